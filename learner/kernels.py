"""Attention of some queries to some keys, forward and backward, in a form that is joined with attention to others.

    out, lse = part.forward(given, scale)              # given: query, key, value; over part.tokens only
    part.backward(given, grad, out, lse, scale, into)  # out, lse: of all parts joined

A part is a number of members; the queries of a member look at the keys of the same member, causally at their own or at
all of them. `lse` [n, heads] float32 is the logarithm of the softmax's denominator, in nats. The backward pass of
softmax needs of a query only its whole output and its whole lse, whatever part the keys are of, so the parts' gradients
for joined outputs are exact sums (cascade attention: https://flashinfer.ai/2024/02/02/cascade-inference.html).

`Rectangle`: torch's flash kernel for CPU on right-padded rectangles, one per class of similar lengths. `Ragged`: its
variable-length flash kernel for CUDA in half precision; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

aten = torch.ops.aten

Span = tuple[int, int]
"""(first token, number of tokens) in a packed row."""

Given = tuple[Tensor, Tensor, Tensor]
"""Query [N, heads, d], key and value [N, kv heads, d]; or their gradients, to which a part adds its own."""


class Part(Protocol):
    """Some of the scores of a packed row. `tokens` [n] int64: which tokens ask; each at most once."""

    @property
    def tokens(self) -> Tensor: ...

    def forward(self, given: Given, scale: float) -> tuple[Tensor, Tensor]:
        """(out [n, heads, d], lse [n, heads]) of its tokens."""

    def backward(self, given: Given, grad: Tensor, out: Tensor, lse: Tensor, scale: float, into: Given) -> None:
        """Add this part's gradients; grad, out [N, heads, d] and lse [N, heads] are of the joined attention."""


@dataclass(frozen=True)
class Rectangle:
    """b members with up to t queries and s keys. queries [b * t], keys [b * s]: which token each cell is.

    Causal ones are right-padded: a padding cell comes after every real one, so no query sees it and no mask is needed.
    The others are padded in their queries only. A padding cell is token 0, and its result is not read.
    real: cells that are queries; tokens: which tokens these are; padding: the other cells.
    """

    b: int
    t: int
    s: int
    causal: bool
    queries: Tensor
    keys: Tensor
    real: Tensor
    tokens: Tensor
    padding: Tensor

    def forward(self, given: Given, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = map(self._cells, given, (self.queries, self.keys, self.keys))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, self.causal, scale=scale)
        return self._tokens(out), lse.transpose(1, 2).flatten(0, 1)[self.real]

    def backward(self, given: Given, grad: Tensor, out: Tensor, lse: Tensor, scale: float, into: Given) -> None:
        q, k, v = map(self._cells, given, (self.queries, self.keys, self.keys))
        # Nothing may come from padding: no gradient, and with an infinite denominator a probability of 0 for all keys.
        g, o = self._cells(grad, self.queries, padding=0.0), self._cells(out, self.queries)
        z = lse[self.queries].index_fill_(0, self.padding, torch.inf).view(self.b, self.t, -1).transpose(1, 2)
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, z, 0.0, self.causal, scale=scale
        )
        into[0].index_add_(0, self.tokens, self._tokens(parts[0]))
        for whole, part in zip(into[1:], parts[1:], strict=True):
            whole.index_add_(0, self.keys, part.transpose(1, 2).flatten(0, 1))

    def _cells(self, x: Tensor, index: Tensor, padding: float | None = None) -> Tensor:
        """[N, heads, d] -> [b, heads, cells of a member, d]."""
        cells = x[index]
        if padding is not None and len(self.padding):
            cells.index_fill_(0, self.padding, padding)
        return cells.view(self.b, -1, *x.shape[1:]).transpose(1, 2)

    def _tokens(self, x: Tensor) -> Tensor:
        """[b, heads, t, d] -> [n, heads, d]."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if len(self.real) == len(flat) else flat[self.real]


def causal(spans: Sequence[Span], device: torch.device) -> list[Part]:
    """Every token of a span looks at the span up to itself. Spans do not overlap."""
    if device.type == "cuda":
        return [Ragged.of(spans, spans, causal=True, device=device)]
    return [_rectangle(spans_, spans_, True, device) for spans_ in classes(spans)]


def crossing(queries: Sequence[Span], keys: Sequence[Span], device: torch.device) -> list[Part]:
    """Every token of queries[i] looks at all of keys[i]."""
    if not queries:
        return []
    if device.type == "cuda":
        return [Ragged.of(queries, keys, causal=False, device=device)]
    parts: list[Part] = []
    for length in sorted({length for _, length in keys}):  # as many keys for all, so that no key is padding
        members = {q: k for q, k in zip(queries, keys, strict=True) if k[1] == length}
        parts += [_rectangle(c, [members[q] for q in c], False, device) for c in classes(list(members))]
    return parts


def classes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans of similar lengths together, longest first: down to half of the longest one of a class.

    So padding never doubles the cells, and there are as many classes as the logarithm of the longest length.
    """
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (-s[1], s[0])):
        if not span[1]:
            continue
        if not found or 2 * span[1] < found[-1][0][1]:
            found.append([])
        found[-1].append(span)
    return found


