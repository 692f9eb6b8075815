"""Constrained reward mixing: hold each objective at a threshold by a multiplier instead of maximising a fixed sum.

"Confronting Reward Model Overoptimization with Constrained RLHF", arXiv 2310.04373 [paper and authors' code]; the
group-relative form is ours. N constraints with raw multipliers lambda_i, weights w_i = s(lambda_i), thresholds theta_i,
measured means v_i, task advantage A_0 (of -KL to the reference) and constraint advantages A_i:

    mu   max v_KL   s.t. v_i >= theta_i   s = sigmoid   A = (N - sum w) A_0 + sum w_i A_i
    xi   max v_KL   s.t. v_i  = theta_i   s = tanh      the same; above its threshold a weight is negative
    all  max sum v  s.t. v_i <= theta_i   s = sigmoid   A = (N - sum w) sum A_i - sum w_i A_i
    projected       v_i >= or <= theta_i  lambda_i in [0, cap]      A = A_0 + sum lambda_i A_i, A_0 of the other columns

`rescale` divides the first three by N (ours), so that clip range and learning rate keep their meaning when objectives
are added. There is no critic, so v_i is the mean of the batch, once per optimiser step; weights used for a batch are
those before its update. There must be no other KL term in the loss, unless `kl_coef` puts the task there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from core.errors import UserError
from rewards.mixing import Mix, StepBatch
from rewards.numeric import Floats, Ints, finite, group_normalised, mean, sigmoid
from rewards.parts import known, part, restored
from rewards.weighting import Policy, weightings

Kind = Literal["mu", "xi", "all", "projected"]
Sense = Literal[">=", "<="]

KL = "-kl"  # the name of the KL's own constraint, whose value is minus the KL
SLOW = 10.0  # beyond it tanh' and sigmoid' have vanished: the multiplier takes long to turn around


def squashed(raw: Floats, kind: Kind) -> Floats:
    """Weights w = s(lambda): sigmoid for mu and all, tanh for xi, lambda itself for projected."""
    if kind == "projected":
        return raw.copy()
    return np.tanh(raw) if kind == "xi" else sigmoid(raw)


def gradient(raw: Floats, means: Floats, thresholds: Floats, kind: Kind) -> Floats:
    """d/d lambda of sum_i s(lambda_i) (v_i - theta_i), sign flipped for all; 0 where the mean is missing [N].

    s' = s (1 - s) for the sigmoid, 1 - s^2 for tanh. A violated constraint has a negative gradient: its weight rises.
    """
    s = squashed(raw, kind)
    slope = 1 - s**2 if kind == "xi" else s * (1 - s)
    violation = np.where(np.isfinite(means), means - thresholds, 0.0)
    return np.asarray(slope * (-violation if kind == "all" else violation))


def dual_ascent(
    raw: Floats, means: Floats, thresholds: Floats, senses: Sequence[Sense], *, lr: float, cap: float | None
) -> Floats:
    """lambda_i <- clip(lambda_i + lr (theta_i - v_i), 0, cap) for >=, reversed for <=; as it was where v is missing."""
    sign = np.array([1.0 if sense == ">=" else -1.0 for sense in senses])
    moved = np.clip(raw + lr * sign * (thresholds - means), 0.0, math.inf if cap is None else cap)
    return np.where(np.isfinite(means), moved, raw)


def mix_constrained(task: Floats, constraints: Floats, weights: Floats, kind: Kind, *, rescale: bool = True) -> Floats:
    """Advantages [B] from task advantages [B] (ignored by all), constraint advantages [B, N] and weights [N].

    The formulas are above; `rescale` divides by N, except for projected.
    """
    share, pull = len(weights) - weights.sum(), constraints @ weights
    if kind == "projected":
        return np.asarray(task + pull)
    mixed = share * constraints.sum(axis=1) - pull if kind == "all" else share * task + pull
    return np.asarray(mixed / len(weights) if rescale else mixed)


def constraint_columns(
    scores: Floats, kl: Floats, group: Ints, *, eps: float = 1e-4, by_std: bool = True
) -> tuple[Floats, Floats]:
    """Task advantages [B] of -kl [B] and constraint advantages [B, N] of the scores, each normalised in its group.

    Missing entries are 0. A row that lacks every score is out of the KL's mean and spread too (ours). `by_std` False
    subtracts the mean only: a small spread of the KL is then not blown up to full size; columns should have known
    ranges. `compose` does the same with the policy's Mix.
    """
    scores = finite(scores)
    task = np.where(np.isfinite(scores).any(axis=1), -finite(kl), np.nan)
    columns = [group_normalised(column, group, eps=eps, by_std=by_std) for column in (task, *scores.T)]
    task, *constraints = (np.nan_to_num(column) for column in columns)
    return task, np.column_stack(constraints)


class AdaptiveKl:
    """A KL coefficient that is steered to a target.

    e = clip((KL - target) / target, -clip, clip);  coef <- coef (1 + rate e);  without a target it stays.
    The authors' controller [code]: init 0.2, target 0.5.
    """

    def __init__(self, *, init: float = 0.2, target: float | None = None, rate: float = 0.1, clip: float = 0.2) -> None:
        self.coef, self.target, self.rate, self.clip = init, target, rate, clip

    def update(self, kl: float) -> float:
        """Take in a measured KL, and return the coefficient after it; a missing KL changes nothing."""
        if self.target is not None and math.isfinite(kl):
            error = min(max((kl - self.target) / self.target, -self.clip), self.clip)
            self.coef *= 1 + self.rate * error
        return self.coef

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coef = state["coef"]


class Multipliers:
    """The raw multipliers of N constraints, by name, and how they learn.

    mu, xi, all: SGD on L(lambda), as in the vectors: g <- g min(1, max_grad_norm / (|g| + 1e-6)); buf <- g at the very
    first update, then momentum buf + g; lambda <- lambda - lr buf. projected: `dual_ascent`. Defaults are those of the
    released configuration, lambda starts at 0 (sigmoid: weight 0.5, tanh: 0); projected: lr 0.01, no cap.

    proportional k (projected): the weight is clip(lambda + k e, 0, cap), e the latest violation. Ascent alone answers
    late and then overshoots; this is the P of Stooke et al., "Responsive Safety in Reinforcement Learning by PID
    Lagrangian Methods", arXiv 2007.03964 [paper]. smoothing s: e <- s e + (1 - s) (the violation of the step).
    """

    def __init__(
        self,
        names: Sequence[str],
        kind: Kind,
        *,
        init: Mapping[str, float] | None = None,
        lr: float | None = None,
        momentum: float = 0.1,
        max_grad_norm: float | None = 0.5,
        cap: float | None = None,
        senses: Mapping[str, Sense] | None = None,
        proportional: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        self.names, self.kind = tuple(names), kind
        self.proportional, self.smoothing = proportional, smoothing
        self.violation = np.zeros(len(self.names))  # latest, smoothed; below 0 where there is room
        self.lr = (0.01 if kind == "projected" else 0.1) if lr is None else lr
        self.momentum, self.max_grad_norm, self.cap = momentum, max_grad_norm, cap
        self.senses: tuple[Sense, ...] = tuple((senses or {}).get(name, ">=") for name in names)
        self.raw = np.array([(init or {}).get(name, 0.0) for name in names], dtype=np.float64)
        self.buffer: Floats | None = None

    def weights(self) -> dict[str, float]:
        """The weight of each constraint."""
        raw = self.raw
        if self.proportional:
            raw = np.clip(raw + self.proportional * self.violation, 0.0, math.inf if self.cap is None else self.cap)
        return dict(zip(self.names, squashed(raw, self.kind).tolist(), strict=True))

    def update(self, means: Mapping[str, float], thresholds: Mapping[str, float]) -> None:
        """One step from the measured means; a missing one has no gradient, but momentum still acts.

        Raises FloatingPointError if a multiplier is not finite afterwards.
        """
        v = np.array([means.get(name, math.nan) for name in self.names], dtype=np.float64)
        theta = np.array([thresholds[name] for name in self.names], dtype=np.float64)
        if self.kind == "projected":
            self.raw = dual_ascent(self.raw, v, theta, self.senses, lr=self.lr, cap=self.cap)
            sign = np.array([1.0 if sense == ">=" else -1.0 for sense in self.senses])
            new = self.smoothing * self.violation + (1 - self.smoothing) * sign * (theta - v)
            self.violation = np.where(np.isfinite(v), new, self.violation)
        else:
            g = gradient(self.raw, v, theta, self.kind)
            if self.max_grad_norm is not None:
                g = g * min(1.0, self.max_grad_norm / (float(np.linalg.norm(g)) + 1e-6))
            self.buffer = g if self.buffer is None else self.momentum * self.buffer + g
            self.raw = self.raw - self.lr * self.buffer
        if not np.isfinite(self.raw).all():
            raise FloatingPointError(f"weighting: the multipliers of {self.names} are not finite: {self.raw.tolist()}")

    def state_dict(self) -> dict[str, Any]:
        buffer = None if self.buffer is None else dict(zip(self.names, self.buffer.tolist(), strict=True))
        violation = dict(zip(self.names, self.violation.tolist(), strict=True))
        return {"raw": dict(zip(self.names, self.raw.tolist(), strict=True)), "buffer": buffer, "violation": violation}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        fits = {"allow_new_objectives": allow_new_objectives}
        raw = restored(state["raw"], self.names, **fits)
        self.raw = np.array([raw.get(name, old) for name, old in zip(self.names, self.raw.tolist(), strict=True)])
        violation = restored(state["violation"], self.names, **fits)
        self.violation = np.array([violation.get(name, 0.0) for name in self.names])
        buffer = None if state["buffer"] is None else restored(state["buffer"], self.names, **fits)
        self.buffer = None if buffer is None else np.array([buffer.get(name, 0.0) for name in self.names])


@part(weightings, "lagrange")
class Lagrange(Policy):
    """Multipliers hold every objective with a threshold there; the task is a small KL, or the other objectives.

    kind: mu (at least the threshold), xi (at it), all (at most it), projected (lambda >= 0, `senses` per objective).
    thresholds: by name, compared with the batch means of `measure`: shaped scores, raw ones, or validation means (then
    multipliers learn on evaluation steps only). task_weights: weights of the task's columns; for projected 1 for each
    objective without a threshold. kl_budget d: instead of being the task the KL is one more constraint, v_KL >= -d.
    kl_mean: KL per token; the sum rewards short completions. kl_coef: the KL stays in the loss with this coefficient
    (times (N - sum w) / N for mu and xi, whose task column then goes); kl_target adapts it (`AdaptiveKl`).
    proportional, smoothing: an answer to the violation itself (projected; `Multipliers`).
    Raises UserError for thresholds of unknown objectives and options that do not go together.
    """

    apart = True

    def __init__(
        self,
        names: Sequence[str],
        *,
        thresholds: Mapping[str, float],
        kind: Kind = "xi",
        lr: float | None = None,
        momentum: float = 0.1,
        max_grad_norm: float | None = 0.5,
        init: Mapping[str, float] | None = None,
        rescale: bool = True,
        by_std: bool = True,
        measure: Literal["scores", "raw", "validation"] = "scores",
        task_weights: Mapping[str, float] | None = None,
        kl_budget: float | None = None,
        kl_mean: bool = False,
        kl_coef: float | None = None,
        kl_target: float | None = None,
        cap: float | None = None,
        senses: Mapping[str, Sense] | None = None,
        proportional: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(names)
        for option, given in {"thresholds": thresholds, "task_weights": task_weights, "senses": senses}.items():
            known(given or {}, self.names, f"lagrange.{option}")
        self.kind, self.rescale, self.by_std, self.measure, self.kl_mean = kind, rescale, by_std, measure, kl_mean
        self.thresholds = dict(thresholds) | ({} if kl_budget is None else {KL: -kl_budget})
        known(init or {}, tuple(self.thresholds), "lagrange.init")
        free = {name: 1.0 for name in self.names if kind == "projected" and name not in thresholds}
        self.task_weights = free | dict(task_weights or {})
        options = {"init": init, "lr": lr, "momentum": momentum, "max_grad_norm": max_grad_norm, "cap": cap}
        options |= {"proportional": proportional, "smoothing": smoothing}
        self.multipliers = Multipliers(tuple(self.thresholds), kind, senses=senses, **options)  # type: ignore[arg-type]
        self.kl = None if kl_coef is None else AdaptiveKl(init=kl_coef, target=kl_target)
        self.steers_kl = self.kl is not None
        self._kl_is_task = kind in ("mu", "xi") and kl_budget is None
        self._check(kl_budget, kl_target, senses)
        uses_kl = (self._kl_is_task and self.kl is None) or kl_budget is not None or kl_target is not None
        self.needs = frozenset(n for n, used in {"kl": uses_kl, "validation": measure == "validation"}.items() if used)

    def _check(self, kl_budget: float | None, kl_target: float | None, senses: Mapping[str, Sense] | None) -> None:
        idle = [n for n in self.names if n not in self.thresholds and n not in self.task_weights]
        wrong = {
            "thresholds: none is given": not self.thresholds,
            "kl_budget: with 'all' the task is the sum of all objectives, which a KL is no part of": (
                kl_budget is not None and self.kind == "all"
            ),
            "kl_target: it steers kl_coef, which is not given": kl_target is not None and self.kl is None,
            "kl_coef: the KL is a constraint already (kl_budget)": kl_budget is not None and self.kl is not None,
            "senses: only 'projected' has them": bool(senses) and self.kind != "projected",
            "proportional: only 'projected' has it": self.multipliers.proportional != 0 and self.kind != "projected",
            "task_weights: the task is the KL (mu, xi without kl_budget) or all objectives (all)": (
                bool(self.task_weights) and (self._kl_is_task or self.kind == "all")
            ),
            f"thresholds: {', '.join(idle)} has none, and no task weight, so it would not count": bool(idle),
        }
        for problem, is_wrong in wrong.items():
            if is_wrong:
                raise UserError(f"lagrange.{problem}")

    def weigh(self, batch: StepBatch) -> Mix:
        w = self.multipliers.weights()
        share, size = len(w) - sum(w.values()), len(w) if self.rescale and self.kind != "projected" else 1
        task, kl_coef = w.get(KL, 0.0) / size, None if self.kl is None else self.kl.coef
        if self.kind == "all":
            weights = {name: (share - w[name]) / size for name in self.names}
        elif self.kind == "projected":
            sign = {n: 1.0 if s == ">=" else -1.0 for n, s in zip(w, self.multipliers.senses, strict=True)}
            weights = {n: self.task_weights.get(n, 0.0) + sign.get(n, 1.0) * w.get(n, 0.0) for n in self.names}
        else:
            weights = {n: (self.task_weights.get(n, 0.0) * share + w.get(n, 0.0)) / size for n in self.names}
            if self._kl_is_task:
                task, kl_coef = (share / size, None) if self.kl is None else (0.0, self.kl.coef * share / size)
        return Mix(
            weights=self.row(weights, batch),
            task=task,
            kl_mean=self.kl_mean,
            order="normalize_then_sum",
            whiten=False,  # it would undo the meaning of small weights
            by_std=self.by_std,
            kl_coef=kl_coef,
        )

    def update(self, batch: StepBatch) -> dict[str, float]:
        means, names = self._means(batch), self.multipliers.names
        if means is not None:
            self.multipliers.update(means, self.thresholds)
        if self.kl is not None:
            self.kl.update(_mean_kl(batch, self.kl_mean))
        found = {f"weighting/multiplier/{n}": v for n, v in zip(names, self.multipliers.raw.tolist(), strict=True)}
        found |= {f"weighting/threshold/{name}": value for name, value in self.thresholds.items()}
        found |= {f"weighting/measured/{n}": means[n] for n in names if means and math.isfinite(means.get(n, math.nan))}
        found["weighting/slow"] = float((np.abs(self.multipliers.raw) > SLOW).sum())
        return found | ({} if self.kl is None else {"weighting/kl_coef": self.kl.coef})

    def _means(self, batch: StepBatch) -> dict[str, float] | None:
        """What the thresholds are compared with; none on a step that did not measure."""
        if self.measure == "validation":
            if batch.validation is None:
                return None
            means = dict(batch.validation)
        else:
            table = finite(batch.scores if self.measure == "scores" else batch.raw)
            means = {name: mean(column) for name, column in zip(batch.names, table.T, strict=True)}
        return means | ({KL: -_mean_kl(batch, self.kl_mean)} if KL in self.thresholds else {})

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """New thresholds, from a search; multipliers go on from where they are. Raises UserError for unknown names."""
        known(thresholds, tuple(self.thresholds), "thresholds")
        self.thresholds |= thresholds

    def state_dict(self) -> dict[str, Any]:
        kl = None if self.kl is None else self.kl.state_dict()
        return {"multipliers": self.multipliers.state_dict(), "thresholds": dict(self.thresholds), "kl": kl}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        self.multipliers.load_state_dict(state["multipliers"], allow_new_objectives=allow_new_objectives)
        names = tuple(self.thresholds)
        self.thresholds |= restored(state["thresholds"], names, allow_new_objectives=allow_new_objectives)
        if self.kl is not None and state["kl"] is not None:
            self.kl.load_state_dict(state["kl"])


def _mean_kl(batch: StepBatch, per_token: bool) -> float:
    if batch.kl is None:
        return math.nan
    return mean(finite(batch.kl) / (np.maximum(batch.lengths, 1) if per_token else 1))
