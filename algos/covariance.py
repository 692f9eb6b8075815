"""Clip-Cov and KL-Cov: restrain the few tokens whose probability and advantage move together most.

"The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", arXiv 2505.22617. Read from the
authors' code and run against it. The entropy falls by the covariance of log-prob and advantage, and few tokens carry
most of it. The choices are detached and belong to a whole minibatch; the losses are per token, so they may be split at
will.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algos.batch import select
from algos.masked import largest, masked_mean, per_token
from algos.surrogates import ppo_clip


def covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Per-token part of the covariance, (A - mean A) (lp - mean lp) [B, T], detached, 0 at masked cells.

    `logprobs` [B, T], `advantages` [B] or [B, T]; the means are over the valid tokens in hand.
    """
    lp, a = select(mask, logprobs.detach()), per_token(advantages.detach(), mask)
    return select(mask, (a - masked_mean(a, mask)) * (lp - masked_mean(lp, mask)))


def ppo_clipped(ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float = 0.2, high: float = 0.2) -> Tensor:
    """Valid tokens whose gradient the PPO clip removes: -A clip(r) > -A r, [B, T] bool."""
    unclipped = ppo_clip(ratio, advantages, low=None, high=None)
    return (ppo_clip(ratio, advantages, low=low, high=high) > unclipped) & mask


def clip_cov_candidates(
    cov: Tensor, clipped: Tensor, mask: Tensor, *, cov_low: float = 1.0, cov_high: float = 5.0
) -> Tensor:
    """Valid, unclipped tokens with cov_low < covariance < cov_high, [B, T] bool."""
    return mask & ~clipped & (cov > cov_low) & (cov < cov_high)


def clip_cov_weights(
    candidates: Tensor,
    mask: Tensor,
    *,
    fraction: float = 0.0002,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clip-Cov as a token weight [B, T]: 0 on max(int(fraction N), 1) random candidates, 1 on other valid tokens.

    The zeroed tokens lose value and gradient but stay in the denominator N. `order` is a permutation of the candidates
    (row-major), whose first members are zeroed; by default `generator` draws it.
    """
    cells = candidates.flatten().nonzero().flatten()
    if order is None:
        order = torch.randperm(len(cells), generator=generator)
    count = max(int(fraction * int(mask.sum())), 1)
    weight = mask.flatten().to(torch.get_default_dtype())
    weight[cells[order.to(cells.device)[:count]]] = 0.0
    return weight.view(mask.shape)


def kl_cov_tokens(cov: Tensor, mask: Tensor, *, fraction: float = 0.002) -> Tensor:
    """The max(1, int(N fraction)) valid tokens with the largest covariance, [B, T] bool.

    The authors use 0.002 for a 7B model and 0.0002 for 32B.
    """
    return largest(cov, mask, max(1, int(int(mask.sum()) * fraction)))


def kl_cov_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, selected: Tensor, *, kl_coef: float = 1.0
) -> Tensor:
    """KL-Cov's per-token loss -A r + [selected] kl_coef |lp - old|, [B, T]; no PPO clip.

    At lp = old the penalty's gradient is 0, so it bites only from the second minibatch on, or off-policy.
    Tensors [B, T] without masked cells that are not finite (see `algos.batch.select`).
    """
    log_ratio = logprobs - old_logprobs
    return -advantages * log_ratio.exp() + selected * kl_coef * log_ratio.abs()
