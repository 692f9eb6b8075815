"""Changes of the reward before the advantage. A function that reads token rewards returns token rewards [B, T];
the others return rewards [B].
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from algos.batch import select
from algos.kl import estimators
from algos.parts import Length, tokens
from core.registry import Registry

shapings = Registry("reward shaping")

Estimator = Literal["k1", "k2", "k3", "abs"]


def overlong_penalty(lengths: Tensor, *, max_length: float, cache: float, factor: float) -> Tensor:
    """0 up to soft = max_length - cache tokens, then falling linearly to -factor at max_length, -factor beyond."""
    return -factor * ((lengths.double() - (max_length - cache)) / cache).clamp(0, 1)


@shapings
def overlong(
    rewards: Tensor,
    lengths: Tensor,
    *,
    max_length: Length = "max_tokens",
    cache: float | None = None,
    factor: float = 1.0,
) -> Tensor:
    """R + overlong penalty; cache none is a fifth of max_length. Source: DAPO, arXiv 2503.14476."""
    longest = tokens(max_length)
    return rewards + overlong_penalty(
        lengths, max_length=longest, cache=longest / 5 if cache is None else cache, factor=factor
    )


@shapings
def scale(rewards: Tensor, *, factor: float = 1.0, shift: float = 0.0) -> Tensor:
    """R' = factor R + shift."""
    return factor * rewards + shift


@shapings
def clip(rewards: Tensor, *, limit: float = 20.0) -> Tensor:
    """R' = clip(R, -limit, limit); 20 in AReaL, 5 in ReMax."""
    return rewards.clamp(-limit, limit)


@shapings
def kl_sequence(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    coef: float = 0.05,
    estimator: Estimator = "k1",
) -> Tensor:
    """R' = R - coef sum_t KL_t, KL_t the estimator on old - ref. Source: RLOO, arXiv 2402.14740."""
    return rewards - coef * select(mask, _token_kl(old_logprobs, ref_logprobs, mask, estimator)).sum(1)


@shapings
def kl_token(
    token_rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    coef: float = 0.01,
    estimator: Estimator = "k1",
) -> Tensor:
    """Token rewards (the outcome on the last token) minus coef KL_t on every valid one. Source: PPO, REINFORCE++."""
    return select(mask, token_rewards - coef * _token_kl(old_logprobs, ref_logprobs, mask, estimator))


def _token_kl(old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    return estimators[estimator]((select(mask, old_logprobs) - select(mask, ref_logprobs)).detach().double())
