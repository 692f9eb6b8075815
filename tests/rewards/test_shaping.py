"""Shapers: formulas by hand, statistics with the batch first, frozen copies, chains."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from core.errors import UserError
from rewards.shaping import Context, Moments, chain, shapings

NAN = math.nan
REFERENCES = np.array([[0.0, NAN, 2.0], [1.0, 1.0, 1.0], [NAN, NAN, NAN]])


def test_par_is_the_chance_of_beating_the_references() -> None:
    shaper = chain(["par"], "shape")
    found = shaper(np.array([0.0, 1.0, 5.0]), Context(references=REFERENCES))
    # sigmoid(0) and sigmoid(-2); sigmoid(0); no reference at all
    assert found[:2] == pytest.approx([(0.5 + 1 / (1 + math.exp(2))) / 2, 0.5]) and math.isnan(found[2])
    one = chain([{"par": {"max_ref": 1}}], "shape")(np.zeros(3), Context(references=REFERENCES[:, ::-1]))
    assert one[0] == pytest.approx(1 / (1 + math.exp(2)))  # the first finite one is 2


def test_running_statistics_take_the_batch_in_first() -> None:
    shaper = chain(["meanstd"], "shape")
    assert shaper(np.array([1.0, 3.0, NAN]), Context())[:2].tolist() == [-1, 1]
    # 1, 3, 8: mean 4, population variance (9 + 1 + 16) / 3
    assert shaper(np.array([8.0]), Context())[0] == pytest.approx(4 / math.sqrt(26 / 3))


def test_a_frozen_copy_learns_nothing() -> None:
    shaper = chain(["minmax"], "shape")
    shaper(np.array([0.0, 2.0]), Context())
    before = shaper.state_dict()
    assert shaper.frozen()(np.array([1.0, 4.0]), Context()).tolist() == [0.5, 2.0] and shaper.state_dict() == before
    assert shaper(np.array([1.0, 4.0]), Context()).tolist() == [0.25, 1.0]
    assert chain(["meanstd", "clip"], "shape").frozen()(np.array([5.0]), Context()).tolist() == [5.0]


@pytest.mark.parametrize(("name", "value"), [("meanstd", 0.0), ("clip", 0.1), ("minmax", 0.0)])
def test_equal_scores_have_no_spread_however_they_round(name: str, value: float) -> None:
    shaper = chain([name], "shape")
    for size in (3, 6, 7):
        assert shaper(np.full(size, 0.1), Context()).tolist() == pytest.approx([value] * size, abs=1e-15)


@pytest.mark.parametrize("name", sorted(shapings))
def test_missing_stays_missing_and_nothing_overflows(name: str) -> None:
    options = {"target": 1.0} if name == "saturate" else {}
    scores = np.array([NAN, 800.0, -800.0, math.inf])
    context = Context(lengths=np.array([1, 400, 2, 3]), references=np.zeros((4, 1)))
    with np.errstate(all="raise", under="ignore"):
        found = chain([{name: options}], "shape")(scores, context)
    assert np.isnan(found).tolist() == [True, False, False, True]


def test_a_chain_goes_from_left_to_right_and_its_state_through_json() -> None:
    specs = [{"length_penalty": {"valid_len": 10, "len_penalty": 1.0}}, {"ceil": {"ceil": 3.0}}, "meanstd"]
    one, two = chain(specs, "shape"), chain(specs, "shape")
    context = Context(lengths=np.array([8, 12]))
    assert one(np.array([9.0, 1.0]), context).tolist() == [1.0, -1.0]  # 3 and -1
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two(np.array([0.5, 7.0]), context).tolist() == one(np.array([0.5, 7.0]), context).tolist()
    with pytest.raises(UserError, match="made with"):
        chain(["minmax"], "shape").load_state_dict(one.state_dict())


def test_the_moments_do_not_depend_on_the_batches() -> None:
    numbers = np.random.default_rng(0).normal(3, 2, 50)
    one, many = Moments(), Moments()
    one.update(numbers)
    for part in np.array_split(numbers, 7):
        many.update(np.append(part, NAN))
    assert many.n == 50 and many.mean == pytest.approx(numbers.mean())
    assert many.std == pytest.approx(numbers.std()) == one.std


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"shape: there is no shaper 'pra'|did you mean 'par'"):
        chain(["pra"], "shape")
    with pytest.raises(UserError, match=r"shape\.par\.m"):
        chain([{"par": {"m": 1}}], "shape")
    with pytest.raises(ValueError, match="reference answers"):
        chain(["par"], "shape")(np.zeros(1), Context())


def test_standardise_measures_the_first_batch_and_is_frozen_then() -> None:
    made = chain(["standardise"], "shape")
    assert made(np.array([0.0, 2.0, np.nan]), Context()).tolist()[:2] == [-1.0, 1.0]
    assert made(np.array([5.0]), Context()).tolist() == [4.0]
    other = chain(["standardise"], "shape")
    other.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert other(np.array([5.0]), Context()).tolist() == [4.0]
    fresh = chain(["standardise"], "shape").frozen()
    assert fresh(np.array([5.0]), Context()).tolist() == [5.0]  # an evaluation before the first step measures nothing
