"""Dynamic reward weighting: a scalar from the progress of the Pareto front, or weights from the agreement of gradients.

"Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", arXiv 2509.11452 [authors' code].
Ours: points are clipped at the reference, objectives have scales, the multiplier acts on the advantage (on the reward
it would cancel in the division by the group's spread), a floor of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from core.errors import UserError
from rewards.mixing import Mix, StepBatch, in_order
from rewards.numeric import Floats, softmax
from rewards.parts import known, part, restored
from rewards.weighting import Policy, build, weightings


def hypervolume(points: Floats, reference: Floats, maximise: Sequence[bool] | None = None) -> float:
    """Volume of the union over points [n, K] of the boxes between `reference` [K] and the point; 0 for no points.

    Minimised objectives are negated first. Points are clipped from below at the reference, so one that fails to beat it
    in some coordinate adds nothing. Points with a missing coordinate are left out. Exact, by slicing along the first
    dimension; meant for K <= 5 and a front of tens of points.
    """
    sign = _sign(maximise, len(reference))
    gains = np.maximum((np.reshape(points, (-1, len(reference))) - reference) * sign, 0.0)
    return _volume(gains[np.isfinite(gains).all(axis=1)])


def _volume(gains: Floats) -> float:
    if not gains.size:
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    gains = gains[np.argsort(-gains[:, 0], kind="stable")]
    ends = np.append(gains[1:, 0], 0.0)
    slices = zip(gains[:, 0], ends, range(1, len(gains) + 1), strict=True)
    return math.fsum((top - end) * _volume(gains[:count, 1:]) for top, end, count in slices if top > end)


def pareto_front(points: Floats, maximise: Sequence[bool] | None = None) -> list[int]:
    """Indices of the points [n, K] that no other dominates (is nowhere worse and somewhere better), in input order.

    Exact duplicates do not dominate each other, so both stay. A point with a missing coordinate is not on the front.
    """
    points = np.asarray(points, dtype=np.float64)
    if not points.size:
        return []
    signed = points * _sign(maximise, points.shape[1])
    known_rows = np.flatnonzero(np.isfinite(signed).all(axis=1))
    rivals = signed[known_rows]
    return [i for i in known_rows.tolist() if not _dominated(signed[i], rivals)]


def _dominated(point: Floats, rivals: Floats) -> bool:
    return bool(((rivals >= point).all(axis=1) & (rivals > point).any(axis=1)).any())


def _sign(maximise: Sequence[bool] | None, size: int) -> Floats:
    return np.array([1.0 if up else -1.0 for up in ([True] * size if maximise is None else maximise)])


def front_report(
    trajectory: Floats, reference: Floats, maximise: Sequence[bool] | None = None
) -> tuple[list[int], float, list[float]]:
    """How a run is compared: its trajectory of evaluations [T, K] -> (front, hypervolume, mean over the front [K]).

    The first index of the front is the evaluation at which the front is reached.
    """
    front = pareto_front(trajectory, maximise)
    best = np.asarray(trajectory, dtype=np.float64)[front]
    return front, hypervolume(best, reference, maximise), best.mean(axis=0).tolist() if front else []


class FrontProgress:
    """The multiplier m = base + gain tanh(max(dHV, 0)) of each evaluation: progress pays, standing still halves.

    dHV is what the point adds to the hypervolume of the archive, each objective divided by its scale (raw units would
    drive a length into tanh's flat part at once). A point that adds is archived, those it dominates leave. An
    evaluation with a missing value is ignored. m = 1 before the first. Without a reference the first evaluation is it.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        reference: Mapping[str, float] | None = None,
        minimise: Sequence[str] = (),
        scale: Mapping[str, float] | None = None,
        base: float = 0.5,
        gain: float = 1.5,
    ) -> None:
        self.names, self.base, self.gain = tuple(names), base, gain
        self.maximise = [name not in minimise for name in names]
        self.scale = dict(scale or {})
        self.reference = None if reference is None else {name: float(reference[name]) for name in names}
        self.archive: list[dict[str, float]] = []
        self.multiplier = 1.0

    def observe(self, evaluation: Mapping[str, float]) -> float:
        """Take in an evaluation, set the multiplier, and return dHV; NaN for one that is ignored."""
        point = {name: float(evaluation.get(name, math.nan)) for name in self.names}
        if not all(map(math.isfinite, point.values())):
            return math.nan
        if self.reference is None:
            self.reference = point
            return math.nan
        gain = self._volume([*self.archive, point]) - self._volume(self.archive)
        self.multiplier = self.base + self.gain * math.tanh(max(gain, 0.0))
        if gain > 0:
            table = np.array([in_order(p, self.names) for p in (*self.archive, point)])
            self.archive = [(*self.archive, point)[i] for i in pareto_front(table, self.maximise)]
        return gain

    @property
    def volume(self) -> float:
        """Hypervolume of the archive, in scaled units."""
        return self._volume(self.archive)

    def _volume(self, points: Sequence[Mapping[str, float]]) -> float:
        if self.reference is None:
            return 0.0
        units = np.array([self._unit(name) for name in self.names])
        table = np.array([in_order(point, self.names) for point in points]).reshape(-1, len(self.names))
        return hypervolume(table / units, in_order(self.reference, self.names) / units, self.maximise)

    def _unit(self, name: str) -> float:
        # What lies within [-1, 1] is taken for a bounded reward; others are measured by their own size (ours).
        own = abs(self.reference[name]) if self.reference else 1.0
        return self.scale.get(name, own if own > 1 else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Reference, archive and scales by name, and the multiplier."""
        return {
            "reference": self.reference,
            "archive": [dict(point) for point in self.archive],
            "multiplier": self.multiplier,
            "scale": {} if self.reference is None else {name: self._unit(name) for name in self.names},
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        reference = state["reference"]
        if reference is not None:
            reference = restored(reference, self.names, allow_new_objectives=allow_new_objectives)
            if len(reference) < len(self.names):
                return  # volumes of other dimensions say nothing about these: the front starts afresh
        self.reference = reference
        self.archive = [{name: point[name] for name in self.names} for point in state["archive"]]
        self.multiplier = state["multiplier"]
        self.scale |= {name: unit for name, unit in state["scale"].items() if name in self.names}


@part(weightings, "hypervolume")
class Hypervolume(Policy):
    """Fixed preferences (`inner`, static by default), and a multiplier of the advantages by the front's progress.

    objectives: whose validation means make a point, all by default; `minimise` names those where less is better.
    reference: the initial model's means, the first evaluation by default. scale: units, by default 1, or |reference|
    where that exceeds 1. Between evaluations the multiplier holds.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        inner: Mapping[str, Any] | None = None,
        objectives: tuple[str, ...] | None = None,
        reference: Mapping[str, float] | None = None,
        minimise: tuple[str, ...] = (),
        scale: Mapping[str, float] | None = None,
        base: float = 0.5,
        gain: float = 1.5,
    ) -> None:
        super().__init__(names)
        self.inner = build(inner or {"policy": "static"}, self.names, "hypervolume.inner")
        self.needs, self.apart = self.inner.needs | {"validation"}, self.inner.apart
        self.steers_kl = self.inner.steers_kl
        if self.inner.update_first:
            raise UserError("hypervolume.inner: it must be a policy that learns after use, as the multiplier does")
        chosen = self.names if objectives is None else objectives
        for option, given in {"reference": reference, "minimise": minimise, "scale": scale}.items():
            known(given or (), chosen, f"hypervolume.{option}")
        if reference is not None and set(reference) != set(chosen):
            raise UserError(f"hypervolume.reference: it needs a value for each of {', '.join(chosen)}")
        options: dict[str, Any] = {"minimise": minimise, "scale": scale, "base": base, "gain": gain}
        self.front = FrontProgress(chosen, reference=reference, **options)

    def weigh(self, batch: StepBatch) -> Mix:
        mix = self.inner.weigh(batch)
        return replace(mix, scale=mix.scale * self.front.multiplier)

    def begin(self, validation: Mapping[str, float]) -> None:
        self.inner.begin(validation)
        if self.front.reference is None:
            self.front.observe(validation)

    def update(self, batch: StepBatch) -> dict[str, float]:
        found = self.inner.update(batch)
        if batch.validation is not None:
            self.front.observe(batch.validation)
        return found | {"weighting/progress": self.front.multiplier, "weighting/hypervolume": self.front.volume}

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "front": self.front.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        self.inner.load_state_dict(state["inner"], allow_new_objectives=allow_new_objectives)
        self.front.load_state_dict(state["front"], allow_new_objectives=allow_new_objectives)


