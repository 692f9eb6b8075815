"""Two real vLLM engines in two Ray processes: publish, share work, lose one to kill -9, replace it, leave none."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from pathlib import Path

import pytest

from actors.engine import FakeEngine
from actors.placement import alive
from actors.pool import ActorLost, ActorPool
from actors.weights import snapshot
from core.errors import UserError
from core.loading import parse_config
from core.schema import GroupRequest, Prompt, Sampling
from tests.tiny import tiny_policy

pytestmark = pytest.mark.real
PROMPT = (2, 272, 14, 294, 32, 3)  # <|user|>12+34=<|assistant|>


@pytest.fixture(scope="module")
def cluster():
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


def config(policy: Path | str, **actors):
    tree = {
        "name": "n",
        "steps": 1,
        "model": {"path": str(policy)},
        "data": {"path": "d.jsonl", "max_prompt_tokens": 16},
        "rollout": {"max_tokens": 200},
        "actors": {"count": 2, "max_num_seqs": 16, "kv_cache_gib": 0.25, **actors},
    }
    return parse_config(tree, "test")


def requests(count: int, max_tokens: int = 200) -> list[GroupRequest]:
    sampling = Sampling(max_tokens, ignore_eos=True)
    return [
        GroupRequest(f"g{i}", Prompt(i, "", PROMPT), tuple(range(4 * i, 4 * i + 4)), sampling) for i in range(count)
    ]


def weights(policy: Path, version: int):
    from safetensors.torch import load_file

    tensors = load_file(policy / "model.safetensors")
    return snapshot(((name, tensor * (1 + 0.01 * version)) for name, tensor in tensors.items()), version)


def test_a_pool_survives_kill_9_without_losing_a_request(cluster, policy, tmp_path):
    async def scenario():
        pool = ActorPool(config(policy), tmp_path)
        try:
            await pool.start()
            published = await pool.publish(weights(policy, 1))
            assert published.loaded == pool.names and published.digest == weights(policy, 1).digest
            victim = (await pool.poll("actor-0", 0.1)).stats.pid

            groups = []
            async for group in pool.run(requests(24)):
                groups.append(group)
                if group.actor == "actor-0" and victim is not None:
                    os.kill(victim, signal.SIGKILL)  # it has finished a first batch, and holds a second one
                    killed, victim = victim, None
            with pytest.raises(ActorLost, match=r"actor-0 .*its process ended"):
                await pool.poll("actor-0", 0.1)
            await pool.replace("actor-0")
            stats = [(await pool.poll(name, 0.1)).stats for name in pool.names]
            return groups, stats, killed, published.digest
        finally:
            await pool.close()

    groups, stats, killed, digest = asyncio.run(scenario())
    assert sorted(g.id for g in groups) == sorted(r.id for r in requests(24))
    assert {g.actor for g in groups} == {"actor-0", "actor-1"} and {g.attempt for g in groups} == {0, 1}
    assert {v for g in groups for c in g.completions for v in c.versions} == {1}
    assert [s.incarnation for s in stats] == [1, 0] and stats[0].pid != killed
    assert {(s.version, s.digest) for s in stats} == {(1, digest)}
    assert not any(alive(s.pid) for s in stats)


def test_actors_that_do_not_fit_are_refused_with_what_there_is(cluster, tmp_path):
    with pytest.raises(UserError, match=r"needs 2 x 2 CPU and this machine cannot provide them .* of 2 CPU free"):
        asyncio.run(ActorPool(config("m", threads=2), tmp_path).start())


def test_an_actor_that_does_not_start_shows_the_end_of_its_log(cluster, tmp_path):
    broken = functools.partial(FakeEngine, no_such_option=1)
    with pytest.raises(UserError, match=r"actor-0: it did not start(.|\n)*no_such_option"):
        asyncio.run(ActorPool(config("m", count=1), tmp_path, make=broken).start())
    assert list(tmp_path.glob("actor-0.0.log"))
