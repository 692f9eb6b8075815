"""Where actors live: in Ray processes, each in a place of its own, or as threads of this process. The pool cannot tell.

Ray must have been started by the caller. It is imported where it is used. `actors.process_host` is a third host.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actors.actor import RolloutActor, Stats
from actors.engine import Device, Engine, EngineSpec
from actors.weights import Snapshot, Stored
from core import cores, patience, stacks
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
    """Places for the actors of one pool, by name."""

    async def place(self, config: RunConfig, names: Sequence[str]) -> Device:
        """Reserve a place for each of them; where their engines will run. Raises UserError if one is not to be had."""

    async def seat(self, name: str) -> str:
        """See that an actor has a place, a new one if it has none or lost it; "", or why there is none for it now.

        Takes seconds at most: ask again later.
        """

    def vacate(self, name: str) -> None:
        """Give an actor's place back."""

    def start(self, name: str, incarnation: int, spec: EngineSpec, make: Make, log: Path) -> Handle:
        """A new actor in the place of this name; what it prints goes to `log`."""

    def share(self, weights: Snapshot | Stored) -> Any:
        """Weights in the form in which `Handle.call` hands them to many actors without a copy for each."""

    async def close(self, last: list[Stats]) -> None:
        """Give all places back and wait until the processes that sent these stats have ended."""


class ThreadHost:
    """Actors in this process, without Ray: for one engine on one machine, and for tests with fakes."""

    async def place(self, config: RunConfig, names: Sequence[str]) -> Device:
        return "cuda" if config.actors.device == "cuda" else "cpu"

    async def seat(self, name: str) -> str:
        return ""

    def vacate(self, name: str) -> None:
        """There is always room here."""

    def start(self, name: str, incarnation: int, spec: EngineSpec, make: Make, log: Path) -> Handle:
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


ROOM_SECONDS = 3.0  # in which a place comes, or there is no room for it now
WISH_SECONDS = 1.0  # for a place where we would rather have it; then it may be anywhere
NODE_SECONDS = 2.0  # between two looks at whether the machine of an actor that keeps us waiting is still there


@dataclass(frozen=True, slots=True)
class _Place:
    """A reserved bundle: a placement group of its own, so that it can be given back alone, and the id of its node."""

    group: Any
    node: str


class RayHost:
    """Each actor a Ray actor in a place of its own; CPU cores or GPUs are reserved until it leaves, or `close`."""

    def __init__(self) -> None:
        self._bundle: dict[str, float] = {}
        self._strategy, self._pins = "PACK", False
        self._places: dict[str, _Place] = {}
        self._seating = asyncio.Lock()  # where one may lie depends on where the others do
        self._looked, self._found = 0.0, dict[str, dict[str, float]]()

    async def place(self, config: RunConfig, names: Sequence[str]) -> Device:
        import ray

        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        gpu = config.actors.device == "cuda" or (config.actors.device == "auto" and has_gpus)
        parallel = config.actors.tensor_parallel
        self._bundle = {"CPU": 1, "GPU": parallel} if gpu else {"CPU": config.actors.threads * parallel}
        self._strategy, self._pins = config.cluster.placement, config.cluster.pin_cores is True and not gpu
        wanted = {kind: amount * len(names) for kind, amount in self._bundle.items()}
        total = ray.cluster_resources()
        if config.cluster.address is None and any(total.get(kind, 0) < amount for kind, amount in wanted.items()):
            # and it will not grow
            raise UserError(_no_room(len(names), self._bundle, "this machine cannot provide them"))
        try:
            await self._seat_all(names, config.cluster.start_timeout)
        except BaseException:
            self._clear()
            raise
        return "cuda" if gpu else "cpu"

    async def _seat_all(self, names: Sequence[str], seconds: float) -> None:
        """Ray chooses the nodes of all places at once, in a group of them. Then each gets its own, for a group cannot
        shrink; should somebody else have been faster on a node, all of it is done again."""
        end = time.monotonic() + seconds
        while len(self._places) < len(names):
            self._clear()
            plan = await _reserve([self._bundle] * len(names), self._strategy, {}, end - time.monotonic())
            if plan is None:
                why = f"the cluster did not provide them with placement {self._strategy} in {seconds:g} s"
                raise UserError(_no_room(len(names), self._bundle, why))
            _give_back([place.group for place in plan])
            nodes = [place.node for place in plan]
            async with asyncio.TaskGroup() as tasks:
                for name, node in zip(names, nodes, strict=True):
                    tasks.create_task(self._take(name, _within([node]), ROOM_SECONDS))

    async def _take(self, name: str, where: Mapping[str, str], seconds: float) -> bool:
        """Reserve a place; whether that has succeeded in so many seconds."""
        if (places := await _reserve([self._bundle], "PACK", where, seconds)) is not None:
            self._places[name] = places[0]
        return places is not None

    async def seat(self, name: str) -> str:
        async with self._seating:
            self._looked = 0.0
            nodes = self._nodes()
            if name in self._places and self._places[name].node in nodes:
                return ""
            self.vacate(name)
            taken = Counter(place.node for place in self._places.values() if place.node in nodes)
            large = [n for n, total in nodes.items() if all(total.get(k, 0) >= v for k, v in self._bundle.items())]
            *wishes, last = choices(self._strategy, taken, large)
            for where, seconds in (*((wish, WISH_SECONDS) for wish in wishes), (last, ROOM_SECONDS)):
                if await self._take(name, where, seconds):
                    return ""
            return _lack(self._bundle, f"no node with placement {self._strategy} has")

    def vacate(self, name: str) -> None:
        if (place := self._places.pop(name, None)) is not None:
            _give_back([place.group])

    def start(self, name: str, incarnation: int, spec: EngineSpec, make: Make, log: Path) -> Handle:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = self._places[name]
        remote = ray.remote(_Process).options(
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=0),
            max_restarts=0,  # the pool replaces what is lost, with the weights of the day
            max_concurrency=8,
        )
        actor = remote.remote(str(log.resolve()), name, incarnation, spec, OnItsCores(make) if self._pins else make)
        return _RayHandle(actor, lambda: place.node in self._nodes())

    def share(self, weights: Snapshot | Stored) -> Any:
        import ray

        return weights.reference if isinstance(weights, Stored) else ray.put(weights)

    async def close(self, last: list[Stats]) -> None:
        self._clear()
        here = [stats.pid for stats in last if stats.host == socket.gethostname()]
        for _ in range(200):  # 10 s
            here = [pid for pid in here if alive(pid)]
            if not here:
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"actor processes {here} are still there 10 s after they were killed")

    def _clear(self) -> None:
        for name in list(self._places):
            self.vacate(name)

    def _nodes(self) -> dict[str, dict[str, float]]:
        """Nodes of the cluster that are alive, id -> resources; as they were within the last second."""
        import ray

        if time.monotonic() - self._looked > 1.0:
            self._found = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
            self._looked = time.monotonic()
        return self._found


