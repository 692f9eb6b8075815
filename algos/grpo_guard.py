"""GRPO-Guard: centre and rescale log-ratios so that clipping works on both sides again.

"GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping", arXiv 2510.22319.
`flow_step_loss` is the original, for one denoising step of a flow-matching model (run against the authors' script). The
rest is OUR ADAPTATION to token sequences; nothing of it is claimed by the paper. A denoising step becomes a bucket of
token positions: off-policy log-ratios have a negative mean and a spread that grow along the sequence.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from algos.batch import select
from algos.ratios import LIMIT, ratios
from algos.statistics import prepares
from algos.surrogates import ppo_clip
from algos.token_weights import token_weights


class FlowStep(NamedTuple):
    """One denoising step of N samples of D dimensions. The policy is Gaussian, mean mu and deviation sqrt(dt) sigma."""

    x: Tensor  # [N, D] the sampled next latent
    mu: Tensor  # [N, D] carries gradient
    mu_old: Tensor  # [N, D]
    dt: float
    sigma: float


def flow_log_ratio(step: FlowStep) -> tuple[Tensor, Tensor]:
    """Log-ratio of one denoising step, raw and normalised (RatioNorm), each [N].

        s = sqrt(dt) sigma;  raw = lp - old (means over dimensions);  b = mean_d (mu - mu_old)^2 / (2 s^2);  z = s (raw
        + b)

    With x = mu_old + s eps, z = mean_d (mu - mu_old) eps: zero mean and a scale that does not depend on the step.
    """
    s = math.sqrt(step.dt) * step.sigma
    raw = (((step.x - step.mu_old) ** 2 - (step.x - step.mu) ** 2) / (2 * s**2)).mean(-1)
    bias = ((step.mu - step.mu_old) ** 2).mean(-1) / (2 * s**2)
    return raw, s * (raw + bias)


def flow_step_loss(
    step: FlowStep, advantages: Tensor, *, clip: float = 2e-6, adv_clip: float = 5.0, divide_by_dt: bool = True
) -> Tensor:
    """Loss of one denoising step, a scalar: mean_i ppo(clip(A_i, -adv_clip, adv_clip), exp(z_i)) / dt.

    `divide_by_dt` is the gradient reweighting of the Flow-GRPO sampler. `advantages` [N]. A run averages over its
    steps.
    """
    _, z = flow_log_ratio(step)
    loss = ppo_clip(z.exp(), advantages.clamp(-adv_clip, adv_clip), low=clip, high=clip).mean()
    return loss / step.dt if divide_by_dt else loss


class Guard(NamedTuple):
    """Detached statistics of a minibatch: per bucket [K] counts, mean m_b, scale k_b, delta; the bucket per token."""

    bucket: Tensor  # [B, T] int64, -1 at masked cells
    counts: Tensor
    mean: Tensor
    scale: Tensor
    delta: Tensor

    def of_tokens(self, per_bucket: Tensor) -> Tensor:
        """A value per bucket [K] as a value per token [B, T], 0 at masked cells."""
        return select(self.bucket >= 0, per_bucket[self.bucket.clamp(min=0)])


def position_buckets(
    mask: Tensor, *, buckets: int = 8, position: Literal["relative", "absolute"] = "relative", bucket_width: int = 512
) -> Tensor:
    """Bucket of each valid token, [B, T] int64, -1 at masked cells. Positions count valid tokens, from 0.

    relative: floor(K pos / L_i); absolute: pos // bucket_width; both at most K - 1.
    """
    place = mask.long().cumsum(-1) - 1
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    index = place * buckets // length if position == "relative" else place // bucket_width
    return torch.where(mask, index.clamp(0, buckets - 1), torch.full_like(index, -1))


def guard_statistics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    bucket: Tensor,
    *,
    buckets: int = 8,
    min_tokens: int = 8,
    sigma_floor: float = 1e-4,
    scale_max: float = 10.0,
    g_floor: float = 1e-3,
    gradient_reweight: bool = True,
    delta_min: float = 0.1,
    delta_max: float = 10.0,
) -> Guard:
    """Shift, scale and gradient weight of each bucket, from d = lp - old [B, T] of a whole minibatch; no gradient.

        k_b = clip(s / max(s_b, sigma_floor), 1/scale_max, scale_max)       buckets below min_tokens use the pooled m, s
        g_b = max(rms_b(1 - exp(old)), g_floor);   raw_b = 1 / (k_b g_b)
        delta_b = clip(raw_b / (token mean of raw), delta_min, delta_max)   1 everywhere without gradient_reweight

    k equalises the spread of the log-ratios over positions; 1/k undoes it in the gradient and 1/g equalises the typical
    gradient norm of a sampled token, which is proportional to 1 - p. A pooled deviation below sigma_floor means no
    drift (the first on-policy minibatch): shift 0 and scale 1.
    """
    valid = bucket >= 0
    index, wide = bucket[valid], torch.promote_types(logprobs.dtype, torch.float32)
    old = old_logprobs.detach()[valid].to(wide)
    drift = logprobs.detach()[valid].to(wide) - old
    count = _sums(torch.ones_like(drift), index, buckets)
    mean, spread, pooled = _moments(drift, index, count, min_tokens)
    if pooled < sigma_floor:
        mean, scale = torch.zeros_like(count), torch.ones_like(count)
    else:
        scale = (pooled / spread.clamp(min=sigma_floor)).clamp(1 / scale_max, scale_max)
    delta = (count > 0).to(wide)
    if gradient_reweight:
        size = (_sums((1 - old.exp()) ** 2, index, buckets) / count.clamp(min=1)).sqrt().clamp(min=g_floor)
        raw = 1 / (scale * size)
        delta = delta * (raw / ((count * raw).sum() / count.sum().clamp(min=1))).clamp(delta_min, delta_max)
    return Guard(bucket, count.long(), mean, scale, delta)


def _sums(values: Tensor, index: Tensor, buckets: int) -> Tensor:
    return values.new_zeros(buckets).index_add_(0, index, values)


def _moments(drift: Tensor, index: Tensor, count: Tensor, min_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and population deviation of each bucket, pooled ones where it has too few tokens; the pooled deviation."""
    pooled_mean = drift.sum() / count.sum().clamp(min=1)
    pooled = (((drift - pooled_mean) ** 2).sum() / count.sum().clamp(min=1)).sqrt()
    seen, buckets = count.clamp(min=1), len(count)
    mean = _sums(drift, index, buckets) / seen
    spread = (_sums((drift - mean[index]) ** 2, index, buckets) / seen).sqrt()
    few = count < min_tokens
    return torch.where(few, pooled_mean, mean), torch.where(few, pooled, spread), pooled


