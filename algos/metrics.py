"""What the objective reports about itself: (sum, count) pairs, which add up over parts; the metric is sum / count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algos.batch import select
from algos.kl import k3


@dataclass(frozen=True)
class Metric:
    """A line of the documentation."""

    meaning: str
    healthy: str
    otherwise: str


METRICS = {
    "policy/clip_low": Metric(
        "share of valid tokens at which the lower bound of the trust region acts",
        "0 to 0.1; sequence ratios clip whole completions, so 0.15 is normal there",
        "large: fewer updates per step (learner.minibatches, learner.epochs) or a smaller learning rate",
    ),
    "policy/clip_high": Metric(
        "share of valid tokens at which the upper bound (dual clip included) acts",
        "0 to 0.1; exactly 0 with one update per step",
        "large: as clip_low; if entropy falls at the same time, raise the surrogate's `high`",
    ),
    "policy/entropy": Metric(
        "mean entropy of the next-token distribution over valid tokens, nats",
        "falls slowly; reasoning runs stay above about 0.1",
        "collapse: clip-higher (dapo), an entropy bonus, a smaller learning rate; growth: check the reward",
    ),
    "policy/kl_ref": Metric(
        "KL(policy || reference), k3 estimate, nats per token",
        "grows slowly from 0; below about 0.5",
        "jumps: reward hacking or too large a step; add or raise kl.coef",
    ),
    "policy/kl_old": Metric(
        "KL(policy before the step || current policy), k3 estimate, nats per token",
        "0 with one update per step, else below 0.02",
        "large: fewer updates per step or a smaller learning rate",
    ),
    "policy/ratio_mean": Metric(
        "mean importance ratio of current to anchor policy",
        "0.98 to 1.02",
        "drifting: the anchor is stale; look at kl_old and mismatch_kl",
    ),
    "policy/mismatch_kl": Metric(
        "KL(rollout policy || learner's policy before the step), k3 estimate, nats per token",
        "below 0.001 on-policy with equal precision, below 0.01 with staleness",
        "large: precision or template differs between engine and learner, or staleness is high; add the modifier tis",
    ),
    "policy/mismatch_k1": Metric(
        "the same KL by its plain estimator; its sign shows the direction of the mismatch",
        "within 0.01 of 0",
        "as mismatch_kl",
    ),
    "policy/chi2_token": Metric(
        "mean squared token ratio of old to rollout policy, minus 1: variance of token correction weights",
        "below 0.1",
        "large: token weights are dominated by few tokens; truncate or mask",
    ),
    "policy/chi2_sequence": Metric(
        "the same for whole completions",
        "below 1",
        "large: sequence weights are useless; use token or geometric level",
    ),
    "policy/old_perplexity": Metric(
        "mean over completions of the learner's perplexity before the step",
        "near rollout_perplexity",
        "apart: as mismatch_kl",
    ),
    "policy/rollout_perplexity": Metric(
        "mean over completions of the rollout engine's perplexity",
        "above 1, falling slowly",
        "at 1: the policy has become deterministic",
    ),
    "policy/ess": Metric(
        "effective share of valid tokens under the correction weights, mean(w)^2 / mean(w^2)",
        "above 0.9",
        "small: few tokens carry the step; lower the cap or the staleness",
    ),
    "policy/ess_raw": Metric(
        "effective share of valid tokens under the raw ratios of old to rollout policy, mean(rho)^2 / mean(rho^2)",
        "above 0.9",
        "small: what was sampled is no longer what the policy would say; lower rollout.max_staleness, or correct (tis)",
    ),
    "policy/ess_raw_lag_<n>": Metric(
        "the same over tokens whose weights were n updates old; only where some are",
        "falls slowly with n",
        "falls at once: the learning rate is too high for that staleness",
    ),
    "policy/mismatch_kl_lag_<n>": Metric(
        "policy/mismatch_kl over tokens whose weights were n updates old; only where some are",
        "at n = 0 that of the engines alone, rising with n",
        "large at n = 0: precision or template; large at n > 0: staleness",
    ),
    "policy/token_weight": Metric(
        "mean of the token weights' product over valid tokens; they never change a denominator",
        "steady: 0.8 to 1 for steer, near 1 for clip_cov and grpo_guard_weight, the fraction for top_entropy",
        "far from 1: the weights change the size of the step; scale the learning rate accordingly",
    ),
    "policy/rejected": Metric(
        "share of valid tokens left out by rejection rules",
        "below 0.1",
        "large: the rules throw away most of what was generated; loosen them or mend the mismatch",
    ),
    "policy/filtered": Metric(
        "share of rows left out by the filter",
        "falls while the task is too hard, rises when it is solved",
        "near 1: the prompts teach nothing any more; change their difficulty",
    ),
    "policy/entropy_coef": Metric(
        "coefficient of the entropy bonus that the method's memory chose for this step",
        "0 while the entropy is above its target",
        "at its upper bound for long: the bonus is too weak; raise the memory's `high`",
    ),
    "policy/kl_coef": Metric(
        "coefficient of the KL term that the method's memory chose for this step",
        "settles",
        "growing for long: the policy leaves the reference faster than `target` allows; lower the learning rate",
    ),
    "policy/entropy_average": Metric(
        "running mean of -log pi over the sampled tokens, nats, as the method's memory keeps it",
        "near the method's entropy_target",
        "far from it for long: raise alpha_cap, or move t_high and t_low further from 1",
    ),
    "critic/loss": Metric(
        "loss of the critic per valid token",
        "falls, then follows the spread of the returns",
        "growing: lower learner.critic.lr, or give it warmup_steps",
    ),
    "critic/unexplained": Metric(
        "mean squared difference of returns and values over valid tokens",
        "below the variance of the returns",
        "not below it: the critic knows nothing yet; give it learner.critic.warmup_steps",
    ),
    "critic/value": Metric(
        "mean value over valid tokens",
        "near reward/total",
        "far from it: as critic/unexplained",
    ),
    "token_reward_model/loss": Metric(
        "cross-entropy of the token reward model's judgement of whole completions, nats",
        "falls below 0.69",
        "at 0.69: it knows nothing yet; give it learner.token_reward_model.warmup_steps",
    ),
    "token_reward_model/accuracy": Metric(
        "share of completions that the token reward model judges as the outcome does",
        "above 0.5, rising",
        "at 0.5: as token_reward_model/loss",
    ),
    "preference/margin": Metric(
        "how much likelier the chosen completion is than the rejected, beyond the reference (or per token), nats",
        "grows from 0",
        "flat: raise the learning rate or beta; exploding: lower them",
    ),
    "preference/accuracy": Metric(
        "share of pairs with a margin above 0",
        "0.6 to 0.9, rising",
        "1.0 early: the pairs differ by something trivial, or are repeated too often",
    ),
    "preference/chosen": Metric(
        "log-probability of the chosen completions, beyond the reference (or per token), nats",
        "does not fall far below 0",
        "falling: the margin grows by unlearning the rejected side; add an SFT term, lower the learning rate",
    ),
    "preference/rejected": Metric(
        "the same of the rejected completions", "falls", "rising with the chosen: the pairs are too alike"
    ),
    "policy/silent": Metric(
        "share of kept rows whose advantage is 0 on every token",
        "below 0.5",
        "near 1: groups agree; larger groups, other prompts, or a finer reward",
    ),
}


def mean_over(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the masked cells, detached, float64."""
    return select(mask, values.detach()).double().sum(), mask.sum().double()


