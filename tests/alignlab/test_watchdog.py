"""What blocks is named within twice its deadline, what does not is left alone."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from alignlab.watchdog import EDGES, LOOP, Blocked, Watchdog
from core import stacks
from rewards.reward import Samples
from rewards.workers import Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def limits(seconds: float = 20.0, **others: float) -> dict[str, float]:
    return dict.fromkeys((*EDGES, LOOP), seconds) | others


def watchdog(folder: Path, lines: list[str], limits: dict[str, float], describe=lambda: "tally", processes=dict):
    """A watchdog whose lines go to `lines`, each with the time at which it came."""
    return Watchdog(folder, lambda line: lines.append((time.monotonic(), line)), limits, describe, processes)


def raised(folder: Path, lines: list, wait, **others) -> Blocked:
    """What a scenario `wait(watchdog)` raises."""

    async def scenario():
        with watchdog(folder, lines, **others) as dog:
            await wait(dog)

    with pytest.raises(Blocked) as error:
        asyncio.run(scenario())
    return error.value


# ------------------------------------------------------------ a wait
def test_a_blocked_wait_is_named_within_twice_its_deadline_and_its_task_fails(tmp_path):
    lines, started, child = [], [], subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    async def wait(dog):
        with dog.waiting("train", "step 3"):
            started.append(time.monotonic())
            with dog.waiting("score", "group 7"):
                await asyncio.Event().wait()

    os.kill(child.pid, signal.SIGSTOP)
    others = {"describe": lambda: "oldest lease: group 7 with actor-0"}
    others["processes"] = lambda: {"actor-0": (child.pid, socket.gethostname(), None), "far": (1, "elsewhere", None)}
    error = raised(tmp_path, lines, wait, limits=limits(score=1.5), **others)
    child.kill()
    child.wait()
    assert (error.edge, error.about, error.limit) == ("score", "group 7", 1.5) and 1.5 <= error.seconds < 3.0
    [(at, line)] = lines
    assert line.startswith("watchdog: blocked on score (group 7): nothing for ") and line.endswith(f"see {error.file}")
    assert 1.5 <= at - started[0] <= 3.0
    text = (tmp_path / "logs" / "watchdog-1.txt").read_text()
    assert "blocked on score (group 7)" in text and "oldest lease: group 7 with actor-0" in text
    assert re.search(r"^train +[\d.]+ s of 20 s  step 3$", text, re.MULTILINE)
    assert "thread MainThread:" in text and "1 x waiting at" in text
    assert f"-- actor-0 (pid {child.pid}) --\nstopped by a signal" in text
    assert "-- far (pid 1) --\non another machine (elsewhere)" in text


def test_only_the_task_that_waits_fails_and_the_watchdog_goes_on(tmp_path):
    lines = []

    async def scenario():
        with watchdog(tmp_path, lines, limits(generate=0.3, publish=0.3)) as dog:

            async def wait(edge):
                with dog.waiting(edge):
                    await asyncio.Event().wait()

            other = asyncio.create_task(asyncio.sleep(1.2, "well"))
            first = await asyncio.gather(wait("generate"), return_exceptions=True)
            second = await asyncio.gather(wait("publish"), return_exceptions=True)
            return [error.edge for error in first + second], [error.file.name for error in first + second], await other

    edges, files, other = asyncio.run(scenario())
    assert (edges, files) == (["generate", "publish"], ["watchdog-1.txt", "watchdog-2.txt"])
    assert other == "well" and len(lines) == 2


def test_of_waits_that_pass_together_the_first_in_the_dataflow_is_named_and_all_fail(tmp_path):
    lines = []

    async def scenario():
        with watchdog(tmp_path, lines, limits(0.4)) as dog:

            async def wait(edge):
                with dog.waiting(edge):
                    await asyncio.Event().wait()

            return await asyncio.gather(*map(wait, ("publish", "generate", "train")), return_exceptions=True)

    errors = asyncio.run(scenario())
    assert [error.edge for error in errors] == ["publish", "generate", "train"]
    assert len({error.file for error in errors}) == 1 and len(lines) == 1 and "blocked on generate" in lines[0][1]


def test_of_nested_waits_of_one_task_the_innermost_is_named(tmp_path):
    async def wait(dog):
        with dog.waiting("evaluate"), dog.waiting("generate", "actor-1"):
            await asyncio.Event().wait()

    assert raised(tmp_path, [], wait, limits=limits(0.4)).edge == "generate"


def test_a_wait_may_bring_its_own_deadline_shorter_than_all(tmp_path):
    lines, started = [], []

    async def wait(dog):
        started.append(time.monotonic())
        with dog.waiting("start", "actor-0", seconds=0.8):
            await asyncio.Event().wait()

    assert raised(tmp_path, lines, wait, limits=limits(600.0)).limit == 0.8
    assert 0.8 <= lines[0][0] - started[0] <= 1.6


def test_a_cancellation_from_elsewhere_stays_one(tmp_path):
    async def scenario():
        with watchdog(tmp_path, [], limits()) as dog:

            async def wait():
                with dog.waiting("train"):
                    await asyncio.Event().wait()

            task = asyncio.create_task(wait())
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return task.cancelled(), dog.slowest()

    assert asyncio.run(scenario()) == (True, {})


def test_a_description_that_fails_or_blocks_costs_only_itself(tmp_path):
    async def wait(dog):
        with dog.waiting("train"):
            await asyncio.Event().wait()

    def fails():
        raise RuntimeError("changed size during iteration")

    blocks = threading.Event()
    error = raised(tmp_path, [], wait, limits=limits(train=0.4), describe=fails, processes=fails)
    assert error.file.read_text().count("it could not be told: RuntimeError('changed size") == 2
    error = raised(tmp_path, [], wait, limits=limits(train=0.4), describe=lambda: str(blocks.wait(30)))
    text = error.file.read_text()
    assert "no answer within" in text and "== processes ==\nnone" in text
    blocks.set()


def test_a_line_that_cannot_be_said_does_not_keep_the_wait_from_failing(tmp_path):
    blocks = threading.Event()

    async def scenario():
        dog = Watchdog(tmp_path, lambda line: blocks.wait(30), limits(train=0.3), str, dict)
        with dog, dog.waiting("train"):
            await asyncio.Event().wait()

    started = time.monotonic()
    with pytest.raises(Blocked):
        asyncio.run(scenario())
    assert time.monotonic() - started < 5
    blocks.set()


# ------------------------------------------------------------ no alarm
def cost(dog) -> float:
    """Seconds of one wait that need not wait."""
    started = time.perf_counter()
    for _ in range(1000):
        with dog.waiting("score", "some group"):
            pass
    return (time.perf_counter() - started) / 1000


def test_thousands_of_waits_that_end_in_time_raise_no_alarm_and_cost_little(tmp_path):
    lines = []

    async def scenario():
        with watchdog(tmp_path, lines, limits(1.0, **{LOOP: 20.0})) as dog:

            async def one(i):
                with dog.waiting("generate", "some group"):
                    await asyncio.sleep(0.1)

            for _ in range(11):  # 1.1 s and more: longer than the deadline of each
                await asyncio.gather(*(one(i) for i in range(1000)))
            return min(cost(dog) for _ in range(50)), dog.slowest()  # the least: others use the cores as well

    seconds, slowest = asyncio.run(scenario())
    assert not lines and not list(tmp_path.glob("logs/*")) and slowest == {}
    assert seconds < 10e-6


def test_slowest_is_the_longest_present_wait_of_each_edge(tmp_path):
    async def scenario():
        with watchdog(tmp_path, [], limits()) as dog, dog.waiting("generate"), dog.waiting("train"):
            await asyncio.sleep(0.3)
            with dog.waiting("generate"):
                return dog.slowest()

    found = asyncio.run(scenario())
    assert found.keys() == {"generate", "train"} and all(0.25 < age < 1 for age in found.values())


def test_a_loop_that_was_busy_for_longer_than_a_wait_reads_the_answer_first(tmp_path):
    lines = []

    async def scenario():
        with watchdog(tmp_path, lines, limits(score=0.4)) as dog:

            async def wait():
                with dog.waiting("score"):
                    await asyncio.sleep(0.2)

            task = asyncio.create_task(wait())
            await asyncio.sleep(0.05)
            time.sleep(0.8)  # the answer is there after 0.2 s, and nobody can read it
            await task

    asyncio.run(scenario())
    assert not lines


def test_every_edge_needs_a_deadline(tmp_path):
    with pytest.raises(ValueError, match="no deadline for ledger, score"):
        watchdog(tmp_path, [], {name: 1.0 for name in (*EDGES, LOOP) if name not in ("ledger", "score")})


# ------------------------------------------------------------ the whole process
DRIVER = """
import asyncio, pathlib, re, sys, threading, time
from alignlab.watchdog import EDGES, LOOP, Watchdog