def guarded_log_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    guard: Guard,
    *,
    center: Literal["bucket", "exact_kl", "none"] = "bucket",
    exact_kl: Tensor | None = None,
) -> Tensor:
    """Normalised log-ratio z = (lp - old - m_b) k_b [B, T], 0 at masked cells; gradient through `logprobs` only.

    `center` (ours): "exact_kl" adds the given KL(pi_old || pi) per token [B, T], the literal analogue of the flow's
    bias, instead of subtracting m_b; "none" only rescales.
    """
    valid = guard.bucket >= 0
    z = select(valid, logprobs) - select(valid, old_logprobs).detach()
    if center == "bucket":
        z = z - guard.of_tokens(guard.mean).to(z.dtype)
    elif center == "exact_kl":
        if exact_kl is None:
            raise ValueError("center 'exact_kl' needs the tensor `exact_kl`")
        z = z + select(valid, exact_kl).detach()
    return select(valid, z * guard.of_tokens(guard.scale).to(z.dtype))


@ratios
def grpo_guard(
    delta: Tensor,
    mask: Tensor,
    ratio_shift: Tensor,
    ratio_scale: Tensor,
    *,
    anchor: Literal["old"] = "old",
    buckets: int = 8,
    position: Literal["relative", "absolute"] = "relative",
    bucket_width: int = 512,
    min_tokens: int = 8,
    sigma_floor: float = 1e-4,
    scale_max: float = 10.0,
    g_floor: float = 1e-3,
    gradient_reweight: bool = True,
    delta_min: float = 0.1,
    delta_max: float = 10.0,
    center: Literal["bucket", "none"] = "bucket",
) -> Tensor:
    """log rho = (delta - m_b) k_b: centred and scaled by the bucket of the token's position (our adaptation).

    The statistics are those of the minibatch, `guard_statistics`. Token weight grpo_guard undoes k_b in the gradient.
    Source: the idea is GRPO-Guard's, arXiv 2510.22319.
    """
    return select(mask, (delta - ratio_shift.to(delta.dtype)) * ratio_scale.to(delta.dtype)).clamp(-LIMIT, LIMIT)


@prepares(grpo_guard)
def guard_of_batch(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    buckets: int = 8,
    position: Literal["relative", "absolute"] = "relative",
    bucket_width: int = 512,
    center: Literal["bucket", "none"] = "bucket",
    anchor: Literal["old"] = "old",
    **options: Any,
) -> dict[str, Tensor]:
    """Shift, scale and gradient weight of every token, from `guard_statistics`."""
    bucket = position_buckets(mask, buckets=buckets, position=position, bucket_width=bucket_width)
    guard = guard_statistics(logprobs, old_logprobs, bucket, buckets=buckets, **options)
    shift = guard.mean if center == "bucket" else torch.zeros_like(guard.mean)
    named = {"ratio_shift": shift, "ratio_scale": guard.scale, "position_weight": guard.delta}
    return {name: guard.of_tokens(values) for name, values in named.items()}


@token_weights
def grpo_guard_weight(position_weight: Tensor) -> Tensor:
    """delta_b: equal gradient sizes over positions; goes with ratio grpo_guard, which has its options."""
    return position_weight
