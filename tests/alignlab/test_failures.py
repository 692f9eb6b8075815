"""A real run - Ray, vLLM, FSDP2 - that loses an actor, has another one freeze and thaw, and loses its learner.

`pytest -s` prints how long each recovery took. Everything is counted again from the files by the audit.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from alignlab.audit import audit
from tests.tiny import tiny_policy

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("failures")
    tiny_policy(home / "policy")
    rows = [{"question": f"{a} + {b}?", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (home / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "unkillable",
        "steps": 100_000,
        "method": {"row": "grpo", "kl": "none"},
        "model": {"path": "policy"},
        "data": {"path": "problems.jsonl", "max_prompt_tokens": 32},
        "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 8, "max_staleness": 2},
        "actors": {"count": 2, "kv_cache_gib": 0.1, "max_num_seqs": 4, "suspect_timeout": 2.0},
        "rewards": {"components": {"tokens": {"per": 24}}},
        "checkpoint": {"every": 20},
    }
    (home / "config.yaml").write_text(yaml.safe_dump(tree))
    return home


class Driver:
    """`alignlab train`, its lines as they come, and the processes that it has started."""

    def __init__(self, home):
        self.run = home / "runs" / "unkillable"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "alignlab.cli", "train", "config.yaml"],
            cwd=home, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines, self._come = [], queue.Queue()
        threading.Thread(target=lambda: [*map(self._come.put, self.process.stdout)], daemon=True).start()

    def until(self, pattern, seconds=60):
        """Read on until a line matches; the match."""
        end = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while True:
                self.lines.append(self._come.get(timeout=max(0.0, end - time.monotonic())).rstrip())
                if found := re.search(pattern, self.lines[-1]):
                    return found
        said = [line for line in self.lines if not line.startswith("step")]
        raise AssertionError(f"no line like {pattern!r} in {seconds} s:\n" + "\n".join(said[:10] + said[-20:]))

    def stop(self):
        """Ctrl-C, to the end of the step."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=100)
        assert code == 130, "\n".join([*self.lines[-20:], *self._come.queue])

    def pid(self, log):
        """The process that writes to this log."""
        for entry in Path("/proc").glob("[0-9]*/fd/1"):
            try:
                if entry.readlink() == self.run / "logs" / log:
                    return int(entry.parts[2])
            except OSError:
                continue
        raise AssertionError(f"nobody writes {log}")

    def freeze(self, actor, log):
        """Stop an actor's process while it holds groups; its pid."""
        pid = self.pid(log)
        for wait in range(100):
            time.sleep(0.01 * (wait % 7))  # groups take a tenth of a second
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)  # what it had sent is taken
            held = 0
            for row in self.records("leased", "done", "returned"):
                held += (1 if row["kind"] == "leased" else -1) * (row["actor"] == actor)
            if held:
                return pid
            os.kill(pid, signal.SIGCONT)
        raise AssertionError(f"{actor} was never at work")

    def refused(self, actor):
        """Whether what an actor brought for its first lease of a group came too late."""
        return any(row["actor"] == actor and row["attempt"] == 0 for row in self.records("refused"))

    def records(self, *kinds):
        rows = map(json.loads, (self.run / "ledger.jsonl").read_text().splitlines())
        return [row for row in rows if row["kind"] in kinds]


def test_a_run_survives_dead_and_frozen_actors_and_a_dead_learner(home):
    driver = Driver(home)
    try:
        driver.until(r"^step +3/")
        os.kill(driver.pid("actor-0.0.log"), signal.SIGKILL)
        lost = driver.until(r"actor-0 serves again, ([\d.]+) s after it was lost")

        # What it held may be finished, or called off, when it thaws: until once something came too late.
        for _ in range(8):
            frozen, since = driver.freeze("actor-1", "actor-1.0.log"), time.monotonic()
            driver.until(r"actor-1 has not answered for 2 s")
            noticed = time.monotonic() - since
            steps = [int(driver.until(r"^step +(\d+)/")[1]) for _ in range(2)]
            assert steps[1] > steps[0], "the run goes on without it"
            os.kill(frozen, signal.SIGCONT)
            driver.until(r"actor-1 answers again")
            driver.until(r"^step +\d+/")
            if driver.refused("actor-1"):
                break

        driver.until(r"^step +\d+/")
        killed = time.monotonic()
        os.kill(driver.pid("learner-0.log"), signal.SIGKILL)
        driver.until(r"the learner starts again from step \d+; the actors keep serving")
        driver.until(r"^step +\d+/")
        learner = time.monotonic() - killed
        driver.stop()
    finally:
        if driver.process.poll() is None:
            os.killpg(driver.process.pid, signal.SIGKILL)
    print(f"\ndead actor: serves again after {lost[1]} s")
    print(f"frozen actor: its groups went to the other one after {noticed:.1f} s")
    print(f"dead learner: the next step after {learner:.1f} s, with the same actors")

    found = audit(driver.run)
    assert found.problems == []
    assert driver.refused("actor-1"), "what came late was not taken"
    lease, moved = {}, 0
    for row in driver.records("leased", "done"):
        if row["kind"] == "leased":
            moved += lease.get(row["group"], ("",))[0] == "actor-1"
            lease[row["group"]] = (row["actor"], row["attempt"])
        else:
            assert lease[row["group"]] == (row["actor"], row["attempt"]), "only the present lease brings a result"
    assert moved > 0, "the frozen actor's groups went to the other one"
    assert [row["reason"] for row in driver.records("begin")] == ["start", "learner lost"]
    starting = [(row["actor"], row["incarnation"]) for row in driver.records("actor") if row["state"] == "starting"]
    assert starting == [("actor-0", 1)], "nobody else was started again"
