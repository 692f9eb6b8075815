"""RECAP: weigh objectives by whether they still move, so that what is learnt fades and what slips comes back.

"Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large Reasoning Models", arXiv 2510.21978 [paper,
pseudo-code]; the guards and the map from rewards to losses are ours. Meant for several kinds of data trained together,
the new task beside replayed general data.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from core.errors import UserError
from rewards.mixing import Mix, StepBatch, in_order
from rewards.numeric import Floats, sigmoid, softmax
from rewards.parts import known, part, restored
from rewards.weighting import Policy, weightings

Center = Literal["own", "current"]


class Movement(NamedTuple):
    """How a loss moves over its window."""

    convergence: float  # older half's mean over newer half's mean; above 1: still improving
    instability: float  # spread over the sum of both means


def movement(losses: Floats, *, center: Center = "own", eps: float = 1e-8, c_max: float = 10.0) -> Movement:
    """Convergence c = older / newer and instability i = sigma / (older + newer) of a window of 2W losses.

    sigma^2 = sum (l - m)^2 / (2W - 1), m the window's own mean (pseudo-code) or the `current`, newer half's (text).
    Guards: older + newer <= eps: c = 1, i = 0; else newer <= eps: c = c_max; c is at most c_max.
    """
    half = len(losses) // 2
    older, newer = float(np.mean(losses[:half])), float(np.mean(losses[half:]))
    if older + newer <= eps:
        return Movement(1.0, 0.0)
    about = float(np.mean(losses)) if center == "own" else newer
    sigma = math.sqrt(float(((losses - about) ** 2).sum()) / (len(losses) - 1))
    return Movement(c_max if newer <= eps else min(older / newer, c_max), sigma / (older + newer))


@part(weightings, "recap")
class Recap(Policy):
    """lambda = K softmax((convergence + instability) / temperature) over windows of 2 x `window` losses; update first.

    The loss of an objective is 1 - mean reward, and 1 - sigmoid(mean reward) for those named in `unbounded`; surrogate
    losses are near 0 by construction and useless here. lambda = 1 for all until every window is full. A missing loss is
    not pushed. Columns are normalised first, then summed. Raises UserError for a negative loss: shape such a reward
    into [0, 1], or name it unbounded.
    """

    update_first = True
    apart = True

    def __init__(
        self,
        names: Sequence[str],
        *,
        window: int = 10,
        temperature: float = 5.0,
        center: Center = "own",
        eps: float = 1e-8,
        c_max: float = 10.0,
        unbounded: tuple[str, ...] = (),
    ) -> None:
        super().__init__(names)
        known(unbounded, self.names, "recap.unbounded")
        self.size, self.temperature, self.unbounded = 2 * window, temperature, unbounded
        self.center, self.eps, self.c_max = center, eps, c_max
        self.losses: dict[str, deque[float]] = {name: deque(maxlen=self.size) for name in self.names}
        self.weights = dict.fromkeys(self.names, 1.0)
        self.steps = 0

    def weigh(self, batch: StepBatch) -> Mix:
        return Mix(weights=self.row(self.weights, batch), order="normalize_then_sum")

    def update(self, batch: StepBatch) -> dict[str, float]:
        self.check(batch)
        means = batch.means()
        losses = {n: 1 - (float(sigmoid(m)) if n in self.unbounded else m) for n, m in means.items()}
        moved = self.push(losses)
        found = {}
        for name, move in moved.items():
            found[f"weighting/convergence/{name}"] = move.convergence
            found[f"weighting/instability/{name}"] = move.instability
        return found

    def push(self, losses: Mapping[str, float]) -> dict[str, Movement]:
        """Take in one step's losses by name and set the weights; the movements, empty while a window is filling."""
        self.steps += 1
        for name, loss in losses.items():
            if loss < -1e-9:  # less is the rounding of a mean of ones
                raise UserError(f"recap: the loss of '{name}' is {loss}; rewards must be in [0, 1], or `unbounded`")
            if math.isfinite(loss):
                self.losses[name].append(max(0.0, float(loss)))
        if any(len(window) < self.size for window in self.losses.values()):
            return {}
        options: dict[str, Any] = {"center": self.center, "eps": self.eps, "c_max": self.c_max}
        moved = {name: movement(np.array(window), **options) for name, window in self.losses.items()}
        scores = in_order({n: m.convergence + m.instability for n, m in moved.items()}, self.names)
        new = len(self.names) * softmax(scores / self.temperature)
        self.weights = dict(zip(self.names, new.tolist(), strict=True))
        return moved

    def state_dict(self) -> dict[str, Any]:
        losses = {name: list(window) for name, window in self.losses.items()}
        return {"losses": losses, "weights": dict(self.weights), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        losses = restored(state["losses"], self.names, allow_new_objectives=allow_new_objectives)
        self.losses |= {name: deque(window, maxlen=self.size) for name, window in losses.items()}
        self.weights |= restored(state["weights"], self.names, allow_new_objectives=allow_new_objectives)
        self.steps = state["steps"]
