"""Weighting policies: how much each component counts, decided from the statistics of a step.

A policy sees a whole step's components (`Statistics`) and returns one weight per component. It may have state, which is
part of the checkpoint, is plain JSON and is keyed by component name. Raw components travel with the rollouts and
weights never do, so a stale rollout is weighted with the weights of the step that trains on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.registry import Registry
from core.schema import Group

weightings = Registry("weighting policy")


@dataclass(frozen=True)
class Statistics:
    """What a policy may look at: one step's groups, flattened. B completions, R components."""

    names: tuple[str, ...]  # of the R components, `name/key` where a function scores several things
    values: NDArray[np.float64]  # [B, R], NaN = missing
    group: NDArray[np.int64]  # [B], index of the group within the step
    lengths: NDArray[np.int64]  # [B], tokens

    def means(self) -> dict[str, float]:
        """Mean of each component over the completions that have it; components that none has are left out."""
        columns = {name: column[np.isfinite(column)] for name, column in zip(self.names, self.values.T, strict=True)}
        return {name: float(column.mean()) for name, column in columns.items() if column.size}


def statistics(groups: Sequence[Group]) -> Statistics:
    """The statistics of a step; names in order of first appearance."""
    names = tuple(dict.fromkeys(name for group in groups for name in group.components))
    rows = [
        [group.components[name][i].value if name in group.components else math.nan for name in names]
        for group in groups
        for i in range(len(group.completions))
    ]
    return Statistics(
        names=names,
        values=np.array(rows, dtype=np.float64).reshape(len(rows), len(names)),
        group=np.repeat(np.arange(len(groups)), [len(g.completions) for g in groups]).astype(np.int64),
        lengths=np.array([len(c.token_ids) for g in groups for c in g.completions], dtype=np.int64),
    )


class WeightingPolicy(Protocol):
    """The life of a policy in one step: `weigh` once, `update` once with the same statistics, on one process."""

    def weigh(self, statistics: Statistics) -> dict[str, float]:
        """Weight of each component, by name; a component that is not named has the weight of its part before the /."""

    def update(self, statistics: Statistics) -> dict[str, float]:
        """Learn from the step; returns metrics. What it changes counts from the next step on."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on bit-identically, as plain JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


@weightings
def fixed(weights: Mapping[str, float]) -> WeightingPolicy:
    """The weights of the config, in every step."""
    return _Fixed(dict(weights))


class _Fixed:
    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights

    def weigh(self, statistics: Statistics) -> dict[str, float]:
        return dict(self.weights)

    def update(self, statistics: Statistics) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}  # the weights are the config's, on resume too

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