def mismatch(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    lag: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the engine that sampled is from the learner before the step, d = old - rollout; all [B, T].

    `lag` [B, T] int64 are the updates between a token's weights and the step; they add the KL and the moments of the
    ratio by lag. Counts are tokens, or rows with tokens.
    """
    old, rollout = select(mask, old_logprobs).double(), select(mask, rollout_logprobs).double()
    d = (old - rollout).clamp(-20, 20)
    rows, length = mask.any(1), mask.sum(1).clamp(min=1)
    total = (old - rollout).sum(1)
    metrics = {
        "policy/mismatch_k1": mean_over(-d, mask),
        "policy/mismatch_kl": mean_over(k3(-d), mask),
        "policy/chi2_token": mean_over((2 * d).clamp(-20, 20).exp() - 1, mask),
        "policy/chi2_sequence": mean_over((2 * total).clamp(-20, 20).exp() - 1, rows),
        "policy/old_perplexity": mean_over((-old.sum(1) / length).clamp(-20, 20).exp(), rows),
        "policy/rollout_perplexity": mean_over((-rollout.sum(1) / length).clamp(-20, 20).exp(), rows),
    }
    metrics |= _moments(d, mask, "")
    for n in lag[mask].unique().tolist() if lag is not None and select(mask, lag).any() else ():
        members = mask & (lag == n)
        metrics |= {f"policy/mismatch_kl_lag_{n}": mean_over(k3(-d), members), **_moments(d, members, f"_lag_{n}")}
    return metrics


def effective_share(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """mean(w)^2 / mean(w^2) of correction weights [B, T] or [B, 1] over the valid tokens, as (sum, count)."""
    w = select(mask, weight.expand(mask.shape)).double()
    share = w.sum() ** 2 / (w**2).sum().clamp(min=torch.finfo(w.dtype).tiny)
    return share, mask.sum().double()


def _moments(d: Tensor, mask: Tensor, suffix: str) -> dict[str, tuple[Tensor, Tensor]]:
    ratio = d.exp()
    return {f"{_FIRST}{suffix}": mean_over(ratio, mask), f"{_SECOND}{suffix}": mean_over(ratio**2, mask)}


def derived(means: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step from the means of all its parts: effective sample shares take the place of moments.

    A share is no mean, so it can only be had when the parts of all micro-batches and ranks are together.
    """
    found = {name: value for name, value in means.items() if not name.startswith((_FIRST, _SECOND))}
    for name, first in means.items():
        if name.startswith(_FIRST):
            suffix = name.removeprefix(_FIRST)
            found[f"policy/ess_raw{suffix}"] = first**2 / means[f"{_SECOND}{suffix}"]
    return found


_FIRST, _SECOND = "policy/moment_1", "policy/moment_2"


def update(
    current: dict[str, Tensor], ref_logprobs: Tensor | None, entropy: Tensor | None, old_known: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """What one update does, from the tensors that the surrogate reads; not `old_known`: they hold no old policy."""
    mask, logprobs = current["mask"], current["logprobs"].detach()
    metrics = {"policy/ratio_mean": mean_over(current["ratio"], mask)}
    if old_known:
        metrics["policy/kl_old"] = mean_over(k3(current["old_logprobs"] - logprobs), mask)
    if ref_logprobs is not None:
        metrics["policy/kl_ref"] = mean_over(k3(logprobs - select(mask, ref_logprobs)), mask)
    if entropy is not None:
        metrics["policy/entropy"] = mean_over(entropy, mask)
    return metrics
