"""The benches against TRL and those of whole runs: what is divided by what, and that their changes are real options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benches import overlap, runs, trl_learner, trl_step, two_actors
from benches.apart import Done
from core.loading import load_config

CONFIG = str(runs.ROOT / "configs" / "quickstart.yaml")
CASE = trl_step.Case("m", "model", "{prompt} \\boxed{{}}", 4, 2, 8, 4, 512, 2, 3, 1, at_least=3)


def done(seconds: float, peak: float = 1.0, **facts: Any) -> Done:
    return Done(seconds, seconds, peak / 2, peak, facts)


def test_the_learner_is_compared_by_time_and_by_peak() -> None:
    pairs = [(done(2, 3, tokens=100), done(8, 12, tokens=100)), (done(4, 3, tokens=100), done(8, 6, tokens=100))]
    assert trl_learner.speed(pairs) == [4, 2]  # theirs over ours
    assert trl_learner.memory(pairs) == [0.25, 0.5]  # ours over theirs
    facts = trl_learner.facts(pairs, "float32")
    assert facts["seconds"] == 3 and facts["tokens/s"] == pytest.approx(100 / 3) and facts["TRL's tokens/s"] == 12.5
    assert trl_learner.gib(pairs)["TRL's in the step"] == 4.5  # half of 9 GiB is there before


def test_both_sides_of_the_learner_train_on_the_same_rollouts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    first, second = trl_learner.rollouts(str(tmp_path)), trl_learner.rollouts(str(tmp_path))
    assert first == second and len(first) == trl_learner.PROMPTS
    assert len(first[0].completions) == trl_learner.GROUP and len(first[0].prompt.token_ids) == 128


def test_a_step_is_compared_on_policy_and_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Peer:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def __call__(self) -> Done:
            return done(40.0, length=6.0)  # of trl_step.STEPS = 2 steps: 20 s each

    seconds = {0: 5.0, 1: 2.0}
    monkeypatch.setattr(trl_step, "Apart", Peer)
    monkeypatch.setattr(trl_step, "best_threads", lambda case: 1)
    monkeypatch.setattr(trl_step, "run", lambda case, folder, name, ahead: trl_step.Step(seconds[ahead], 7.0))
    on_policy, ahead = trl_step.against(CASE, rounds=2)
    assert on_policy.values == [4, 4] and on_policy.holds and on_policy.at_least == 3
    assert ahead.values == [10, 10] and ahead.at_least is None
    assert on_policy.facts["seconds"] == 5 and on_policy.facts["TRL's seconds"] == 20
    assert on_policy.facts["length"] == 7 and on_policy.facts["TRL's length"] == 6


def test_changes_of_a_run_are_options_that_exist() -> None:
    config = load_config(CONFIG, [*runs.QUIET, *trl_step.changes(CASE, threads=2)])
    assert config.data.template == CASE.template and config.learner.threads == config.actors.threads == 2
    assert config.eval.benchmarks == [] and config.checkpoint.every == 0
    config = load_config(CONFIG, two_actors.CHANGES)
    assert config.method["drop_truncated"] is True and config.rollout.max_staleness == 1
    assert load_config(CONFIG, overlap.CHANGES).rollout.prompts == 64


def test_steps_are_read_after_the_warm_up_and_evaluations_are_not(tmp_path: Path) -> None:
    rows = [{"step": n, "time/step": float(n), "time/train": 1.0} for n in (1, 2, 3, 4)]
    lines = [*rows[:3], {"step": 3, "eval/heldout/accuracy": 0.5}, rows[3]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(runs.steps(tmp_path / "metrics.jsonl", warm=1))
    assert found == rows[1:]
    assert runs.median(found, "time/step", "time/train") == 4 and runs.mean(found, "time/step") == 3


def test_an_overlap_is_the_step_over_the_longer_part() -> None:
    parts = {"time/wait_groups": 3.0, "time/train": 1.0, "time/weigh": 0.5, "time/publish": 0.5, "time/step": 5.5}
    found = overlap.parts([parts], [parts | {"time/step": 3.3}])
    # generate 3, learn 1 + 0.5 + 0.5 = 2: 3.3 over 3 is 1.1
    assert found == {"generate": 3.0, "learn": 2.0, "one after the other": 5.5, "overlapped": 3.3}
