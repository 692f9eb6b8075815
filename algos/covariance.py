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
from algos.statistics import prepares
from algos.surrogates import ppo_clip, surrogates
from algos.token_weights import token_weights


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


@surrogates
def kl_cov(
    ratio: Tensor,
    delta: Tensor,
    advantages: Tensor,
    selected: Tensor,
    *,
    fraction: float = 0.002,
    kl_coef: float = 1.0,
) -> Tensor:
    """Z = -rho A + [selected] kl_coef |delta|: no clip, a pull to the old policy on the tokens of highest covariance.

    At delta = 0 the pull's gradient is 0: it bites only from a step's second update on, or off-policy. `selected` are
    the `kl_cov_tokens` of the minibatch. The authors use fraction 0.002 for a 7B model and 0.0002 for 32B.
    Source: KL-Cov, arXiv 2505.22617.
    """
    return -advantages * ratio + selected * kl_coef * delta.abs()


@prepares(kl_cov)
def selected_by_kl_cov(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, *, fraction: float = 0.002
) -> dict[str, Tensor]:
    """The tokens that KL-Cov pulls."""
    return {"selected": kl_cov_tokens(covariance(logprobs, advantages, mask), mask, fraction=fraction)}


@token_weights
def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    seed: int,
    *,
    fraction: float = 0.0002,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    low: float = 1.0,
    high: float = 1.0,
) -> Tensor:
    """0 for a few random tokens whose covariance lies between the bounds, and that the PPO clip leaves alone; else 1.

    low and high: those of the surrogate ppo_clip. Source: Clip-Cov, arXiv 2505.22617, with the functions above.
    """
    ratio = (select(mask, logprobs) - select(mask, old_logprobs)).detach().exp()
    clipped = ppo_clipped(ratio, per_token(advantages, mask), mask, low=low, high=high)
    cov = covariance(logprobs, advantages, mask)
    candidates = clip_cov_candidates(cov, clipped, mask, cov_low=cov_low, cov_high=cov_high)
    generator = torch.Generator().manual_seed(seed)
    return clip_cov_weights(candidates, mask, fraction=fraction, generator=generator)
