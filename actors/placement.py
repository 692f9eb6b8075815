"""Where actors live: in Ray processes of a placement group, or as threads of this process. The pool cannot tell.

Ray must have been started by the caller. It is imported where it is used.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from actors.actor import RolloutActor, Stats
from actors.engine import Device, Engine, EngineSpec
from actors.weights import Snapshot, Stored
from core import patience, stacks
from core.config import RunConfig
from core.errors import UserError

Make = Callable[[EngineSpec], Engine]


class Gone(Exception):
    """The process or thread of an actor is no more."""


class Handle(Protocol):
    """One living actor."""

    async def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        """What `RolloutActor.method(*arguments)` returns or raises; TimeoutError after `timeout` s; Gone."""

    def kill(self) -> None:
        """End it without asking; returns at once."""


class Host(Protocol):
    """A place for the actors of one pool."""

    async def place(self, config: RunConfig) -> Device:
        """Reserve what all actors need; where their engines will run. Raises UserError if it is not to be had."""

    def start(self, index: int, name: str, incarnation: int, spec: EngineSpec, make: Make, log: Path) -> Handle:
        """A new actor in the reserved place number `index`; what it prints goes to `log`."""

    def share(self, weights: Snapshot | Stored) -> Any:
        """Weights in the form in which `Handle.call` hands them to many actors without a copy for each."""

    async def close(self, last: list[Stats]) -> None:
        """Give the places back and wait until the processes that sent these stats have ended."""


class ThreadHost:
    """Actors in this process, without Ray: for one engine on one machine, and for tests with fakes."""

    async def place(self, config: RunConfig) -> Device:
        return "cuda" if config.actors.device == "cuda" else "cpu"

    def start(self, index: int, name: str, incarnation: int, spec: EngineSpec, make: Make, log: Path) -> Handle:
        return _ThreadHandle(RolloutActor(name, incarnation, spec, make))

    def share(self, weights: Snapshot | Stored) -> Any:
        return weights.reference if isinstance(weights, Stored) else weights

    async def close(self, last: list[Stats]) -> None:
        """Threads end with their actors."""


class _ThreadHandle:
    def __init__(self, actor: RolloutActor) -> None:
        self._actor, self._killed = actor, False
        self._threads = ThreadPoolExecutor(8, thread_name_prefix=actor.name)

    async def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        if self._killed:
            raise Gone("it was killed")
        loop = asyncio.get_running_loop()
        return await patience.within(
            loop.run_in_executor(self._threads, lambda: getattr(self._actor, method)(*arguments)), timeout
        )

    def kill(self) -> None:
        self._killed = True
        self._actor.close(timeout=0)
        self._threads.shutdown(wait=False)


class RayHost:
    """Each actor a Ray actor in a bundle of one placement group; CPU cores or GPUs are reserved until `close`."""

    def __init__(self) -> None:
        self._group: Any = None
        self._bundle: dict[str, float] = {}

    async def place(self, config: RunConfig) -> Device:
        import ray

        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        gpu = config.actors.device == "cuda" or (config.actors.device == "auto" and has_gpus)
        parallel = config.actors.tensor_parallel
        self._bundle = {"CPU": 1, "GPU": parallel} if gpu else {"CPU": config.actors.threads * parallel}
        await self._reserve(config)
        return "cuda" if gpu else "cpu"

    async def _reserve(self, config: RunConfig) -> None:
        import ray

        count, cluster = config.actors.count, config.cluster
        wanted = {kind: amount * count for kind, amount in self._bundle.items()}
        total = ray.cluster_resources()
        if cluster.address is None and any(total.get(kind, 0) < amount for kind, amount in wanted.items()):
            raise UserError(_no_room(count, self._bundle, "this machine cannot provide them"))  # and it will not grow
        self._group = ray.util.placement_group([self._bundle] * count, strategy=cluster.placement)
        try:
            await asyncio.wait_for(_awaited(self._group.ready()), cluster.start_timeout)
        except TimeoutError:
            why = f"the cluster did not provide them with placement {cluster.placement} in {cluster.start_timeout:g} s"
            raise UserError(_no_room(count, self._bundle, why)) from None

    def start(self, index: int, name: str, incarnation: int, spec: EngineSpec, make: Make, log: Path) -> Handle:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        remote = ray.remote(_Process).options(
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=place,
            max_restarts=0,  # the pool replaces what is lost, with the weights of the day
            max_concurrency=8,
        )
        return _RayHandle(remote.remote(str(log.resolve()), name, incarnation, spec, make))

    def share(self, weights: Snapshot | Stored) -> Any:
        import ray

        return weights.reference if isinstance(weights, Stored) else ray.put(weights)

    async def close(self, last: list[Stats]) -> None:
        import ray

        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None
        here = [stats.pid for stats in last if stats.host == socket.gethostname()]
        for _ in range(200):  # 10 s
            here = [pid for pid in here if alive(pid)]
            if not here:
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"actor processes {here} are still there 10 s after they were killed")


class _RayHandle:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        import ray

        try:
            return await patience.within(_awaited(getattr(self._actor, method).remote(*arguments)), timeout)
        except ray.exceptions.RayActorError as error:
            raise Gone(f"its process ended: {str(error).strip().splitlines()[0]}") from None

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


class _Process(RolloutActor):
    """A RolloutActor that owns its process: all that it prints, C++ included, goes to its log."""

    def __init__(self, log: str, *arguments: Any) -> None:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        stacks.register(2)
        super().__init__(*arguments)


async def _awaited(reference: Any) -> Any:
    return await reference


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which waits only for its parent to notice, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _no_room(count: int, bundle: dict[str, float], why: str) -> str:
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    have = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind in bundle)
    return (
        f"actors.count {count} needs {count} x {wanted} and {why} ({have}); lower actors.count, actors.threads or "
        "actors.tensor_parallel, or free resources"
    )
