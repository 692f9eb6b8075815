"""How good a completion was: estimators of the advantage, detached and in float64.

An estimator reads rewards (or token rewards) and returns one number per row [B], one per token [B, T], or a list of
channels. Rows whose reward is NaN are in no statistic; the composition gives them advantage 0.
Outcome estimators are baseline x scale:

    A_i = (R_i - baseline_i) / scale_i          then optional whitening, then broadcast to the row's valid tokens

Estimators that recur over tokens are in `critic.py`; those that read current log-probabilities are in `coupled.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from algos.baselines import baselines as baseline_table
from algos.baselines import group_mean, group_std, leave_one_out, require_range, scales
from algos.batch import Channel, select
from algos.groups import Groups, mean_std
from algos.parts import supply
from core.errors import UserError
from core.registry import Registry

advantages = Registry("advantage")
whitenings = Registry("whitening")
combinations = Registry("combination")


@advantages
def group(
    rewards: Tensor,
    group: Tensor,
    lengths: Tensor,
    *,
    baseline: Literal[
        "none", "constant", "group_mean", "leave_one_out", "length_weighted", "virtual_max", "batch_mean"
    ] = "group_mean",
    scale: Literal["none", "group_std", "virtual_std", "batch_std", "group_mean", "nonzero_fraction"] = "group_std",
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Literal["zero", "raw"] = "zero",
    constant: float = 0.0,
    max_reward: float = 1.0,
    num_virtual: int = 1,
) -> Tensor:
    """A_i = (R_i - baseline_i) / scale_i, one number per row.

    singleton: what a group of one gets when its peers are needed: zero (no comparison, no signal), or raw (the reward).
    Source: GRPO (arXiv 2402.03300) and its variants; the tables of baselines and scales name theirs.
    """
    groups = Groups.of(group, rewards)
    known = {
        **{"rewards": rewards, "groups": groups, "lengths": lengths, "scored": groups.member, "eps": eps},
        **{"ddof": ddof, "constant": constant, "max_reward": max_reward, "num_virtual": num_virtual},
    }
    base, divisor = baseline_table[baseline], scales[scale]
    centred = rewards - supply(base, known)
    # A centred reward of exactly 0 stays 0 whatever its divisor, also with eps = 0.
    result = torch.where(centred == 0, centred, centred / supply(divisor, known))
    if _reads(base, "groups") or _reads(divisor, "groups"):
        alone = groups.spread(groups.size == 1)
        result = torch.where(alone, rewards if singleton == "raw" else torch.zeros_like(rewards), result)
    return result


@advantages
def passk(
    rewards: Tensor,
    group: Tensor,
    *,
    scale: Literal["none", "group_std"] = "group_std",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Tensor:
    """Only the best row of a group: A = (R_(1) - R_(2)) / (std + eps); 0 for all others, for ties and for n = 1.

    Source: "Optimizing language models for inference time objectives", arXiv 2503.19595.
    """
    groups = Groups.of(group, rewards)
    best = groups.spread(groups.largest(rewards))
    below = Groups(groups.index, groups.member & (rewards < best), groups.count)
    leaders = groups.sum((rewards == best).to(rewards.dtype))
    wins = (rewards == best) & groups.spread((leaders == 1) & below.present)
    gap = select(wins, best - groups.spread(below.largest(rewards)))
    return gap if scale == "none" else torch.where(gap == 0, gap, gap / group_std(rewards, groups, eps, ddof))


@advantages
def bnpo(
    rewards: Tensor, group: Tensor, *, weight_max: float = 1e6, min_reward: float = 0.0, max_reward: float = 1.0
) -> Tensor:
    """A_i = (R_i - p_g) min(1 / BetaPDF(p_g; alpha, beta), weight_max), with p_g the group's mean of rescaled rewards.

    alpha = max(1, 1 + a/3), beta = max(1, 1 + b/3), where Beta(a, b) has the mean and variance of the p_g of the step
    (divisor P - 1). Fewer than two groups, or no variance: alpha = beta = 1 (the published code gives NaN).
    Source: "BNPO: Beta Normalization Policy Optimization", arXiv 2506.02864.
    """
    require_range(rewards, min_reward, max_reward, "bnpo")
    rewards = (rewards - min_reward) / (max_reward - min_reward)
    groups = Groups.of(group, rewards)
    rates = groups.mean(rewards)
    mean, std = mean_std(rates, groups.present)
    shape = torch.ones(2, dtype=rewards.dtype, device=rewards.device)
    if std**2 > 1e-12:
        k = mean * (1 - mean) / std**2 - 1
        shape = (1 + torch.stack([mean * k, (1 - mean) * k]) / 3).clamp(min=1)
    log_density = _log_beta_density(rates, shape[0], shape[1])
    return (rewards - groups.spread(rates)) * groups.spread((-log_density).exp().clamp(max=weight_max))


@advantages
def reward(rewards: Tensor) -> Tensor:
    """A_i = R_i."""
    return rewards


@advantages
def tracker(rewards: Tensor, baselines: Tensor) -> Tensor:
    """A_i = R_i - the prompt's running estimate, which a memory keeps (SPO, arXiv 2509.13232)."""
    return rewards - baselines


