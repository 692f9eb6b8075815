"""Inner products of the policy gradients of several objectives, for one pass over the model however many there are.

The gradient that is compared is that of a linear map (an identity) between the last hidden states and the head. With
c_kt = d loss_k / d log p_t, what one row of the batch adds to it is known without any backward pass through the model:

    g_k = sum_t c_kt (d log p_t / d h_t) h_t^T     [H, H]           gram_jk = <g_j, g_k>, each g cut to norm 1

Cost: one forward pass without gradient, the head's backward, K products [H, M] x [M, H], memory K H^2. The gradients of
all parameters would cost K forward and backward passes. The authors of gradient-based weighting (arXiv 2509.11452) look
at a subset of the layers too; last-layer gradients are the common stand-in. [the choice of the map is ours]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from algos.batch import Batch
from algos.loss import advantages, loss, normalise
from algos.methods import resolve

GRPO = resolve({"row": "grpo", "kl": "none"})
"""Whose advantages and loss are compared, whatever the run's method: it reads nothing but rewards."""


def pulls(batch: Batch) -> Tensor:
    """c [K, B, T]: d policy loss / d log-probs where only column k of `batch.rewards` [B, K] is the reward.

    Full GRPO advantages of that column alone, at the policy that sampled; no step is taken.
    """
    found = []
    for column in batch.rewards.unbind(1):
        alone = normalise(GRPO, advantages(GRPO, replace(batch, rewards=column, reward_weights=None)))
        current = torch.zeros_like(batch.mask, dtype=torch.float32).requires_grad_()
        # The ratio is 1 whatever the log-probs are, and so is what the loss makes of them.
        (grad,) = torch.autograd.grad(
            loss(GRPO, replace(alone, old_logprobs=current.detach()), current).policy, current
        )
        found.append(torch.where(batch.mask, grad, 0.0))
    return torch.stack(found)


def gradients(pull: Tensor, parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], width: int) -> Tensor:
    """g [K, H, H] of this rank's micro-batches: (rows, steps [M] of targets, their gradients, hidden states [M, H])."""
    total = torch.zeros(len(pull), width, width, device=pull.device)
    for rows, steps, slopes, hidden in parts:
        total += torch.einsum("km,mh,mi->khi", pull[:, rows, steps].float(), slopes, hidden)
    return total


def gram(gradient: Tensor) -> list[list[float]]:
    """Inner products [K, K] of gradients [K, ...], each cut to norm 1."""
    flat = gradient.flatten(1).double()
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1.0)
    return (flat @ flat.T).tolist()