def limits(seconds=20.0, **others):
    return dict.fromkeys((*EDGES, LOOP), seconds) | others

def watchdog(limits):
    say = lambda line: print(f"{{time.monotonic() - STARTED:.2f}} {{line}}", flush=True)
    return Watchdog(pathlib.Path({folder!r}), say, limits, lambda: "tally", dict)

async def main():
    global STARTED
    STARTED = time.monotonic()
{body}
    print("went on", flush=True)

print("ready", flush=True)
asyncio.run(main())
"""


def driver(folder: Path, body: str) -> subprocess.Popen:
    script = DRIVER.format(folder=str(folder), body=textwrap.indent(textwrap.dedent(body), "    "))
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        printed, errors = process.communicate(timeout=30)
        return process.returncode, printed, errors
    finally:
        process.kill()


def test_a_loop_that_is_blocked_by_synchronous_code_is_named_and_ended(tmp_path):
    body = """
    with watchdog(limits(**{LOOP: 1.0})), open("/dev/null"):
        await asyncio.sleep(0.1)
        time.sleep(60)
    """
    code, printed, errors = ended(driver(tmp_path, body))
    assert code == 1 and "went on" not in printed
    at, line = printed.strip().split(" ", 1)
    assert line.startswith("watchdog: blocked on driver loop: nothing for ") and 1.1 <= float(at) <= 0.1 + 2 * 1.0
    assert "watchdog: the driver loop is blocked for" in errors and "the process ends (exit code 1)" in errors
    text = (tmp_path / "logs" / "watchdog-1.txt").read_text()
    assert "thread MainThread:" in text and "in main" in text


def test_synchronous_code_inside_a_wait_is_named_by_the_wait(tmp_path):
    body = """
    with watchdog(limits(ledger=0.5)) as dog, dog.waiting("ledger", "fsync"):
        time.sleep(60)
    """
    code, printed, errors = ended(driver(tmp_path, body))
    assert code == 1 and "blocked on ledger (fsync)" in printed and "ledger (fsync) was told to fail" in errors
    assert "(its task runs and does not return)" in (tmp_path / "logs" / "watchdog-1.txt").read_text()


def test_a_wait_that_does_not_let_itself_be_failed_ends_the_process(tmp_path):
    body = """
    with watchdog(limits(publish=0.4)) as dog, dog.waiting("publish", "version 2"):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    """
    code, printed, errors = ended(driver(tmp_path, body))
    assert code == 1 and "blocked on publish" in printed
    assert "publish (version 2) was told to fail and did not end" in errors


def test_a_loop_that_comes_back_goes_on(tmp_path):
    body = """
    with watchdog(limits(**{LOOP: 0.8})):
        await asyncio.sleep(0.1)
        time.sleep(1.3)
        await asyncio.sleep(0.6)
    """
    code, printed, _ = ended(driver(tmp_path, body))
    assert code == 0 and "blocked on driver loop" in printed and "the driver loop goes on" in printed
    assert printed.endswith("went on\n")


def test_a_wait_in_a_thread_without_a_loop_ends_the_process(tmp_path):
    body = """
    with watchdog(limits(ledger=0.4)) as dog:
        def write():
            with dog.waiting("ledger"):
                time.sleep(60)
        threading.Thread(target=write, daemon=True).start()
        await asyncio.sleep(60)
    """
    code, printed, errors = ended(driver(tmp_path, body))
    assert code == 1 and "blocked on ledger" in printed and "the wait on ledger was told" in errors


def test_a_driver_that_was_stopped_blames_nobody(tmp_path):
    body = """
    with watchdog(limits(1.0)) as dog, dog.waiting("generate"):
        until = time.monotonic() + 3.0
        print("waiting", flush=True)
        while time.monotonic() < until:  # an actor that runs on while the driver is stopped
            await asyncio.sleep(0.01)
    """
    process = driver(tmp_path, body)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.4)
    os.kill(process.pid, signal.SIGCONT)
    code, printed, errors = ended(process)
    assert (code, printed, errors) == (0, "went on\n", "") and not list(tmp_path.glob("logs/*"))


# ------------------------------------------------------------ what holds the interpreter's lock
HOPELESS = """
with watchdog(limits(**{LOOP: 0.8})) as dog, dog.waiting("score", "group 5"):
    await asyncio.sleep(1.0)
    re.match(r"(a+)+$", "a" * 40 + "b")
