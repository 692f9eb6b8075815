"""Cores are claimed by one process each, and come free when it ends."""

import os
import subprocess
import sys

import pytest

from core import cores

ALLOWED = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="one core: nothing to claim apart")

CLAIM = """
import os, sys, threading
from pathlib import Path
from core import cores
claimed = cores.claim(int(sys.argv[2]), Path(sys.argv[1]), seconds=float(sys.argv[3]))
thread = threading.Thread(target=lambda: print(*claimed, "|", *sorted(os.sched_getaffinity(0)), flush=True))
thread.start(), thread.join()
sys.stdin.read()
"""


@pytest.fixture
def claim(tmp_path):
    """Starts a process that claims cores in a folder of the test's; returns it with what it said: claimed, allowed."""
    started = []

    def start(count, seconds=0.0):
        command = [sys.executable, "-c", CLAIM, str(tmp_path / "cores"), str(count), str(seconds)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        claimed, _, allowed = process.stdout.readline().partition("|")
        return process, [int(core) for core in claimed.split()], [int(core) for core in allowed.split()]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_have_different_cores_and_the_threads_they_start_stay_there(claim):
    _, one, ones = claim(1)
    _, two, twos = claim(1)
    assert len(one) == len(two) == 1 and one != two
    assert (ones, twos) == (one, two)


def test_who_finds_too_few_is_left_where_it_was(claim):
    claim(len(ALLOWED) - 1)
    _, claimed, allowed = claim(2)
    assert claimed == [] and allowed == ALLOWED
    _, claimed, _ = claim(1)  # what the other had locked in vain is free
    assert len(claimed) == 1
    assert claim(len(ALLOWED) + 1)[1] == []


def test_cores_of_a_process_that_was_killed_are_free(claim):
    process, claimed, _ = claim(len(ALLOWED))
    assert claimed == ALLOWED and claim(1)[1] == []
    process.kill()
    assert claim(len(ALLOWED), seconds=5.0)[1] == ALLOWED


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    assert cores.claim(1, tmp_path / "open", 0) == cores.claim(1, tmp_path / "link", 0) == ()
    assert list((tmp_path / "open").iterdir()) == [] and sorted(os.sched_getaffinity(0)) == ALLOWED


def test_a_log_says_which_cores_or_why_none():
    assert cores.told((0, 3)) == "cores: 0, 3" and "this runs on any" in cores.told(())
