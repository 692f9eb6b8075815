"""The Ray cluster of a run: one started here on loopback, or one that is already running."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from core.config import RunConfig
from core.cores import allowed
from core.errors import UserError

THREADS_PER_CORE = 8  # that a run may ask for on its own machine


def here() -> dict[str, int]:
    """CPU cores and GPUs of this machine."""
    import torch

    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def on_gpu(device: str, gpus: int) -> bool:
    """Where a pool runs whose option `device` says so, on a cluster with so many GPUs."""
    return device == "cuda" or (device == "auto" and gpus > 0)


def pools(config: RunConfig, gpus: int, *, sampling: bool = True) -> dict[str, Counter[str]]:
    """What each pool asks Ray for, for instance {"actors": {"CPU": 2}, "learner": {"CPU": 1, "GPU": 1}}.

    The pool `rewards` is there where a component wants a model.

    `gpus` of the cluster decide what the device auto is. Without `sampling` (demonstrations) there are no actors.
    """
    from rewards.pool import pooled

    actors, learner, models = config.actors, config.learner, config.rewards.models
    parallel = actors.tensor_parallel
    engine = {"CPU": 1, "GPU": parallel} if on_gpu(actors.device, gpus) else {"CPU": actors.threads * parallel}
    rank = {"CPU": learner.threads} | ({"GPU": 1} if on_gpu(learner.device, gpus) else {})
    model = {"CPU": 1, "GPU": 1} if on_gpu(models.device, gpus) else {"CPU": models.threads}
    bundles = {"actors": (actors.count if sampling else 0, engine), "learner": (learner.ranks, rank)}
    if pooled(config):
        bundles["rewards"] = (models.count, model)
    return {name: Counter({k: n * amount for k, amount in one.items()}) for name, (n, one) in bundles.items()}


def check_room(config: RunConfig, *, sampling: bool = True) -> None:
    """Refuse pools that this machine can never hold, where the run starts a cluster of its own. Raises UserError.

    GPUs are not shared. Cores are: two actors and two ranks on a laptop are a choice, a hundred are a slip.
    """
    if config.cluster.address is not None:
        return
    have = here()
    asked = pools(config, have["GPU"], sampling=sampling)
    for kind, most in {"GPU": have["GPU"], "CPU": have["CPU"] * THREADS_PER_CORE}.items():
        if sum(pool[kind] for pool in asked.values()) > most:
            shared = f" ({THREADS_PER_CORE} threads may share one)" if kind == "CPU" else ""
            raise UserError(
                f"pools: {describe_pools(asked)}, but this machine has {have[kind]} {kind}{shared}; lower "
                "actors.count, actors.tensor_parallel, learner.ranks or threads, change actors.device or "
                "learner.device, or name a larger cluster in cluster.address"
            )


def check_compiler(config: RunConfig) -> None:
    """Refuse to compile for a CPU where nothing compiles C++; on a cluster its machines will say. Raises UserError."""
    if not config.learner.compile or config.cluster.address is not None or on_gpu(config.learner.device, here()["GPU"]):
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"learner.compile: torch.compile needs a C++ compiler on CPU, there is no {compiler} here; install one, "
            "name another in the environment's CXX, or leave the option out"
        )


def pins_cores(config: RunConfig, *, sampling: bool = True) -> bool:
    """`cluster.pin_cores`, where it is not said what it stands for: whether processes are to have cores of their own.

    Those that take turns cannot fight. With fewer cores than compute threads all share them: who is bound to one could
    not move away from whoever else is there. On a cluster Ray counts the cores.
    """
    if config.cluster.pin_cores is not None:
        return config.cluster.pin_cores
    if config.rollout.max_staleness == 0:
        return False
    if config.cluster.address is not None:
        return True
    asked = pools(config, here()["GPU"], sampling=sampling)
    return sum(pool["CPU"] for pool in asked.values()) <= len(allowed())


def describe_pools(asked: dict[str, Counter[str]]) -> str:
    """For instance "actors 2 CPU, learner 1 CPU + 1 GPU"."""
    return ", ".join(
        f"{name} {' + '.join(f'{n} {kind}' for kind, n in pool.items() if n) or 'none'}" for name, pool in asked.items()
    )


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Ray, connected for the length of the block. Raises UserError when a named cluster cannot be reached."""
    import ray

    address = config.cluster.address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would give a worker's every thread pool all cores; each pool of ours sets its own threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # More processes than cores is a choice (two actors and two ranks on a laptop), not an error.
        have = here()
        wanted = sum(pool["CPU"] for pool in pools(config, have["GPU"]).values())
        options |= {
            "num_cpus": max(have["CPU"], wanted),
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cluster.address {address}: cannot reach a Ray cluster there: {error}; start one with `ray start --head`, "
            "or leave cluster.address out to run on this machine alone"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