def influence(gram: Floats) -> Floats:
    """I_k = <g_k, sum_j g_j> [K], itself included: the row sums of the Gram matrix [K, K] of the gradients."""
    return np.asarray(np.asarray(gram, dtype=np.float64).sum(axis=1))


@part(weightings, "gradient")
class Gradient(Policy):
    """Objectives whose policy gradient agrees with the sum of all gain weight; update before use.

    w_k <- w_k exp(eta I_k / mu) / sum_j w_j exp(eta I_j / mu), eta the actor's learning rate, I from `influence`.
    every n: the influences of n steps are averaged, a step with a non-finite one skipped as a whole; none left: no
    update. min_weight f (ours): w <- (1 - K f) w + f, else a saturated objective fades without a floor.
    """

    needs = frozenset({"gram"})
    update_first = True

    def __init__(
        self,
        names: Sequence[str],
        *,
        mu: float = 1e-5,
        every: int = 1,
        min_weight: float = 0.0,
        init: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(names)
        known(init or {}, self.names, "gradient.init")
        if not 0 <= min_weight * len(self.names) <= 1:
            raise UserError(f"gradient.min_weight: {min_weight} for each of {len(self.names)} objectives exceeds 1")
        self.mu, self.every, self.min_weight = mu, every, min_weight
        self.weights = dict.fromkeys(self.names, 1 / max(len(self.names), 1)) | dict(init or {})
        self.sums = dict.fromkeys(self.names, 0.0)
        self.used = self.steps = 0

    def weigh(self, batch: StepBatch) -> Mix:
        return Mix(weights=self.row(self.weights, batch))

    def update(self, batch: StepBatch) -> dict[str, float]:
        self.check(batch)
        if batch.gram is None:
            raise ValueError("gradient weighting needs the Gram matrix of the objectives' gradients with every batch")
        current = influence(batch.gram)
        self.steps += 1
        if np.isfinite(current).all():
            self.used += 1
            for name, value in zip(batch.names, current.tolist(), strict=True):
                self.sums[name] += value
        if self.steps % self.every == 0:
            self._step(batch.lr)
        return {f"weighting/influence/{n}": v for n, v in zip(batch.names, current.tolist(), strict=True)}

    def _step(self, lr: float) -> None:
        if self.used:
            average = in_order(self.sums, self.names) / self.used
            with np.errstate(divide="ignore"):  # a weight that has become 0 stays 0
                new = softmax(np.log(in_order(self.weights, self.names)) + lr * average / self.mu)
            new = (1 - len(new) * self.min_weight) * new + self.min_weight
            self.weights = dict(zip(self.names, new.tolist(), strict=True))
        self.sums, self.used = dict.fromkeys(self.names, 0.0), 0

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "sums": dict(self.sums), "used": self.used, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        self.weights |= restored(state["weights"], self.names, allow_new_objectives=allow_new_objectives)
        self.sums |= restored(state["sums"], self.names, allow_new_objectives=allow_new_objectives)
        self.used, self.steps = state["used"], state["steps"]
