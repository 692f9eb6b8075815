"""Weighting policies: how much each component counts, decided from the statistics of a step.

A policy may have state, which is part of the checkpoint, is plain JSON and is keyed by component name. Raw components
travel with the rollouts and weights never do, so a stale rollout is weighted with the weights of the step that trains
on it. Two kinds: `WeightingPolicy` (the composer's) sees `Statistics` and returns one weight per component; `Policy`
sees a `StepBatch` and returns a `Mix`, which also says how the columns are put together (`rewards.mixing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.registry import Registry
from core.schema import Group
from rewards.mixing import Mix, Order, StepBatch, in_order
from rewards.parts import known, part

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


class Policy:
    """A weighting policy: looks at the statistics of each batch and says how to mix it. Made of the objectives' names.

    One optimiser step, on one process, from the global batch: `weigh` once and `update` once; `update` comes first
    where `update_first`, else what it learns counts from the next batch on. Everything is keyed by name: the columns
    of a batch may come in any order. This base has no state.
    """

    needs: frozenset[str] = frozenset()  # what of kl, validation, gram the batch must have
    update_first: bool = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def weigh(self, batch: StepBatch) -> Mix:
        """How to mix this batch. Changes nothing."""
        raise NotImplementedError

    def update(self, batch: StepBatch) -> dict[str, float]:
        """Learn from the batch; returns metrics. Once per optimiser step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on bit-identically, as plain JSON keyed by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        """Go on from a saved state. Raises UserError if it is of other objectives, unless those are allowed."""

    def check(self, batch: StepBatch) -> None:
        """Raise UserError if the batch has other objectives than the policy was made for."""
        if set(batch.names) != set(self.names):
            made, got = ", ".join(sorted(self.names)), ", ".join(sorted(batch.names))
            raise UserError(f"weighting: the policy was made for the objectives {made}; the batch has {got}")

    def row(self, weights: Mapping[str, float], batch: StepBatch) -> NDArray[np.float64]:
        """The weights in the order of the batch's columns."""
        self.check(batch)
        return in_order(weights, batch.names)


def build(spec: Mapping[str, Any], names: Sequence[str], where: str = "weighting") -> Policy:
    """The policy of a spec {"policy": NAME, **options} for the objectives `names`; raises UserError naming `where`.

    The policies are registered when `rewards.policies` is imported.
    """
    options = dict(spec)
    name = options.pop("policy", None)
    if not isinstance(name, str):
        raise UserError(f"{where}.policy: {name!r} is no name; give one of {', '.join(weightings)}")
    if weightings.get(name) is fixed:
        raise UserError(f"{where}.policy: '{name}' gives weights alone and no way of mixing; use static")
    policy: Policy = weightings.bind(name, options, where)(tuple(names))
    return policy


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


@part(weightings, "static")
class Static(Policy):
    """The same weights in every step, 1 where none is given; `order` and `whiten` say how they are applied."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
        order: Order = "sum_then_normalize",
        whiten: bool = True,
    ) -> None:
        super().__init__(names)
        known(weights or {}, self.names, "static.weights")
        self.weights = dict.fromkeys(self.names, 1.0) | dict(weights or {})
        self.order: Order = order
        self.whiten = whiten

    def weigh(self, batch: StepBatch) -> Mix:
        return Mix(weights=self.row(self.weights, batch), order=self.order, whiten=self.whiten)
