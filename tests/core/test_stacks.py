"""Processes say where their threads are, whatever they do; others are left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from core import stacks

HERE = socket.gethostname()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

SLEEPS = "def forgotten():\n    print('ready', flush=True)\n    time.sleep(60)\nforgotten()"
KEEPS_THE_LOCK = (
    "import re\ndef hopeless():\n    print('ready', flush=True)\n    re.match(r'(a+)+$', 'a' * 40 + 'b')\nhopeless()"
)


@pytest.fixture
def start(tmp_path):
    started = []

    def start(body: str, log: bool = True, registers: bool = True) -> tuple[int, str, Path | None]:
        path = tmp_path / f"{len(started)}.log"
        register = ("stacks.register(2)" if log else "stacks.register_quietly()") if registers else ""
        script = f"import time\nfrom core import stacks\n{register}\n{body}"
        with open(path, "a") as file:
            process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=file, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process.pid, HERE, path if log else None

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_thread_of_the_process_answers_and_its_log_stays_as_it_was(start):
    pid, host, log = start(SLEEPS)
    answer = stacks.collect({"learner-0": (pid, host, log)}, 5)["learner-0"]
    assert "thread MainThread:" in answer and "in forgotten" in answer and log.read_text() == ""


def test_a_busy_process_survives_many_questions(start):
    # Never by the signal, which would be seen in its log: it reads frames while these threads change them.
    busy = """
    import threading
    def deep(n): return deep(n - 1) + 1 if n else 0
    def turn():
        while True: deep(60)
    for _ in range(4): threading.Thread(target=turn, daemon=True).start()
    print("ready", flush=True)
    time.sleep(60)
    """
    process = start(textwrap.dedent(busy))
    for _ in range(10):
        assert "in turn" in stacks.collect({"a": process}, 10)["a"]
    assert process[2].read_text() == ""


def test_the_signal_writes_into_the_log_and_only_what_is_new_counts(start):
    pid, host, log = start(KEEPS_THE_LOCK)
    log.write_text("what it printed before\n")
    time.sleep(0.2)
    answer = stacks.collect({"a": (pid, host, log)}, 2)["a"]
    assert "in hopeless" in answer and "before" not in answer
    assert stacks.ask(pid) == ""  # and again
    time.sleep(0.3)
    assert "before" in log.read_text() and log.read_text().count("in hopeless") == 2


def test_a_process_without_a_log_keeps_them_in_memory(start):
    pid, host, _ = start(SLEEPS, log=False)
    assert "in forgotten" in stacks.collect({"scorer": (pid, host, None)}, 5)["scorer"]


def test_all_are_asked_and_none_is_waited_for_in_vain(start):
    stopped, listens, deaf = start(SLEEPS), start(SLEEPS), start(SLEEPS, registers=False)
    os.kill(stopped[0], signal.SIGSTOP)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    while not stacks.stopped(stopped[0]):
        time.sleep(0.01)
    started = time.monotonic()
    asked = {
        "stopped": stopped,
        "listens": listens,
        "deaf": deaf,
        "gone": (gone.pid, HERE, None),
        "zombie": (zombie.pid, HERE, None),
        "far": (1, "elsewhere", None),
    }
    found = stacks.collect(asked, 10)
    assert time.monotonic() - started < 5
    assert list(found) == list(asked)
    assert found["stopped"].startswith("stopped by a signal") and f"kill -CONT {stopped[0]}" in found["stopped"]
    assert "in forgotten" in found["listens"]
    assert found["deaf"].startswith("it does not listen") and Path(f"/proc/{deaf[0]}").exists()  # and lives on
    assert found["gone"].startswith("gone") and found["zombie"] == "gone: it has ended"
    assert found["far"].startswith("on another machine (elsewhere)")
    zombie.wait()
    assert not stacks.stopped(listens[0]) and not stacks.stopped(gone.pid)


def test_who_does_not_answer_costs_the_deadline_and_no_more(start):
    mute = start("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n" + SLEEPS, log=False)
    time.sleep(0.2)
    started = time.monotonic()
    found = stacks.collect({"a": mute}, 0.3)["a"]
    assert found.startswith("no answer in time; its state is S") and 0.3 <= time.monotonic() - started < 2


def test_the_own_stacks_name_threads_and_where_tasks_wait():
    async def innermost():
        await asyncio.Event().wait()

    async def outer():
        await innermost()

    async def scenario():
        tasks = [asyncio.create_task(outer()) for _ in range(3)]
        await asyncio.sleep(0)
        loop, found = asyncio.get_running_loop(), []
        thread = threading.Thread(target=lambda: (time.sleep(0.05), found.append(stacks.own(loop))))
        thread.start()
        thread.join()  # the loop is blocked meanwhile, here
        for task in tasks:
            task.cancel()
        return found[0]

    text = asyncio.run(scenario())
    assert "thread MainThread:" in text and "in scenario" in text
    assert "tasks of the event loop (4)" in text and "3 x waiting at" in text
    assert text.index(".outer") < text.index(".innermost")
