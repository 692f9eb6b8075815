"""Shapers: a column of scores in, a column out, some with small running statistics.

    shaper = chain([{"length_penalty": {}}, {"par": {"k": 1.0}}], "rewards.components.helpful.shape")
    shaped = shaper(scores, Context(lengths=lengths, references=references))

"Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv 2502.18770 [authors' code; guards for constant input and
overflow are ours]. An RL reward should be bounded, grow fast at first and then slowly converge, and is best a function
of the score's distance from that of a reference answer. NaN in, NaN out. With one reward and division by the group's
spread, meanstd, minmax and centring change nothing; the sigmoid and clipping do.

r [B] scores, q_1 .. q_M the scores that the same reward model gives to M answers of the reference policy to the same
prompt, computed once and frozen: the first `max_ref` finite ones are used, and none at all gives NaN.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from core.errors import UserError
from core.registry import Registry
from rewards.numeric import Floats, Ints, finite, log_sigmoid, mean, sigmoid, std, variance
from rewards.parts import part

shapings = Registry("shaper")

Z85 = 1.0364333894937896  # the 85 % quantile of the standard normal distribution

Self = TypeVar("Self", bound="Shaper")


@dataclass(frozen=True, eq=False)
class Context:
    """What a shaper may look at beside its column."""

    lengths: Ints | None = None  # [B] tokens, the end-of-sequence token included
    references: Floats | None = None  # [B, M] scores of reference answers to each row's prompt, NaN = missing


class Shaper:
    """A column in, a column out. This base has no state."""

    learns = False  # has running statistics
    compares = False  # with scores of reference answers

    def __call__(self, scores: Floats, context: Context) -> Floats:
        """The shaped column [B]. A shaper with statistics takes the batch in first, unless it is frozen."""
        return self.shape(finite(scores), context)

    def shape(self, r: Floats, context: Context) -> Floats:
        """The formula."""
        raise NotImplementedError

    def frozen(self: Self) -> Self:
        """A copy for evaluation, which takes nothing in."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON; empty without state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


def references(context: Context, max_ref: int) -> list[Floats]:
    """Each row's first `max_ref` finite reference scores. Raises ValueError where the context has none at all."""
    if context.references is None:
        raise ValueError("this shaping compares with scores of reference answers, and the data has none")
    rows = finite(context.references)
    return [row[np.isfinite(row)][:max_ref] for row in rows]


class _Centred(Shaper):
    """Mean over the references of a function of r - q."""

    compares = True

    def __init__(self, *, max_ref: int = 10) -> None:
        self.max_ref = max_ref

    def curve(self, distance: Floats) -> Floats:
        return distance

    def shape(self, r: Floats, context: Context) -> Floats:
        chosen = references(context, self.max_ref)
        return np.array([mean(self.curve(score - q)) for score, q in zip(r, chosen, strict=True)])


@part(shapings, "par")
class Par(_Centred):
    """mean over references of sigmoid(k (r - q)): the Bradley-Terry probability of beating a reference answer."""

    def __init__(self, *, k: float = 1.0, max_ref: int = 10) -> None:
        super().__init__(max_ref=max_ref)
        self.k = k

    def curve(self, distance: Floats) -> Floats:
        return sigmoid(self.k * distance)


@part(shapings, "tanh_centered")
class TanhCentered(_Centred):
    """mean over references of tanh(r - q)."""

    def curve(self, distance: Floats) -> Floats:
        return np.tanh(distance)


@part(shapings, "centered")
class Centered(_Centred):
    """mean over references of r - q."""


@part(shapings, "lsc")
class Lsc(_Centred):
    """log sigmoid(r - q85), q85 = mean(q) + 1.036 (std(q) + 1e-5): the references' 85 % quantile, std with n - 1."""

    def shape(self, r: Floats, context: Context) -> Floats:
        chosen = references(context, self.max_ref)
        return log_sigmoid(r - np.array([mean(q) + Z85 * (std(q) + 1e-5) for q in chosen]))


@part(shapings, "sigmoid")
class Sigmoid(Shaper):
    """sigmoid(k r)."""

    def __init__(self, *, k: float = 1.0) -> None:
        self.k = k

    def shape(self, r: Floats, context: Context) -> Floats:
        return sigmoid(self.k * r)


@part(shapings, "ceil")
class Ceil(Shaper):
    """min(r, ceil): the authors use 3 to 5."""

    def __init__(self, *, ceil: float = 4.0) -> None:
        self.ceil = ceil

    def shape(self, r: Floats, context: Context) -> Floats:
        return np.minimum(r, self.ceil)


@part(shapings, "length_penalty")
class LengthPenalty(Shaper):
    """r - len_penalty max(0, tokens - valid_len), before the other shapers."""

    def __init__(self, *, valid_len: int = 300, len_penalty: float = 0.01) -> None:
        self.valid_len, self.len_penalty = valid_len, len_penalty

    def shape(self, r: Floats, context: Context) -> Floats:
        if context.lengths is None:
            raise ValueError("length_penalty needs the lengths of the completions")
        return np.asarray(r - self.len_penalty * np.maximum(0, np.asarray(context.lengths) - self.valid_len))


@part(shapings, "saturate")
class Saturate(Shaper):
    """-(r - target)^2: PPO-SAT of "Confronting Reward Model Overoptimization", arXiv 2310.04373 [paper]."""

    def __init__(self, *, target: float) -> None:
        self.target = target

    def shape(self, r: Floats, context: Context) -> Floats:
        return np.asarray(-((r - self.target) ** 2))


