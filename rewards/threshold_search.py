"""Where the thresholds of a constrained policy come from: a search during one run, or a fit over earlier runs.

"Confronting Reward Model Overoptimization with Constrained RLHF", arXiv 2310.04373 [paper and authors' code; stop rule
and details of the fit are ours]. The best thresholds are the proxy point: the means of the components at which true
quality peaks. Components are correlated, so it is found jointly, and ten per cent beside it already costs quality.

`NelderMead` moves a simplex in threshold space, `ThresholdSearch` lets a run evaluate its points, `proxy_point` fits a
surface over recorded points. Plan twice the usual number of steps for a search.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError
from core.registry import Registry
from rewards.numeric import Floats, finite, mean, std
from rewards.parts import restored

searches = Registry("threshold search")

Point = tuple[float, ...]


class Move(NamedTuple):
    """One iteration: the simplex after it, with its values; it is sorted only when the next one begins."""

    move: str  # reflect, expand, contract or shrink
    simplex: list[Point]
    values: list[float]


class NelderMead:
    """Maximises g over R^N, asking for one value at a time, so that an evaluation may take a thousand steps.

        while (point := search.ask()) is not None:
            search.tell(g(point))

    Best first (stable), c the centroid of all but the worst, r = c + alpha (c - worst):
    r no better than the best but better than the second worst: r. r better than the best: e = c + gamma (r - c) if it
    is better than *the best*, else r. Else k = c + rho (worst - c) if better than the worst; else all move towards the
    best, x <- best + sigma (x - best). It ends when an iteration leaves a (population) spread of values below `tol_f`,
    or when `max_evals` values have been told; a started iteration is finished. A point asked for before, or within
    `cache_tol` of one in every coordinate, is not asked for again.
    """

    def __init__(
        self,
        simplex: Sequence[Sequence[float]],
        *,
        alpha: float = 1.0,
        gamma: float = 2.0,
        rho: float = 0.5,
        sigma: float = 0.5,
        cache_tol: float = 5e-3,
        tol_f: float = 0.01,
        max_evals: int = 60,
    ) -> None:
        self.alpha, self.gamma, self.rho, self.sigma = alpha, gamma, rho, sigma
        self.cache_tol, self.tol_f, self.max_evals = cache_tol, tol_f, max_evals
        self._start(simplex)

    def _start(self, simplex: Sequence[Sequence[float]]) -> None:
        self.initial: list[Point] = [tuple(map(float, point)) for point in simplex]
        self.evaluations: list[tuple[Point, float]] = []
        self.trace: list[Move] = []
        self._simplex = list(self.initial)
        self._values: list[float] = []
        self._running = self._search()
        self._pending: Point | None = next(self._running)

    def ask(self) -> Point | None:
        """The point to evaluate next, the same until its value is told; none when the search has ended."""
        return self._pending

    def tell(self, value: float) -> None:
        """The value of the point that was asked for. Raises ValueError for a value that is not finite."""
        if self._pending is None or not math.isfinite(value):
            raise ValueError(f"the search waits for {self._pending}; it cannot take {value}")
        self.evaluations.append((self._pending, float(value)))
        try:
            self._pending = self._running.send(float(value))
        except StopIteration:
            self._pending = None

    @property
    def best(self) -> tuple[Point, float]:
        """The best point of the simplex and its value, once the initial simplex has values."""
        place = max(range(len(self._values)), key=self._values.__getitem__)
        return self._simplex[place], self._values[place]

    def _search(self) -> Generator[Point, float, None]:
        # Appended one by one, so that `best` speaks only of points that have values.
        for point in self.initial:
            self._values.append((yield from self._value(point)))
        while len(self.evaluations) < self.max_evals:
            yield from self._iterate()
            if float(np.std(self._values)) < self.tol_f:
                return

    def _value(self, point: Point) -> Generator[Point, float, float]:
        known = self._known(point)
        return (yield point) if known is None else known

    def _known(self, point: Point) -> float | None:
        for own, value in self.evaluations:
            if own == point:
                return value
        for own, value in self.evaluations:
            if all(abs(a - b) <= self.cache_tol for a, b in zip(own, point, strict=True)):
                return value
        return None

    def _iterate(self) -> Generator[Point, float, None]:
        order = sorted(range(len(self._values)), key=lambda i: -self._values[i])
        simplex, values = [self._simplex[i] for i in order], [self._values[i] for i in order]
        table = np.array(simplex)
        center, worst = table[:-1].mean(axis=0), table[-1]
        reflected = _point(center + self.alpha * (center - worst))
        value = yield from self._value(reflected)
        move, point = "reflect", reflected
        if value > values[0]:
            expanded = _point(center + self.gamma * (np.array(reflected) - center))
            further = yield from self._value(expanded)
            if further > values[0]:
                move, point, value = "expand", expanded, further
        elif not value > values[-2]:
            move, point = "contract", _point(center + self.rho * (worst - center))
            value = yield from self._value(point)
            if not value > values[-1]:
                nearer = table[0] + self.sigma * (table[1:] - table[0])
                move, simplex = "shrink", [simplex[0], *map(_point, nearer)]
                for i in range(1, len(simplex)):
                    values[i] = yield from self._value(simplex[i])
        if move != "shrink":
            simplex[-1], values[-1] = point, value
        self._simplex, self._values = simplex, values
        self.trace.append(Move(move, list(simplex), list(values)))

    def state_dict(self) -> dict[str, Any]:
        """The initial simplex and every evaluation in order: the search follows from them, the pending point too."""
        return {
            "simplex": [list(point) for point in self.initial],
            "evaluations": [[list(point), value] for point, value in self.evaluations],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on by telling the saved values again. Raises UserError if the search then asks for other points."""
        self._start(state["simplex"])
        for point, value in state["evaluations"]:
            if self._pending != tuple(point):
                raise UserError("threshold_search: the checkpoint's search used other settings; resume with the same")
            self.tell(value)


