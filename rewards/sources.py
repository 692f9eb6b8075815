"""How often each source of prompts is sampled, or how much its examples weigh: mixers with state.

A mixer has `probabilities` (DreamPRM: `weights`) by source name, and `update` once a step. Sources d = 1 .. D.

DGA: "Dynamic Gradient Alignment", arXiv 2410.02498 [rebuilt]. ScaleBiO, arXiv 2406.19976, and
DreamPRM, arXiv 2505.20241 [authors' code].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from core.errors import UserError
from core.registry import Registry
from rewards.mixing import in_order
from rewards.numeric import Floats, finite, softmax
from rewards.parts import known, part, restored

mixers = Registry("source mixer")


class SourceMixer(Protocol):
    """The life of a mixer: made of the sources' names, updated once a step, on one process."""

    probabilities: dict[str, float]

    def update(self, signal: Mapping[str, float]) -> dict[str, float]:
        """Take in one number per source (each mixer says which) and return metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON keyed by source."""

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        """Go on from a saved state. Raises UserError if it is of other sources, unless those are allowed."""


def alignment(source_gradients: Floats, target_gradient: Floats) -> Floats:
    """a_d = <g_d, g_target> [D] of the sources' mean gradients [D, n] with that of the small target set [n]."""
    return np.asarray(np.asarray(source_gradients, dtype=np.float64) @ np.asarray(target_gradient, dtype=np.float64))


