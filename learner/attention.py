"""Attention for packed rows: sequences concatenated into one row [1, N], none of which sees another.

The completions of a group share their prompt, which is in the row once: matrices work on it once, and so does
attention. It looks at itself once, and all completions of the group look at it in one call. What a completion sees of
its prompt and of itself is computed apart and joined by the logarithms of the softmax denominators:

    lse = log(e^lse_1 + e^lse_2)      out = e^(lse_1 - lse) out_1 + e^(lse_2 - lse) out_2

which is attention to both, to rounding (`learner.kernels`). All else in a model does not look across tokens, so nothing
is padded but the cells of the attention on CPU.

    transformers:  AttentionInterface 'packed_sdpa' (no mask function is registered under this name, so the model builds
    no mask); the model call carries `packing=Packing`, which transformers hands on to `packed_sdpa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from core.errors import UserError
from learner.kernels import Part, Span, causal, classes, crossing

NAME = "packed_sdpa"


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a row lie: the span of each one's prompt and of its completion, which may be empty.

    Sequences may have a prompt in common. Every token of the row belongs to a sequence.
    """

    prompts: Sequence[Span]
    completions: Sequence[Span]
    device: torch.device

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(p[1] + c[1] for p, c in zip(self.prompts, self.completions, strict=True))

    @cached_property
    def own(self) -> list[Part]:
        """Each token's attention to its own span: every token is in one of these parts."""
        return causal(self._spans[0], self.device)

    @cached_property
    def shared(self) -> list[Part]:
        """Attention of completions to the prompt that they have in common with others."""
        return crossing(*self._spans[1:], self.device)

    @cached_property
    def _spans(self) -> tuple[list[Span], list[Span], list[Span]]:
        """Spans that look at themselves; spans that look at a prompt; that prompt's span."""
        own: list[Span] = []
        queries: list[Span] = []
        keys: list[Span] = []
        pairs = sorted(zip(self.prompts, self.completions, strict=True))
        for prompt, members in groupby(pairs, key=lambda pair: pair[0]):
            spans = [completion for _, completion in members if completion[1]]
            if len(spans) == 1 and spans[0][0] == sum(prompt):  # alone with its prompt: nothing to share
                own.append((prompt[0], prompt[1] + spans[0][1]))
                continue
            own += [prompt, *spans]
            runs = _runs(spans)
            queries += runs
            keys += [prompt] * len(runs)
        return own, queries, keys

    @cached_property
    def rectangles(self) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """Whole sequences right-padded, for kernels that know no parts: (sequences, token of each cell), and [N] a cell
        of each token in all rectangles laid end to end. A padding cell is token 0."""
        spans = {(i, p[1] + c[1]): (p, c) for i, (p, c) in enumerate(zip(self.prompts, self.completions, strict=True))}
        found: list[tuple[int, Tensor]] = []
        places: dict[int, int] = {}
        filled = 0
        for members in classes(list(spans)):
            width = members[0][1]
            cells: list[int] = []
            for prompt, completion in map(spans.__getitem__, members):
                tokens = [*range(prompt[0], sum(prompt)), *range(completion[0], sum(completion))]
                places |= {token: filled + len(cells) + i for i, token in enumerate(tokens)}
                cells += tokens + [0] * (width - len(tokens))
            filled += len(cells)
            found.append((len(members), torch.tensor(cells, device=self.device)))
        return found, torch.tensor([places[token] for token in range(len(places))], device=self.device)


def packing(prompts: Sequence[Span], completions: Sequence[Span], device: torch.device | str = "cpu") -> Packing:
    """The packing of sequences given by (first token, number of tokens) of their prompt and of their completion."""
    return Packing(list(prompts), list(completions), torch.device(device))


def _runs(spans: Sequence[Span]) -> list[Span]:
    """The same tokens in as few spans as possible; `spans` are sorted."""
    runs: list[Span] = []
    for start, length in spans:
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((start, length))
    return runs


@torch.compiler.disable  # blocks may be compiled around it; here the work is in kernels that are compiled already
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
    if softcap is not None or s_aux is not None or attention_mask is not None or dropout:
        raise UserError(
            f"model.attention: 'sdpa' cannot compute {type(module).__name__}, which caps its scores, has attention "
            "sinks, drops some or makes masks of its own; use eager or flash_attention_2"
        )
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None or sliding_window >= packing.longest else sliding_window
    half = query.dtype in (torch.float16, torch.bfloat16)
    if window is not None or query.shape[-1] != value.shape[-1] or (query.is_cuda and not half):
        return _whole(query, key, value, packing, scale, window)[None], None
    return _Joined.apply(query, key, value, packing, scale)[None], None


class _Joined(torch.autograd.Function):
    """Attention as the join of parts; [N, heads, d], [N, kv heads, d] twice -> [N, heads, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        for part in packing.own:
            out[part.tokens], lse[part.tokens] = part.forward((query, key, value), scale)
        for part in packing.shared:
            more, log = part.forward((query, key, value), scale)
            before = lse[part.tokens]
            both = torch.logaddexp(before, log)
            share = (log - both).exp_()[..., None].to(more.dtype)  # of the softmax that is on the prompt
            out[part.tokens] = out[part.tokens].lerp_(more, share)
            lse[part.tokens] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        into = (torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))
        for part in (*ctx.packing.own, *ctx.packing.shared):
            part.backward((query, key, value), grad, out, lse, ctx.scale, into)
        return *into, None, None


def _whole(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
    """The same with every prompt laid out before each of its completions, by torch's own attention."""
    rectangles, places = packing.rectangles
    outputs = []
    for b, cells in rectangles:
        q, k, v = (x.index_select(0, cells).view(b, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        band = _band(q.shape[2], window, q.device)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, places)


def _band(t: int, window: int | None, device: torch.device) -> Tensor | None:
    """[t, t] mask of causal attention over the last `window` tokens; None where plain causal attention is the same."""
    if window is None or window >= t:
        return None
    causal = torch.ones(t, t, dtype=torch.bool, device=device).tril()
    return causal & ~causal.tril(-window)


AttentionInterface.register(NAME, packed_sdpa)
