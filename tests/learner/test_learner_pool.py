"""Learner ranks under a real Ray: they work together, and a dead or silent one is named."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.weights import verify
from alignlab.handoff import PutSnapshot
from core.errors import UserError
from learner.pool import LearnerLost, LearnerPool
from tests.learner import samples

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


def test_two_ranks_work_save_and_continue_and_a_dead_one_is_named(cluster: None, tiny: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        config = samples.config(tiny, ranks=2, timeout=120.0)
        pool = await LearnerPool.start(config, tmp_path)
        try:
            result = await pool.step(samples.groups(), version=0)
            assert result.metrics["optim/grad_norm"] > 0 and len(result.advantages) == 4
            # asked for during a step: the answer is of the weights after it, and says so
            stepping = asyncio.create_task(pool.step(samples.groups(), version=1))
            await asyncio.sleep(0)
            names, version = await pool.export(lambda tensors, version: ([name for name, _ in tensors], version))
            assert names[0] == "model.embed_tokens.weight" and version == 2
            assert (await stepping).metrics["optim/grad_norm"] > 0
            assert await pool.ask(os.getpid) == pool.processes()["learner-0"][0]
            stored = await pool.export(PutSnapshot("bfloat16"))
            weights = await stored.reference  # the bytes have stayed in the object store until now
            verify(weights)
            assert (stored.version, stored.digest) == (weights.version, weights.digest) and weights.version == 2
            (tmp_path / "checkpoint").mkdir()
            await pool.save(tmp_path / "checkpoint")
            assert (tmp_path / "checkpoint" / "model" / "model.safetensors").is_file()
            assert await pool.load(tmp_path / "checkpoint") == 2

            os.kill(pool.processes()["learner-1"][0], signal.SIGKILL)
            with pytest.raises(LearnerLost, match="learner rank 1 died while it should step"):
                await pool.step(samples.groups(), version=2)
        finally:
            await pool.close()

    asyncio.run(scenario())


def test_a_silent_rank_is_named_when_its_time_is_up(cluster: None, tiny: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = await LearnerPool.start(samples.config(tiny, timeout=60.0), tmp_path)
        try:
            os.kill(pool.processes()["learner-0"][0], signal.SIGSTOP)
            pool.config = samples.config(tiny, timeout=1.0)
            with pytest.raises(LearnerLost, match=r"learner rank 0 did not step within learner\.timeout 1 s"):
                await pool.step(samples.groups(), version=0)
        finally:
            await pool.close()

    asyncio.run(scenario())


def test_the_users_mistake_comes_back_as_it_is(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: transformers cannot load"):
        asyncio.run(LearnerPool.start(samples.config(tmp_path / "nothing"), tmp_path))


def test_a_cluster_that_is_too_small_is_said_in_time(cluster: None, tiny: Path, tmp_path: Path) -> None:
    config = samples.config(tiny, ranks=3)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"start_timeout": 2.0})})
    with pytest.raises(UserError, match=r"did not provide 3 x .*Lower learner\.ranks"):
        asyncio.run(LearnerPool.start(config, tmp_path))