class Moments:
    """Mean and spread of all finite numbers seen, merged batch by batch.

    With a batch of b numbers, d = batch mean - mean, v the batch's population variance and n' = n + b:
    mean += d b / n';  M2 += v b + d^2 n b / n'.  std = sqrt(M2 / n), 0 for n <= 1.
    """

    def __init__(self) -> None:
        self.n, self.mean, self.m2 = 0, 0.0, 0.0
        self.min, self.max = math.inf, -math.inf

    def update(self, values: Floats) -> None:
        """Take in the finite ones of `values`."""
        known = values[np.isfinite(values)]
        count = int(known.size)
        if not count:
            return
        total, distance = self.n + count, mean(known) - self.mean
        self.mean += distance * count / total
        self.m2 += variance(known, 0) * count + distance**2 * self.n * count / total
        self.n = total
        self.min, self.max = min(self.min, float(known.min())), max(self.max, float(known.max()))

    @property
    def std(self) -> float:
        # Equal numbers have spread 0, whatever their sum's rounding left in M2.
        return 0.0 if self.n <= 1 or self.min == self.max else math.sqrt(self.m2 / self.n)

    def state_dict(self) -> dict[str, Any]:
        bounds = {"min": self.min, "max": self.max} if self.n else {"min": None, "max": None}  # JSON has no infinity
        return {"n": self.n, "mean": self.mean, "m2": self.m2, **bounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.n, self.mean, self.m2 = state["n"], state["mean"], state["m2"]
        self.min = math.inf if state["min"] is None else state["min"]
        self.max = -math.inf if state["max"] is None else state["max"]


class _Running(Shaper):
    """A shaper with the moments of all scores seen, the current batch included. Before any, scores stay as they are."""

    learns = True

    def __init__(self) -> None:
        self.seen = Moments()
        self._learns = True

    def __call__(self, scores: Floats, context: Context) -> Floats:
        r = finite(scores)
        if self._learns:
            self.seen.update(r)
        return self.shape(r, context) if self.seen.n else r

    def frozen(self: Self) -> Self:
        kept = copy.deepcopy(self)
        kept._learns = False  # type: ignore[attr-defined]
        return kept

    def state_dict(self) -> dict[str, Any]:
        return self.seen.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen.load_state_dict(state)


@part(shapings, "meanstd")
class MeanStd(_Running):
    """(r - m) / s over all scores seen; s 0 divides by 1."""

    def shape(self, r: Floats, context: Context) -> Floats:
        return np.asarray((r - self.seen.mean) / (self.seen.std or 1.0))


@part(shapings, "clip")
class Clip(_Running):
    """clip(r, m - s, m + s) over all scores seen."""

    def shape(self, r: Floats, context: Context) -> Floats:
        return np.clip(r, self.seen.mean - self.seen.std, self.seen.mean + self.seen.std)


@part(shapings, "minmax")
class MinMax(_Running):
    """(r - lo) / (hi - lo) over all scores seen; 0 while they are all equal (ours)."""

    def shape(self, r: Floats, context: Context) -> Floats:
        width = self.seen.max - self.seen.min
        return np.asarray((r - self.seen.min) / width if width else r * 0.0)


@part(shapings, "standardise")
class Standardise(_Running):
    """(r - m) / s, both of the first batch it sees and frozen then: the answers of the model before training (ours)."""

    def __call__(self, scores: Floats, context: Context) -> Floats:
        r = finite(scores)
        if self._learns and not self.seen.n:
            self.seen.update(r)
        return self.shape(r, context) if self.seen.n else r

    def shape(self, r: Floats, context: Context) -> Floats:
        return np.asarray((r - self.seen.mean) / (self.seen.std or 1.0))


class Chain(Shaper):
    """Shapers of one column, applied left to right. State: one entry per shaper, under its name."""

    def __init__(self, shapers: Sequence[tuple[str, Shaper]]) -> None:
        self.shapers = list(shapers)

    def __call__(self, scores: Floats, context: Context) -> Floats:
        shaped = finite(scores)
        for _, shaper in self.shapers:
            shaped = shaper(shaped, context)
        return shaped

    def frozen(self) -> Chain:
        return Chain([(name, shaper.frozen()) for name, shaper in self.shapers])

    def state_dict(self) -> dict[str, Any]:
        return {"shapers": [[name, shaper.state_dict()] for name, shaper in self.shapers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved, own = [name for name, _ in state["shapers"]], [name for name, _ in self.shapers]
        if saved != own:
            raise UserError(f"shape: the checkpoint was made with {saved}, the run has {own}; resume with the same")
        for (_, shaper), (_, kept) in zip(self.shapers, state["shapers"], strict=True):
            shaper.load_state_dict(kept)


def chain(specs: Sequence[str | Mapping[str, Any]], where: str) -> Chain:
    """The shapers of a list of names, or of mappings {name: options}. Raises UserError naming `where`."""
    made = []
    for spec in specs:
        single = isinstance(spec, Mapping) and len(spec) == 1 and isinstance(next(iter(spec.values())) or {}, Mapping)
        if not isinstance(spec, str) and not single:
            raise UserError(f"{where}: {spec!r} is no shaper; write its name, or {{name: {{option: value}}}}")
        ((name, options),) = [(spec, {})] if isinstance(spec, str) else spec.items()
        made.append((name, shapings.bind(name, options or {}, f"{where}.{name}")()))
    return Chain(made)
