"""Off-policy corrections: weights and masks for tokens sampled by another engine or by older weights.

d_it = numerator - rollout log-probability; the numerator is the old policy, or the detached current one. Statistics are
those of the whole step, everything is detached. A weight multiplies the policy term only; a rejected position leaves
the policy term and the KL term.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from algos.batch import select
from algos.surrogates import clip
from core.registry import Registry

corrections = Registry("correction")
rejections = Registry("rejection")
proximals = Registry("proximal policy")

WeightLevel = Literal["token", "sequence", "geometric"]
RejectLevel = Literal["token", "seq_sum", "seq_mean", "seq_max"]


def mismatch_ratio(numerator_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: WeightLevel) -> Tensor:
    """exp of d per token [B, T], of its sum over the row (sequence) or of its mean (geometric), both [B, 1]."""
    d = _difference(numerator_logprobs, rollout_logprobs, mask)
    if level == "token":
        return d.clamp(-20, 20).exp()
    total = d.sum(1, keepdim=True)
    if level == "geometric":
        total = total / mask.sum(1, keepdim=True).clamp(min=1)
    return total.clamp(-20, 20).exp()


@corrections
def truncate(
    numerator_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel = "token",
    low: float | None = None,
    high: float | None = 2.0,
    batch_normalize: bool = False,
) -> Tensor:
    """w = clip(u, low, high), u = exp(d): truncated importance sampling.

    batch_normalize divides by the mean weight of the step. [B, T], or [B, 1] for the row levels.
    Source: TIS; verl, TRL.
    """
    weight = clip(mismatch_ratio(numerator_logprobs, rollout_logprobs, mask, level), low, high)
    return _self_normalised(weight, mask) if batch_normalize else weight


@corrections
def mask_(
    numerator_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: WeightLevel = "token",
    low: float | None = None,
    high: float | None = 2.0,
    batch_normalize: bool = False,
) -> Tensor:
    """w = u where low <= u <= high, else 0. Source: IcePop, arXiv 2510.18855; MIS; decoupled PPO, arXiv 2505.24298."""
    ratio = mismatch_ratio(numerator_logprobs, rollout_logprobs, mask, level)
    weight = torch.where(clip(ratio, low, high) == ratio, ratio, torch.zeros_like(ratio))
    return _self_normalised(weight, mask) if batch_normalize else weight


def _self_normalised(weight: Tensor, mask: Tensor) -> Tensor:
    """w / mean(w), over valid tokens or over rows with tokens; left alone where the mean is <= 1e-8."""
    counted = mask if weight.shape == mask.shape else mask.any(1, keepdim=True)
    mean = select(counted, weight).sum() / counted.sum().clamp(min=1)
    return torch.where(mean > 1e-8, weight / mean, weight)


# Rejection: keep [B, T] bool; several rules of a method must all keep a position.


def _kept(statistic: Tensor, mask: Tensor, level: RejectLevel, low: float | None, high: float | None) -> Tensor:
    """Valid cells where the statistic [B, T], reduced to its level, is within the bounds."""
    value = select(mask, statistic)
    if level == "seq_max":
        value = torch.where(mask, value, torch.full_like(value, -torch.inf)).amax(1, keepdim=True)
    elif level != "token":
        value = value.sum(1, keepdim=True)
    if level == "seq_mean":
        value = value / mask.sum(1, keepdim=True).clamp(min=1)
    return (mask & (clip(value, low, high) == value)).expand(mask.shape)


@rejections
def k1(
    numerator_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: RejectLevel = "seq_mean",
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Keep where log(low) <= d <= log(high): the bounds are ratios."""
    lowest, highest = (None if bound is None else math.log(bound) for bound in (low, high))
    x = _difference(numerator_logprobs, rollout_logprobs, mask).clamp(-20, 20)
    return _kept(x, mask, level, lowest, highest)


@rejections
def k2(
    numerator_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: RejectLevel = "seq_mean",
    high: float = 0.05,
) -> Tensor:
    """Keep where d^2 / 2 <= high."""
    x = _difference(numerator_logprobs, rollout_logprobs, mask).clamp(-20, 20)
    return _kept(x**2 / 2, mask, level, None, high)


@rejections
def k3(
    numerator_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: RejectLevel = "seq_mean",
    high: float = 0.01,
) -> Tensor:
    """Keep where exp(d) - 1 - d <= high, the estimator of KL(rollout || old)."""
    x = _difference(numerator_logprobs, rollout_logprobs, mask).clamp(-20, 20)
    return _kept(x.exp() - 1 - x, mask, level, None, high)


@rejections
def abs_(
    numerator_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: RejectLevel = "seq_mean",
    high: float = 0.1,
) -> Tensor:
    """Keep where |d| <= high."""
    x = _difference(numerator_logprobs, rollout_logprobs, mask).clamp(-20, 20)
    return _kept(x.abs(), mask, level, None, high)


@rejections
def m2(numerator_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, threshold: float = 0.04) -> Tensor:
    """Drop the valid tokens of the step with the largest d^2 until the mean of the rest is below the threshold.

    At least one token remains. Source: M2PO, arXiv 2510.01161; AReaL.
    """
    squares = (_difference(numerator_logprobs, rollout_logprobs, mask) ** 2)[mask]
    order = squares.argsort(stable=True)
    running = squares[order].cumsum(0) / torch.arange(1, len(squares) + 1, device=mask.device)
    kept = max(int((running < threshold).sum()), 1)
    chosen = torch.zeros_like(squares, dtype=torch.bool)
    chosen[order[:kept]] = True
    return mask.masked_scatter(mask, chosen)


@proximals
def loglinear(logprobs: Tensor, rollout_logprobs: Tensor, versions: Tensor, version: int) -> Tensor:
    """A stand-in for the old policy that saves its forward pass: o = b + alpha (sg(l) - b).

    alpha = clip((V - 1 - v) / (V - v), 0, 1) where V > v, else 0; v the token's version, V the current one.
    Source: A-3PO; AReaL.
    """
    behind = (version - versions).double()
    alpha = torch.where(behind > 0, ((behind - 1) / behind.clamp(min=1)).clamp(0, 1), torch.zeros_like(behind))
    return rollout_logprobs + alpha * (logprobs.detach() - rollout_logprobs)


def _difference(numerator_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """d [B, T] in float64, 0 at masked cells."""
    return (select(mask, numerator_logprobs) - select(mask, rollout_logprobs)).detach().double()
