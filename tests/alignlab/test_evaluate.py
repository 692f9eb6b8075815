"""Which model an evaluation is of, how its problems are asked, and what is said of those that could not be."""

import argparse
import json
import math

import pytest

from alignlab.benchmarks import find
from alignlab.evaluate import _resolve, evaluate, grader, job
from alignlab.run_dir import RunDir
from core.errors import UserError
from core.loading import parse_config
from core.schema import Completion, Group, Score
from tests.tiny import tiny_tokenizer

TREE = {"name": "r", "steps": 4, "model": {"path": "m"}, "data": {"path": "d.jsonl", "max_prompt_tokens": 30}}


def arguments(model, **changes):
    given = {"benchmarks": "gsm8k", "data": None, "limit": None, "samples": 1, "temperature": None, "out": None}
    given |= {"max_tokens": None, "template": None, "seed": 0, "overrides": []}
    return argparse.Namespace(model=str(model), **{**given, **changes})


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 2 and 3."""
    made = RunDir.create(parse_config({**TREE, "output_dir": str(tmp_path)}, "test"), resume=False)
    for step in (2, 3):
        (made.begin_checkpoint(step) / "model").mkdir()
        made.commit_checkpoint(step, {}, keep=2)
    return made.path


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_is_itself(run):
    for model, step in ((run, 3), (run / "checkpoints", 3), (run / "checkpoints" / "step-000002", 2)):
        config, base, folder = _resolve(arguments(model))
        assert config.model.path == str(run / "checkpoints" / f"step-{step:06d}" / "model")
        assert folder == run / "evals" / f"eval-step-{step:06d}" and base.max_prompt_tokens == 30
    inside = run / "checkpoints" / "step-000002" / "model"
    assert _resolve(arguments(inside))[0].model.path == str(inside)


def test_a_checkpoint_that_is_not_there_is_not_replaced_by_another(run):
    with pytest.raises(UserError, match=r"no checkpoint .*step-000001.*holds step-000002, step-000003"):
        _resolve(arguments(run / "checkpoints" / "step-000001"))


def test_a_config_in_the_working_directory_makes_no_run_of_what_lies_below(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert _resolve(arguments("model"))[0].model.path == str(tmp_path / "model")


def test_naming_no_benchmark_is_a_mistake(run):
    with pytest.raises(UserError, match="--benchmarks: names none; Allowed: aime24"):
        _resolve(arguments(run, benchmarks=","))


def test_a_run_is_evaluated_as_it_was_trained():
    components = {"right": {"fn": "math_answer", "extract": "any", "weight": 3.0}, "length": {"target": 9}}
    config = parse_config({**TREE, "rollout": {"stop": ["###"]}, "rewards": {"components": components}}, "test")
    one = job("mine", find("mine.jsonl"), [], config, config.data, max_tokens=7)
    assert (one.name, one.sampling.max_tokens, one.sampling.stop) == ("mine", 7, ("###",))
    assert one.grader == {"extract": "any"} == grader(config).components["math_answer"]


class Actors:
    """Answers every request with one right completion."""

    async def run(self, requests):
        for request in requests:
            yield Group(request.id, request.prompt, (Completion((1,), (0.0,), (0,), "5", "stop"),) * len(request.seeds))


async def right(group):
    from dataclasses import replace

    return replace(group, components={"math_answer": (Score("ok", 1.0),) * len(group.completions)})


async def unjudged(group):
    from dataclasses import replace

    return replace(group, components={"math_answer": (Score("abstain"),) * len(group.completions)})


def evaluated(tmp_path, grade, *questions):
    import asyncio

    config = parse_config(TREE, "test")
    rows = [{"question": question, "answer": "5"} for question in questions]
    one = job("mine", find("mine.jsonl"), rows, config, None, max_tokens=7)
    result = asyncio.run(evaluate(one, tiny_tokenizer(tmp_path / "t"), Actors(), grade, tmp_path, {}))
    return result, json.loads((tmp_path / "mine.summary.json").read_text(), parse_constant=pytest.fail)


def test_problems_that_are_too_long_to_ask_are_said(tmp_path):
    result, summary = evaluated(tmp_path, right, "2+3?", "long " * 50)
    assert (result.problems, result.left_out, summary["result"]["left_out"]) == (1, 1, 1)
    assert "(1 problems x 1, 1 left out as too long)" in result.line()
    assert result.metrics()["eval/mine/left_out"] == 1.0


def test_what_nobody_could_judge_is_null_and_not_a_number(tmp_path):
    result, summary = evaluated(tmp_path, unjudged, "2+3?")
    assert math.isnan(result.accuracy) and summary["result"]["accuracy"] is None
