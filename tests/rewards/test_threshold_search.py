"""The search for thresholds: every move of the simplex, the phases of an evaluation, the fit over recorded points."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from rewards.threshold_search import NelderMead, ThresholdSearch, proxy_point


def run(search: NelderMead, g: Callable[[Sequence[float]], float]) -> NelderMead:
    while (point := search.ask()) is not None:
        search.tell(g(point))
    return search


def table(values: dict[tuple[float, ...], float]) -> Callable[[Sequence[float]], float]:
    return lambda point: values[tuple(round(x, 6) for x in point)]


TRIANGLE = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]  # worth 3, 2, 1: the centroid of the best two is (0.5, 0)
KNOWN = {(0.0, 0.0): 3.0, (1.0, 0.0): 2.0, (0.0, 1.0): 1.0}


@pytest.mark.parametrize(
    ("more", "move", "last"),
    [
        ({(1.0, -1.0): 2.5}, "reflect", (1.0, -1.0)),
        ({(1.0, -1.0): 3.0}, "reflect", (1.0, -1.0)),  # as good as the best: no expansion
        ({(1.0, -1.0): 4.0, (1.5, -2.0): 3.5}, "expand", (1.5, -2.0)),  # better than the best, not than r
        ({(1.0, -1.0): 4.0, (1.5, -2.0): 3.0}, "reflect", (1.0, -1.0)),
        ({(1.0, -1.0): 2.0, (0.25, 0.5): 1.5}, "contract", (0.25, 0.5)),  # as good as the second worst: contraction
        ({(1.0, -1.0): 9.9 - 9, (0.25, 0.5): 1.0, (0.5, 0.0): 7.0, (0.0, 0.5): 8.0}, "shrink", (0.0, 0.5)),
    ],
)
def test_the_moves_of_the_simplex(more: dict[tuple[float, ...], float], move: str, last: tuple[float, ...]) -> None:
    search = run(NelderMead(TRIANGLE, max_evals=4, tol_f=0.0), table(KNOWN | more))
    assert search.trace[0].move == move and search.trace[0].simplex[-1] == pytest.approx(last)
    if move == "shrink":  # a started iteration is finished
        assert search.trace[0].values == [3, 7, 8] and len(search.evaluations) == 7
        assert search.best == ((0.0, 0.5), 8.0)


def test_one_dimension_and_a_point_that_was_near_another() -> None:
    search = run(NelderMead([[0.0], [1.0]], tol_f=1e-4, max_evals=100), lambda x: -((x[0] - 3) ** 2))
    (best,), _ = search.best
    assert best == pytest.approx(3, abs=0.01)
    # 1 is told; the reflection -1 + 2 = 1.004 is near it and so is not asked for.
    near = NelderMead([[0.502], [0.0], [1.0]][:2], max_evals=3)
    near.tell(1.0), near.tell(0.0)
    assert near.ask() == (1.004,)
    cached = NelderMead([[0.502], [0.0]], cache_tol=2.0)
    cached.tell(1.0)
    assert cached.ask() is None  # everything is near the first point, and the spread is nothing


def test_a_search_that_is_told_too_much_or_no_number_refuses() -> None:
    search = NelderMead([[0.0], [1.0]])
    with pytest.raises(ValueError, match="cannot take nan"):
        search.tell(math.nan)
    other = NelderMead([[0.0], [1.0]], alpha=1.5)
    for value in (1.0, 0.0, 0.5):
        search.tell(value)
    with pytest.raises(UserError, match="other settings"):
        other.load_state_dict(search.state_dict())


NAMES = ("right", "brief")


def search_of(names: Sequence[str] = NAMES, **options: Any) -> ThresholdSearch:
    highest = {"right": 0.9, "brief": -0.1}
    return ThresholdSearch(names, highest=highest, total_steps=80, max_evals=6, tol_f=0.0, **options)


def drive(search: ThresholdSearch, cut: int | None = None) -> list[dict[str, float]]:
    """A run whose means move most of the way to the thresholds with each validation; gold peaks at (0.6, -0.3)."""
    means, seen = {"right": 0.2, "brief": -0.8}, []
    for step in range(0, 400, 5):
        if step == cut:
            state = json.loads(json.dumps(search.state_dict(), allow_nan=False))
            search = search_of(NAMES[::-1])  # the other order of names
            search.load_state_dict(state)
        gold = -sum((means[n] - peak) ** 2 for n, peak in (("right", 0.6), ("brief", -0.3)))
        search.update(step, means, gold)
        seen.append(dict(search.thresholds))
        means = {n: v + 0.8 * (search.thresholds.get(n, v) - v) for n, v in means.items()}
    return seen


def test_a_run_is_driven_from_point_to_point_and_ends_at_the_best() -> None:
    search = search_of()
    seen = drive(search)
    assert search.done and search.evaluated >= 6 and search.reached >= 1 and seen[-1] == seen[-2]
    best, _ = search.search.best  # type: ignore[union-attr]
    assert search.thresholds == dict(zip(NAMES, best, strict=True))
    first = search.search.initial  # type: ignore[union-attr]
    assert all(0.2 <= right <= 0.9 and -0.8 <= brief <= -0.1 for right, brief in first)


@pytest.mark.parametrize("cut", [0, 5, 20, 45, 100, 395])
def test_a_search_survives_a_restart_by_name(cut: int) -> None:
    whole, again = drive(search_of()), drive(search_of(), cut)
    assert [{n: step[n] for n in NAMES if step} for step in whole] == [
        {n: step[n] for n in NAMES if step} for step in again
    ]


def test_an_evaluation_waits_for_the_gold_score_and_gives_up_after_its_share_of_the_steps() -> None:
    search = search_of()
    assert not search.update(0, {"right": 0.2, "brief": math.nan}, 0.0)
    assert search.update(0, {"right": 0.2, "brief": -0.8}, 0.0)
    there = dict(search.thresholds)
    assert not search.update(5, there, None) and not search.update(5, there, math.nan)
    assert search.update(5, there, 1.0) and search.reached == 1
    away = {"right": -5.0, "brief": 5.0}
    assert not search.update(10, away, 1.0)
    assert search.update(15, away, 1.0)  # 10 of 80 steps
    assert (search.evaluated, search.reached) == (2, 1)


def test_thresholds_below_zero_are_reached_within_the_same_band() -> None:
    search = search_of()
    search.update(0, {"right": 0.2, "brief": -0.8}, 0.0)
    near = {n: 1.049 * theta for n, theta in search.thresholds.items()}
    far = {n: 1.051 * theta for n, theta in search.thresholds.items()}
    assert not search.update(1, far, 1.0) and search.update(1, near, 1.0)


def test_the_highest_means_are_needed_for_each_name() -> None:
    with pytest.raises(UserError, match="right, brief"):
        ThresholdSearch(NAMES, highest={"right": 1.0}, total_steps=10)


def test_the_proxy_point_is_the_top_of_the_surface() -> None:
    x = np.random.default_rng(0).random((60, 2))
    gold = 1 - (x[:, 0] - 0.6) ** 2 - 2 * (x[:, 1] - 0.3) ** 2
    found = proxy_point(x, gold, grid=41)
    assert found.point == pytest.approx([0.6, 0.3], abs=0.02) and found.value == pytest.approx(1, abs=1e-3)


def test_a_coordinate_that_never_moved_gets_its_mean() -> None:
    x = np.random.default_rng(0).random((60, 2))
    x[:, 1] = 0.1
    gold = 1 - (x[:, 0] - 0.6) ** 2
    found = proxy_point(x, gold, grid=21)
    assert found.point[1] == 0.1 and found.point[0] == pytest.approx(0.6, abs=0.04) and found.kept_cells <= 21
    still = proxy_point(np.full((9, 2), 0.5), gold[:9])
    assert still.point.tolist() == [0.5, 0.5] and still.value == pytest.approx(gold[:9].mean())


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="5 points do not determine 6 monomials"):
        proxy_point(np.random.default_rng(0).random((5, 2)), np.ones(5))
