"""Scoring processes: whatever user code does, the culprit alone is marked, nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.schema import Score
from rewards.reward import Samples
from rewards.workers import RewardFailure, Scored, Workers, _Process

WICKED = r"""
import ctypes, os, sys, time

def wicked(completion):
    print("scoring", completion)
    if completion == "loop":
        while True: pass
    if completion == "fork":  # leaves a child behind and hangs
        child = os.fork()
        if child == 0:
            time.sleep(600)
        open(CHILD, "w").write(str(child))
        while True: time.sleep(1)
    if completion == "orphan":  # dies while its child keeps all pipes open
        if os.fork() == 0:
            time.sleep(600)
        os._exit(3)
    if completion == "exit": os._exit(7)
    if completion == "crash": ctypes.string_at(0)
    if completion == "hog": bytearray(8 * 2**30)
    if completion == "print":
        for _ in range(50): print("x" * 100_000)
        os.system("echo from a child")
    if completion == "read": return len(sys.stdin.read())
    if completion == "long": return {"k" * 2**21: 1}
    return len(completion)

def batch(completions):
    while "loop" in completions: pass
    return [len(c) for c in completions]

async def slow_to_load(completion): return 1.0
def _prepare(): time.sleep(0.6)
slow_to_load.prepare = _prepare

def breaks_in_its_process(completion): return 1.0
def _break(): raise RuntimeError("no model here")
breaks_in_its_process.prepare = _break
"""


@pytest.fixture
def wicked(tmp_path: Path) -> Path:
    path = tmp_path / "wicked.py"
    path.write_text(f"CHILD = {str(tmp_path / 'child')!r}\n" + WICKED)
    return path


def score(path: Path, function: str, texts: list[str], timeout: float = 1.0, count: int = 1) -> list[Scored]:
    async def run() -> list[Scored]:
        workers = Workers({"c": {"fn": f"{path}:{function}", "options": {}}}, count, timeout, memory_gib=1.0)
        try:
            samples = Samples("Q?", {}, texts, [[] for _ in texts], [False] * len(texts))
            return await workers.score("c", samples, batch=function == "batch")
        finally:
            await workers.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def gone(pid: int) -> bool:
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_each_culprit_is_marked_and_all_others_are_scored(wicked: Path) -> None:
    texts = ["a", "loop", "bb", "exit", "crash", "ccc", "orphan", "hog", "print", "read", "long", "dddd"]
    found = dict(zip(texts, score(wicked, "wicked", texts), strict=True))
    scores = {text: one.scores for text, one in found.items()}
    assert {t: s.value for t, s in scores.items() if s.status == "ok"} == {
        "a": 1.0,
        "bb": 2.0,
        "ccc": 3.0,
        "print": 5.0,  # what it printed did not mix with the answers
        "read": 0.0,  # and there was nothing of ours to read
        "dddd": 4.0,
    }
    assert scores["loop"] == Score("timeout", detail="took longer than 1 s")
    assert found["loop"].seconds >= 1.0
    for text, reason in (("exit", "exit code 7"), ("crash", "SIGSEGV"), ("orphan", "exit code 3")):
        assert scores[text].status == "error" and reason in scores[text].detail
    assert scores["exit"].detail.endswith("scoring exit")  # its last words
    assert scores["hog"].status == "error" and "MemoryError" in scores["hog"].detail
    assert scores["long"].status == "error" and len(scores["long"].detail) < 2000


def test_a_killed_process_takes_its_children_along(wicked: Path, tmp_path: Path) -> None:
    (found,) = score(wicked, "wicked", ["fork"], timeout=1.0)
    assert found.scores == Score("timeout", detail="took longer than 1 s")
    assert gone(int((tmp_path / "child").read_text()))


def test_a_batch_function_that_hangs_loses_its_group_only(wicked: Path) -> None:
    assert [one.scores for one in score(wicked, "batch", ["a", "loop"], timeout=0.5)] == [
        Score("timeout", detail="took longer than 1 s")
    ] * 2
    assert [one.scores for one in score(wicked, "batch", ["a", "bb"])] == [Score("ok", 1.0), Score("ok", 2.0)]


def test_loading_does_not_count_as_scoring_time(wicked: Path) -> None:
    assert [one.scores for one in score(wicked, "slow_to_load", ["a", "b"], timeout=0.5)] == [Score("ok", 1.0)] * 2


def test_a_component_that_does_not_load_is_an_error_for_every_completion(wicked: Path) -> None:
    found = score(wicked, "breaks_in_its_process", ["a", "b"])
    assert [one.scores for one in found] == [Score("error", detail="RuntimeError: no model here")] * 2


def test_processes_score_side_by_side(tmp_path: Path) -> None:
    # Each call waits until three are under way, so that one after another they would all pass their deadline.
    (tmp_path / "meet.py").write_text(f"""