@advantages
def given(given_advantages: Tensor) -> Tensor:
    """Advantages computed elsewhere, [B] or [B, T]."""
    return given_advantages


@advantages
def demonstration(lengths: Tensor) -> Tensor:
    """A_i = 1: every demonstration is to be made more likely."""
    return torch.ones_like(lengths, dtype=torch.float64)


@advantages
def nft(rewards: Tensor) -> Tensor:
    """+1 for a correct row, -1 for a wrong one. Rewards must be 0 or 1; the surrogate reads the pass rate.

    Source: "Bridging Supervised Learning and Reinforcement Learning in Math Reasoning", arXiv 2505.18116.
    """
    return require_binary(rewards, "nft") * 2 - 1


@advantages
def oreal(rewards: Tensor, group: Tensor, *, positives_times_advantage: bool = True) -> Tensor:
    """Leave-one-out advantage; with positives_times_advantage false, correct rows (R > 0) get 1, as in the paper.

    Source: "Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning", arXiv 2502.06781.
    """
    groups = Groups.of(group, rewards)
    centred = select(groups.spread(groups.size > 1), rewards - leave_one_out(rewards, groups))
    return centred if positives_times_advantage else torch.where(rewards > 0, torch.ones_like(rewards), centred)


@advantages
def copo(
    rewards: Tensor,
    group: Tensor,
    answers: Tensor,
    mask: Tensor,
    *,
    gamma: float = 5.0,
    rho: float = 1.0,
    blend: Literal["soft", "soft_with_zero", "zero", "soft_with_forced", "forced", "global"] = "soft_with_zero",
    consistency_discount: bool = False,
    eps: float = 1e-6,
) -> list[Channel]:
    """Two channels: the group's advantage a_i with weight w_i, the prompt's advantage b_g with weight 1 - w_i.

    b_g = (Rbar_g - mean Rbar) / (std Rbar + eps) over prompts; w_i = sigmoid(gamma (H_g - rho)) with H_g the entropy
    (bits) of the group's answers, changed by `blend`. Low entropy: the prompt-level signal takes over.
    Source: "COPO: Consistency-Aware Policy Optimization", arXiv 2508.04138.
    """
    groups = Groups.of(group, rewards)
    local = select(groups.spread(groups.size > 1), rewards - group_mean(rewards, groups))
    local = torch.where(local == 0, local, local / group_std(rewards, groups, eps, 1))
    local = torch.where(groups.spread(groups.size == 1), rewards, local)
    entropy, rate = copo_prompt_statistics(rewards, group, answers, consistency_discount=consistency_discount)
    mean, std = mean_std(rate, groups.present)
    overall = groups.spread((rate - mean) / (std + eps) if std > 0 else torch.zeros_like(rate))
    soft = groups.spread(torch.sigmoid(gamma * (entropy - rho)))
    shares = {
        "soft": soft,
        "soft_with_zero": select(rewards != 0, soft),
        "zero": (rewards != 0).to(soft.dtype),
        "soft_with_forced": select(local != 0, soft),
        "forced": (local != 0).to(soft.dtype),
        "global": torch.zeros_like(soft),
    }
    share = shares[blend]
    return [Channel(a[:, None].expand(mask.shape), w) for a, w in ((local, share), (overall, 1 - share))]


def copo_prompt_statistics(
    rewards: Tensor, group: Tensor, answers: Tensor, *, consistency_discount: bool = False
) -> tuple[Tensor, Tensor]:
    """Answer entropy in bits [P] and prompt reward [P], by increasing group id.

    With consistency_discount the reward is mean_g R (1 - (1 - 1/n) / log2(n) H_g); n = 1: factor 1 and H = 0.
    """
    groups = Groups.of(group, rewards)
    pairs = groups.index * (answers.max() + 1) + answers
    votes = Groups(torch.unique(pairs, return_inverse=True)[1], groups.member, len(rewards))
    share = votes.spread(votes.size) / groups.spread(groups.size.clamp(min=1))
    # Every row of a class adds -log2(q) / n, so that a class adds -q log2(q).
    entropy = groups.sum(-share.log2()) / groups.size.clamp(min=1) + 0.0
    rate = groups.mean(rewards)
    if consistency_discount:
        n = groups.size.clamp(min=2)
        rate = rate * (1 - (1 - 1 / n) / n.log2() * entropy)
    return entropy, rate


