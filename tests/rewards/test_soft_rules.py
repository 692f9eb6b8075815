"""Trust, uncertainty, ensembles, process rewards, length rules and extraction beyond their vectors."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest

from rewards.ensemble import best_of_n, best_of_n_kl, combine
from rewards.extraction import gsm8k_flexible, gsm8k_strict, last_number
from rewards.length_rules import Conciseness, TraacLengths, drpo_weights, traac_length
from rewards.neighbours import agreement, variation
from rewards.process import collapse, counted, process_advantages, with_outcome
from rewards.soft_credit import soft_multichoice, weighted_means
from rewards.trust import trust
from rewards.uncertainty import uncertainty

NAN = math.nan
ONE_GROUP = np.zeros(4, dtype=int)


def test_a_judge_that_likes_wrong_answers_is_trusted_less() -> None:
    outcome, liked = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.2, NAN, 0.6, 1.0])
    found = trust(outcome, liked, ONE_GROUP, step=0, total_steps=10)
    assert found.gamma[0] == pytest.approx(math.exp(0.2 - 0.8)) and found.coefficient[3] == 0.3 * found.gamma[3]
    later = trust(outcome, liked, ONE_GROUP, step=10, total_steps=10)
    assert later.coefficient[0] == pytest.approx(found.coefficient[0] / math.e)
    unjudged = trust(outcome, np.array([NAN, NAN, 0.6, 1.0]), ONE_GROUP, step=0, total_steps=10)
    assert unjudged.gamma.tolist() == [1, 1, 1, 1]


def test_the_judge_is_never_the_only_signal() -> None:
    for outcome in (np.ones(4), np.zeros(4), np.array([1.0, 1.0, NAN, 0.95]), np.full(4, NAN)):
        found = trust(outcome, np.linspace(0, 1, 4), ONE_GROUP, step=0, total_steps=10)
        assert not found.coefficient.any()


def test_an_uncertain_score_moves_to_the_mean_of_its_group() -> None:
    sure = uncertainty(np.array([1.0, 0.0]), np.array([1.0, NAN]), np.zeros(2, int))
    assert sure.reward.tolist() == [1, 0] and sure.weight.tolist() == [1, 1] and math.isnan(sure.uncertainty[1])
    torn = uncertainty(np.array([2.0, 0.0]), np.array([0.0, 0.0]), np.zeros(2, int), scale=math.log(2))
    assert torn.reward == pytest.approx([0.5 + 0.25 * 0.5, 0])  # 2^-2 of the way from the mean, 1/2, to 1
    literal = uncertainty(np.array([2.0]), np.array([0.0]), np.zeros(1, int), mode="multiply", scale=math.log(2))
    assert literal.reward == pytest.approx([0.25])


def test_a_coefficient_of_0_is_0() -> None:
    scores = np.array([[1.0, 5.0], [3.0, NAN]])
    assert combine(scores, coef=0.0).reward.tolist() == [2, 5]
    assert combine(scores, coef=0.5).reward.tolist() == [1.5, 5] and combine(scores, ddof=1).variance.tolist() == [2, 0]


def test_best_of_n_is_the_average_over_all_draws() -> None:
    rng = np.random.default_rng(0)
    proxy, gold = rng.random((3, 6)), rng.random((3, 6))
    for n in range(1, 7):
        draws = [[g[list(c)][np.argmax(p[list(c)])] for c in combinations(range(6), n)] for p, g in zip(proxy, gold)]  # noqa: B905
        assert best_of_n(proxy, gold, n)[1] == pytest.approx(np.mean(draws))
    assert math.isnan(best_of_n(proxy, gold, 7)[0]) and best_of_n_kl(1) == 0
    assert best_of_n(rng.random((1, 3000)), np.ones((1, 3000)), 1500)[1] == pytest.approx(1)


def test_later_steps_count_for_earlier_tokens() -> None:
    # rewards 0, 2 and 1: mean 1, std sqrt(2/3)
    found = process_advantages([[0.0, 2.0], [1.0]], [[0, 2], [1]], [4, 2], eps=0.0)
    size = math.sqrt(1.5)
    assert found[0] == pytest.approx([0, size, size, 0]) and found[1].tolist() == [0, 0]
    spread = process_advantages([[0.0, 2.0], [1.0]], [[0, 2], [1]], [4, 2], eps=0.0, per_step=True)
    assert spread[0] == pytest.approx([0, size, size, 0])
    assert with_outcome(np.array([1.0, -1.0]), found, weight=2.0)[1].tolist() == [-1, -1]


def test_step_scores_collapse_to_one_number() -> None:
    assert collapse([0.5, NAN, 0.25]) == 0.25 and collapse([0.5, 0.25, NAN], "last") == 0.25
    assert math.isnan(collapse([NAN])) and math.isnan(collapse([], "prod"))
    assert collapse([0.0, 1.0], "mean_logit") == pytest.approx(0.5)
    assert counted([0.9, 0.2, 0.8], wrong_below=0.5) == [0.9, 0.2] and counted([0.9, 0.2, 0.8], limit=1) == [0.9]


def test_constant_columns_have_no_weight() -> None:
    table = np.array([[0.1, 0.0, NAN], [0.1, 1.0, NAN], [0.1, 0.5, NAN]])
    assert variation(table)[1] == pytest.approx([0, 3, 0])
    # offset by 1: std 0.5 over mean 1.5
    assert variation(table, offsets=[0, 1, 0])[0][1] == pytest.approx(1 / 3)
    found = agreement(table, np.array([-1.0, 1.0, 0.0]), np.zeros(3, int))
    assert found[1] == pytest.approx(1) and np.isnan(found[[0, 2]]).all()
    covariance = agreement(table, np.array([-1.0, 1.0, 0.0]), np.zeros(3, int), use_corr=False)
    assert covariance[:2] == pytest.approx([0, 1 / 3])  # (0.5 + 0.5) / 3


def test_traac_compares_with_the_batches_before() -> None:
    lengths = TraacLengths(window=2)
    assert lengths.reward(10, True, "gsm", 0.9) == 0
    lengths.add([("gsm", 0.9, 100), ("gsm", 0.85, 200), ("gsm", 0.2, 900)])
    assert lengths.history("gsm", 0.8) == [100, 200] and lengths.history("gsm", 0.0) == [900]
    assert lengths.reward(100, True, "gsm", 0.9) == 1 and lengths.reward(100, False, "gsm", 0.9) == 0
    again = TraacLengths(window=2)
    again.load_state_dict(json.loads(json.dumps(lengths.state_dict())))
    for each in (lengths, again):
        each.add([("gsm", 0.9, 50)]), each.add([])
        assert each.history("gsm", 0.9) == [50]
    assert traac_length(1e9, 0.1, [100.0]) == pytest.approx(0, abs=1e-12)


def test_concise_is_shorter_than_the_mean_of_all_so_far() -> None:
    short = Conciseness()
    assert short([10, 20]) == [1, 0]
    again = Conciseness()
    again.load_state_dict(json.loads(json.dumps(short.state_dict())))
    assert short([15, 100]) == again([15, 100]) == [1, 0] and short.mean == pytest.approx(145 / 4)


def test_drpo_weights_have_mean_1_over_the_right_ones() -> None:
    found = drpo_weights([1e6, 2e6, 5], [True, True, False], max_len=100, temper=0.1)
    assert found == [2, 0, 0] and drpo_weights([5], [False], max_len=10, temper=0.1) == [0]


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "last"),
    [
        ("#### 12,", "12", "12,", "12"),
        ("#### 12.", "12.", "12.", "12"),
        ("####6", None, "6", "6"),
        ("no number. Really.", None, None, None),
        ("a .5 b", None, ".5", ".5"),
        ("7 - 2 = 5", None, "5", "5"),
    ],
)
def test_answers_are_extracted_as_elsewhere(text: str, strict: str, flexible: str, last: str) -> None:
    assert (gsm8k_strict(text), gsm8k_flexible(text), last_number(text)) == (strict, flexible, last)


def test_part_of_the_right_labels_earns_part() -> None:
    assert soft_multichoice("B ,A", "A,B,C") == 2 / 3 and soft_multichoice(" , ", "A") == soft_multichoice("A", "") == 0


def test_means_cannot_be_traded_off_to_nothing() -> None:
    assert weighted_means(1.0, 0.0, 0.5, 0.5) == (0.5, 0, 0)
    assert weighted_means(0.25, 1.0, 0.5, 0.5) == pytest.approx((0.625, 0.5, 0.4))
