"""Cheap weighting policies, good as baselines: by spread, by the worst objective, by the objective left behind.

cv: SAW, arXiv 2606.07705 [authors' code]; softmin: RVPO, arXiv 2605.05750 [rebuilt]; tchebycheff and covariance: the
repository of CTWA, arXiv 2602.06869 [authors' code].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import UserError
from rewards.mixing import Mix, Order, StepBatch, compose
from rewards.numeric import Floats, Ints, finite, mean, rows_of, std
from rewards.parts import known, part, restored
from rewards.weighting import Policy, weightings


def variation(scores: Floats, *, offsets: Sequence[float] | None = None, eps: float = 1e-8) -> tuple[Floats, Floats]:
    """Coefficients of variation cv_k = std_k / (|mean_k| + eps) and weights K cv_k / (sum cv + eps), both [K].

    `offsets` are added to the columns of `scores` [B, K] first, which they must make non-negative. std is n - 1.
    Constant columns get 0; all constant: all 0; a column without scores: 0.
    """
    columns = (finite(scores) + np.asarray(0.0 if offsets is None else offsets)).T
    cv = np.nan_to_num([std(column) / (abs(mean(column)) + eps) for column in columns])
    return cv, len(cv) * cv / (cv.sum() + eps)


@part(weightings, "cv")
class Variation(Policy):
    """Weights by each objective's coefficient of variation in the batch: what is constant does not count. Stateless."""

    def __init__(self, names: Sequence[str], *, offsets: Mapping[str, float] | None = None, eps: float = 1e-8) -> None:
        super().__init__(names)
        known(offsets or {}, self.names, "cv.offsets")
        self.offsets, self.eps = dict.fromkeys(self.names, 0.0) | dict(offsets or {}), eps

    def weigh(self, batch: StepBatch) -> Mix:
        offsets = self.row(self.offsets, batch)
        return Mix(weights=variation(batch.scores, offsets=offsets.tolist(), eps=self.eps)[1])