def choices(strategy: str, taken: Counter[str], nodes: Sequence[str]) -> list[dict[str, str]]:
    """Label selectors of the nodes on which one more place may lie, the best first; {} is any node.

    `taken`: places by node, on nodes that are alive. `nodes`: all on which one would fit if they were empty. A pool
    under STRICT_PACK that has lost its node as a whole comes together again where the first of it finds room.
    """
    if strategy == "STRICT_SPREAD":
        return [_without(taken)]
    if strategy == "SPREAD" and nodes:
        fewest = min(taken[node] for node in nodes)
        return [_within(node for node in nodes if taken[node] == fewest), {}]
    together = [_within(taken)] if taken else []
    return together if together and strategy == "STRICT_PACK" else [*together, {}]


def _within(nodes: Iterable[str]) -> dict[str, str]:
    return {"ray.io/node-id": f"in({','.join(nodes)})"}


def _without(nodes: Iterable[str]) -> dict[str, str]:
    return {"ray.io/node-id": f"!in({','.join(nodes)})"} if nodes else {}


async def _reserve(
    bundles: list[dict[str, float]], strategy: str, where: Mapping[str, str], seconds: float
) -> list[_Place] | None:
    """Places for all bundles, each on a node that `where` selects; None, and nothing kept, if they do not come."""
    import ray

    selectors = [dict(where)] * len(bundles) if where else None
    group = ray.util.placement_group(bundles, strategy=strategy, bundle_label_selector=selectors)
    try:
        await patience.within(_awaited(group.ready()), seconds)
        nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        return [_Place(group, nodes[index]) for index in range(len(bundles))]
    except BaseException as error:
        _give_back([group])
        if isinstance(error, TimeoutError):
            return None
        raise


def _give_back(groups: Iterable[Any]) -> None:
    import ray

    for group in set(groups):
        ray.util.remove_placement_group(group)


@dataclass(frozen=True)
class OnItsCores:
    """Makes an engine on cores of its own. It is called on the engine's thread, so Ray's threads stay free to move."""

    make: Make

    def __call__(self, spec: EngineSpec) -> Engine:
        print(cores.told(cores.claim(spec.threads * spec.tensor_parallel)), flush=True)
        return self.make(spec)


class _RayHandle:
    def __init__(self, actor: Any, has_node: Callable[[], bool]) -> None:
        self._actor, self._has_node = actor, has_node

    async def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        import ray

        answer = _awaited(getattr(self._actor, method).remote(*arguments))
        try:
            return await patience.within(self._while_there(answer), timeout)
        except ray.exceptions.RayActorError as error:
            raise Gone(f"its process ended: {str(error).strip().splitlines()[0]}") from None

    async def _while_there(self, answer: Awaitable[Any]) -> Any:
        """The answer, or Gone when the machine has left the cluster: Ray would not say so of one being started."""
        task = asyncio.ensure_future(answer)
        try:
            while not (await asyncio.wait([task], timeout=NODE_SECONDS))[0]:
                if not self._has_node():
                    raise Gone("its machine has left the cluster")
            return task.result()
        finally:
            task.cancel()

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


def _no_room(count: int, bundle: Mapping[str, float], why: str) -> str:
    return (
        f"{_lack(bundle, f'actors.count {count} needs {count} x', why)}; lower actors.count, actors.threads or "
        "actors.tensor_parallel, or free resources"
    )


def _lack(bundle: Mapping[str, float], before: str, why: str = "") -> str:
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    have = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind in bundle)
    return f"{before} {wanted}{why and f' and {why}'} ({have})"
