"""New weights, from the learner to every actor, verified. The one place that knows both pools.

Learner rank 0 runs the callables below on its tensors: `PutSnapshot` leaves them in Ray's object store, from which
every machine fetches them once; `SendNccl` broadcasts them from GPU to GPU. In a broadcast one member that is lost or
late holds up all others: then this version goes through the object store, where each actor is on its own.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from actors.pool import CALL_SECONDS, ActorPool, Published, brief
from actors.weights import Broadcast, Layout, Stored, layout, size, view
from learner.pool import LearnerPool

Tensors = Iterator[tuple[str, Any]]


class HandoffFailed(RuntimeError):
    """No actor serves the new weights, or they are not those that the learner has."""


class Handoff:
    """`await handoff(version)` returns when every actor that is well serves the learner's weights as `version`.

    Actors that failed or were late are lost: they are replaced, and catch up, where their loss is dealt with. Each of
    the two ways has `actors.publish_timeout`; the object store is the second one, taken when the first has failed.
    """

    def __init__(self, learner: LearnerPool, actors: ActorPool, say: Callable[[str], None] = print) -> None:
        self._learner, self._actors, self._say = learner, actors, say
        self._layout: Layout = ()
        actors.supply = self._put  # for an actor that joins after a broadcast

    async def __call__(self, version: int) -> Published:
        """Who serves the version. Raises HandoffFailed when nobody does, or the learner is at another one."""
        if self._actors.spec.weight_transfer == "nccl":
            published, problem = await self._broadcast(version)
            if published is not None:
                return published
            self._say(f"weights of version {version} go through the object store, not over NCCL: {problem}")
        stored = await self._put()
        if stored.version != version:
            raise HandoffFailed(f"version {version} was to be published, and the learner is at {stored.version}")
        published = await self._actors.publish(stored)
        if not published.loaded:
            raise HandoffFailed(f"no actor serves version {version}: {published.stale}")
        costs = {"weights/bytes": stored.nbytes, "weights/put_seconds": stored.seconds}
        return replace(published, costs={**published.costs, **costs})

    async def _put(self) -> Stored:
        return await self._learner.export(PutSnapshot(self._actors.spec.dtype))

    async def _broadcast(self, version: int) -> tuple[Published | None, str]:
        """Every actor that is well serves the version; or none and why not, and the group is given up."""
        end = time.monotonic() + self._actors.config.actors.publish_timeout
        problem = "" if self._actors.connected else await self._connect(end)
        published = None
        if not problem:
            published, problem = await self._send(version, end - time.monotonic())
        if problem:
            self._actors.disconnect()
        return (None if problem else published), problem

    async def _connect(self, end: float) -> str:
        names = self._actors.well
        if not names:
            return "no actor is well"
        if not self._layout:
            self._layout = await self._learner.export(Announce(self._actors.spec.dtype))
        address, port = await self._learner.ask(meeting_point)
        seconds = min(CALL_SECONDS, end - time.monotonic())
        join = JoinNccl(address, port, self._actors.group_size(names), self._layout, seconds)
        ours, theirs = await asyncio.gather(
            self._learner.ask(join), self._actors.connect(names, address, port, seconds)
        )
        return "; ".join(filter(None, (ours, theirs)))

    async def _send(self, version: int, seconds: float) -> tuple[Published | None, str]:
        message = Broadcast(version, self._layout, seconds)
        (digest, problem), published = await asyncio.gather(
            self._learner.export(SendNccl(version, seconds)), self._actors.publish(message)
        )
        if problem:
            return None, problem
        reasons = {name: brief(reason) for name, reason in published.stale.items()}
        without = {name: reason for name, reason in reasons.items() if name in self._actors.well}
        if without or not published.loaded:
            return None, f"not received: {without or reasons}"
        if published.digest != digest:
            return None, "the actors have received other weights than the learner has sent"
        costs = {"weights/bytes": size(self._layout)}
        return replace(published, costs={**published.costs, **costs}), ""


@dataclass(frozen=True)
class PutSnapshot:
    """Leave the tensors, in the engines' dtype, in Ray's object store: one copy, straight from where they are."""

    dtype: str

    def __call__(self, tensors: Tensors, version: int) -> Stored:
        """The bytes stay on the learner's machine until an actor asks for them."""
        import ray

        started = time.monotonic()
        weights = view(tensors, version, self.dtype)
        reference = ray.put(weights)
        return Stored(version, weights.digest, reference, weights.nbytes, time.monotonic() - started)


@dataclass(frozen=True)
class Announce:
    """What will be broadcast."""

    dtype: str

    def __call__(self, tensors: Tensors, version: int) -> Layout:
        """It is the same for every version."""
        return layout(tensors, self.dtype)


def meeting_point() -> tuple[str, int]:
    """Where the actors can meet learner rank 0: its address, and a port that is free."""
    import ray

    import actors.vllm_nccl  # noqa: F401 - this takes seconds; better now than while the actors wait

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


@dataclass(frozen=True)
class JoinNccl:
    """Make learner rank 0 the sender of a new NCCL group."""

    address: str
    port: int
    world_size: int
    layout: Layout
    seconds: float

    def __call__(self) -> str:
        """Empty when all have joined, else why not: an exception would be the end of the rank."""
        from actors.vllm_nccl import NcclSender

        _leave()
        global _sender
        try:
            _sender = NcclSender(self.address, self.port, self.world_size, self.layout, self.seconds)
        except Exception as error:
            return f"the learner could not join: {type(error).__name__}: {error}"
        return ""


@dataclass(frozen=True)
class SendNccl:
    """Broadcast the tensors to all engines."""

    version: int
    seconds: float

    def __call__(self, tensors: Tensors, version: int) -> tuple[str, str]:
        """(digest, "") or, with the group left, ("", what went wrong)."""
        try:
            if version != self.version:
                raise ValueError(f"the learner is at version {version}")
            return _sender.send(tensors, self.seconds), ""
        except Exception as error:
            _leave()
            return "", f"the learner could not send: {type(error).__name__}: {error}"


_sender: Any = None  # lives in learner rank 0's process between the steps, as its NCCL group does


def _leave() -> None:
    global _sender
    if _sender is not None:
        _sender.close()
    _sender = None
