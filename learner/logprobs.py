"""Log-probabilities of given tokens and entropies, without the [N, V] logits in memory.

With N = 8192 tokens and V = 150,000 the float32 logits alone are 4.9 GB, and autograd would keep several of their kind.
Here tokens go through the head in chunks, on CPU also the vocabulary in blocks, so that a tile of logits stays in the
cache; forward and again backward. Between the two only [N] numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from algos.tw_grpo import group_divergence


@dataclass(frozen=True)
class Head:
    """What a model does between `hidden @ weight.T + bias` and its logits: logits = cap(scale * x), then / temperature.

    softcap: cap(x) = softcap * tanh(x / softcap), none leaves x (Gemma 2); scale: a constant factor (Cohere, Granite).
    """

    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, chunk: int
) -> tuple[Tensor, Tensor]:
    """log p(target) in nats and the entropy of p, both [N] float32, where p = softmax(logits / temperature).

    hidden [N, H] and weight [V, H] in the compute precision, bias [V] or None, targets [N] int64; `chunk` is the number
    of tokens whose logits are held at once: two float32 tensors of [chunk, V], on CPU of [chunk, BLOCK]. Gradients flow
    to those of hidden, weight and bias that want one.
    """
    return _TokenLogprobs.apply(hidden, weight, bias, targets, head, chunk)


def tempered(factor: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """`token_logprobs` at `factor` times the temperature."""

    def read(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, chunk: int
    ) -> tuple[Tensor, Tensor]:
        hotter = replace(head, temperature=head.temperature * factor)
        return token_logprobs(hidden, weight, bias, targets, hotter, chunk)

    return read


@torch.no_grad()
def sum_of_squares(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, chunk: int
) -> tuple[Tensor]:
    """sum over the vocabulary of p^2 where each target is predicted, [N] float32, alone in a tuple; no gradient."""
    parts = (_logits(hidden[part], weight, bias, head).softmax(-1) for part in _chunks(len(hidden), chunk))
    return (torch.cat([(p * p).sum(-1) for p in parts] or [hidden.new_zeros(0, dtype=torch.float32)]),)


@torch.no_grad()
def hidden_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, chunk: int
) -> tuple[Tensor, Tensor]:
    """d log p(target) / d hidden, [N, H] float32, and `hidden` itself: what a linear map before the head is told."""
    parts = []
    for part in _chunks(len(hidden), chunk):
        z = _logits(hidden[part], weight, bias, head)
        slope = _softcap_slope(z, head)
        grad = -z.softmax(-1)
        grad.scatter_add_(-1, targets[part, None], torch.ones_like(grad[:, :1]))
        if slope is not None:
            grad *= slope
        parts.append((grad.mul_(head.scale / head.temperature).to(weight.dtype) @ weight).float())
    return torch.cat(parts or [hidden.new_zeros(0, hidden.shape[1], dtype=torch.float32)]), hidden.float()


def divergences(rows: Tensor, steps: Tensor, groups: Tensor, sizes: Mapping[int, int]) -> Callable[..., tuple[Tensor]]:
    """A reader of how far a group's distributions are apart at a target's position (`algos.tw_grpo`), [N] float32.

    rows, steps [N]: row and position of each target; groups [rows]: a number per row. All rows of a group are here but
    those without tokens, which `sizes` (completions of each group) counts.
    """

    @torch.no_grad()
    def read(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, chunk: int
    ) -> tuple[Tensor]:
        """Group by group, `chunk` tokens' logits at a time."""
        out = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for number in groups.unique():
            members = (groups == number).nonzero()[:, 0]
            mine = torch.isin(rows, members)
            width = max(1, chunk // len(members))  # positions whose logits of all rows are held at once
            for start in range(0, int(steps[mine].max()) + 1, width):
                cells = (mine & (steps >= start) & (steps < start + width)).nonzero()[:, 0]
                logprobs = _logits(hidden[cells], weight, bias, head).log_softmax(-1)
                row, step = torch.searchsorted(members, rows[cells]), steps[cells] - start
                out[cells] = _spread(logprobs, row, step, (sizes[int(number)], width))[step]
        return (out,)

    return read


def _spread(logprobs: Tensor, row: Tensor, step: Tensor, shape: tuple[int, int]) -> Tensor:
    """`group_divergence` of one group at each position, [positions]; logprobs [n, V] of the cells (row, step)."""
    rectangle = logprobs.new_zeros(1, *shape, logprobs.shape[-1])
    present = torch.zeros(1, *shape, dtype=torch.bool, device=logprobs.device)
    rectangle[0, row, step], present[0, row, step] = logprobs, True
    return group_divergence(rectangle, present)[0]


class _TokenLogprobs(torch.autograd.Function):
    """With l = log softmax(z) and H = -sum_j p_j l_j:  dl_t/dz_j = [j = t] - p_j  and  dH/dz_j = -p_j (l_j + H).

    Over blocks of the vocabulary a running maximum m, s = sum_j e^(z_j - m), u = sum_j (z_j - m) e^(z_j - m) are kept:
    log sum_j e^z_j = m + log s and H = log s - u / s.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, normalisers = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for part in _chunks(len(hidden), chunk):
            target = hidden.new_zeros(part.stop - part.start, dtype=torch.float32)
            m, s, u = torch.full_like(target, -torch.inf), torch.zeros_like(target), torch.zeros_like(target)
            for block in _blocks(weight):
                z = _tile(hidden[part], weight, bias, block, head)
                rows, columns = _found(targets[part], block)
                target[rows] = z[rows, columns]
                before, m = m, torch.maximum(m, z.amax(-1))
                z -= m[:, None]
                e = z.exp()
                shrunk = (before - m).exp_()
                # The first block shrinks nothing to nothing, and -inf * 0 is not a number.
                u = (u + s * (before - m).nan_to_num_(neginf=0.0)) * shrunk + z.mul_(e).sum(-1)
                s = s * shrunk + e.sum(-1)
            normalisers[part] = m + s.log()
            logprobs[part], entropy[part] = target - normalisers[part], s.log() - u / s
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, normalisers)
        ctx.head, ctx.chunk = head, chunk
        ctx.set_materialize_grads(False)  # entropies are mostly looked at and not trained on: None instead of zeros
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, normalisers = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        # Many tiles are summed, so the sums are kept in float32 whatever the compute precision.
        sums = [
            torch.zeros_like(x, dtype=torch.float32) if x is not None and wanted else None
            for x, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        for part in _chunks(len(hidden), ctx.chunk):
            for block in _blocks(weight):
                z = _tile(hidden[part], weight, bias, block, ctx.head)
                slope = _softcap_slope(z, ctx.head)
                z -= normalisers[part, None]
                if grad_entropy is None:
                    grad = z.exp_().mul_(-grad_logprobs[part, None])
                else:
                    grad = z.exp().mul_(
                        -(grad_logprobs[part, None] + grad_entropy[part, None] * (z + entropy[part, None]))
                    )
                rows, columns = _found(targets[part], block)
                grad[rows, columns] += grad_logprobs[part][rows]
                if slope is not None:
                    grad *= slope
                grad = grad.mul_(ctx.head.scale / ctx.head.temperature).to(weight.dtype)
                _add_product(sums[0], part, grad, weight[block])
                _add_product(sums[1], block, grad.T, hidden[part])
                if sums[2] is not None:
                    sums[2][block] += grad.sum(0, dtype=torch.float32)
        return *(x if x is None else x.to(hidden.dtype) for x in sums), None, None, None


BLOCK = 2048
"""Columns of a tile on CPU: 8 MiB with 1024 tokens, which a cache holds. A GPU is better off with all of them."""


def _blocks(weight: Tensor) -> list[slice]:
    return _chunks(len(weight), len(weight) if weight.is_cuda else BLOCK)


def _tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: slice, head: Head) -> Tensor:
    """[n, columns] float32 logits of a block of the vocabulary."""
    return _logits(hidden, weight[block], None if bias is None else bias[block], head)


def _found(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target is in this block of the vocabulary, and its columns there."""
    columns = targets - block.start
    rows = ((columns >= 0) & (targets < block.stop)).nonzero()[:, 0]
    return rows, columns[rows]


def _add_product(into: Tensor | None, rows: slice, a: Tensor, b: Tensor) -> None:
    """into[rows] += a @ b, if it is wanted at all."""
    if into is None:
        return
    if a.dtype == into.dtype:
        into[rows].addmm_(a, b)
    else:
        into[rows] += a @ b


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """[n, V] float32 logits at the temperature."""
    z = torch.nn.functional.linear(hidden, weight, bias).float()
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = torch.tanh(z / head.softcap) * head.softcap
    # A division by 1 would copy [n, V] for nothing.
    return z if head.temperature == 1.0 else z / head.temperature


def _softcap_slope(z: Tensor, head: Head) -> Tensor | None:
    """d cap(x) / dx, from z = cap(x) / temperature: 1 - tanh^2."""
    return None if head.softcap is None else 1 - (z * (head.temperature / head.softcap)) ** 2
