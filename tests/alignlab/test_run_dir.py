"""What a run leaves behind is whole, and a resumed run continues it."""

import json

import pytest

from alignlab.run_dir import RunDir
from core.errors import UserError
from core.loading import load_config, parse_config

TREE = {"name": "r", "steps": 4, "model": {"path": "m"}, "data": {"path": "d.jsonl"}}


@pytest.fixture
def config(tmp_path):
    return parse_config({**TREE, "output_dir": str(tmp_path)}, "test")


def test_a_run_writes_its_config_and_environment(config):
    run = RunDir.create(config, resume=False)
    assert load_config(run.path / "config.yaml") == config
    assert json.loads((run.path / "environment.json").read_text())["versions"]["ray"]


def begun(config):
    """The folder of a run that has done a step."""
    run = RunDir.create(config, resume=False)
    run.write_rollouts(1, [{"step": 1}])
    return run


def test_a_run_is_not_overwritten_and_not_resumed_with_another_config(config):
    begun(config)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        RunDir.create(config, resume=False)
    with pytest.raises(UserError, match="in what shapes the updates: seed was 0, is 1"):
        RunDir.create(config.model_copy(update={"seed": 1}), resume=True)
    with pytest.raises(UserError, match="there is no run in"):
        RunDir.create(config.model_copy(update={"name": "other"}), resume=True)


def test_a_resumed_run_may_be_placed_otherwise(config, tmp_path):
    begun(config)
    tree = {**TREE, "output_dir": str(tmp_path), "steps": 9, "actors": {"count": 3}, "rewards": {"workers": 4}}
    tree["learner"] = {"token_budget": 64, "ranks": 2, "timeout": 9.0}
    RunDir.create(parse_config(tree, "test"), resume=True)
    for section, option, value in (("actors", "dtype", "bfloat16"), ("learner", "minibatches", 2)):
        with pytest.raises(UserError, match=rf"{section}\.{option} was"):
            RunDir.create(parse_config({**tree, section: {**tree[section], option: value}}, "test"), resume=True)


def test_a_run_that_ended_before_its_first_step_may_start_again_with_another_config(config):
    RunDir.create(config, resume=False)
    changed = config.model_copy(update={"seed": 1})
    assert load_config(RunDir.create(changed, resume=False).path / "config.yaml").seed == 1
    assert load_config(RunDir.create(config, resume=True).path / "config.yaml").seed == 0


def test_logs_of_earlier_attempts_are_kept_apart(config):
    run = begun(config)
    (run.path / "logs" / "learner-0.log").write_text("first")
    again = RunDir.create(config, resume=True)
    assert (again.path / "logs" / "attempt-0" / "learner-0.log").read_text() == "first"
    assert not (again.path / "logs" / "learner-0.log").exists()


def test_a_checkpoint_that_is_written_again_replaces_the_old_one(config):
    run = RunDir.create(config, resume=False)
    run.begin_checkpoint(1)
    run.commit_checkpoint(1, {"try": 1}, keep=2)
    run.begin_checkpoint(1)
    run.commit_checkpoint(1, {"try": 2}, keep=2)
    assert [c.state() for c in run.checkpoints()] == [{"try": 2}]
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_checkpoint_counts_only_when_it_is_whole_and_the_oldest_go(config):
    run = RunDir.create(config, resume=False)
    for step in (1, 2, 3):
        (run.begin_checkpoint(step) / "weights").write_text("x")
        assert all(c.step != step for c in run.checkpoints())
        run.commit_checkpoint(step, {"step": step}, keep=2)
    run.begin_checkpoint(4)  # a crash here leaves no checkpoint 4
    assert [c.step for c in run.checkpoints()] == [2, 3]
    assert run.checkpoints()[-1].state() == {"step": 3}


def test_a_resumed_run_forgets_what_it_does_again(config):
    run = RunDir.create(config, resume=False)
    for step in (1, 2, 3):
        run.write_rollouts(step, [{"step": step}])
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "x')
    run.forget_after(2)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert sorted(p.name for p in (run.path / "rollouts").iterdir()) == ["step-000001.jsonl", "step-000002.jsonl"]
