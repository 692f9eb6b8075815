"""Evaluation numbers that a person can work out."""

import doctest
import math

from alignlab import results
from alignlab.results import interval, pass_at_k, problem_rows, summarise
from core.schema import Completion, Group, Prompt, Score


def group(ordinal, *scores, tokens=2, finish="stop"):
    completion = Completion(tuple(range(tokens)), (0.0,) * tokens, (0,) * tokens, "x", finish)
    prompt = Prompt(ordinal, "q", (1,), {"answer": "1", "id": f"p{ordinal}"})
    return Group(f"g{ordinal}", prompt, (completion,) * len(scores), components={"math_answer": scores})


RIGHT, WRONG = Score("ok", 1.0), Score("ok", 0.0)


def test_examples_in_docstrings_are_true():
    assert doctest.testmod(results).failed == 0


def test_accuracy_is_the_mean_over_problems_and_pass_at_k_is_unbiased():
    result = summarise("b", [group(0, RIGHT, RIGHT), group(1, RIGHT, WRONG), group(2, WRONG, WRONG)], 2, seconds=2.0)
    assert result.accuracy == 0.5  # (1 + 1/2 + 0) / 3
    assert result.pass_at == {1: 0.5, 2: 2 / 3}
    assert result.tokens_per_second == 6.0  # 3 problems x 2 completions x 2 tokens in 2 s
    # Shares 1, .5, 0: standard deviation .5, standard error .5 / sqrt(3) = .2887
    assert math.isclose(result.high, min(1, 0.5 + 1.96 * 0.5 / math.sqrt(3)))


def test_a_completion_without_a_verdict_is_left_out_and_counted():
    result = summarise("b", [group(0, RIGHT, Score("timeout")), group(1, Score("error", detail="x"))], 2, seconds=1.0)
    assert (result.accuracy, result.unscored) == (1.0, 2)
    assert result.pass_at[1] == 1.0
    rows = list(problem_rows(group(1, Score("error", detail="x"))))
    assert rows[0]["correct"] is None and rows[0]["status"] == "error"


def test_interval_without_and_with_one_problem():
    assert all(map(math.isnan, interval([])))
    low, high = interval([0.5])
    assert 0 <= low < 0.5 < high <= 1


def test_pass_at_k_by_hand():
    assert pass_at_k(3, 0, 2) == 0.0
    assert pass_at_k(3, 3, 1) == 1.0
    assert math.isclose(pass_at_k(4, 2, 2), 1 - 1 / 6)  # only 1 of the 6 pairs has no right one
