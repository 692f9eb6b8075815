"""KL to an anchor: estimators, gradient modes and the penalty in the loss.

With x = l - f on tokens sampled from (about) the policy. Which gradient an estimator has matters more than its value:
naive k1 has none in expectation, naive k2 has that of KL(pi || ref), naive k3 that of the *forward* KL(ref || pi).
Sources: DeepSeekMath, arXiv 2402.03300 (k3 in the loss); DeepSeek-V3.2, arXiv 2512.02556 (ratio); verl, OpenRLHF.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from algos.ratios import LIMIT
from core.registry import Registry

estimators = Registry("KL estimator")
gradients = Registry("KL gradient")
penalties = Registry("KL penalty")


@estimators
def k1(x: Tensor) -> Tensor:
    """x: unbiased, noisy; right inside a reward, useless with its naive gradient inside a loss."""
    return x


@estimators
def k2(x: Tensor) -> Tensor:
    """x^2 / 2: biased, good for small x; its naive gradient is that of the reverse KL on-policy."""
    return x**2 / 2


@estimators
def k3(x: Tensor) -> Tensor:
    """exp(-x) - 1 + x: unbiased, never negative, low variance."""
    x = x.clamp(-LIMIT, LIMIT)
    return (-x).exp() - 1 + x


@estimators
def abs_(x: Tensor) -> Tensor:
    """|x|."""
    return x.abs()


@gradients
def naive(x: Tensor, moved: Tensor, estimator: str, is_cap: float) -> Tensor:
    """Differentiate the estimator as it stands."""
    return estimators[estimator](x)


@gradients
def k2_(x: Tensor, moved: Tensor, estimator: str, is_cap: float) -> Tensor:
    """Value of the estimator, gradient of k2."""
    return estimators[estimator](x).detach() + k2(x) - k2(x).detach()


@gradients
def k2_is(x: Tensor, moved: Tensor, estimator: str, is_cap: float) -> Tensor:
    """Value of the estimator, gradient of k2 times min(exp(l - old), is_cap), for stale data."""
    weight = moved.detach().clamp(-LIMIT, LIMIT).exp().clamp(max=is_cap)
    return estimators[estimator](x).detach() + weight * (k2(x) - k2(x).detach())


@gradients
def ratio(x: Tensor, moved: Tensor, estimator: str, is_cap: float) -> Tensor:
    """exp(l - old) times the estimator, both differentiated: with k3 the gradient is exactly exp(l - old) x."""
    return moved.clamp(-LIMIT, LIMIT).exp() * estimators[estimator](x)


@penalties
def in_loss(
    logprobs: Tensor,
    kl_anchor_logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    coef: float = 0.001,
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3",
    gradient: Literal["naive", "k2", "k2_is", "ratio"] = "ratio",
    is_cap: float = 10.0,
    anchor: Literal["ref", "old"] = "ref",
    direction: Literal["reverse", "forward"] = "reverse",
    hinge: float | None = None,
    mode: str | None = None,
) -> Tensor:
    """Per-token KL [B, T]; the loss adds coef times its aggregate.

    direction: reverse takes x = l - anchor; forward takes x = anchor - l, for tokens sampled by the anchor.
    hinge: the coefficient is max(0, coef (KL - hinge)), KL of the minibatch (late): the gradient of a squared hinge.
    mode: aggregation of the KL; none is that of the policy term.
    """
    x = logprobs - kl_anchor_logprobs
    return gradients[gradient](x if direction == "reverse" else -x, logprobs - old_logprobs, estimator, is_cap)