import pathlib, time, uuid
HERE = pathlib.Path({str(tmp_path)!r})
def meet(completion):
    (HERE / f"{{uuid.uuid4()}}.here").touch()
    while len(list(HERE.glob("*.here"))) < 3: time.sleep(0.01)
    return 1
""")

    async def run() -> list[list[Scored]]:
        workers = Workers({"c": {"fn": f"{tmp_path}/meet.py:meet", "options": {}}}, 3, 20.0, memory_gib=1.0)
        one = Samples("Q?", {}, ["x"], [[]], [False])
        try:
            return await asyncio.gather(*(workers.score("c", one, batch=False) for _ in range(3)))
        finally:
            await workers.close()

    assert [one.scores for (one,) in asyncio.run(run())] == [Score("ok", 1.0)] * 3


@pytest.mark.parametrize("seconds", [0.0, 1.0], ids=["while it starts", "while it scores"])
def test_closing_ends_what_is_under_way(wicked: Path, seconds: float) -> None:
    async def run() -> None:
        workers = Workers({"c": {"fn": f"{wicked}:wicked", "options": {}}}, 1, 60.0, memory_gib=1.0)
        task = asyncio.ensure_future(workers.score("c", Samples("", {}, ["loop", "a"], [[], []], [False] * 2), False))
        await asyncio.sleep(seconds)
        await workers.close()
        with pytest.raises(RewardFailure, match="were closed"):
            await asyncio.wait_for(task, 10)

    asyncio.run(run())


def test_a_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def run() -> None:
        workers = Workers({}, 1, 1.0, memory_gib=1.0)
        with pytest.raises(RewardFailure, match=r"does not start: .*exit code 1"):
            await workers.score("c", Samples("", {}, ["x"], [[]], [False]), False)

    asyncio.run(run())


def test_a_process_sees_none_of_the_modules_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "core.py").write_text("raise SystemExit('the wrong core')")
    (tmp_path / "mine.py").write_text("def one(completion): return 1")
    monkeypatch.chdir(tmp_path)
    assert score(tmp_path / "mine.py", "one", ["x"])[0].scores == Score("ok", 1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_processes_die_with_a_driver_that_is_killed(wicked: Path) -> None:
    code = f"""
import asyncio
from rewards.reward import Samples
from rewards.workers import Workers
async def run():
    workers = Workers({{"c": {{"fn": "{wicked}:wicked", "options": {{}}}}}}, 1, 600.0, 1.0)
    task = asyncio.ensure_future(workers.score("c", Samples("", {{}}, ["loop"], [[]], [False]), False))
    while not workers._busy: await asyncio.sleep(0.05)
    print(next(iter(workers._busy))._process.pid, flush=True)
    await task
asyncio.run(run())
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    time.sleep(0.5)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(10)
    driver.stdout.close()
    assert gone(pid)


def test_starting_a_process_takes_little() -> None:
    async def run() -> float:
        started = time.monotonic()
        process = await _Process.start({"components": {}, "memory_bytes": 2**30})
        try:
            return time.monotonic() - started
        finally:
            await process.kill()

    assert asyncio.run(run()) < 10  # 0.2 s on a free core
