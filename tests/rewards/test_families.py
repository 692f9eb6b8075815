"""The formulas of form, length and repetition, in numbers that a person can work out."""

from __future__ import annotations

import pytest

from core.errors import UserError
from rewards.format import boxed, regex, tag_count, think_format
from rewards.length import cosine_length, kimi_length, l1_max, length, soft_overlong
from rewards.repetition import repetition
from rewards.reward import bind

RIGHT, WRONG = r"\boxed{5}", r"\boxed{4}"


def tokens(count: int) -> list[int]:
    return [0] * count


@pytest.mark.parametrize(("count", "value"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (1000, -1)])
def test_soft_overlong_falls_over_the_last_tokens(count: int, value: float) -> None:
    assert soft_overlong(tokens(count), max_len=100, cache=20) == value
    assert soft_overlong(tokens(count), max_len=100, cache=20, factor=0.5) == value / 2


def test_length_is_the_distance_from_the_target() -> None:
    assert length(tokens(50), target=48, alpha=0.25) == length(tokens(46), target=48, alpha=0.25) == -0.5
    assert length(tokens(48), target=48) == 0
    assert length(tokens(0), target=48) == length(tokens(96), target=48) == -1


@pytest.mark.parametrize(
    ("text", "count", "value"),
    [
        (RIGHT, 0, 1.0),
        (RIGHT, 50, 0.75),  # cos(pi / 2) = 0: half way between 1 and 0.5
        (RIGHT, 100, 0.5),
        (RIGHT, 900, 0.5),
        (WRONG, 0, -1.0),
        (WRONG, 50, -0.75),
        (WRONG, 100, -0.5),
    ],
)
def test_cosine_length_pays_short_right_and_long_wrong_answers(text: str, count: int, value: float) -> None:
    assert cosine_length(text, tokens(count), max_len=100, answer="5") == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "count", "value"),
    [
        (RIGHT, 480, 0.82),  # 0.01 * (512 - 480) + 0.5
        (RIGHT, 100, 1.0),
        (RIGHT, 562, 0.0),  # 0.01 * -50 + 0.5
        (WRONG, 100, 0.0),
    ],
)
def test_l1_max_pays_right_answers_below_the_budget(text: str, count: int, value: float) -> None:
    assert l1_max(text, tokens(count), budget=512, answer="5") == pytest.approx(value)


def test_kimi_length_compares_within_the_group() -> None:
    # shortest 2, longest 10: 1/2 - (n - 2) / 8 is 1/2, 1/4, -1/2; wrong ones get at most 0
    texts, ids = [RIGHT, RIGHT, RIGHT, WRONG, WRONG], [tokens(n) for n in (2, 4, 10, 2, 10)]
    assert kimi_length(texts, ids, answer=["5"] * 5) == [0.5, 0.25, -0.5, 0.0, -0.5]
    assert kimi_length(texts, [tokens(7)] * 5, answer=["5"] * 5) == [0.0] * 5


def test_rewards_that_need_the_right_answer_abstain_without_it() -> None:
    assert cosine_length(RIGHT, tokens(3), max_len=9) is None
    assert l1_max(RIGHT, tokens(3), budget=9, answer="") is None
    assert kimi_length([RIGHT], [tokens(3)]) == [None]
    assert l1_max(RIGHT, tokens(3), budget=9, gold_column="solution", solution="5") == 0.56


@pytest.mark.parametrize(
    ("ids", "n", "value"),
    [
        ([1, 2, 3, 4], 2, 0),
        ([5, 5, 5, 5, 5], 2, -0.75),  # 4 pairs, 1 distinct
        ([1, 2, 1, 2, 1], 2, -0.5),  # 12 21 12 21: 4 pairs, 2 distinct
        ([1, 2], 3, 0),
        ([], 1, 0),
    ],
)
def test_repetition_is_the_share_of_repeated_n_grams(ids: list[int], n: int, value: float) -> None:
    assert repetition(ids, n=n) == value
    assert repetition(ids, n=n, max_penalty=-2.0) == 2 * value


@pytest.mark.parametrize(
    ("text", "tags", "think"),
    [
        ("<think>\nabc\n</think>\n<answer>\n4\n</answer>", 1.0, 1.0),
        ("<think>\nabc\n</think>\n4", 0.5, 1.0),
        ("<think>\n<think>\nabc\n</think>\n4", 0.25, 0.0),
        ("abc", 0.0, 0.0),
        ("abc <think>x</think>", 0.0, 0.0),
    ],
)
def test_thinking_tags(text: str, tags: float, think: float) -> None:
    assert (tag_count(text), think_format(text)) == (tags, think)


def test_a_box_counts_when_closed_filled_and_after_the_thinking() -> None:
    assert boxed(r"so \boxed{5}") == 1.0
    assert [boxed(t) for t in (r"\boxed{}", r"\boxed{5", r"\boxed{5}</think> so", "5")] == [0.0] * 4


def test_a_pattern_is_searched_or_matched_and_checked_when_bound() -> None:
    import re

    assert regex("a 12 b", pattern=re.compile(r"\d+")) == 1.0
    assert regex("a 12 b", pattern=re.compile(r"\d+"), whole=True) == 0.0
    with pytest.raises(UserError, match=r"rewards.components.r.pattern"):
        bind("regex", {"pattern": "("}, "rewards.components.r")
