"""Each edge of the dataflow blocked in turn: it is named within twice its deadline, and the run recovers or ends."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignlab.watchdog import EDGES, LOOP, Blocked, Watchdog
from tests.alignlab.test_run import FakeActors, make

DEADLINE = 0.5
ROOT = Path(__file__).parents[2]


async def never(*_, **__):
    await asyncio.sleep(60)


BLOCKS = {
    "score": lambda run: setattr(run.composer, "score", never),
    "weigh": lambda run: setattr(run.composer, "columns", never),
    "train": lambda run: setattr(run.learner, "step", never),
    "publish": lambda run: setattr(run, "publish", never),
    "evaluate": lambda run: setattr(run, "evaluate", never),
    "checkpoint": lambda run: setattr(run.learner, "save", never),
}


@pytest.mark.parametrize("edge", BLOCKS)
def test_a_blocked_edge_is_named_and_ends_the_run(tmp_path, edge):
    run, _, _ = make(tmp_path, FakeActors(), evals=[], eval={"every": 1}, checkpoint={"every": 1})
    BLOCKS[edge](run)
    said = []
    limits = dict.fromkeys((*EDGES, LOOP), 30.0) | {edge: DEADLINE}
    run.watchdog = Watchdog(run.run_dir.path, said.append, limits, lambda: f"tally {run.coordinator.tally()}", dict)

    async def watched():
        with run.watchdog:
            await run.loop()

    began = time.monotonic()
    with pytest.raises(Blocked) as blocked:
        asyncio.run(watched())
    assert blocked.value.edge == edge and blocked.value.seconds <= 2 * DEADLINE
    assert time.monotonic() - began < 10
    (line,) = [line for line in said if edge in line]
    report = blocked.value.file.read_text()
    assert blocked.value.file.name in line
    assert edge in report and "tally {'admitted'" in report and "test_edges.py" in report  # where the driver is


SYNCHRONOUS = """
import asyncio, sys, time
from pathlib import Path
from tests.alignlab.test_run import FakeActors, make
from alignlab.watchdog import EDGES, LOOP, Watchdog

where, folder = sys.argv[1], Path(sys.argv[2])
run, _, _ = make(folder, FakeActors())

class Slow:
    def __getitem__(self, ordinal): time.sleep(60)

def slow(records):
    print("blocked at", time.time(), flush=True)
    time.sleep(60)

if where == "prompts":
    run.prompts = Slow()
else:
    run.archive.record = slow
limits = dict.fromkeys((*EDGES, LOOP), 30.0) | {LOOP: 0.5}
say = lambda text: print("said at", time.time(), text, flush=True)
run.watchdog = Watchdog(run.run_dir.path, say, limits, str, dict)

async def watched():
    with run.watchdog:
        print("begun at", time.time(), flush=True)
        await run.loop()

asyncio.run(watched())
"""


@pytest.mark.parametrize(("where", "function"), [("prompts", "__getitem__"), ("ledger", "slow")])
def test_a_driver_that_blocks_itself_is_named_and_ended(tmp_path, where, function):
    done = subprocess.run(
        [sys.executable, "-c", SYNCHRONOUS, where, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (begun,) = [line.split() for line in done.stdout.splitlines() if line.startswith("begun at")]
    (said, *_) = [line.split() for line in done.stdout.splitlines() if line.startswith("said at")]
    assert float(said[2]) - float(begun[2]) < 2 * DEADLINE + 0.3  # the loop turns for a moment before it blocks
    assert LOOP in " ".join(said)
    report = next((tmp_path / "r" / "logs").glob("watchdog-*.txt")).read_text()
    assert function in report, "the stack says where"
