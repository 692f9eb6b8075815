"""A disk that is full, a clock that jumps, files that are damaged: the run says it, and ends as if nothing had been."""

import errno
import json
import random
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

import alignlab.ledger
import alignlab.run_dir
from alignlab.audit import audit
from alignlab.ledger import read_ledger
from alignlab.payloads import Payloads
from alignlab.run_dir import RunDir
from core.errors import UserError
from tests.rig import HashLearner, Rig, batches, one_by_one, run_config

DETERMINISTIC = {"max_staleness": 2, "deterministic": True}


class Dead(SystemExit):
    """Ends a run without a chance to do anything."""


def rig(folder, **options):
    return Rig(run_config(folder, steps=8, rollout=DETERMINISTIC), HashLearner, **options)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """(hash, batches) of the run to which nothing happens."""
    run = rig(tmp_path_factory.mktemp("calm"))
    assert run.run() == 8
    return run.learner.hash, batches(run.folder)


def same(run, calm):
    assert (run.learner.hash, batches(run.folder)) == calm
    assert audit(run.folder).problems == []


def dies_after(kind, number):
    """For Rig.look: dead after so many records of a kind."""
    left = [number]

    def after(record):
        left[0] -= record["kind"] == kind
        if left[0] <= 0:
            raise Dead

    return lambda archive: one_by_one(archive, after)


