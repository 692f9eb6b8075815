"""Pools on a Ray cluster of three nodes on this machine: where actors lie, a node that goes, one that comes."""

from __future__ import annotations

import asyncio
import functools
import os
import time

import pytest

from actors.engine import FakeEngine
from actors.pool import ActorPool
from actors.weights import snapshot
from core.errors import UserError
from core.loading import parse_config
from core.schema import GroupRequest, Prompt, Sampling

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, for the driver, and two nodes with two cores each."""
    import ray
    from ray.cluster_utils import Cluster

    environment = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # A node that does not answer three times in as many seconds is dead; Ray's defaults take four times as long.
    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "health_check_timeout_ms": 3000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(environment)


def requests(count: int) -> list[GroupRequest]:
    prompt = Prompt(0, "?", (5, 9))
    return [GroupRequest(f"g{i}", prompt, (2 * i, 2 * i + 1), Sampling(8)) for i in range(count)]


def weights(version: int):
    import torch

    return snapshot([("w", torch.full((4,), float(version)))], version)


def pool_of(tmp_path, said, placement="PACK", timeout=30.0, latency=0.0, **actors) -> ActorPool:
    tree = {
        "name": "n",
        "steps": 1,
        "model": {"path": "m"},
        "data": {"path": "d.jsonl", "max_prompt_tokens": 8},
        "rollout": {"max_tokens": 8},
        "actors": {"start_timeout": 60.0, "max_num_seqs": 4, **actors},
        "cluster": {"address": "auto", "placement": placement, "start_timeout": timeout},
    }
    make = functools.partial(FakeEngine, latency=latency)
    return ActorPool(parse_config(tree, "test"), tmp_path, make=make, say=said.append)


def nodes_of(pool) -> list[str]:
    return [pool._host._places[name].node for name in pool.names]


def free_cores() -> float:
    """Cores that nobody has reserved, once Ray has heard of all that was given back."""
    import ray

    end = time.monotonic() + 5
    while (free := ray.available_resources().get("CPU", 0)) != ray.cluster_resources()["CPU"]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return free


def test_what_the_cluster_cannot_hold_is_refused_in_time_and_nothing_stays_reserved(cluster, tmp_path):
    with pytest.raises(UserError, match=r"actors.count 3 needs 3 x 1 CPU .*STRICT_SPREAD in 1 s .* of 4 CPU free"):
        asyncio.run(pool_of(tmp_path, [], "STRICT_SPREAD", timeout=1.0, count=3).start())
    assert free_cores() == 4


def test_growth_keeps_to_the_placement_and_a_place_is_given_back(cluster, tmp_path):
    async def scenario(placement, count, **actors):
        pool = pool_of(tmp_path, [], placement, count=count, max_count=9, **actors)
        try:
            await pool.start()
            before = nodes_of(pool)
            began = time.monotonic()
            joined = await pool.join()
            if joined is None:
                assert time.monotonic() - began < 8
                await pool.leave("actor-0")
                assert await pool.join() == f"actor-{count}"
            return before, joined, nodes_of(pool)
        finally:
            await pool.close()

    # Two nodes of two cores: one more may lie beside the first, but a third node is not there.
    before, joined, after = asyncio.run(scenario("STRICT_SPREAD", 2))
    assert len(set(before)) == 2 and joined is None and len(set(after)) == 2
    before, joined, after = asyncio.run(scenario("STRICT_PACK", 1))
    assert joined == "actor-1" and after == before * 2
    before, joined, after = asyncio.run(scenario("SPREAD", 1))
    assert joined == "actor-1" and len(set(after)) == 2
    assert free_cores() == 4


def test_work_goes_on_without_a_node_and_one_that_comes_is_used(cluster, tmp_path):
    said: list[str] = []

    async def scenario():
        pool = pool_of(tmp_path, said, latency=0.02, count=2, threads=2, max_count=3)  # each fills a node
        try:
            await pool.start()
            await pool.publish(weights(1))
            gone = nodes_of(pool)[1]
            groups, by, began = [], [], time.monotonic()
            async for group in pool.run(requests(5000)):
                groups.append(group)
                by.append((group.actor, pool.incarnations[group.actor]))
                if len(groups) == 20:
                    node = next(node for node in cluster.worker_nodes if node.node_id == gone)
                    removing = asyncio.create_task(asyncio.to_thread(cluster.remove_node, node, allow_graceful=False))
                    times["lost"] = time.monotonic()
                if "waiting" not in times and pool.waiting_for_place:
                    times["waiting"], since = time.monotonic(), len(groups)
                if "waiting" in times and "added" not in times and len(groups) == since + 50:
                    assert set(by[since:]) == {("actor-0", 0)}
                    assert await pool.join() is None
                    await removing
                    times["added"] = time.monotonic()
                    cluster.add_node(num_cpus=2)  # the loop stands still meanwhile, the actors do not
                if "added" in times and group.actor == "actor-1":
                    times["served"] = time.monotonic()
                    break
            cluster.add_node(num_cpus=2)
            assert await pool.join() == "actor-2" and len(set(nodes_of(pool))) == 3 and gone not in nodes_of(pool)
            groups += [group async for group in pool.run(requests(40))]
            assert {group.actor for group in groups[-40:]} == {"actor-0", "actor-1", "actor-2"}
            assert {v for g in groups for c in g.completions for v in c.versions} == {1}
            return began
        finally:
            await pool.close()

    times: dict[str, float] = {}
    asyncio.run(scenario())
    print({name: round(at - times["lost"], 1) for name, at in times.items()}, *said, sep="\n")
    assert any("actor-1 waits for a place" in line and "0 of 2 CPU free" in line for line in said)
    assert any("actor-1 has a place again" in line for line in said)
    assert free_cores() == 6
