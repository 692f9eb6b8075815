"""Which pool is the bottleneck, and the best split of the devices: of runs whose times a person can work out."""

import pytest

from alignlab import check
from alignlab.balance import Balance, Split, balance, devices, said, splits, standing_still
from alignlab.report import render
from alignlab.run_files import read_run
from alignlab.workload import Recorded, Workload
from core.errors import UserError
from core.loading import load_config
from tests.recorded import record

LOOP = ["rollout.prompts=4", "rollout.group_size=1", "actors.max_num_seqs=1", "rollout.max_staleness=1", "steps=16"]


def config(*changes):
    return load_config("configs/quickstart.yaml", ["name=seen", *LOOP, *changes])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three actors and a rank on four GPUs. A group takes an actor 10 s; a step, of 4 groups, takes the rank 60 s."""
    folder = tmp_path_factory.mktemp("runs") / "seen"
    workload = Workload(Recorded([[10]]), decode_base=1.0, sequences=1, train_seconds=60.0)
    assert record(folder, workload, config("actors.count=3"), 3) == pytest.approx(3600 / 60, rel=0.01)
    return folder


def test_a_slow_learner_gets_a_device_of_an_actor(run):
    found = balance(run)
    assert found is not None and found.devices == "4 GPUs" and found.ways == 3
    assert found.pace == pytest.approx(60, rel=0.01) and found.learner_idle < 0.02
    assert found.actors_idle == pytest.approx(1 - 40 / 3 / 60, abs=0.03)  # 40 s of work a step, on three
    assert (found.present.actors, found.present.ranks) == (3, 1) and (found.best.actors, found.best.ranks) == (2, 2)
    # Two actors take 20 s a step, two ranks 30 s: twice as fast. One and three take 40 s and 20 s.
    assert found.best.pace / found.present.pace == pytest.approx(2.0, rel=0.05)
    lines = said(found)
    assert lines[1] == "bottleneck: the learner" and "2 actors + 2 ranks, 2.0" in lines[2]


def test_check_and_report_say_it_and_say_nothing_of_what_was_not_measured(run, tmp_path):
    assert any("bottleneck: the learner" in line for line in check._measured(run, named=True))
    assert "Which pool is the bottleneck" in render([read_run(run)])
    for folder in (tmp_path, run / "rollouts"):
        assert balance(folder) is None and check._measured(folder, named=False) == []
    with pytest.raises(UserError, match="needs actors and 4 steps"):
        check._measured(tmp_path, named=True)
    record(tmp_path / "short", Workload(Recorded([[10]]), 1.0, sequences=1), config("steps=3"), 1)
    assert balance(tmp_path / "short") is None


def test_pools_that_cannot_give_each_other_devices_are_not_compared():
    assert devices(config(), gpus=True) == (1, 1) == devices(config(), gpus=False)
    assert devices(config("actors.tensor_parallel=2"), gpus=True) == (2, 1)
    assert devices(config("actors.threads=4", "learner.threads=8"), gpus=False) == (4, 8)
    assert devices(config("actors.device=cpu"), gpus=True) is None


def test_splits_use_all_devices_and_are_few():
    assert splits(4, 1, 1, (3, 1)) == [(3, 1), (2, 2), (1, 3)]
    assert splits(8, 2, 1, (3, 2)) == [(3, 2), (2, 4), (1, 6)]
    assert splits(2, 1, 1, (1, 1)) == [(1, 1)]
    many = splits(128, 1, 1, (100, 28))
    assert (100, 28) in many and (1, 127) in many and len(many) <= 14


def test_shares_of_the_time_are_of_all_steps_but_the_first():
    rows = [
        {"time/step": 100.0, "time/wait_groups": 100.0, "rollout/busy": 0.0},
        {"time/step": 10.0, "time/wait_groups": 2.0, "time/wait_publish": 1.0, "rollout/busy": 0.5},
        {"time/eval": 3.0},
        {"time/step": 30.0, "time/wait_groups": 1.0, "rollout/busy": 0.9},
    ]
    assert standing_still(rows) == pytest.approx((4 / 40, 1 - (5 + 27) / 40))
    assert standing_still(rows[:1]) is None and standing_still([{"time/step": 1.0}] * 3) is None


@pytest.mark.parametrize(
    ("learner", "actors", "overlap", "what"),
    [
        (0.5, 0.05, True, "bottleneck: the actors"),
        (0.05, 0.5, True, "bottleneck: the learner"),
        (0.04, 0.05, True, "neither, both are at work"),
        (0.4, 0.5, True, "neither, both wait for what is between them"),
        (0.6, 0.4, False, "most of the time for sampling; rollout.max_staleness=1"),
        (0.4, 0.6, False, "most of the time for learning; rollout.max_staleness=1"),
    ],
)
def test_who_waits_less_is_waited_for(learner, actors, overlap, what):
    here = Split(1, 1, 10.0)
    lines = said(Balance(10.0, learner, actors, overlap, "2 cores", 1, here, here))
    assert what in lines[1] and lines[2] == "1 actor + 1 rank is the only split of 2 cores"
