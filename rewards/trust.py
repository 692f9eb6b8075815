"""SophiaVL-R1: a judge of the reasoning counts as much as its verdicts agree with the outcomes.

"SophiaVL-R1: Reinforcing MLLMs Reasoning with Thinking Reward", arXiv 2505.17018 [paper and authors' code]. In a group,
with a thinking reward R_t in [0, 1] and an outcome R_o, correct where R_o >= threshold:

    gamma = 1 if mean R_t of the correct >= mean R_t of the wrong, else exp(their difference)
    R = R_o + gamma alpha exp(-step / total) R_t

Ours: every completion of a mixed group is judged (the release puts 0 where R_o < 0.2, so gamma is always 1 there), and
a missing verdict leaves the means and adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from rewards.mixing import Mix, StepBatch
from rewards.numeric import Floats, Ints, finite, mean, rows_of
from rewards.parts import known, part
from rewards.weighting import Policy, build, weightings

Degenerate = Literal["skip", "keep"]


class Trust(NamedTuple):
    """How far the judge counts, per row [B]."""

    gamma: Floats  # trust in the row's group
    coefficient: Floats  # weight of the thinking reward: gamma, annealed; 0 where it is skipped


def trust(
    outcome: Floats,
    thinking: Floats,
    group: Ints,
    *,
    step: int,
    total_steps: int,
    alpha: float = 0.3,
    threshold: float = 0.5,
    degenerate: Degenerate = "skip",
) -> Trust:
    """Trust and weight of the thinking reward [B]; gamma is 1 where the correct or the wrong have no verdict.

    skip: a group whose outcomes are all >= 0.9 or all <= 0.1 gets no thinking reward, for the judge would be the only
    signal; keep: it does. A missing outcome (ours) is neither correct nor wrong.
    """
    outcome, thinking = finite(outcome), finite(thinking)
    gamma, annealed = np.ones(len(outcome)), alpha * math.exp(-step / total_steps)
    coefficient = np.zeros(len(outcome))
    for rows in rows_of(group):
        o, t = outcome[rows], thinking[rows]
        gap = mean(t[o >= threshold]) - mean(t[o < threshold])
        gamma[rows] = math.exp(gap) if gap < 0 else 1.0  # a missing mean makes the gap NaN, which is not below 0
        known_outcomes = o[np.isfinite(o)]
        alike = bool((known_outcomes >= 0.9).all() or (known_outcomes <= 0.1).all())
        coefficient[rows] = 0.0 if alike and degenerate == "skip" else gamma[rows] * annealed
    return Trust(gamma, coefficient)


@part(weightings, "trust")
class TrustWeighting(Policy):
    """The column `thinking` weighs gamma alpha exp(-step / total), by `outcome` in its group; the others as `inner`.

    Both are shaped scores. Without `inner` every other column weighs 1. No state but the inner policy's. The paper has
    groups of 8 and 1500 steps.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        outcome: str,
        thinking: str,
        alpha: float = 0.3,
        threshold: float = 0.5,
        degenerate: Degenerate = "skip",
        inner: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(names)
        known((outcome,), self.names, "trust.outcome")
        known((thinking,), self.names, "trust.thinking")
        self.outcome, self.thinking = outcome, thinking
        self.alpha, self.threshold, self.degenerate = alpha, threshold, degenerate
        self.inner = build(inner or {"policy": "static"}, self.names, "trust.inner")
        self.needs, self.update_first, self.apart = self.inner.needs, self.inner.update_first, self.inner.apart
        self.steers_kl = self.inner.steers_kl

    def weigh(self, batch: StepBatch) -> Mix:
        mix = self.inner.weigh(batch)
        weights = np.broadcast_to(mix.weights, batch.scores.shape).copy()
        weights[:, batch.names.index(self.thinking)] = trust(
            batch.column(self.outcome),
            batch.column(self.thinking),
            batch.group,
            step=batch.step,
            total_steps=batch.total_steps,
            alpha=self.alpha,
            threshold=self.threshold,
            degenerate=self.degenerate,
        ).coefficient
        return replace(mix, weights=weights)

    def begin(self, validation: Mapping[str, float]) -> None:
        self.inner.begin(validation)

    def update(self, batch: StepBatch) -> dict[str, float]:
        return self.inner.update(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        self.inner.load_state_dict(state["inner"], allow_new_objectives=allow_new_objectives)