def _point(values: Floats) -> Point:
    return tuple(values.tolist())


class ThresholdSearch:
    """Owns the thresholds of a constrained policy in one run (NM-PPO): keyed by objective name, never by position.

    The first validation means and `highest`, the largest mean of each objective seen so far in other runs, span the
    initial simplex: N + 1 points, each the means plus a uniform random share (`seed`) of the way, per coordinate. A
    point is evaluated by training towards it: when every mean is within `band` of its threshold, or after `patience` of
    all steps (paper 1/8, code 1/10), the gold score is its value; policy and multipliers go on from where they are.
    When the search has ended the thresholds are the best ones. `gold` names the score among a validation's means;
    `options` are those of `NelderMead`.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        highest: Mapping[str, float],
        total_steps: int,
        gold: str = "gold",
        band: float = 0.05,
        patience: float = 1 / 8,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if set(highest) != set(names):
            raise UserError(f"threshold_search.highest: it needs a value for each of {', '.join(names)}")
        self.names, self.highest, self.band, self.seed = tuple(names), dict(highest), band, seed
        self.gold = gold
        self.limit, self.options = patience * total_steps, options
        self.search: NelderMead | None = None
        self.thresholds: dict[str, float] = {}
        self.started = 0  # step at which the current evaluation began
        self.evaluated = self.reached = 0

    def metrics(self) -> dict[str, float]:
        """How far it is: search/evaluated, /reached, and /best where there is one."""
        found = {"search/evaluated": float(self.evaluated), "search/reached": float(self.reached)}
        if self.search is not None and self.search.evaluations:
            found["search/best"] = max(value for _, value in self.search.evaluations)
        return found

    @property
    def done(self) -> bool:
        """Whether the search has ended, and the thresholds are the best that it found."""
        return self.search is not None and self.search.ask() is None

    def update(self, step: int, means: Mapping[str, float], gold: float | None) -> bool:
        """Take in a validation's means by name and gold score; True where the thresholds have changed.

        A missing mean is not at its threshold, and without a gold score an evaluation goes on.
        """
        if self.search is None:
            if not all(math.isfinite(means.get(name, math.nan)) for name in self.names):
                return False
            self.search = NelderMead(self._simplex(means), **self.options)
        elif self.done or not self._finished(step, means, gold):
            return False
        point = self.search.ask() or self.search.best[0]
        self.thresholds, self.started = dict(zip(self.names, point, strict=True)), step
        return True

    def _finished(self, step: int, means: Mapping[str, float], gold: float | None) -> bool:
        assert self.search is not None
        # |v - theta| <= band |theta| is (1 - band) theta <= v <= (1 + band) theta, for negative thresholds too.
        arrived = all(
            abs(means.get(name, math.nan) - theta) <= self.band * abs(theta) for name, theta in self.thresholds.items()
        )
        if gold is None or not math.isfinite(gold) or not (arrived or step - self.started >= self.limit):
            return False
        self.search.tell(gold)
        self.evaluated, self.reached = self.evaluated + 1, self.reached + arrived
        return True

    def _simplex(self, means: Mapping[str, float]) -> list[list[float]]:
        names = sorted(self.names)  # drawn in this order, whatever order the run has them in
        shares = np.random.default_rng(self.seed).random((len(names) + 1, len(names)))
        rows = [dict(zip(names, row, strict=True)) for row in shares.tolist()]
        return [[means[n] + row[n] * (self.highest[n] - means[n]) for n in self.names] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        search = None
        if self.search is not None:
            saved = self.search.state_dict()
            search = {
                "simplex": [self._named(point) for point in saved["simplex"]],
                "evaluations": [[self._named(point), value] for point, value in saved["evaluations"]],
            }
        counts = {"started": self.started, "evaluated": self.evaluated, "reached": self.reached}
        return {"thresholds": dict(self.thresholds), "search": search, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises UserError if it is of other objectives or settings."""
        self.thresholds = restored(state["thresholds"], self.names) if state["thresholds"] else {}
        self.search = None
        if (saved := state["search"]) is not None:
            simplex = [self._listed(point) for point in saved["simplex"]]
            self.search = NelderMead(simplex, **self.options)
            told = [[self._listed(point), value] for point, value in saved["evaluations"]]
            self.search.load_state_dict({"simplex": simplex, "evaluations": told})
        self.started, self.evaluated, self.reached = state["started"], state["evaluated"], state["reached"]

    def _named(self, point: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.names, point, strict=True))

    def _listed(self, point: Mapping[str, float]) -> list[float]:
        return list(restored(point, self.names).values())


