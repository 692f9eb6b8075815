"""A real run on a Ray cluster of three nodes on this machine: one that holds an actor goes, another one comes."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from alignlab.audit import audit
from tests.alignlab.test_failures import Driver
from tests.tiny import tiny_policy

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster():
    """A head and two nodes of one core each, so that the learner and two actors are each on a node of their own."""
    import ray
    from ray.cluster_utils import Cluster

    environment = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(environment)


def parent(pid):
    """The raylet that has started a worker."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


def test_a_node_goes_and_another_comes(cluster, tmp_path):
    tiny_policy(tmp_path / "policy")
    rows = [{"question": f"{a} + {b}?", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "unkillable",
        "steps": 100_000,
        "method": {"row": "grpo", "kl": "none"},
        "model": {"path": "policy"},
        "data": {"path": "problems.jsonl", "max_prompt_tokens": 32},
        "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 24, "max_staleness": 1},
        "actors": {"count": 2, "max_count": 3, "kv_cache_gib": 0.1, "max_num_seqs": 32},
        "rewards": {"components": {"tokens": {"per": 24}}},
        "cluster": {"address": cluster.address},
        "checkpoint": {"every": 50},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    driver = Driver(tmp_path)
    try:
        driver.until(r"^step +3/")
        homes = {name: parent(driver.pid(log)) for name, log in LOGS.items()}
        assert len(set(homes.values())) == 3 == len(cluster.worker_nodes) + 1

        gone = next(name for name in ("actor-1", "actor-0") if homes[name] != raylet(cluster.head_node))
        node = next(node for node in cluster.worker_nodes if raylet(node) == homes[gone])
        began = time.monotonic()
        cluster.remove_node(node, allow_graceful=False)
        driver.until(rf"{gone} .*lost")
        noticed = time.monotonic() - began
        steps = [int(driver.until(r"^step +(\d+)/")[1]) for _ in range(5)]

        cluster.add_node(num_cpus=1)
        waited = float(driver.until(rf"{gone} serves again, ([\d.]+) s after")[1])
        cluster.add_node(num_cpus=1)
        driver.until(r"actor-2 has joined")
        for _ in range(10):
            driver.until(r"^step +\d+/")
        driver.stop()
    finally:
        driver.process.kill()
    print(f"\nnode lost: noticed after {noticed:.1f} s, {steps[-1] - steps[0]} steps without it")
    print(f"its actor serves on another node {waited:.1f} s after the loss")
    assert audit(driver.run).problems == []
    used = {(row["actor"], row["incarnation"] > 0) for row in driver.records("done")}
    assert {(gone, True), ("actor-2", False)} <= used, "what came later was used"


LOGS = {"actor-0": "actor-0.0.log", "actor-1": "actor-1.0.log", "learner": "learner-0.log"}
