"""The simulator: durations that can be worked out by hand, the same run for a seed, a run's own numbers found again."""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import pytest

from alignlab.coordinator import Coordinator
from alignlab.outcome import outcome
from alignlab.simulate import add_arguments, simulate
from alignlab.virtual_actor import Job, Switch, VirtualActor
from alignlab.workload import LogNormal, Recorded, Wave, Workload, decode_seconds
from alignlab.workload_fit import WorkClock, measure, shared_cores
from alignlab.world import World
from core.config import RolloutConfig
from core.errors import UserError
from core.loading import load_config
from tests.recorded import record

TEN = Recorded([[10]])  # every group is one completion of ten tokens


def run(workload, actors=1, seconds=math.inf, seed=0, age=None, heard=None, **numbers):
    return World(Coordinator(**numbers), workload, seed, age, heard).run(actors, seconds)


def sampled(actor, switches=()):
    """(time, ordinal, tokens by version) of each group as it is done."""
    done = []
    while (alarm := actor.alarm(switches)) is not None:
        done += [(alarm, job.ordinal, job.tokens) for job in actor.advance(alarm, switches)]
    return done


def actor(base, each=0.0, sequences=8):
    return VirtualActor("a", 0, base, each, sequences, since=0.0, version=0, seen=0)


# ---------------------------------------------------------------- an engine
def test_a_group_is_done_when_its_longest_completion_is():
    a = actor(base=1.0)
    a.add(Job(0, 0, 2), [3, 5])
    assert sampled(a) == [(5.0, 0, {0: 8})]


def test_engines_that_share_their_speed_are_faster_with_fewer_sequences():
    a = actor(base=0.0, each=1.0)  # a second a step for each sequence
    a.add(Job(0, 0, 1), [3])
    a.add(Job(1, 0, 1), [5])
    assert sampled(a) == [(6.0, 0, {0: 3}), (8.0, 1, {0: 5})]  # 3 steps of 2 s, then 2 of 1 s
    assert (a.busy, a.decoded) == (8.0, 14.0)


def test_what_an_engine_has_no_room_for_waits():
    a = actor(base=1.0, sequences=1)
    a.add(Job(0, 0, 1), [3])
    a.add(Job(1, 0, 1), [5])
    assert [(time, ordinal) for time, ordinal, _ in sampled(a)] == [(3.0, 0), (8.0, 1)]


def test_weights_that_change_under_way_give_each_token_its_version():
    a = actor(base=1.0)
    a.add(Job(0, 0, 2), [3, 5])
    # The third token of both is there at 3 s. From 3.5 s to 5.5 s the actor loads; half of the fourth was decoded.
    assert sampled(a, [Switch(3.5, 5.5, 1)]) == [(7.0, 0, {0: 6, 1: 2})]


def test_lengths_are_a_groups_own_and_have_the_mean_that_is_said():
    lengths = LogNormal(mean=100, sigma=0.8, group_size=8, longest=10**6, seed=1)
    assert lengths[5] == LogNormal(100, 0.8, 8, 10**6, 1)[5] != lengths[6]
    mean = sum(sum(lengths[ordinal]) for ordinal in range(8192)) / 8 / 8192
    assert mean == pytest.approx(100, rel=0.02)  # five standard errors: 94 / sqrt(65536) = 0.4
    assert max(LogNormal(100, 0.8, 8, 150)[0]) == 150


def test_speeds_alone_and_together():
    base, each = decode_seconds(alone=10, full=30, sequences=6)
    assert base + each == pytest.approx(1 / 10) and base + 6 * each == pytest.approx(6 / 30)


# ---------------------------------------------------------------- a world
def test_on_policy_steps_take_the_sum_of_their_parts():
    # 10 s of sampling, 1 s of scoring, 5 s of training, 2 s for the weights and 1 s for the rest: 19 s.
    workload = Workload(TEN, 1.0, score_seconds=1, train_seconds=5, publish_seconds=2, close_seconds=1)
    world = run(workload, prompts=1, steps=5)
    assert [step.time for step in world.steps] == [18, 37, 56, 75, 94]
    o = outcome(world, 1)
    assert o.steps_per_hour == pytest.approx(3600 / 19) and o.ages == {0: 1.0}
    assert o.learner_idle == pytest.approx(1 - 5 * 8 / 95) and o.actors_idle == pytest.approx(1 - 5 * 10 / 95)