"""


def test_a_call_that_keeps_the_interpreters_lock_is_named_and_ended_from_outside(tmp_path):
    started = time.monotonic()
    code, printed, errors = ended(driver(tmp_path, HOPELESS))
    assert code == -signal.SIGKILL and printed == "" and time.monotonic() - started < 10
    assert "watchdog: blocked on driver loop: none of its threads runs for" in errors and "it is killed" in errors
    text = (tmp_path / "logs" / "watchdog-1.txt").read_text()
    assert re.search(r"^score +[\d.]+ s of 20 s  group 5$", text, re.MULTILINE)
    assert "in main" in text and "re" in text


def test_the_process_outside_does_not_blame_a_driver_that_is_stopped_and_ends_with_it(tmp_path):
    process = driver(tmp_path, HOPELESS.replace("await", "print('on', flush=True); await asyncio.sleep(60) #"))
    assert process.stdout.readline() == "on\n"
    [outside] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    assert Path(f"/proc/{outside}").exists() and not list(tmp_path.glob("logs/*"))
    process.kill()
    process.communicate(timeout=10)
    for _ in range(100):
        if not Path(f"/proc/{outside}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("it outlives its driver")


# ------------------------------------------------------------ whom it asks
def test_a_scoring_process_says_where_it_is_by_its_watcher(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef endless(completion):\n    while True: time.sleep(0.1)\n")

    async def scenario():
        workers = Workers({"c": {"fn": f"{tmp_path}/slow.py:endless", "options": {}}}, 1, 30.0, memory_gib=1.0)
        try:
            scoring = asyncio.create_task(workers.score("c", Samples("Q?", {}, ["a"], [[]], [False]), batch=False))
            while not workers._busy:
                await asyncio.sleep(0.05)
            [process] = workers._busy
            await asyncio.sleep(0.5)
            here = (process._process.pid, socket.gethostname(), None)
            found = await asyncio.to_thread(stacks.collect, {"scoring": here}, 5)
            alive = process.alive
            scoring.cancel()
            return found["scoring"], alive
        finally:
            await workers.close()

    text, alive = asyncio.run(scenario())
    assert "slow.py" in text and "in endless" in text and alive