Estimate = Callable[[Tensor], Tensor]
"""Rewards [B] -> advantages [B]."""


@combinations
def sum_then_normalise(
    components: Tensor, component_weights: Tensor, estimate: Estimate, *, weights: list[float] | None = None
) -> Tensor:
    """One advantage of the weighted sum of the components [B, R]; unscorable only where all of them are."""
    factor = component_weights if weights is None else components.new_tensor(weights)
    missing = torch.isnan(components)
    total = (torch.where(missing, torch.zeros_like(components), components) * factor).sum(1)
    return estimate(torch.where(missing.all(1), torch.full_like(total, torch.nan), total))


@combinations
def normalise_then_sum(
    components: Tensor,
    component_weights: Tensor,
    estimate: Estimate,
    *,
    weights: list[float] | None = None,
    reduce: Literal["sum", "mean", "softmin"] = "sum",
    sharpness: float = 1.0,
) -> Tensor:
    """One advantage per component [B, R], then their weighted sum, mean over R, or soft minimum. Missing ones add 0.

    Keeps distinctions that vanish when rewards are summed first: (0, 1) and (1, 0) have the same total.
    Source: GDPO, arXiv 2601.05242; BNPO's advantage decomposition, arXiv 2506.02864; RVPO's soft minimum.
    """
    factor = (component_weights if weights is None else components.new_tensor(weights)).expand(components.shape)
    columns = torch.stack([_of_one(estimate(column)) for column in components.unbind(1)], dim=1)
    factor = torch.where(torch.isnan(components), torch.zeros_like(factor), factor)
    if columns.dim() == 3:  # one advantage a token
        factor = factor[:, :, None].expand(columns.shape)
    if reduce == "softmin":
        return soft_minimum(columns, factor, sharpness)
    total = (torch.where(factor == 0, torch.zeros_like(columns), columns) * factor).sum(1)
    return total if reduce == "sum" else total / components.shape[1]


def _of_one(estimate: object) -> Tensor:
    """The advantage of one component; raises UserError where the method makes more of a reward than an advantage."""
    if not isinstance(estimate, Tensor):
        raise UserError(
            "method: its advantage comes with a critic's targets or in several channels, so it cannot be taken of each "
            "component on its own; use a weighting that sums first (static, gradient, cv ...), or another method"
        )
    return estimate


def soft_minimum(columns: Tensor, weights: Tensor, sharpness: float) -> Tensor:
    """-(1/k) log sum_r w_r exp(-k Z_r) / sum w of columns and weights >= 0 [B, R, ...]; k = 0 is the mean, no weight 0.

    Source: RVPO, arXiv 2605.05750; weighted by us.
    """
    share = weights / torch.where(weights.sum(1, keepdim=True) > 0, weights.sum(1, keepdim=True), 1.0)
    if sharpness == 0:
        return (share * columns).sum(1)
    exponents = torch.where(weights > 0, -sharpness * columns + share.log(), -torch.inf)
    return torch.where((weights > 0).any(1), -exponents.logsumexp(1) / sharpness, torch.zeros_like(columns[:, 0]))


# Whitening: advantages [B, T] constant along a row for `sequence`; `member` [B, T] are valid tokens of scored rows.


@whitenings
def sequence(per_row: Tensor, scored: Tensor, *, eps: float = 1e-6, ddof: int = 1) -> Tensor:
    """(a - mean) / (std + eps) over the scored rows; needs one advantage per row."""
    mean, std = mean_std(per_row, scored, ddof)
    return per_row - mean if std == 0 else (per_row - mean) / (std + eps)


@whitenings
def token(per_token: Tensor, member: Tensor, *, eps: float = 1e-8, ddof: int = 1) -> Tensor:
    """(a - mean) / sqrt(var + eps) over the valid tokens: a row counts L_i times. One token or none: left alone.

    Source: REINFORCE++, arXiv 2501.03262.
    """
    if member.sum() <= 1:
        return per_token
    mean, std = mean_std(per_token, member, ddof)
    return (per_token - mean) / (std**2 + eps).sqrt()


def require_binary(rewards: Tensor, method: str) -> Tensor:
    """`rewards`, all 0, 1 or NaN; raises UserError otherwise."""
    known = rewards[~torch.isnan(rewards)]
    if not ((known == 0) | (known == 1)).all():
        low, high = known.min().item(), known.max().item()
        raise UserError(
            f"method: {method} is defined for rewards of 0 and 1 only, got values in [{low:g}, {high:g}]; "
            "train on one correctness reward of weight 1, without shaping"
        )
    return rewards


def _reads(function: Callable[..., Tensor], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _log_beta_density(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """log BetaPDF(x; alpha, beta) with 0 log 0 = 0."""
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return torch.xlogy(alpha - 1, x) + torch.xlogy(beta - 1, 1 - x) - log_norm