def test_overlap_by_hand():
    # Two slots, each of which takes 10 s of sampling and 5 s of training: two steps in 15 s.
    world = run(Workload(TEN, 1.0, train_seconds=5), prompts=1, steps=7, max_staleness=1)
    assert outcome(world, 1).steps_per_hour == pytest.approx(3600 / 7.5)
    # Of the groups of the first steps, 0 and 1 were there from the start; 1 is sampled by version 0, trained in step 1.
    assert [dict(step.ages) for step in world.steps[:2]] == [{0: 10}, {1: 10}]


def test_processes_that_share_a_core_are_slower():
    # Two actors on one core: 10 s of work take 20 s. Then only the learner works, 5 s.
    world = run(Workload(TEN, 1.0, train_seconds=5, cores=1), actors=2, prompts=2, steps=3, capacity=1)
    assert [step.time for step in world.steps] == [25, 50, 75]


def test_tokens_older_than_allowed_are_masked():
    workload = Workload(Recorded([[20], *[[1]] * 9]), 1.0)  # while the long one is sampled, short ones are trained
    world = run(workload, prompts=1, steps=30, max_staleness=1, window=9, age=2)
    ages = sum((step.ages for step in world.steps), world.steps[0].ages.copy())
    assert max(ages) == 9 and world.coordinator.token_tally()["masked"] == sum(step.masked for step in world.steps) > 0
    assert all(step.masked == sum(n for age, n in step.ages.items() if age > 2) for step in world.steps)


TROUBLE = {"failure_seconds": 400, "restart_seconds": 30, "joins": [(2, 300.0)], "slow_share": 0.3, "slow_factor": 3.0}
WAVES = [Wave(0.3, at=200.0), Wave(0.3, at=400.0, notice=60.0)]


def troubled(seed=0, **numbers):
    workload = Workload(LogNormal(40, 0.8, 4, 10**6), 1.0, sequences=16, train_seconds=20, waves=WAVES, **TROUBLE)
    trained = []

    def heard(record, now):
        if record.kind == "trained":
            trained.extend(record.fields["groups"])

    world = run(workload, 8, seed=seed, heard=heard, prompts=8, max_attempts=100, **numbers)
    return world, trained


@pytest.mark.parametrize("numbers", [{"max_staleness": 1, "window": 10}, {"deterministic": True}, {"in_order": True}])
def test_whatever_actors_do_every_group_is_trained_once(numbers):
    world, trained = troubled(steps=25, **numbers)
    assert world.finished and sorted(trained) == list(range(200))
    if "window" not in numbers:
        assert trained == sorted(trained)  # batches in order
    o = outcome(world, 8)
    assert o.losses > 3 and o.lost > 0 and 0 < o.recovery_mean <= o.recovery_max
    assert o.refused == 0  # what is lost is not heard of again


def test_a_seed_gives_the_same_run_and_another_seed_another():
    first, again, other = (outcome(troubled(seed, steps=10, max_staleness=1)[0], 8) for seed in (0, 0, 1))
    assert first == again != other


def test_actors_that_leave_with_notice_lose_less():
    lost = []
    for notice in (0.0, 500.0):
        workload = Workload(LogNormal(40, 0.8, 4, 10**6), 1.0, train_seconds=5, waves=[Wave(0.5, 100.0, notice)])
        lost.append(outcome(run(workload, 8, prompts=8, steps=10, max_staleness=1, capacity=4), 8).lost)
    assert lost[0] > 0 == lost[1]


