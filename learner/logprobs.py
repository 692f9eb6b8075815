"""Log-probabilities of given tokens and entropies, without the [N, V] logits in memory.

With N = 8192 tokens and V = 150,000 the float32 logits alone are 4.9 GB, and autograd would keep several of their kind.
Here the tokens go through the head in chunks, forward and again backward; between the two only [N] numbers are kept.
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
    of tokens whose logits are held at once (two float32 tensors of [chunk, V]). Gradients flow to hidden, weight, bias.
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
    """With l = log softmax(z) and H = -sum_j p_j l_j:  dl_t/dz_j = [j = t] - p_j  and  dH/dz_j = -p_j (l_j + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, normalisers = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for part in _chunks(len(hidden), chunk):
            z = _logits(hidden[part], weight, bias, head)
            normaliser = z.logsumexp(-1)
            logprobs[part] = z.gather(-1, targets[part, None])[:, 0] - normaliser
            z -= normaliser[:, None]
            entropy[part] = -(z.exp() * z).sum(-1)
            normalisers[part] = normaliser
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, normalisers)
        ctx.head, ctx.chunk = head, chunk
        ctx.set_materialize_grads(False)  # entropies are mostly looked at and not trained on: None instead of zeros
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, normalisers = ctx.saved_tensors
        head: Head = ctx.head
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        grad_hidden = torch.empty_like(hidden)
        # Many chunks are summed, so the sum is kept in float32 whatever the compute precision.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for part in _chunks(len(hidden), ctx.chunk):
            z = _logits(hidden[part], weight, bias, head)
            slope = _softcap_slope(z, head)
            z -= normalisers[part, None]
            grad = z.exp()
            if grad_entropy is None:
                grad *= -grad_logprobs[part, None]
            else:
                grad *= -(grad_logprobs[part, None] + grad_entropy[part, None] * (z + entropy[part, None]))
            grad.scatter_add_(-1, targets[part, None], grad_logprobs[part, None])
            if slope is not None:
                grad *= slope
            grad = grad.mul_(head.scale / head.temperature).to(weight.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None


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
