"""Attention for packed rows: sequences concatenated into one row [1, N], none of which sees another.

transformers' own sdpa path for packed rows builds a dense [N, N] mask and computes all N^2 scores: a hundred times too
many for a hundred short sequences. Here everything but attention stays padding-free; for attention alone the tokens are
laid out as right-padded rectangles, one per class of similar lengths, where plain causal attention is exact: a padding
cell comes after every real token, so causality already hides it and no mask is needed (the fastest kernels take none).

    transformers:  AttentionInterface 'packed_sdpa' (no mask function is registered under this name, so the model builds
    no mask); the model call carries `packing=Packing`, which transformers hands on to `packed_sdpa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "packed_sdpa"


@dataclass(frozen=True)
class Rectangle:
    """Sequences of similar lengths, right-padded to [b, t].

    cell_tokens: [b * t] int64, the token of each cell (of a padding cell: any). real_cells, real_tokens: [n] int64, the
    cells that hold tokens, and which.
    """

    b: int
    t: int
    cell_tokens: Tensor
    real_cells: Tensor
    real_tokens: Tensor


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a row lie. `cells` [N] int64: a token's place in all rectangles laid end to end."""

    rectangles: tuple[Rectangle, ...]
    cells: Tensor


def packing(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
    """The packing of consecutive sequences of the given lengths (each at least 1).

    A rectangle takes sequences down to half of its longest one, so padding never doubles the cells and the number of
    rectangles grows with the logarithm of the longest length.
    """
    length = torch.tensor(lengths)
    starts = length.cumsum(0) - length
    order = torch.argsort(length, descending=True, stable=True).tolist()
    rectangles, cells, filled = [], torch.empty(int(length.sum()), dtype=torch.int64), 0
    while order:
        longest = lengths[order[0]]
        members = [i for i in order if 2 * lengths[i] >= longest]
        order = order[len(members) :]
        steps = torch.arange(longest)
        is_real = (steps < length[members, None]).flatten()
        cell_tokens = (starts[members, None] + steps).flatten().where(is_real, torch.tensor(0))
        real_cells = is_real.nonzero()[:, 0]
        real_tokens = cell_tokens[real_cells]
        cells[real_tokens] = filled + real_cells
        filled += len(is_real)
        indices = (x.to(device) for x in (cell_tokens, real_cells, real_tokens))
        rectangles.append(Rectangle(len(members), longest, *indices))
    return Packing(tuple(rectangles), cells.to(device))


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, N, d], key, value [1, kv heads, N, d] -> [1, N, heads, d]."""
    if softcap is not None or s_aux is not None or attention_mask is not None:
        raise NotImplementedError(
            f"{type(module).__name__} caps its attention scores, has attention sinks or makes masks of its own, which "
            "model.attention 'sdpa' cannot compute; use 'eager' or 'flash_attention_2'"
        )
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    outputs = []
    for r in packing.rectangles:
        q, k, v = (_ToRectangle.apply(x, r).transpose(1, 2) for x in (query, key, value))
        band = _band(r.t, sliding_window, q.device)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _FromRectangles.apply(torch.cat(outputs), packing)[None], None


def _band(t: int, window: int | None, device: torch.device) -> Tensor | None:
    """[t, t] mask of causal attention over the last `window` tokens; None where plain causal attention is the same."""
    if window is None or window >= t:
        return None
    causal = torch.ones(t, t, dtype=torch.bool, device=device).tril()
    return causal & ~causal.tril(-window)


class _ToRectangle(torch.autograd.Function):
    """[N, heads, d] -> [b, t, heads, d]. Each token has one cell, so the backward pass is an assignment, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rectangle: Rectangle) -> Tensor:
        ctx.rectangle, ctx.count = rectangle, len(x)
        return x[rectangle.cell_tokens].view(rectangle.b, rectangle.t, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        r: Rectangle = ctx.rectangle
        grad = grad.flatten(0, 1)
        out = grad.new_zeros(ctx.count, *grad.shape[1:])
        out[r.real_tokens] = grad[r.real_cells]
        return out, None


class _FromRectangles(torch.autograd.Function):
    """All rectangles' cells -> [N, heads, d]; the gradient of a padding cell is zero."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, packing: Packing) -> Tensor:
        ctx.packing, ctx.shape = packing, cells.shape
        return cells[packing.cells]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        out[ctx.packing.cells] = grad
        return out, None


AttentionInterface.register(NAME, packed_sdpa)
