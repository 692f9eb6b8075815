"""A scoring process that is killed from outside costs no completion its score."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from core.schema import Score
from rewards.reward import Samples
from rewards.workers import Workers

CODE = """
import os, signal, time

def fatal(completion):
    if completion == "fatal": os.kill(os.getpid(), signal.SIGKILL)
    if completion == "slow": time.sleep(0.5)
    return float(len(completion))

class Counting:
    def __init__(self): self.seen = 0
    def __call__(self, completion):
        self.seen += 1
        time.sleep(0.2)
        return float(self.seen)
    def state_dict(self): return {"seen": self.seen}
    def load_state_dict(self, state): self.seen = state["seen"]
"""


def samples(*completions: str) -> Samples:
    return Samples("?", {}, list(completions), [[] for _ in completions], [False] * len(completions))


def pool(tmp_path: Path, name: str) -> Workers:
    (tmp_path / "mine.py").write_text(CODE)
    return Workers({name: {"fn": f"{tmp_path}/mine.py:{name}", "options": {}}}, 1, 20.0, 4.0)


async def killing(workers: Workers, scoring: asyncio.Task[Any], after: float) -> Any:
    """Kill the scoring process once it is at work, in so many seconds."""
    while not workers._busy:
        await asyncio.sleep(0.01)
    await asyncio.sleep(after)
    os.kill(next(iter(workers._busy)).pid, signal.SIGKILL)
    return await scoring


@pytest.mark.parametrize("after", [0.0, 0.2])
def test_a_killed_process_costs_no_completion_its_score(tmp_path: Path, after: float) -> None:
    async def run() -> list[Score]:
        workers = pool(tmp_path, "fatal")
        try:
            await workers.score("fatal", samples("once"), False)
            scoring = asyncio.ensure_future(workers.score("fatal", samples("a", "slow", "abc"), False))
            return [one.scores for one in await killing(workers, scoring, after)]  # type: ignore[misc]
        finally:
            await workers.close()

    assert asyncio.run(run()) == [Score("ok", 1.0), Score("ok", 4.0), Score("ok", 3.0)]


def test_a_process_that_died_idle_costs_nothing(tmp_path: Path) -> None:
    async def run() -> list[Score]:
        workers = pool(tmp_path, "fatal")
        try:
            await workers.score("fatal", samples("once"), False)
            os.kill(workers._idle[0].pid, signal.SIGSEGV)
            await asyncio.sleep(0.5)
            return [one.scores for one in await workers.score("fatal", samples("ab"), False)]  # type: ignore[misc]
        finally:
            await workers.close()

    assert asyncio.run(run()) == [Score("ok", 2.0)]


def test_a_completion_that_kills_its_process_every_time_is_an_error(tmp_path: Path) -> None:
    async def run() -> list[Score]:
        workers = pool(tmp_path, "fatal")
        try:
            scored = await workers.score("fatal", samples("a", "fatal", "abc"), False)
            return [one.scores for one in scored]  # type: ignore[misc]
        finally:
            await workers.close()

    first, second, third = asyncio.run(run())
    assert (first, third) == (Score("ok", 1.0), Score("ok", 3.0))
    assert second.status == "error" and "SIGKILL" in second.detail


def test_a_reward_with_state_starts_a_group_again_from_the_state_before_it(tmp_path: Path) -> None:
    async def run() -> tuple[list[float], Any]:
        workers = pool(tmp_path, "Counting")
        try:
            _, state = await workers.score_from(None, "Counting", samples("a"), False)
            scoring = asyncio.ensure_future(workers.score_from(state, "Counting", samples("b", "c", "d"), False))
            scored, state = await killing(workers, scoring, 0.3)  # it has scored the first of the three
            return [one.scores.value for one in scored], state
        finally:
            await workers.close()

    assert asyncio.run(run()) == ([2.0, 3.0, 4.0], {"seen": 4})
