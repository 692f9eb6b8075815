"""The two signatures, functions of one's own, what becomes of results, and the contract of all registered rewards."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from core.schema import Score
from rewards.reward import Reward, Samples, bind, rewards


def samples(*texts: str, ids: list[list[int]] | None = None, **columns: Any) -> Samples:
    return Samples("Q?", columns, list(texts), ids or [[1] * len(t) for t in texts], [False] * len(texts))


def scores(reward: Reward, given: Samples) -> list[Any]:
    if reward.batch:
        return reward.score_all(given)
    return [reward.score_one(given, i) for i in range(len(given.completions))]


def written(folder: Path, source: str, name: str = "f") -> str:
    (folder / "mine.py").write_text(source)
    return f"{folder / 'mine.py'}:{name}"


# ---------------------------------------------------------------- one completion a call
def test_inputs_are_positional_names_and_options_are_keyword_only(tmp_path: Path) -> None:
    fn = written(
        tmp_path, "def f(completion, answer, *, bonus: float = 1.0):\n    return bonus * (answer in completion)"
    )
    assert scores(bind(fn, {"bonus": 2.5}, "here"), samples("it is 5", "no", answer="5")) == [
        Score("ok", 2.5),
        Score("ok", 0.0),
    ]


def test_every_input_arrives(tmp_path: Path) -> None:
    source = """
def f(prompt, completion, completion_ids, truncated, level=3, **columns):
    assert (prompt, completion, completion_ids, truncated, level) == ("Q?", "ab", [7, 8], False, 3), locals()
    assert columns == {"answer": 5}
    return 1
"""
    assert scores(bind(written(tmp_path, source), {}, "here"), samples("ab", ids=[[7, 8]], answer=5)) == [
        Score("ok", 1)
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", Score("abstain")),
        ("return True", Score("ok", 1.0)),
        ("import numpy; return numpy.float32(0.5)", Score("ok", 0.5)),
        ("return float('nan')", Score("error", detail="invalid: returned nan")),
        ("return -float('inf')", Score("error", detail="invalid: returned -inf")),
        ("raise ValueError('no')", Score("error", detail="ValueError: no")),
        ("raise SystemExit(3)", Score("error", detail="SystemExit: 3")),
        ("return {'a': 1, 'b': None}", {"a": Score("ok", 1.0), "b": Score("abstain")}),
        ("return {}", Score("error", detail="ValueError: returned an empty mapping")),
    ],
)
def test_what_becomes_of_a_result(tmp_path: Path, body: str, expected: Any) -> None:
    assert scores(bind(written(tmp_path, f"def f(completion):\n    {body}"), {}, "here"), samples("x")) == [expected]


def test_text_is_no_number_and_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    (score,) = scores(bind(written(tmp_path, "def f(completion): return '1'"), {}, "here"), samples("x"))
    assert score.status == "error" and "where a number or None is expected" in score.detail
    (score,) = scores(
        bind(written(tmp_path, "def f(completion, anwser): return 1"), {}, "here"), samples("x", answer=1)
    )
    assert "no column 'anwser'; did you mean 'answer'?" in score.detail


def test_an_option_that_hides_a_column_is_refused(tmp_path: Path) -> None:
    fn = written(tmp_path, "def f(completion, *, answer=None): return 1")
    (score,) = scores(bind(fn, {}, "here"), samples("x", answer="5"))
    assert score.status == "error" and "put it before the *" in score.detail
    assert scores(bind(fn, {"answer": "y"}, "here"), samples("x", answer="5")) == [Score("ok", 1.0)]


def test_a_message_that_cannot_be_made_does_not_hide_the_error(tmp_path: Path) -> None:
    source = "class E(Exception):\n    def __str__(self): raise OSError\ndef f(completion): raise E"
    assert scores(bind(written(tmp_path, source), {}, "here"), samples("x")) == [Score("error", detail="E")]


# ---------------------------------------------------------------- TRL's signature
TRL = """
def f(prompts, completions, completion_ids=None, **kwargs):
    assert prompts == ["Q?", "Q?"] and completion_ids == [[1], [1, 1]]
    assert kwargs["trainer_state"] is None and kwargs["log_metric"]("a", 1) is None
    return [float(c == a) if a else None for c, a in zip(completions, kwargs["answer"])]
"""


def test_a_function_written_for_trl_works_unchanged(tmp_path: Path) -> None:
    reward = bind(written(tmp_path, TRL), {}, "here")
    assert scores(reward, samples("5", "no", answer="5")) == [Score("ok", 1.0), Score("ok", 0.0)]
    assert scores(reward, samples("5", "no", answer="")) == [Score("abstain")] * 2


def test_chat_prompts_reach_a_batch_function_as_trl_passes_them(tmp_path: Path) -> None:
    source = """
def f(completions, prompts, **kwargs):
    assert prompts[0][0]["content"] == "2+3?"
    return [len(c[0]["content"]) for c in completions]