@searches
def nelder_mead(
    names: Sequence[str],
    total_steps: int,
    *,
    gold: str,
    highest: Mapping[str, float],
    band: float = 0.05,
    patience: float = 1 / 8,
    seed: int = 0,
    tol_f: float = 0.01,
    max_evals: int = 60,
    cache_tol: float = 5e-3,
) -> ThresholdSearch:
    """NM-PPO: a simplex in threshold space, moved by the gold score that training towards each point reaches."""
    options = {"tol_f": tol_f, "max_evals": max_evals, "cache_tol": cache_tol}
    shared = {"highest": highest, "total_steps": total_steps, "band": band, "patience": patience, "seed": seed}
    return ThresholdSearch(names, gold=gold, **shared, **options)  # type: ignore[arg-type]


def make_search(spec: Mapping[str, Any] | None, names: Sequence[str], total_steps: int) -> ThresholdSearch | None:
    """The search of `rewards.threshold_search` for the thresholds `names`. Raises UserError."""
    if spec is None:
        return None
    options = dict(spec)
    method = options.pop("method", "nelder_mead")
    if not names:
        raise UserError(
            "rewards.threshold_search: it moves thresholds, and this weighting policy has none; use lagrange"
        )
    made = searches.bind(method, options, "rewards.threshold_search")(tuple(names), total_steps)
    assert isinstance(made, ThresholdSearch)
    return made


class ProxyPoint(NamedTuple):
    """Where a fitted surface of gold over means is highest, among places with data."""

    point: Floats  # [N]
    value: float
    kept_cells: int  # of the grid


def proxy_point(
    points: Floats, gold: Floats, *, degree: int = 2, ridge: float = 1e-6, grid: int = 21, density_frac: float = 0.05
) -> ProxyPoint:
    """The proxy point of recorded (means of all components [n, N], gold score [n]) of runs without KL.

    Ridge fit of all monomials up to `degree` of the z-scored means; `grid` points per axis over the data's box, first
    axis slowest; cells whose product-Gaussian density (bandwidth std n^(-1 / (N + 4))) is below `density_frac` of the
    highest are masked; the first largest prediction of the others. A coordinate without spread is left out of the fit
    and gets its mean. Rows with a missing number are left out. Raises ValueError for fewer points than monomials.
    """
    table = np.column_stack([finite(points), finite(gold)])
    table = table[np.isfinite(table).all(axis=1)]
    x, y = table[:, :-1], table[:, -1]
    middle, spread = np.array([mean(c) for c in x.T]), np.array([std(c) for c in x.T])
    moving = np.flatnonzero(spread > 0)
    x = x[:, moving]
    powers = _powers(len(moving), degree)
    if len(x) < len(powers):
        raise ValueError(f"proxy_point: {len(x)} points do not determine {len(powers)} monomials; record more points")
    axes = [np.linspace(column.min(), column.max(), grid) for column in x.T]
    cells = np.array(list(itertools.product(*axes))).reshape(grid ** len(axes), len(axes))
    fit, at = (_monomials((rows - middle[moving]) / spread[moving], powers) for rows in (x, cells))
    coefficients = np.linalg.solve(fit.T @ fit + ridge * np.eye(len(powers)), fit.T @ y)
    density = _density(x, cells, spread[moving] * len(x) ** (-1 / (len(moving) + 4)))
    kept = np.flatnonzero(density >= density_frac * density.max())
    predicted = at[kept] @ coefficients
    best = int(np.argmax(predicted))
    middle[moving] = cells[kept[best]]
    return ProxyPoint(middle, float(predicted[best]), len(kept))


def _powers(size: int, degree: int) -> list[tuple[int, ...]]:
    """Exponents of all monomials of total degree <= degree, by total degree, then by exponents."""
    every = itertools.product(range(degree + 1), repeat=size)
    return sorted((p for p in every if sum(p) <= degree), key=lambda p: (sum(p), p))


def _monomials(rows: Floats, powers: Sequence[tuple[int, ...]]) -> Floats:
    return np.column_stack([np.prod(rows ** np.array(p, dtype=np.int64), axis=1) for p in powers])


def _density(points: Floats, cells: Floats, bandwidth: Floats) -> Floats:
    """Sum over points of the product of Gaussians, up to a constant [cells]."""
    total = np.zeros(len(cells))
    for point in points:  # one at a time: cells times points may not fit in memory
        total += np.exp(-0.5 * (((cells - point) / bandwidth) ** 2).sum(axis=1))
    return total