# ---------------------------------------------------------------- what becomes of long completions
BENCH = Path(__file__).resolve().parents[2] / "benches" / "staleness.py"
spec = importlib.util.spec_from_file_location("benches_staleness", BENCH)
staleness = sys.modules["benches_staleness"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(staleness)
FEW = argparse.Namespace(prompts=32, steps=80)


def test_the_defaults_of_window_and_max_token_age_are_those_that_the_bench_recommends():
    rollout = RolloutConfig(max_staleness=3)
    assert (rollout.group_age, rollout.token_age) == (3 * staleness.WINDOW, 3 * staleness.AGE)
    assert staleness.keeps(FEW, "generation-bound", 1)


def test_throwing_old_groups_away_shortens_what_is_trained_and_waiting_for_them_takes_time():
    discard = staleness.run(staleness.discard(FEW, 1), "generation-bound", 1.0, None)
    in_order = staleness.run(Coordinator(32, 80, 1, in_order=True), "generation-bound", 1.0, 2)
    assert discard.length < 0.96 and discard.age_max <= 2  # thrown away when older than 2 S
    assert in_order.length == pytest.approx(1, abs=0.02) and in_order.pace < 0.6 * discard.pace


# ---------------------------------------------------------------- fitted to a run
def test_seconds_of_work_are_fewer_while_cores_are_shared():
    records = [{"kind": "leased", "actor": "a", "time": 0.0}, {"kind": "leased", "actor": "b", "time": 0.0}]
    records += [{"kind": "done", "actor": "b", "time": 10.0}, {"kind": "done", "actor": "a", "time": 14.0}]
    clock = WorkClock(records, cores=1)
    assert [clock(time) - clock(0.0) for time in (10.0, 12.0, 14.0, 15.0)] == [5.0, 7.0, 9.0, 10.0]


@pytest.fixture
def recorded(tmp_path):
    """Makes the files that a run of a workload would leave, and says its pace."""

    def make(workload, config, actors):
        folder = tmp_path / config.name
        return folder, record(folder, workload, config, actors)

    return make


CONFIG = ["name=seen", "steps=20", "rollout.prompts=8", "rollout.group_size=4", "actors.max_num_seqs=16"]
PARTS = {"lease_seconds": 0.5, "score_seconds": 0.25, "train_seconds": 3.0, "train_token_seconds": 0.002}
PARTS |= {"publish_seconds": 2.0, "close_seconds": 1.0}


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("cores", [None, 2])
def test_the_numbers_of_a_run_are_found_in_its_files(recorded, staleness, cores):
    config = load_config("configs/quickstart.yaml", [*CONFIG, f"rollout.max_staleness={staleness}"])
    lengths = LogNormal(40, 0.6, 4, 10**6)
    workload = Workload(lengths, 0.1, 0.02, sequences=16, cores=cores, **PARTS)
    folder, pace = recorded(workload, config, 2)
    assert shared_cores(folder, config) == cores
    found = measure(folder, config, cores)
    assert found.steps_per_hour == pytest.approx(pace, rel=1e-3) and found.actors == 2
    # On shared cores the ledger does not say when exactly a process rested, so the speeds are found less exactly.
    near = 0.1 if cores else 0.02
    for name in ("decode_base", "decode_each", "train_seconds", "train_token_seconds", "publish_seconds"):
        assert getattr(found.workload, name) == pytest.approx(getattr(workload, name), rel=near), name
    assert found.workload.close_seconds == pytest.approx(1.0, abs=0.01)
    assert found.workload.score_seconds == pytest.approx(0.25, rel=0.2)
    r = config.rollout
    again = run(
        found.workload, 2, prompts=8, steps=20, max_staleness=r.max_staleness, capacity=8 if staleness else None
    )
    assert outcome(again, 2).steps_per_hour == pytest.approx(pace, rel=0.03)


# ---------------------------------------------------------------- the verb
def verb(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return simulate(parser.parse_args(words))


SAID = ("--length-mean", "40", "--tokens-per-second", "1", "--train-seconds", "5", "--prompts", "4", "--hours", "1")


def test_one_run_in_detail_or_a_row_for_each_number_of_actors(capsys):
    assert verb(*SAID) == 0
    page = capsys.readouterr().out
    assert "steps/h" in page and "learner idle" in page and "coordinator: " in page
    assert verb(*SAID, "--actors", "1,2") == 0
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()] == ["actors", "---", "1", "2"]


def test_a_config_gives_the_numbers_of_the_loop(capsys):
    assert verb("configs/quickstart.yaml", "rollout.prompts=4", *SAID[:6], "--steps", "2") == 0
    assert "2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "say --length-mean, --tokens-per-second, --train-seconds"),
        (["rollout.prompts=4", *SAID], "there is no config to change"),
        (["--run", "runs/none"], "runs/none/config.yaml"),
        (["a.yaml", "--run", "runs/none"], "has a config of its own"),
        ([*SAID, "--max-staleness", "2", "--window", "1"], "window 1 is less than max_staleness 2"),
        ([*SAID, "--tokens-per-second", "1,1000", "--sequences", "8"], "cannot be faster than each alone"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said(words, problem):
    with pytest.raises(UserError, match=problem):
        verb(*words)


def test_a_run_may_be_simulated_with_other_numbers(recorded, capsys):
    config = load_config("configs/quickstart.yaml", CONFIG)
    folder, pace = recorded(Workload(LogNormal(40, 0.6, 4, 10**6), 0.1, 0.02, sequences=16, **PARTS), config, 1)
    assert verb("--run", str(folder), "--actors", "1,2,4") == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    one, two, four = (float(row[2]) for row in rows)
    assert one == pytest.approx(pace, rel=0.03) and one < two < four
