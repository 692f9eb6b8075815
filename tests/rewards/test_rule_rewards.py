"""Options of several letters, L1's exact target, rewards with state."""

from __future__ import annotations

import json
import math

import pytest

from core.errors import UserError
from rewards.choices import soft_multichoice
from rewards.length import conciseness, kimi_length, l1_exact, traac_length
from rewards.reward import Samples, bind

RIGHT, WRONG = r"\boxed{5}", r"\boxed{4}"


def tokens(count: int) -> list[int]:
    return [0] * count


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        (r"\boxed{A}", "A,C", 0.5),
        (r"\boxed{C, A}", "A,C", 1),
        (r"\boxed{A} and \boxed{C}", "A,C", 1),
        (r"\boxed{(A), (C)}", ["A", "C"], 1),
        (r"\boxed{\text{A, C}}", "A,C", 1),
        (r"\boxed{A,B}", "A,C", 0),
        (r"\boxed{a}", "A,C", 0),
        ("#### A", "A,B,C,D", 0.25),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        ("A", "A", 0),  # not marked
        ("", "A", 0),
    ],
)
def test_part_of_the_right_options_earns_part(text: str, gold: object, value: float) -> None:
    score = soft_multichoice(text, answer=gold)
    assert score.status == "ok" and score.value == value


def test_options_are_found_where_they_are_said_to_be() -> None:
    assert soft_multichoice("<answer>B</answer> <answer>A, C</answer>", extract="tag", answer="A,C").value == 1
    assert soft_multichoice("<think>B</think>A", extract="whole", answer="A,C").value == 0.5
    assert soft_multichoice("A", extract="tag", answer="A").value == 0
    assert soft_multichoice(r"\boxed{A}", gold_column="key", key="A").value == 1
    nothing: list[object] = [None, "", " ", []]
    for missing in nothing:
        assert soft_multichoice(r"\boxed{A}", answer=missing).status == "abstain"


def test_l1_exact_charges_for_every_token_off_the_target() -> None:
    assert l1_exact(RIGHT, tokens(100), target=300, answer="5") == pytest.approx(0.94)  # 1 - 0.0003 * 200
    assert l1_exact(WRONG, tokens(400), target=300, alpha=0.01, answer="5") == pytest.approx(-1)
    assert l1_exact(RIGHT, tokens(100), target="budget", answer="5", budget="200") == pytest.approx(0.97)
    assert l1_exact(RIGHT, tokens(100), target=300) is None
    with pytest.raises(LookupError, match="'budget'"):
        l1_exact(RIGHT, tokens(1), target="budget", answer="5", budgets=3)
    bound = bind("l1_exact", {"target": 300}, "here")
    assert bound.score_one(Samples("2+3?", {"answer": "5"}, [RIGHT], [tokens(300)], [False]), 0).value == 1  # type: ignore[union-attr]
    with pytest.raises(UserError, match="target"):
        bind("l1_exact", {"target": 0}, "here")


def call(by: traac_length, step: int, counts: list[int], right: list[bool], source: str = "gsm") -> list[float | None]:
    texts = [RIGHT if yes else WRONG for yes in right]
    many = len(counts)
    return by(texts, [tokens(n) for n in counts], step, answer=["5"] * many, source=[source] * many)


def test_traac_compares_with_the_steps_before() -> None:
    by = traac_length(source_column="source")
    assert call(by, 1, [100, 200], [True, True]) == [0, 0]  # nothing to compare with yet
    assert call(by, 1, [100, 300], [True, True]) == [0, 0]  # groups of one step do not see each other
    # history 100, 200, 100, 300: linear (300 - n) / 200, median 150, so sigmoid(-(n - 150) / 15)
    assert call(by, 2, [100, 250], [True, True]) == [1, pytest.approx(0.25)]
    assert call(by, 2, [150, 150], [True, False]) == [0, 0]  # pass rate 1/2: another class, without history
    assert call(by, 2, [100, 100], [True, True], source="math") == [0, 0]
    assert call(by, 3, [100, 300], [True, False]) == [0.75, 0]  # of medium difficulty, shorter than the 150 there
    assert by(["5"], [tokens(3)], 4, source=["gsm"]) == [None]


def test_traac_forgets_what_is_older_than_its_window() -> None:
    by = traac_length(window=1, source_column="source")
    for step, count in enumerate((100, 300, 200)):
        call(by, step, [count], [True])
    assert call(by, 3, [300], [True]) == [pytest.approx(1 / (1 + math.exp(5)))]  # beside 200 alone: (300 - 200) / 20
    assert by.past.history("gsm", 1.0) == [200]


@pytest.mark.parametrize("cut", range(6))
def test_state_goes_on_where_it_was_left(cut: int) -> None:
    calls = [(1, [100, 200]), (1, [120, 90]), (2, [100, 250]), (2, [30, 40]), (3, [150, 150]), (5, [10, 500])]
    whole, first = traac_length(window=2, source_column="source"), traac_length(window=2, source_column="source")
    expected = [call(whole, step, counts, [True, True]) for step, counts in calls]
    short, part = conciseness(), conciseness()
    flags = [short(["a"] * 2, [tokens(n) for n in counts]) for _, counts in calls]
    found = [call(first, step, counts, [True, True]) for step, counts in calls[:cut]]
    seen = [part(["a"] * 2, [tokens(n) for n in counts]) for _, counts in calls[:cut]]
    second, rest = traac_length(window=2, source_column="source"), conciseness()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert found + [call(second, step, counts, [True, True]) for step, counts in calls[cut:]] == expected
    assert seen + [rest(["a"] * 2, [tokens(n) for n in counts]) for _, counts in calls[cut:]] == flags
    assert second.state_dict() == whole.state_dict() and rest.state_dict() == short.state_dict()


def test_concise_is_shorter_than_the_mean_so_far() -> None:
    by = conciseness()
    assert by(["a", "b"], [tokens(10), tokens(20)]) == [1, 0]  # mean 15
    assert by(["a", "b"], [tokens(14), tokens(100)]) == [1, 0]  # mean 36


@pytest.mark.parametrize("name", ["traac_length", "conciseness"])
def test_rewards_with_state_are_bound_with_it(name: str) -> None:
    reward = bind(name, {}, "here")
    samples = Samples("2+3?", {"answer": "5"}, [RIGHT, RIGHT], [tokens(1), tokens(3)], [False, False], step=1)
    assert reward.keeper is not None and not reward.pool
    assert [score.value for score in reward.score_all(samples)] == ([0, 0] if name == "traac_length" else [1, 0])  # type: ignore[union-attr]
    assert json.loads(json.dumps(reward.keeper.state_dict())) == reward.keeper.state_dict()


def test_group_rewards_read_chat_messages_too() -> None:
    chat = [[{"role": "assistant", "content": text}] for text in (RIGHT, RIGHT)]
    ids = [tokens(2), tokens(4)]
    assert kimi_length(chat, ids, answer=["5"] * 2) == [0.5, -0.5]
    assert traac_length()(chat, ids, 1, answer=["5"] * 2) == [0, 0]
