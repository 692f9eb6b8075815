"""A few of the runs of benches/chaos.py: killed in every part, and nothing lost, trained twice or left behind.

And what they have found: a learner that is lost while actors are silent, or on their way.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from actors.process_host import ProcessHost
from alignlab.audit import audit
from alignlab.ledger import _line, read_ledger
from benches.chaos import Check, Report, family
from benches.chaos_driver import Case, rig_of
from tests.rig import HashLearner, PickyEngine, Rig, run_config

ROOT = Path(__file__).parents[2]


def test_runs_that_are_killed_in_every_part_account_for_everything(tmp_path):
    command = [sys.executable, "-m", "benches.chaos", "--runs", "6", "--jobs", "2", "--seed", "7"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    counts = "counts: 0 lost, 0 twice, 0 unexplained, 0 audit, 0 learner, 0 differs, 0 unfinished, 0 behind"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == counts, done.stdout[-3000:] + done.stderr[-2000:]
    (strikes,) = [line for line in done.stdout.splitlines() if line.startswith("strikes:")]
    assert all(kind in strikes for kind in ("driver", "actor")), "somebody was killed"


# ---------------------------------------------------------------- the bench finds what is wrong
@pytest.fixture
def finished(tmp_path):
    """A free-running case whose method has dropped groups, done without any harm."""
    case = next(c for c in (Case.draw(n, 0) for n in range(1, 99, 2)) if c.filtered and not c.refuse and not c.small)
    folder = tmp_path / "case"
    case.write(folder)
    rig_of(folder, calm=True).run()
    return case, folder


def faults(case, folder):
    report = Report()
    Check(case, folder, report).all()
    return report.faults


def rewrite(ledger, change):
    """The ledger with `change` made to its records, and right checksums."""
    records = [record for _, record in read_ledger(ledger)]
    for record in records:
        del record["crc"]
        change(record)
    ledger.write_bytes(b"".join(_line(record, record["time"]) for record in records))


def test_a_run_to_which_nothing_happened_has_no_fault(finished):
    assert faults(*finished) == {}


def test_a_drop_that_nothing_explains_is_found(finished):
    case, folder = finished
    drops = [r["group"] for _, r in read_ledger(folder / "run" / "ledger.jsonl") if r["kind"] == "dropped"]

    def lie(record):
        if record["kind"] == "dropped" and record["group"] == drops[0]:
            record["reason"] = "failed: bored."  # as long as "filter mixed" and two more

    rewrite(folder / "run" / "ledger.jsonl", lie)
    assert faults(case, folder)["unexplained"] == 1


def test_a_group_that_the_learner_was_given_twice_is_found(finished):
    case, folder = finished
    file = max((folder / "run" / "checkpoints").glob("step-*")) / "trainer" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"groups": [*state["groups"][:-1], state["groups"][0]]}))
    assert faults(case, folder)["twice"] == 1


def test_a_learner_that_was_given_something_else_than_the_payloads_say_is_found(finished):
    case, folder = finished
    file = max((folder / "run" / "checkpoints").glob("step-*")) / "trainer" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"hash": 64 * "0"}))
    assert faults(case, folder)["learner"] == 1


# ---------------------------------------------------------------- a learner is lost while actors are not well
class Lost(HashLearner):
    """Is lost in its third step, once, after it has done something to the actors."""

    harm = staticmethod(lambda: None)
    seconds = 0.0
    times = 0

    async def step(self, groups, version, mixture):
        if version == 2 and not Lost.times:
            from learner.pool import LearnerLost

            Lost.times += 1
            Lost.harm()
            await asyncio.sleep(Lost.seconds)
            raise LearnerLost("as it was told")
        return await super().step(groups, version, mixture)


def freeze():
    """Both actors; one thaws in 1.5 s, the other in 2 s."""
    for seconds, pid in zip((1.5, 2.0), family(os.getpid())["actor"], strict=True):
        os.kill(pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(seconds, os.kill, pid, signal.SIGCONT)


def kill():
    """The first actor."""
    os.kill(family(os.getpid())["actor"][0], signal.SIGKILL)


def lost_rig(folder, start, **options):
    config = run_config(
        folder,
        steps=14,
        rollout={"max_staleness": 1, "deterministic": True},
        actors={"suspect_timeout": 0.5, "silence_timeout": 30.0, "publish_timeout": 30.0},
    )
    return Rig(config, start, **options)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The hash of the run to which nothing happens."""
    rig = lost_rig(tmp_path_factory.mktemp("calm"), HashLearner)
    rig.run()
    return rig.learner.hash


@pytest.mark.parametrize(("harm", "seconds"), [(freeze, 1.0), (kill, 0.05)])
def test_a_learner_is_lost_while_actors_are_silent_or_on_their_way(tmp_path, monkeypatch, calm, harm, seconds):
    monkeypatch.setattr(Lost, "harm", harm)
    monkeypatch.setattr(Lost, "seconds", seconds)
    monkeypatch.setattr(Lost, "times", 0)
    rig = lost_rig(tmp_path, Lost, host=ProcessHost, make=partial(PickyEngine, latency=0.03))
    assert rig.run() == 14 and Lost.times == 1
    assert rig.learner.hash == calm
    assert audit(rig.folder).problems == []
    records = [record for _, record in read_ledger(rig.folder / "ledger.jsonl")]
    again = max(i for i, record in enumerate(records) if record["kind"] == "begin")
    used = {(r["actor"], r["incarnation"]) for r in records[again:] if r["kind"] == "done"}
    assert used == ({("actor-0", 0), ("actor-1", 0)} if harm is freeze else {("actor-0", 1), ("actor-1", 0)})
