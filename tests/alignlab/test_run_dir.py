"""What a run leaves behind is whole, and a resumed run continues it."""

import hashlib
import json
import os

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


def saved(run, *steps):
    """The run's checkpoints after these steps; each has a model and a trainer's file."""
    for step in steps:
        folder = run.begin_checkpoint(step)
        for name in ("model/weights", "trainer/state"):
            (folder / name).parent.mkdir()
            (folder / name).write_bytes(f"{name} {step}".encode())
        run.commit_checkpoint(step, {"step": step, "owed": {10: 1, 9: 2}}, keep=9)
    return run.checkpoints()


def test_a_manifest_holds_the_digest_of_every_other_file(config):
    (checkpoint,) = saved(RunDir.create(config, resume=False), 3)
    manifest = json.loads((checkpoint.path / "run.json").read_text())
    assert manifest["files"] == {
        "model/weights": hashlib.sha256(b"model/weights 3").hexdigest(),
        "trainer/state": hashlib.sha256(b"trainer/state 3").hexdigest(),
    }
    assert checkpoint.state() == {"step": 3, "owed": {"10": 1, "9": 2}}  # the driver's part alone, as JSON has it
    assert checkpoint.verify() == []


def damage(checkpoint, name, how):
    path = checkpoint.path / name
    if how == "gone":
        path.unlink()
    elif how == "torn":
        os.truncate(path, path.stat().st_size // 2)
    else:
        data = path.read_bytes()
        path.write_bytes(data.replace(b"3", b"4", 1))  # in run.json that is valid JSON: "step": 4


DAMAGES = [
    ("model/weights", "changed", "model/weights has been changed"),
    ("model/weights", "torn", "model/weights has been changed"),
    ("trainer/state", "gone", "trainer/state is missing"),
    ("run.json", "changed", "run.json has been changed"),
    ("run.json", "torn", "run.json cannot be read"),
]


@pytest.mark.parametrize(("name", "how", "said"), DAMAGES)
def test_damage_of_any_file_is_found_and_the_checkpoint_before_is_used(config, name, how, said):
    run = RunDir.create(config, resume=False)
    first, second, third = saved(run, 1, 2, 3)
    damage(third, name, how)
    assert third.verify()[0].startswith(said) and second.verify() == []
    told = []
    assert run.newest_valid(told.append) == second
    (line,) = told
    assert said in line and "moved to corrupt-step-000003; step 2, the one before, is used" in line
    assert run.checkpoints() == [first, second]
    assert (run.path / "checkpoints" / "corrupt-step-000003" / "model").is_dir()  # nothing is deleted
    assert run.newest_valid(told.append) == second and len(told) == 1


def test_all_damaged_checkpoints_are_put_aside_until_one_is_whole_or_none_is_left(config):
    run = RunDir.create(config, resume=False)
    told = []
    for checkpoint in saved(run, 1, 2):
        (checkpoint.path / "model/weights").unlink()
        (checkpoint.path / "trainer/state").unlink()
    assert run.newest_valid(told.append) is None
    assert "model/weights is missing (and 1 more)" in told[0] and "there is none before it" in told[1]
    # The step is done and saved again, and damaged again: the newer damaged one is kept.
    (again,) = saved(run, 2)
    damage(again, "model/weights", "torn")
    assert run.newest_valid(told.append) is None
    aside = run.path / "checkpoints" / "corrupt-step-000002" / "model/weights"
    assert aside.stat().st_size == len("model/weights 2") // 2


def test_a_checkpoint_of_before_there_were_digests_is_believed(config):
    run = RunDir.create(config, resume=False)
    (checkpoint,) = saved(run, 3)
    (checkpoint.path / "run.json").write_text('{"step": 3}')
    assert checkpoint.verify() == []
    assert run.newest_valid(print) == checkpoint


def test_a_run_without_a_checkpoint_has_no_valid_one(config):
    assert RunDir.create(config, resume=False).newest_valid(print) is None


def test_a_resumed_run_forgets_what_it_does_again(config):
    run = RunDir.create(config, resume=False)
    for step in (1, 2, 3):
        run.write_rollouts(step, [{"step": step}])
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "x')
    run.forget_after(2)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert sorted(p.name for p in (run.path / "rollouts").iterdir()) == ["step-000001.jsonl", "step-000002.jsonl"]