@part(mixers, "dga")
class Dga:
    """Sources whose gradient agrees with the target's are sampled more: p^ ~ p exp(eta a), p <- (1 - beta) p + beta p^.

    The signal is `alignment`; a cheap one without gradients (ours) is the gain of the validation reward, or the mean
    |A| of the source. floor f (ours): p <- (1 - D f) p + f, else a source may vanish. Only every `every`-th update
    acts; one with a missing or non-finite signal is skipped.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        eta: float = 0.5,
        beta: float = 0.2,
        floor: float = 0.0,
        every: int = 1,
        init: Mapping[str, float] | None = None,
    ) -> None:
        known(init or {}, names, "dga.init")
        if not 0 <= floor * len(names) <= 1:
            raise UserError(f"dga.floor: {floor} for each of {len(names)} sources exceeds 1")
        self.names, self.eta, self.beta, self.floor, self.every = tuple(names), eta, beta, floor, every
        self.probabilities = dict.fromkeys(names, 1 / max(len(names), 1)) | dict(init or {})
        self.steps = 0

    def update(self, signal: Mapping[str, float]) -> dict[str, float]:
        self.steps += 1
        a = finite([signal.get(name, math.nan) for name in self.names])
        if self.steps % self.every == 0 and np.isfinite(a).all():
            p = in_order(self.probabilities, self.names)
            with np.errstate(divide="ignore"):  # a source at 0 stays there
                target = softmax(np.log(p) + self.eta * a)
            p = (1 - self.beta) * p + self.beta * target
            p = (1 - len(p) * self.floor) * p + self.floor
            self.probabilities = dict(zip(self.names, p.tolist(), strict=True))
        return {f"sources/{name}": p for name, p in self.probabilities.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"probabilities": dict(self.probabilities), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        saved = restored(state["probabilities"], self.names, allow_new_objectives=allow_new_objectives)
        self.probabilities |= saved
        if set(state["probabilities"]) != set(self.names):  # else the saved bits stay as they are
            total = sum(self.probabilities.values())
            self.probabilities = {name: p / total for name, p in self.probabilities.items()}
        self.steps = state["steps"]


def scalebio_gradient(q: Floats, gaps: Floats, *, alpha: float = 100.0) -> Floats:
    """d/dq_j of alpha [L2(w, q) - L2(u, q)]: alpha p_j (D_j - sum_d p_d D_d) [D], p = softmax(q).

    `gaps` D: mean loss of each source under the trained copy w minus under the auxiliary copy u. A source whose loss is
    missing has gradient 0 and no part in the mean (ours).
    """
    p, there = softmax(q), np.isfinite(gaps)
    share = np.where(there, p, 0.0)
    middle = float(share @ np.where(there, gaps, 0.0)) / (float(share.sum()) or 1.0)
    return np.where(there, alpha * p * (np.where(there, gaps, 0.0) - middle), 0.0)


@part(mixers, "scalebio")
class ScaleBio:
    """p = softmax(q), q by AdamW (or plain SGD) on the minimax objective L1(w) + alpha [L2(w, q) - L2(u, q)].

    The signal is each source's mean loss under w minus under u. It takes two copies of the model, so it is for small
    ones. The released step size of q is 1e-2; weight decay is off here.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        alpha: float = 100.0,
        lr: float = 1e-2,
        adam: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        init: Mapping[str, float] | None = None,
    ) -> None:
        known(init or {}, names, "scalebio.init")
        self.names, self.alpha, self.lr, self.adam = tuple(names), alpha, lr, adam
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.q = dict.fromkeys(names, 0.0) | dict(init or {})
        self.first, self.second = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        self.steps = 0

    @property
    def probabilities(self) -> dict[str, float]:
        return dict(zip(self.names, softmax(in_order(self.q, self.names)).tolist(), strict=True))

    def update(self, signal: Mapping[str, float]) -> dict[str, float]:
        gaps = finite([signal.get(name, math.nan) for name in self.names])
        gradient = scalebio_gradient(in_order(self.q, self.names), gaps, alpha=self.alpha)
        self.steps += 1
        for name, g in zip(self.names, gradient.tolist(), strict=True):
            self.q[name] -= self.lr * (self._moved(name, g) + self.weight_decay * self.q[name])
        return {f"sources/{name}": p for name, p in self.probabilities.items()}

    def _moved(self, name: str, g: float) -> float:
        """The direction of the step, Adam's where it is on."""
        if not self.adam:
            return g
        b1, b2 = self.betas
        self.first[name] = b1 * self.first[name] + (1 - b1) * g
        self.second[name] = b2 * self.second[name] + (1 - b2) * g * g
        spread = math.sqrt(self.second[name] / (1 - b2**self.steps)) + self.eps
        return self.first[name] / (1 - b1**self.steps) / spread

    def state_dict(self) -> dict[str, Any]:
        return {"q": dict(self.q), "first": dict(self.first), "second": dict(self.second), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        for key, own in (("q", self.q), ("first", self.first), ("second", self.second)):
            own |= restored(state[key], self.names, allow_new_objectives=allow_new_objectives)
        self.steps = state["steps"]


def dreamprm_weights(q: Floats) -> Floats:
    """softplus(q_d) / mean_d softplus(q): positive, with mean 1, all 1 at the start q = 0 [D]."""
    positive = np.logaddexp(0.0, np.asarray(q, dtype=np.float64))
    return np.asarray(positive / positive.mean())


@part(mixers, "dreamprm")
class DreamPrm:
    """Weights of sources in the loss of a process reward model: softplus(q) / mean softplus(q), q by gradient steps.

    The signal is the derivative of the meta loss by q_d, from unrolling the inner steps; sources without one stay. It
    trains reward models, not policies.
    """

    def __init__(self, names: Sequence[str], *, lr: float = 0.01, init: Mapping[str, float] | None = None) -> None:
        known(init or {}, names, "dreamprm.init")
        self.names, self.lr = tuple(names), lr
        self.q = dict.fromkeys(names, 0.0) | dict(init or {})
        self.steps = 0

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each source, with mean 1."""
        return dict(zip(self.names, dreamprm_weights(in_order(self.q, self.names)).tolist(), strict=True))

    @property
    def probabilities(self) -> dict[str, float]:
        return {name: weight / len(self.names) for name, weight in self.weights.items()}

    def update(self, signal: Mapping[str, float]) -> dict[str, float]:
        self.steps += 1
        for name in self.names:
            if math.isfinite(slope := signal.get(name, math.nan)):
                self.q[name] -= self.lr * slope
        return {f"sources/{name}": weight for name, weight in self.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"q": dict(self.q), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_new_objectives: bool = False) -> None:
        self.q |= restored(state["q"], self.names, allow_new_objectives=allow_new_objectives)
        self.steps = state["steps"]
