"""Attention for packed rows: sequences concatenated into one row [1, N], none of which sees another.

The completions of a group share their prompt: it is in the row once, so all matrices work on it once, and only
attention lays it out before each completion. With prompts as long as completions that nearly halves the work.

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

from core.errors import UserError

NAME = "packed_sdpa"


@dataclass(frozen=True)
class Rectangle:
    """Sequences of similar lengths, right-padded to [b, t]. cells: [b * t] int64, which token of the row each cell is.

    A padding cell is any token: nothing reads it.
    """

    b: int
    t: int
    cells: Tensor


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a row lie. `places` [N] int64: a cell of each token in all rectangles laid end to end."""

    rectangles: tuple[Rectangle, ...]
    places: Tensor


def packing(
    prompts: Sequence[tuple[int, int]], completions: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
) -> Packing:
    """The packing of sequences given by (first token, number of tokens) of their prompt and of their completion.

    Sequences may have a prompt in common: its tokens are in the row once and in several cells. Every token of the row
    belongs to a sequence. A rectangle takes sequences down to half of its longest one, so padding never doubles the
    cells and the number of rectangles grows with the logarithm of the longest length.
    """
    prompt_start, prompt_length = torch.tensor(prompts).T
    start, length = torch.tensor(completions).T
    lengths = prompt_length + length
    order = torch.argsort(lengths, descending=True, stable=True)
    rectangles, filled = [], 0
    places = torch.empty(int(torch.maximum(prompt_start + prompt_length, start + length).max()), dtype=torch.int64)
    while len(order):
        longest = int(lengths[order[0]])
        fits = 2 * lengths[order] >= longest
        members, order = order[fits], order[~fits]
        step = torch.arange(longest)
        in_prompt = step < prompt_length[members, None]
        cells = torch.where(
            in_prompt, prompt_start[members, None] + step, (start - prompt_length)[members, None] + step
        )
        real = step < lengths[members, None]
        cells = cells.where(real, 0).flatten()
        real = real.flatten().nonzero()[:, 0]
        places[cells[real]] = filled + real
        filled += len(cells)
        rectangles.append(Rectangle(len(members), longest, cells.to(device)))
    return Packing(tuple(rectangles), places.to(device))


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
        raise UserError(
            f"model.attention: 'sdpa' cannot compute {type(module).__name__}, which caps its scores, has attention "
            "sinks or makes masks of its own; use eager or flash_attention_2"
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
    """[N, heads, d] -> [b, t, heads, d]. A token's gradient is the sum over its cells (of padding: zero)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rectangle: Rectangle) -> Tensor:
        ctx.rectangle, ctx.shape = rectangle, x.shape
        return x[rectangle.cells].view(rectangle.b, rectangle.t, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        if grad.is_cuda:  # here the order of index_add_ is not fixed, that of index_put_ is
            return out.index_put_((ctx.rectangle.cells,), grad.flatten(0, 1), accumulate=True), None
        return out.index_add_(0, ctx.rectangle.cells, grad.flatten(0, 1)), None


class _FromRectangles(torch.autograd.Function):
    """All rectangles' cells -> [N, heads, d]; the gradient of a cell that is not read is zero."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, packing: Packing) -> Tensor:
        ctx.packing, ctx.shape = packing, cells.shape
        return cells[packing.places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        out[ctx.packing.places] = grad
        return out, None


AttentionInterface.register(NAME, packed_sdpa)
