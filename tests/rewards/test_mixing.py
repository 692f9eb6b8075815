"""Composition of several rewards, in numbers that a person can work out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rewards.mixing import Mix, StepBatch, compose, soft_min, tchebycheff, weighted_sum

NAN = math.nan


def batch_of(scores: Any, group: Any, **fields: Any) -> StepBatch:
    table = np.array(scores, dtype=np.float64)
    names = tuple(f"r{k}" for k in range(table.shape[1]))
    lengths = np.full(len(table), 10)
    return StepBatch(names=names, raw=table, scores=table, group=np.array(group), lengths=lengths, **fields)


def advantages(batch: StepBatch, mix: Mix, **options: Any) -> list[float]:
    return compose(batch, mix, **{"eps": 0.0, **options})[0].tolist()


ONES = Mix(weights=np.ones(2))


def test_summing_first_lets_the_wider_column_rule_and_normalising_first_does_not() -> None:
    # Column 1 is ten times column 0 turned round; sums are 10, 1: deviation 4.5 each way, std (n - 1) 6.36.
    batch = batch_of([[0, 10], [1, 0]], [0, 0])
    assert advantages(batch, ONES) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert advantages(batch, Mix(weights=np.ones(2), order="normalize_then_sum", whiten=False)) == [0, 0]


def test_a_row_with_one_score_counts_it_and_a_row_with_none_has_advantage_0() -> None:
    batch = batch_of([[1, 1], [0, NAN], [NAN, NAN]], [0, 0, 0])
    # totals 2, 0, -: mean 1, std sqrt 2
    assert advantages(batch, ONES) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0])
    assert compose(batch, ONES)[1]["mix/unscorable"] == pytest.approx(1 / 3)


def test_an_infinite_score_is_missing_and_counted() -> None:
    clean = compose(batch_of([[1, 1], [0, NAN], [0, 0]], [0, 0, 0]), ONES)
    dirty = compose(batch_of([[1, 1], [0, math.inf], [0, 0]], [0, 0, 0]), ONES)
    assert np.array_equal(clean[0], dirty[0]) and (clean[1]["mix/invalid"], dirty[1]["mix/invalid"]) == (0, 1)


@pytest.mark.parametrize("order", ["sum_then_normalize", "normalize_then_sum"])
def test_equal_scores_and_groups_of_one_give_exactly_0(order: Any) -> None:
    batch = batch_of([[0.1, -1.0977]] * 5 + [[0.7, 0.2]], [0, 0, 0, 0, 0, 1])
    for scale in ("group", "batch", "none"):
        found = compose(batch, Mix(weights=np.array([0.3, 0.7]), order=order, whiten=False), scale=scale)[0]
        assert not found.any()


def test_renormalising_scales_by_all_weights_over_those_used() -> None:
    columns, weights = np.array([[1.0, NAN], [NAN, 2.0], [1.0, 2.0]]), np.array([1.0, 3.0])
    assert weighted_sum(columns, weights).tolist() == [1, 6, 7]
    assert weighted_sum(columns, weights, renormalize_missing=True).tolist() == [4, 8, 7]
    assert weighted_sum(columns, np.array([0.0, 3.0]), renormalize_missing=True).tolist() == [0, 6, 6]


def test_the_kl_column_leaves_with_an_unscorable_row() -> None:
    # Task column -kl = -1, -3 (and -100, which must not count): normalised 1/sqrt 2, -1/sqrt 2; rewards equal.
    batch = batch_of([[1], [1], [NAN]], [0, 0, 0], kl=np.array([1.0, 3.0, 100.0]))
    mix = Mix(weights=np.ones(1), task=2.0, order="normalize_then_sum", whiten=False)
    assert advantages(batch, mix) == pytest.approx([math.sqrt(2), -math.sqrt(2), 0])
    assert advantages(batch, Mix(weights=np.ones(1), task=1.0), scale="none") == [1, -1, 0]
    per_token = Mix(weights=np.ones(1), task=1.0, kl_mean=True)
    assert advantages(batch, per_token, scale="none") == pytest.approx([0.1, -0.1, 0])
    with pytest.raises(ValueError, match="needs the KL"):
        compose(batch_of([[1]], [0]), Mix(weights=np.ones(1), task=1.0))


def test_the_scale_is_of_the_advantages() -> None:
    batch = batch_of([[1, 0], [0, 0]], [0, 0])
    half = math.sqrt(0.5)
    assert advantages(batch, Mix(weights=np.ones(2), scale=3.0)) == pytest.approx([3 * half, -3 * half])
    assert advantages(batch, Mix(weights=3 * np.ones(2))) == pytest.approx([half, -half])


def test_whitening_keeps_the_size_of_the_advantages() -> None:
    batch = batch_of(np.random.default_rng(0).random((40, 2)), np.arange(40) % 8)
    found = advantages(batch, Mix(weights=np.array([5.0, 7.0]), order="normalize_then_sum"))
    assert np.std(found, ddof=1) == pytest.approx(1) and np.mean(found) == pytest.approx(0)


def test_the_soft_minimum_lies_between_mean_and_minimum() -> None:
    table = np.array([[1.0, 3.0], [NAN, 2.0], [NAN, NAN], [-900.0, 900.0]])
    assert soft_min(table, sharpness=0.0).tolist() == [2, 2, 0, 0]
    hard = soft_min(table, sharpness=1e3)
    assert hard == pytest.approx([1, 2, 0, -900], abs=1e-3)
    # -log((e^-1 + e^-3) / 2)
    assert soft_min(table, sharpness=1.0)[0] == pytest.approx(-math.log((math.exp(-1) + math.exp(-3)) / 2))
    assert soft_min(table, np.array([1.0, 0.0]), sharpness=1.0).tolist()[0] == 1
    assert soft_min(np.array([[NAN, 900.0]]), sharpness=1.0).tolist() == [900]
    with pytest.raises(ValueError, match="no negative"):
        soft_min(table, sharpness=-1.0)


def test_tchebycheff_is_the_worst_weighted_gap() -> None:
    table = np.array([[1.0, 0.0], [0.5, NAN], [NAN, NAN]])
    found = tchebycheff(table, np.array([1.0, 0.5]), ideal=np.array([1.0, 1.0]))
    assert found[:2].tolist() == [-0.5, -0.5] and math.isnan(found[2])
    with pytest.raises(ValueError, match="tchebycheff"):
        compose(batch_of(table, [0, 0, 0]), Mix(weights=np.ones(2), reduce="tchebycheff", ideal=np.ones(2), task=1.0))


def test_an_empty_batch_gives_no_advantages() -> None:
    batch = batch_of(np.zeros((0, 2)), np.zeros(0, dtype=int))
    for order in ("sum_then_normalize", "normalize_then_sum"):
        assert advantages(batch, Mix(weights=np.ones(2), order=order)) == []  # type: ignore[arg-type]