def _rectangle(queries: Sequence[Span], keys: Sequence[Span], is_causal: bool, device: torch.device) -> Rectangle:
    cells, real = _laid_out(queries)
    others, _ = _laid_out(keys)
    real_cells = real.flatten().nonzero()[:, 0]
    moved = (
        x.to(device)
        for x in (cells.flatten(), others.flatten(), real_cells, cells[real], (~real).flatten().nonzero()[:, 0])
    )
    return Rectangle(len(queries), cells.shape[1], others.shape[1], is_causal, *moved)


def _laid_out(spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Tokens of the spans, one a row, right-padded with token 0, and which cells are real; both [b, t]."""
    start, length = torch.tensor(spans).T
    step = torch.arange(int(length.max()))
    real = step < length[:, None]
    return (start[:, None] + step).where(real, 0), real


@dataclass(frozen=True)
class Ragged:
    """Members end to end: tokens that ask, keys they look at; ends_q, ends_k [members + 1] int32: where each ends.

    longest: queries and keys of the longest member.
    """

    tokens: Tensor
    keys: Tensor
    ends_q: Tensor
    ends_k: Tensor
    longest: tuple[int, int]
    causal: bool

    @classmethod
    def of(cls, queries: Sequence[Span], keys: Sequence[Span], causal: bool, device: torch.device) -> Ragged:
        """Queries of member i look at keys[i]."""

        def tokens(spans: Sequence[Span]) -> Tensor:
            return torch.cat([torch.arange(start, start + length) for start, length in spans]).to(device)

        def ends(spans: Sequence[Span]) -> Tensor:
            counts = torch.tensor([0, *(length for _, length in spans)])
            return counts.cumsum(0).to(device, torch.int32)

        longest = (max(length for _, length in queries), max(length for _, length in keys))
        return cls(tokens(queries), tokens(keys), ends(queries), ends(keys), longest, causal)

    def _gathered(self, given: Given) -> tuple[Tensor, ...]:
        """Query, key and value of the members' tokens."""
        return tuple(x[index] for x, index in zip(given, (self.tokens, self.keys, self.keys), strict=True))

    def forward(self, given: Given, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._flash_attention_forward(
            *self._gathered(given),
            self.ends_q,
            self.ends_k,
            *self.longest,
            0.0,
            self.causal,
            False,
            scale=scale,
        )
        return out, lse.T  # the kernel's lse is [heads, n]

    def backward(self, given: Given, grad: Tensor, out: Tensor, lse: Tensor, scale: float, into: Given) -> None:
        unused = torch.empty(2, dtype=torch.uint64, device=grad.device)  # the state of a dropout that there is none of
        parts = aten._flash_attention_backward(
            grad[self.tokens],
            *self._gathered(given),
            out[self.tokens],
            lse[self.tokens].T.contiguous(),
            self.ends_q,
            self.ends_k,
            *self.longest,
            0.0,
            self.causal,
            unused,
            unused,
            scale=scale,
        )
        # Every token is in a part once, so the order of the additions does not matter.
        for whole, part, index in zip(into, parts, (self.tokens, self.keys, self.keys), strict=True):
            whole.index_add_(0, index, part)