"""
    chat = [{"role": "user", "content": "2+3?"}]
    assert scores(bind(written(tmp_path, source), {}, "here"), samples("5", "five", prompt=chat)) == [
        Score("ok", 1.0),
        Score("ok", 4.0),
    ]


def test_coroutines_are_awaited_and_mappings_of_lists_become_columns(tmp_path: Path) -> None:
    source = """
import asyncio
async def f(completions, log_extra=None):
    await asyncio.sleep(0)
    return {"a": [1, None], "b": [0, 2]}
"""
    assert scores(bind(written(tmp_path, source), {}, "here"), samples("x", "y")) == [
        {"a": Score("ok", 1.0), "b": Score("ok", 0.0)},
        {"a": Score("abstain"), "b": Score("ok", 2.0)},
    ]


def test_a_batch_function_that_forgets_one_completion_is_an_error_for_all(tmp_path: Path) -> None:
    result = scores(bind(written(tmp_path, "def f(completions): return [1]"), {}, "here"), samples("x", "y"))
    assert result == [Score("error", detail="ValueError: returned 1 values for 2 completions")] * 2


# ---------------------------------------------------------------- mistakes, before anything starts
@pytest.mark.parametrize(
    ("source", "name", "options", "says"),
    [
        ("def polite(completion): return 1", "polit", {}, "no function 'polit'; did you mean 'polite'?"),
        ("x = 1", "f", {}, "no function 'f'; it has none at all"),
        ("def f(text): return 1", "f", {}, "f(text), which takes no completion"),
        ("def f(*, completion): return 1", "f", {}, "takes no completion"),
        ("def f(completion, /): return 1", "f", {}, "drop the /"),
        ("def f(completion, completions): return 1", "f", {}, "names both one completion and many"),
        ("def f(completion, *, bonus=1.0): return 1", "f", {"bonis": 2}, "here.bonis: unknown option of "),
        ("def f(completion, *, bonus: float = 1.0): return 1", "f", {"bonus": "2"}, "here.bonus: "),
        ("def f(completion, *, bonus): return 1", "f", {}, "here.bonus: field required"),
        (
            "def f(completion, bonus=1.0): return 1",
            "f",
            {"bonus": 2},
            "is an input; put it after a * to make it an option",
        ),
        ("import no_such_module", "f", {}, "cannot be loaded: ModuleNotFoundError"),
        ("def f(:", "f", {}, "cannot be loaded: SyntaxError"),
        ("raise SystemExit", "f", {}, "cannot be loaded: SystemExit"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, source: str, name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        bind(written(tmp_path, source, name), options, "here")
    assert str(error.value).startswith("here") and says in str(error.value)


def test_a_missing_file_and_an_unknown_name_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_mine.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; did you mean 'rewards_of_mine.py'"):
        bind("reward_of_mine.py:f", {}, "here")
    with pytest.raises(UserError, match=r"there is no reward 'math_anwser'; did you mean 'math_answer'"):
        bind("math_anwser", {}, "here")


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("BONUS = 4")
    fn = written(tmp_path, "from neighbour_of_mine import BONUS\ndef f(completion): return BONUS")
    assert scores(bind(fn, {}, "here"), samples("x")) == [Score("ok", 4.0)]


# ---------------------------------------------------------------- all registered rewards
OPTIONS = {
    "regex": {"pattern": r"\d+"},
    "length": {"target": 10},
    "soft_overlong": {"max_len": 20, "cache": 10},
    "cosine_length": {"max_len": 20},
    "l1_max": {"budget": 20},
    "l1_exact": {"target": 20},
}
RULES = [name for name, made in rewards.items() if not getattr(made, "pool", False)]
TEXTS = ["", " ", r"\boxed{5}", "x" * 200_000, "\\boxed{" * 10_000, "√∞💥 ٣", "\ud800", "<think>" * 10_000, "\x00"]


@pytest.mark.parametrize("gold", ["5", None, "", 5, ["5"], "\\frac{"])
@pytest.mark.parametrize("name", RULES)
def test_every_reward_gives_a_number_or_abstains_on_any_text(name: str, gold: object) -> None:
    given = samples(*TEXTS, ids=[[1] * min(len(t), 5000) for t in TEXTS], answer=gold)
    found = scores(bind(name, OPTIONS.get(name, {}), name), given)
    assert len(found) == len(TEXTS)
    assert {score.status for score in found} <= {"ok", "abstain"}
    assert all(math.isfinite(score.value) for score in found if score.status == "ok")


@pytest.mark.parametrize("name", rewards)
def test_every_reward_is_documented_in_one_line_and_its_options_are_typed(name: str) -> None:
    assert len((inspect.getdoc(rewards[name]) or "").split("\n")[0]) > 20
    parameters = inspect.signature(rewards[name]).parameters.values()
    assert all(p.annotation is not p.empty for p in parameters)


def test_importing_rewards_is_light() -> None:
    code = (
        "import sys, rewards.composer; print([m for m in ('sympy', 'math_verify', 'torch', 'ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