# ---------------------------------------------------------------- full disk
class Filling:
    """Every file that a run writes goes half, and then there is no room: at the `count`-th write and all later ones."""

    def __init__(self, count):
        self.left, self.where = count, ""

    def full(self, where):
        self.left -= 1
        if self.left <= 0:
            self.where = self.where or where
        return self.left <= 0

    def patch(self, monkeypatch):
        def fills(owner, name, where, half):
            real = getattr(owner, name)

            def write(target, data, *more, **options):
                if not self.full(where):
                    return real(target, data, *more, **options)
                half(target, data, real)
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(owner, name, write)

        def begun(path, text, real):
            path.with_name(path.name + ".partial").write_text(text[: len(text) // 2])

        fills(alignlab.ledger, "_write", "ledger", lambda file, data, real: real(file, data[: len(data) // 2]))
        fills(Path, "write_bytes", "payload", lambda path, data, real: real(path, data[: len(data) // 2]))
        fills(alignlab.run_dir, "write_atomically", "run folder", begun)
        fills(Path, "write_text", "learner", lambda path, text, real: None)


@pytest.mark.parametrize("seed", range(8))
def test_a_full_disk_ends_the_run_and_with_room_it_goes_on_to_the_same_end(tmp_path, calm, seed):
    # A run of 8 steps writes its ledger about 65 times, 40 payloads, 12 files of its folder.
    filling = Filling(random.Random(seed).randrange(3, 110))
    with pytest.MonkeyPatch.context() as monkeypatch:
        filling.patch(monkeypatch)
        with pytest.raises(OSError) as error:
            rig(tmp_path).run()
    assert error.value.errno == errno.ENOSPC and filling.where
    again = rig(tmp_path)
    assert again.run() == 8
    same(again, calm)


@pytest.mark.parametrize("write", ["config.yaml", "environment.json"])
def test_a_disk_that_is_full_at_the_start_is_the_users_to_mend(tmp_path, write):
    with pytest.MonkeyPatch.context() as monkeypatch:
        Filling(1 + (write != "config.yaml")).patch(monkeypatch)
        with pytest.raises(UserError, match=r"cannot write to .*/run: No space left on device"):
            RunDir.create(run_config(tmp_path), resume=False)
    assert RunDir.create(run_config(tmp_path), resume=False).checkpoints() == []


def test_no_checkpoint_is_begun_without_room_for_it(tmp_path, monkeypatch):
    run = rig(tmp_path)
    run.run()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(OSError, match="a checkpoint takes") as error:
        RunDir(run.folder).begin_checkpoint(9)
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == ["step-000006", "step-000008"]


SMALL = """
import os, subprocess, sys, traceback
from pathlib import Path
from benches.chaos_driver import preload
from tests.rig import HashLearner, Rig, run_config

disk = Path(sys.argv[1])
preload()
for kib in range(48, 2000, 64):
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)
    if (child := os.fork()) == 0:
        code = 1
        try:
            rig = Rig(run_config(disk, steps=8, rollout={"max_staleness": 2, "deterministic": True}), HashLearner)
            code = 8 - rig.run()
            print("end", rig.learner.hash, flush=True)
        except BaseException as error:
            print("full", kib, type(error).__name__, error, flush=True)
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_small_disk_that_grows_whenever_it_is_full(tmp_path, calm):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        command = [sys.executable, "-c", SMALL, disk]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
        *full, end = done.stdout.splitlines()
        assert len(full) >= 3 and all("No space left on device" in line for line in full), done.stdout + done.stderr
        assert end.split() == ["end", calm[0]]
        assert audit(disk / "run").problems == []
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- clock
@pytest.mark.parametrize("every", [3, 20])
def test_a_clock_that_jumps_by_a_day_disturbs_nothing(tmp_path, calm, monkeypatch, every):
    real, asked = time.time, [0]

    def jumping():
        asked[0] += 1
        return real() + 86400 * (0, 1, -1)[asked[0] // every % 3]

    monkeypatch.setattr(time, "time", jumping)
    run = rig(tmp_path, look=lambda archive: setattr(archive._ledger, "_clock", jumping))
    assert run.run() == 8
    times = [record["time"] for _, record in read_ledger(run.folder / "ledger.jsonl")]
    assert min(later - earlier for earlier, later in pairwise(times)) < -80000, "it did jump"
    same(run, calm)
    assert [text for text in run.said if not text.startswith("step")] == []


# ---------------------------------------------------------------- damage
def damage(path):
    """Turn over one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def dead_run(folder, kind, number):
    run = rig(folder, look=dies_after(kind, number))
    with pytest.raises(Dead):
        run.run()
    return run.folder


def payload_of(folder, kind, ordinal):
    """The file of the last payload of a kind that a group has."""
    records = [r for _, r in read_ledger(folder / "ledger.jsonl") if r["kind"] == kind and r["group"] == ordinal]
    return Payloads(folder / "payloads").path(records[-1]["payload"])


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(tmp_path, calm):
    folder = dead_run(tmp_path, "trained", 8)  # checkpoints of steps 3 and 6 are there
    damage(folder / "checkpoints" / "step-000006" / "trainer" / "state.json")
    again = rig(tmp_path)
    assert again.run() == 8
    same(again, calm)
    (said,) = [text for text in again.said if "damaged" in text]
    assert "trainer/state.json has been changed" in said and "step 3, the one before, is used" in said
    begins = [record["from_step"] for _, record in read_ledger(folder / "ledger.jsonl") if record["kind"] == "begin"]
    assert begins == [0, 3]


@pytest.mark.parametrize("kind", ["done", "scored"])
def test_a_damaged_payload_of_the_present_version_is_said_and_made_anew(tmp_path, calm, kind):
    folder = dead_run(tmp_path, "scored", 12)  # step 3 has a checkpoint, and groups 10 and 11 are of its version
    damage(payload_of(folder, kind, 10))
    again = rig(tmp_path)
    assert again.run() == 8
    same(again, calm)
    doing = "sampled" if kind == "done" else "scored"
    (said,) = [text for text in again.said if "again" in text]
    assert said.startswith(f"group 10 is {doing} again") and "torn or changed" in said


def test_where_a_damaged_payload_cannot_be_sampled_again_the_run_goes_further_back(tmp_path, calm):
    folder = dead_run(tmp_path, "trained", 8)
    owed = json.loads((folder / "checkpoints" / "step-000006" / "run.json").read_text())["coordinator"]["owed"]
    old = min(int(ordinal) for ordinal, version in owed.items() if version < 6)
    damage(payload_of(folder, "done", old))
    again = rig(tmp_path)
    assert again.run() == 8
    same(again, calm)
    assert any(f"groups {old} cannot be read" in text and "the one before is used" in text for text in again.said)
    begins = [record["from_step"] for _, record in read_ledger(folder / "ledger.jsonl") if record["kind"] == "begin"]
    assert begins == [0, 6, 3]
    assert (folder / "checkpoints" / "corrupt-step-000006").is_dir()


def test_with_no_checkpoint_before_it_the_run_says_that_it_is_another_one(tmp_path):
    folder = dead_run(tmp_path, "trained", 8)
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    for ordinal in range(12, 16):  # of versions 4 and 5
        damage(payload_of(folder, "done", ordinal))
    again = rig(tmp_path)
    assert again.run() == 8
    assert any("from here on this run is another one" in text for text in again.said)