@part(weightings, "softmin")
class SoftMin(Policy):
    """The soft minimum of the normalised columns: 0 is their mean, a large `sharpness` their minimum. Stateless."""

    apart = True

    def __init__(
        self, names: Sequence[str], *, sharpness: float = 1.0, weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(names)
        known(weights or {}, self.names, "softmin.weights")
        if sharpness < 0 or min((weights or {}).values(), default=0.0) < 0:
            raise UserError("softmin: the soft minimum takes no negative sharpness and no negative weights")
        self.sharpness = sharpness
        self.weights = dict.fromkeys(self.names, 1.0) | dict(weights or {})

    def weigh(self, batch: StepBatch) -> Mix:
        order: Order = "normalize_then_sum"
        return Mix(weights=self.row(self.weights, batch), order=order, reduce="softmin", sharpness=self.sharpness)


@part(weightings, "tchebycheff")
class Tchebycheff(Policy):
    """-max_k w_k (z_k - S_k): the worst objective decides, z the best score ever seen, this batch included.

    weights: 1 / K by default. State: z by name.
    """

    update_first = True

    def __init__(self, names: Sequence[str], *, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(names)
        known(weights or {}, self.names, "tchebycheff.weights")
        self.weights = dict.fromkeys(self.names, 1 / max(len(self.names), 1)) | dict(weights or {})
        self.ideal: dict[str, float] = {}  # objectives without any score so far are not in it

    def weigh(self, batch: StepBatch) -> Mix:
        ideal = np.array([self.ideal.get(name, math.nan) for name in batch.names])
        return Mix(weights=self.row(self.weights, batch), reduce="tchebycheff", ideal=ideal)

    def update(self, batch: StepBatch) -> dict[str, float]:
        self.check(batch)
        for name, column in zip(batch.names, finite(batch.scores).T, strict=True):
            there = column[np.isfinite(column)]
            if there.size:
                self.ideal[name] = max(self.ideal.get(name, -math.inf), float(there.max()))
        return {f"weighting/ideal/{name}": value for name, value in self.ideal.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"ideal": {name: self.ideal.get(name) for name in self.names}}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        saved = restored(state["ideal"], self.names, allow_new_objectives=allow_new_objectives)
        self.ideal = {name: value for name, value in saved.items() if value is not None}


def agreement(scores: Floats, advantages: Floats, group: Ints, *, use_corr: bool = True) -> Floats:
    """Mean over groups of each column's correlation (or covariance, / n) with the advantages [B] in the group: [K].

    Over rows that have both. A correlation without spread is left out of the mean, as in the authors' code; NaN if that
    leaves none (there it is 0, which would be taken for a measurement).
    """
    found: list[list[float]] = [[] for _ in range(scores.shape[1])]
    for rows in rows_of(group):
        for k, column in enumerate(scores[rows].T):
            both = np.isfinite(column) & np.isfinite(advantages[rows])
            x, a = column[both], advantages[rows][both]
            if len(x) < 2:
                continue
            covariance = float(((x - mean(x)) * (a - mean(a))).mean())
            spread = std(x, 0) * std(a, 0)
            if not use_corr or spread > 0:
                found[k].append(covariance / spread if use_corr else covariance)
    return np.array([mean(np.array(values)) for values in found])


@part(weightings, "covariance")
class Covariance(Policy):
    """CTWA: an objective whose agreement with the composite advantage is below its target gains weight.

    ema_k <- (1 - tau) ema_k + tau v_k, v from `agreement` (the first value starts it); log w_k += lr max(0, target_k -
    ema_k), after use. Weights only grow; sum_then_normalize makes their common size irrelevant.
    The authors measure against the clipped weight of the update, we against the advantage. State: log w, ema by name.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        targets: Mapping[str, float],
        init: Mapping[str, float] | None = None,
        lr: float = 0.05,
        tau: float = 0.1,
        use_corr: bool = True,
    ) -> None:
        super().__init__(names)
        known(targets, self.names, "covariance.targets")
        known(init or {}, self.names, "covariance.init")
        start = dict.fromkeys(self.names, 1 / max(len(self.names), 1)) | dict(init or {})
        # An objective without a target never gains.
        self.targets = dict.fromkeys(self.names, -math.inf) | dict(targets)
        self.log_weights = {name: math.log(max(weight, 1e-8)) for name, weight in start.items()}
        self.ema: dict[str, float] = {}  # objectives that have never been measured are not in it
        self.lr, self.tau, self.use_corr = lr, tau, use_corr

    def weigh(self, batch: StepBatch) -> Mix:
        return Mix(weights=self.row({name: math.exp(value) for name, value in self.log_weights.items()}, batch))

    def update(self, batch: StepBatch) -> dict[str, float]:
        scores = finite(batch.scores)
        advantages, _ = compose(batch, self.weigh(batch))
        advantages[~np.isfinite(scores).any(axis=1)] = np.nan  # an unscorable row has no part in any baseline
        values = agreement(scores, advantages, batch.group, use_corr=self.use_corr)
        for name, value in zip(batch.names, values.tolist(), strict=True):
            if math.isfinite(value):  # what was not measured stays as it is
                self.ema[name] = (1 - self.tau) * self.ema[name] + self.tau * value if name in self.ema else value
                self.log_weights[name] += self.lr * max(0.0, self.targets[name] - self.ema[name])
        return {f"weighting/agreement/{name}": value for name, value in self.ema.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"log_weights": dict(self.log_weights), "ema": {name: self.ema.get(name) for name in self.names}}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        fits = {"allow_new_objectives": allow_new_objectives}
        self.log_weights |= restored(state["log_weights"], self.names, **fits)
        self.ema = {name: v for name, v in restored(state["ema"], self.names, **fits).items() if v is not None}
