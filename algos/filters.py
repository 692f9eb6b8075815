"""Which rows of a step are worth training on. A filter looks at raw rewards [B] and groups; it returns keep [B].

A filter that asks for more data (dynamic sampling) is executed by the rollout loop, which calls the same functions on
finished groups; inside the objective a filtered row has no tokens and leaves every denominator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algos.groups import Groups
from core.registry import Registry

filters = Registry("filter")


@filters
def mixed(rewards: Tensor, group: Tensor, *, keep_single: bool = True) -> Tensor:
    """Keep groups whose rewards differ (dynamic sampling).

    keep_g = max_g R != min_g R, or n = 1 (if keep_single). A group without a scored row is dropped.
    Source: DAPO, arXiv 2503.14476.
    """
    groups = Groups.of(group, rewards)
    keep = ~groups.constant(rewards)
    if keep_single:
        keep = keep | (torch.bincount(groups.index, minlength=groups.count) == 1)
    return groups.spread(keep & groups.present)


@filters
def drop_all_correct(rewards: Tensor, group: Tensor, *, max_reward: float = 1.0) -> Tensor:
    """Keep groups whose mean reward is below the highest possible one. Source: NGRPO, arXiv 2509.18851."""
    groups = Groups.of(group, rewards)
    return groups.spread((groups.mean(rewards) < max_reward) & groups.present)


@filters
def drop_all_wrong(rewards: Tensor, group: Tensor, *, min_reward: float = 0.0) -> Tensor:
    """Keep groups whose mean reward is above the lowest possible one."""
    groups = Groups.of(group, rewards)
    return groups.spread((groups.mean(rewards) > min_reward) & groups.present)


@filters
def one_pos_one_neg(rewards: Tensor, group: Tensor, seed: int) -> Tensor:
    """Keep one correct (R > 0) and one wrong row of every mixed group, drawn at random.

    Group statistics are those of all rows. Source: OREAL, arXiv 2502.06781.
    """
    groups = Groups.of(group, rewards)
    draw = torch.rand(len(rewards), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draw = draw.to(rewards.device)
    sides = [Groups(groups.index, side, groups.count) for side in (rewards > 0, rewards <= 0)]
    both = sides[0].present & sides[1].present
    chosen = [side.member & (draw == side.spread(side.largest(draw))) for side in sides]
    return (chosen[0] | chosen[1]) & groups.spread(both)
