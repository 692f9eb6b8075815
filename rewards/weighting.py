"""Weighting policies: how much each component counts, decided from the statistics of a step.

A policy may have state, which is part of the checkpoint, is plain JSON and is keyed by component name. Raw components
travel with the rollouts and weights never do, so a stale rollout is weighted with the weights of the step that trains
on it. A policy sees a `StepBatch` and returns a `Mix`: the weights, and how the columns are put together
(`rewards.mixing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.registry import Registry, options_of
from rewards.mixing import Mix, Order, StepBatch, in_order
from rewards.parts import known, part

weightings = Registry("weighting policy")


class Policy:
    """A weighting policy: looks at the statistics of each batch and says how to mix it. Made of the objectives' names.

    One optimiser step, on one process, from the global batch: `weigh` once and `update` once; `update` comes first
    where `update_first`, else what it learns counts from the next batch on. Everything is keyed by name: the columns
    of a batch may come in any order. This base has no state.
    """

    needs: frozenset[str] = frozenset()  # what of kl, validation, gram the batch must have
    update_first: bool = False
    apart: bool = False  # whether its mixes are normalised column by column first
    steers_kl: bool = False  # whether it decides the coefficient of the KL in the loss

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def weigh(self, batch: StepBatch) -> Mix:
        """How to mix this batch. Changes nothing."""
        raise NotImplementedError

    def begin(self, validation: Mapping[str, float]) -> None:
        """Look at the validation means of the model before training. Once, before the first step of a run."""

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
    weightings.find(name, f"{where}.policy")
    policy: Policy = weightings.bind(name, options, where)(tuple(names))
    return policy


def with_weights(spec: Mapping[str, Any], weights: Mapping[str, float], where: str = "weighting") -> dict[str, Any]:
    """The spec of a policy in which the components' own weights stand where it takes weights and writes none.

    Raises UserError where components have weights of their own (not 1) and the policy decides all by itself.
    """
    name = spec.get("policy")
    if not isinstance(name, str) or name not in weightings:
        return dict(spec)  # `build` says what is wrong
    takes = options_of(weightings[name])
    if "inner" in takes:
        return {**spec, "inner": with_weights(spec.get("inner") or {"policy": "static"}, weights, f"{where}.inner")}
    if "weights" in takes:
        return {"weights": dict(weights), **spec}
    if held := [n for n in spec.get("thresholds") or {} if weights.get(n, 1.0) != 1.0]:
        raise UserError(
            f"{where}.thresholds: '{held[0]}' is held at a threshold, so its multiplier is its weight; drop "
            f"rewards.components.{held[0]}.weight"
        )
    if "task_weights" in takes and (spec.get("kind") == "projected" or spec.get("kl_budget") is not None):
        free = {n: w for n, w in weights.items() if n not in (spec.get("thresholds") or {})}
        return {"task_weights": free, **spec}
    if own := [n for n, w in weights.items() if w != 1.0]:
        raise UserError(
            f"{where}.policy: '{name}' decides the weights itself, but rewards.components.{own[0]} has a weight; leave "
            "it out, or use static"
        )
    return dict(spec)


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
        self.whiten, self.apart = whiten, order == "normalize_then_sum"

    def weigh(self, batch: StepBatch) -> Mix:
        return Mix(weights=self.row(self.weights, batch), order=self.order, whiten=self.whiten)
