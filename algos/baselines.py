"""What a reward is compared with, and what the difference is divided by: A_i = (R_i - baseline_i) / scale_i.

All take rewards [B] in float64 and return [B]. A function that reads `groups` needs peers: see `singleton` in
`advantages.group`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algos.batch import select
from algos.groups import Groups, mean_std
from core.errors import UserError
from core.registry import Registry

baselines = Registry("baseline")
scales = Registry("scale")

# Baselines: rewards [B], their groups -> [B]. A baseline of a constant group is exactly the common reward.


@baselines
def none_(rewards: Tensor) -> Tensor:
    """0."""
    return torch.zeros_like(rewards)


@baselines
def constant_(rewards: Tensor, constant: float) -> Tensor:
    """The option `constant`; moves the balance of positives and negatives (TOPR)."""
    return torch.full_like(rewards, constant)


@baselines
def group_mean(rewards: Tensor, groups: Groups) -> Tensor:
    """Mean reward of the group."""
    return groups.spread(groups.mean(rewards))


@baselines
def leave_one_out(rewards: Tensor, groups: Groups) -> Tensor:
    """Mean reward of the other rows of the group: (sum(x) - x_i) / (n - 1)."""
    others = (groups.spread(groups.sum(rewards)) - rewards) / groups.spread((groups.size - 1).clamp(min=1))
    return torch.where(groups.spread(groups.constant(rewards)), rewards, others)


@baselines
def length_weighted(rewards: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
    """sum_j L_j x_j / sum_j L_j: the variance-optimal baseline when the score grows with length (OPO)."""
    tokens = lengths.to(rewards.dtype)
    mean = groups.sum(rewards * tokens) / groups.sum(tokens).clamp(min=1)
    return torch.where(groups.spread(groups.constant(rewards)), rewards, groups.spread(mean))


@baselines
def virtual_max(rewards: Tensor, groups: Groups, max_reward: float, num_virtual: int) -> Tensor:
    """Mean of the group with num_virtual imagined rows of reward max_reward (NGRPO). Rewards above it are refused."""
    require_range(rewards, None, max_reward, "baseline virtual_max")
    mean = (groups.sum(rewards) + num_virtual * max_reward) / (groups.size + num_virtual)
    perfect = groups.smallest(rewards) == max_reward
    return groups.spread(torch.where(perfect, torch.full_like(mean, max_reward), mean))


@baselines
def batch_mean(rewards: Tensor, scored: Tensor) -> Tensor:
    """Mean over all scored rows of the step."""
    return mean_std(rewards, scored)[0].expand_as(rewards)


# Scales: -> [B], divisors with eps already added.


def unit(rewards: Tensor) -> Tensor:
    """1."""
    return torch.ones_like(rewards)


scales["none"] = unit


@scales
def group_std(rewards: Tensor, groups: Groups, eps: float, ddof: int) -> Tensor:
    """std(x) + eps."""
    return groups.spread(groups.std(rewards, ddof)) + eps


@scales
def virtual_std(rewards: Tensor, groups: Groups, max_reward: float, num_virtual: int, eps: float, ddof: int) -> Tensor:
    """std(x with num_virtual rows of max_reward) + eps."""
    mean = virtual_max(rewards, groups, max_reward, num_virtual)
    squares = groups.sum((rewards - mean) ** 2) + num_virtual * (max_reward - _first(groups, mean)) ** 2
    return groups.spread((squares / (groups.size + num_virtual - ddof).clamp(min=1)).sqrt()) + eps


@scales
def batch_std(rewards: Tensor, scored: Tensor, eps: float, ddof: int) -> Tensor:
    """std of all scored rewards of the step, not centred per group, + eps (Lite PPO)."""
    return (mean_std(rewards, scored, ddof)[1] + eps).expand_as(rewards)


@scales
def group_mean_(rewards: Tensor, groups: Groups, eps: float) -> Tensor:
    """mean(x) + eps: hard prompts weigh more, by one over their pass rate (MaxRL). Negative rewards are refused."""
    require_range(rewards, 0.0, None, "scale group_mean")
    return groups.spread(groups.mean(rewards)) + eps


@scales
def nonzero_fraction(rewards: Tensor, scored: Tensor) -> Tensor:
    """max(1, rows with R != 0) / rows (GPG)."""
    rows = scored.sum().clamp(min=1).to(rewards.dtype)
    return ((select(scored, rewards) != 0).sum().clamp(min=1) / rows).expand_as(rewards)


def require_range(rewards: Tensor, low: float | None, high: float | None, who: str) -> None:
    """Raises UserError if a scored reward is outside [low, high]; none is no bound."""
    seen = rewards[~torch.isnan(rewards)]
    lowest, highest = (-torch.inf if low is None else low), (torch.inf if high is None else high)
    if ((seen < lowest) | (seen > highest)).any():
        raise UserError(
            f"method: {who} takes rewards in [{lowest:g}, {highest:g}], got values in [{seen.min().item():g}, "
            f"{seen.max().item():g}]; rescale them (shaping: scale) or set its bounds (min_reward, max_reward)"
        )


def _first(groups: Groups, per_row: Tensor) -> Tensor:
    """[B] that is equal within a group -> [P]."""
    return torch.zeros(groups.count, dtype=per_row.dtype, device=per_row.device).index_copy(0, groups.index, per_row)
