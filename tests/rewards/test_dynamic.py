"""Hypervolume and front by hand and against counting; the policies' first evaluation, floors and skipped steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from core.errors import UserError
from rewards.dynamic import FrontProgress, Gradient, Hypervolume, front_report, hypervolume, pareto_front
from rewards.recap import Recap, movement
from tests.rewards.test_policies import NAMES, step_of


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_hypervolume_is_the_number_of_unit_boxes(size: int) -> None:
    points = np.random.default_rng(size).integers(-1, 5, (7, size)).astype(float)
    boxes = itertools.product(range(5), repeat=size)
    covered = sum(any(all(b < p for b, p in zip(box, point, strict=True)) for point in points) for box in boxes)
    assert hypervolume(points, np.zeros(size)) == covered


def test_minimised_objectives_and_missing_points() -> None:
    points = np.array([[0.5, 100.0], [np.nan, 0.0], [0.25, 50.0]])
    # boxes 0.5 x 20 and 0.25 x 70, overlapping in 0.25 x 20
    assert hypervolume(points, np.array([0.0, 120.0]), [True, False]) == pytest.approx(10 + 17.5 - 5)
    assert pareto_front(points, [True, False]) == [0, 2] and pareto_front(np.zeros((0, 2))) == []


def test_a_trajectory_is_reported_by_its_front() -> None:
    front, volume, means = front_report(np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]]), np.zeros(2))
    assert (front, volume, means) == ([1, 2], 3.0, [1.5, 1.5])


def test_without_a_reference_the_first_evaluation_is_it() -> None:
    front = FrontProgress(["a", "tokens"], minimise=["tokens"])
    assert math.isnan(front.observe({"a": 0.5, "tokens": 200.0})) and front.multiplier == 1
    # 0.1 x 100 tokens, these in units of the reference's 200
    assert front.observe({"a": 0.6, "tokens": 100.0}) == pytest.approx(0.1 * 0.5)
    assert front.multiplier == pytest.approx(0.5 + 1.5 * math.tanh(0.05))
    assert front.observe({"a": 0.6, "tokens": 100.0}) == 0 and front.multiplier == 0.5
    assert math.isnan(front.observe({"a": 0.9})) and front.multiplier == 0.5


def test_the_multiplier_holds_between_evaluations() -> None:
    policy = Hypervolume(NAMES, reference=dict.fromkeys(NAMES, 0.0))
    policy.update(step_of(1))
    scale = policy.weigh(step_of(2)).scale
    policy.update(replace(step_of(2), validation=None))
    assert policy.weigh(step_of(3)).scale == scale != 1


def test_gradient_weights_keep_their_floor_and_skip_what_is_not_finite() -> None:
    gram = np.diag([100.0, 0.0, 0.0])
    policy = Gradient(NAMES, min_weight=0.1)
    for _ in range(50):
        policy.update(replace(step_of(0), gram=gram))
    assert policy.weights == pytest.approx({"right": 0.8, "brief": 0.1, "polite": 0.1})
    other = Gradient(NAMES, every=2)
    other.update(replace(step_of(0), gram=np.full((3, 3), np.nan)))
    other.update(replace(step_of(0), gram=gram * 1e-2))  # the average of the one step that counts: influence 1
    # exp(eta / mu * 1) = e against two of weight 1
    assert other.weights["right"] == pytest.approx(math.e / (math.e + 2))


def test_a_loss_that_stays_fades_and_one_that_moves_gains() -> None:
    policy = Recap(("still", "falling"), window=2, temperature=0.5)
    for step in range(4):
        assert policy.weights == {"still": 1, "falling": 1}
        policy.push({"still": 0.4, "falling": 0.8 - 0.2 * step})
    assert policy.weights["falling"] > 1.5 and sum(policy.weights.values()) == pytest.approx(2)
    # 0.8, 0.6 | 0.4, 0.2: 0.7 / 0.3; spread sqrt(0.2 / 3)
    move = movement(np.array([0.8, 0.6, 0.4, 0.2]))
    assert move == pytest.approx((0.7 / 0.3, math.sqrt(0.2 / 3)))


def test_solved_losses_are_guarded_and_negative_ones_refused() -> None:
    assert movement(np.zeros(4)) == (1, 0) and movement(np.array([0.5, 0.5, 0.0, 0.0])).convergence == 10
    with pytest.raises(UserError, match="unbounded"):
        Recap(("a",)).push({"a": -0.2})
    policy = Recap(("a",), unbounded=("a",))
    policy.update(replace(step_of(0, ("a",)), scores=np.full((20, 1), 7.0)))
    assert policy.losses["a"][0] == pytest.approx(1 - 1 / (1 + math.exp(-7)))
