"""The pool of reward models on real Ray: many groups a call, a deadline for each, a new process for a lost one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from core.loading import parse_config
from core.schema import Score
from rewards.pool import ModelPool, pooled
from rewards.reward import Samples
from rewards.workers import Scored

MODELS = """
import os, time

class Model:
    pool = True
    def __init__(self, *, factor: float = 1.0, broken: bool = False): self.factor, self.broken = factor, broken
    def prepare(self):
        if self.broken: raise OSError("no such model")
        self.loaded = os.getpid()
    def __call__(self, prompts, completions, **columns):
        if "hang" in completions: time.sleep(600)
        if "die" in completions: os._exit(3)
        if "bad" in completions: raise ValueError("a bad text")
        rows = len(completions)
        return [len(c) * self.factor + 1000 * rows + (100 if p == "Q1" else 0) for p, c in zip(prompts, completions)]

def plain(completion): return 1.0
"""


def config(tmp_path: Path, components: dict[str, Any], **models: Any) -> Any:
    (tmp_path / "models.py").write_text(MODELS)
    entries = {n: {**e, "fn": f"{tmp_path}/models.py:{e['fn']}"} for n, e in components.items()}
    tree = {"name": "t", "steps": 1, "model": {"path": "m"}, "data": {"path": "d"}, "output_dir": str(tmp_path)}
    return parse_config({**tree, "rewards": {"components": entries, "models": models}}, "test")


def samples(prompt: str, *texts: str) -> Samples:
    return Samples(prompt, {}, list(texts), [[] for _ in texts], [False] * len(texts))


@pytest.fixture(scope="module")
def ray_here() -> Any:
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def values(scored: list[Scored]) -> list[Any]:
    return [one.scores.value if one.scores.status == "ok" else one.scores.status for one in scored]  # type: ignore


@pytest.mark.real
def test_groups_are_scored_together_and_a_lost_process_costs_its_own_call(ray_here: Any, tmp_path: Path) -> None:
    settings = config(tmp_path, {"m": {"fn": "Model", "factor": 2.0}, "p": {"fn": "plain"}}, timeout=2.0, batch=4)
    assert list(pooled(settings)) == ["m"]

    async def run() -> None:
        pool = ModelPool(settings, tmp_path / "logs")
        await pool.start()
        try:
            asked = [pool.score("m", samples(f"Q{i}", "a", "bb"), True) for i in range(3)]
            found = await asyncio.gather(*asked)
            # One process, four completions a call: two groups together, then the third; or the first alone.
            rows = sorted(int(v // 1000) for scored in found for v in values(scored))
            assert rows == [2, 2, 4, 4, 4, 4]
            assert [v % 1000 for v in values(found[1])] == [102, 104]
            # A call that fails as a whole is tried group by group.
            good, bad = await asyncio.gather(*(pool.score("m", samples("Q", t, "x"), True) for t in ("good", "bad")))
            assert values(bad) == ["error", "error"] and values(good)[1] % 1000 == 2
            started = time.monotonic()
            hung, after = await asyncio.gather(*(pool.score("m", samples("Q", *t), True) for t in (["hang"] * 4, "a")))
            assert hung[0].scores == Score("timeout", detail="took longer than 2 s (rewards.models.timeout)")
            assert values(after) == [1002.0] and time.monotonic() - started < 60
            died = await pool.score("m", samples("Q", "die"), True)
            assert values(died) == ["error"] and "process of reward models ended" in died[0].scores.detail  # type: ignore
            assert values(await pool.score("m", samples("Q", "a"), True)) == [1002.0]
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(run(), 200))
    assert (tmp_path / "logs" / "reward-models-0.log").exists()


@pytest.mark.real
def test_a_model_that_does_not_load_is_the_users_to_mend(ray_here: Any, tmp_path: Path) -> None:
    async def run() -> None:
        await ModelPool(config(tmp_path, {"m": {"fn": "Model", "broken": True}}), tmp_path / "logs").start()

    with pytest.raises(UserError, match=r"rewards\.components\.m: OSError: no such model; see .*reward-models"):
        asyncio.run(asyncio.wait_for(run(), 100))


def test_without_models_there_is_no_pool(tmp_path: Path) -> None:
    pool = ModelPool(config(tmp_path, {"p": {"fn": "plain"}}), tmp_path / "logs")
    asyncio.run(pool.start())
    asyncio.run(pool.close())
    assert not pool.components and not (tmp_path / "logs").exists()
