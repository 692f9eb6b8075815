"""Faults of every kind at once: scoring ends, marks the culprits, leaves the others and the machine as they were.

A short form of `benches/faults.py`, with its reward functions.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.reward import Samples
from rewards.workers import Scored, Workers

BENCH = Path(__file__).resolve().parents[2] / "benches" / "faults.py"
spec = importlib.util.spec_from_file_location("benches_faults", BENCH)
assert spec is not None and spec.loader is not None
faults = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = faults
spec.loader.exec_module(faults)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


async def score(workers: Workers, *texts: str) -> list[Scored]:
    samples = Samples("Q?", {}, list(texts), [[] for _ in texts], [False] * len(texts))
    return await workers.score("one", samples, batch=False)


def workers(count: int, timeout: float) -> Workers:
    return Workers({"one": {"fn": f"{BENCH}:one", "options": {}}}, count, timeout, memory_gib=1.0)


def test_a_fifth_of_all_calls_faulty_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "TIMEOUT", 2.0)  # a busy machine takes its time with healthy calls
    others = [kind for kind in faults.KINDS if kind != "bomb"]
    healthy, faulty = (
        faults.run(faults.calls_of(others, rate, 55) + faults.calls_of(["bomb"], 2.5 * rate, 16)) for rate in (0.0, 0.2)
    )
    assert {one.scores.status for part in healthy.scored for one in part} == {"ok"}
    assert sum(faulty.statuses().values()) == 11 + 4 * 5 + 8  # each kind once, 5 of 27 groups of four, each bomb once
    assert list(faults.misnamed(faulty)) == []
    assert list(faults.unequal(faulty, healthy)) == []
    assert faulty.left == 0


def test_no_child_is_left_wherever_it_went_and_whatever_became_of_its_parent() -> None:
    run = faults.run(faults.calls_of(["fork"], 1.0, 3))  # the parent returns, hangs, exits
    assert run.statuses() == {"abstain": 1, "timeout": 1, "error": 1}
    assert run.children >= 12 and run.left == 0  # six each, but for those that the exit was too fast for


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6, 8, 10, 12])
def test_a_start_is_cancelled_at_once_wherever_it_is(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.MARK, f"cancelled-{steps}")

    async def run() -> None:
        pool = workers(1, 20.0)
        task = asyncio.ensure_future(score(pool, "fine 1"))
        for _ in range(steps):  # turns of the loop: connecting, starting, waiting for the process
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=10)
        assert done and task.cancelled()
        await pool.close()

    asyncio.run(run())
    assert faults.marked(f"cancelled-{steps}") == set()


def test_answers_count_though_the_death_after_them_is_noticed_first() -> None:
    async def run() -> list[Scored]:
        pool = workers(1, 20.0)
        try:
            await score(pool, "fine 0")  # loads it
            scoring = asyncio.ensure_future(score(pool, "fine 1", "fine 2", "segfault 0", "fine 3"))
            while not pool._busy:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(1.0)  # the driver is busy with something else until answers and death lie before it
            return await scoring
        finally:
            await pool.close()

    assert [faults.plain(one).status for one in asyncio.run(run())] == ["ok", "ok", "error", "ok"]


def test_what_is_left_is_found() -> None:
    os.environ[faults.MARK] = "test-mark"
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    del os.environ[faults.MARK]
    try:
        end = time.monotonic() + 10
        while not faults.marked("test-mark") and time.monotonic() < end:  # its environment comes with its program
            time.sleep(0.01)
        assert faults.marked("test-mark") == faults.living({child.pid}) == {child.pid}
    finally:
        child.kill()
        child.wait()


def test_a_forked_child_that_returns_does_not_answer_for_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.HOME, str(tmp_path))

    async def run() -> list[Scored]:
        pool = workers(1, 20.0)
        try:
            return await score(pool, "fine 1", "fork 0", "fine 2", "fine 3")
        finally:
            await pool.close()

    scores = [faults.plain(one) for one in asyncio.run(run())]
    assert [s.status for s in scores] == ["ok", "abstain", "ok", "ok"]
    assert [s.value for s in scores if s.status == "ok"] == [math.sin(1), math.sin(2), math.sin(3)]


def test_a_fault_holds_up_no_other_group() -> None:
    async def run() -> tuple[list[Scored], bool]:
        pool = workers(2, 20.0)
        try:
            stuck = asyncio.ensure_future(score(pool, "sleep 0"))
            others = await asyncio.gather(*(score(pool, f"fine {i}") for i in range(20)))
            return [one for part in others for one in part], stuck.done()
        finally:
            await pool.close()

    others, done = asyncio.run(run())
    assert [faults.plain(one).value for one in others] == [math.sin(i) for i in range(20)]
    assert not done


def test_children_that_left_the_session_die_with_a_killed_driver(tmp_path: Path) -> None:
    code = f"""
import asyncio
from rewards.reward import Samples
from rewards.workers import Workers
workers = Workers({{"one": {{"fn": "{BENCH}:one", "options": {{}}}}}}, 1, 600.0, 1.0)
asyncio.run(workers.score("one", Samples("", {{}}, ["fork 1"], [[]], [False]), False))
"""
    env = {**os.environ, faults.HOME: str(tmp_path)}
    driver = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=BENCH.parents[1])

    def until(met: str) -> set[int]:
        end = time.monotonic() + 20
        while True:
            children = {int(path.stem) for path in tmp_path.glob("*.pid")}
            alive = faults.living(children)
            if (met == "all there" and len(alive) >= 5) or (met == "gone" and not alive) or time.monotonic() > end:
                return alive
            time.sleep(0.05)

    try:
        assert len(until("all there")) >= 5  # all but the one that came back and ended
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(10)
    assert until("gone") == set()
