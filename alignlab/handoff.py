"""New weights, from the learner to every actor, verified. The one place that knows both pools.

Learner rank 0 runs the callables below on its tensors: `PutSnapshot` leaves them in Ray's object store, from which
every machine fetches them once; `SendNccl` broadcasts them from GPU to GPU.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actors.pool import ActorPool
from actors.weights import Broadcast, snapshot
from learner.pool import LearnerPool

Tensors = Iterator[tuple[str, Any]]


class HandoffFailed(RuntimeError):
    """No actor serves the new weights, or they are not those that the learner has."""


class Handoff:
    """`await handoff(version)` returns when every actor that is well serves the learner's weights as `version`.

    Actors that refused or were late are lost: they are replaced where their loss is dealt with.
    """

    def __init__(self, learner: LearnerPool, actors: ActorPool) -> None:
        self._learner, self._actors, self._version = learner, actors, 0
        self._manifest: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
        actors.supply = self._put  # an actor that joins an NCCL group late gets its weights this way

    async def __call__(self, version: int) -> None:
        """Raises HandoffFailed when no actor serves the version, or the digests differ."""
        self._version = version
        if self._actors.spec.weight_transfer == "nccl":
            await self._broadcast(version)
            return
        reference, digest = await self._pack()
        published = await self._actors.publish(reference)
        if not published.loaded:
            raise HandoffFailed(f"no actor serves version {version}: {published.stale}")
        if published.digest != digest:
            raise HandoffFailed(
                f"version {version}: the actors serve weights with digest {published.digest[:12]}..., "
                f"the learner has {digest[:12]}..."
            )

    async def _pack(self) -> tuple[Any, str]:
        (reference,), digest = await self._learner.export(PutSnapshot(self._version, self._actors.spec.dtype))
        return reference, digest

    async def _put(self) -> Any:
        return (await self._pack())[0]

    async def _broadcast(self, version: int) -> None:
        if not self._actors.connected:
            self._manifest, address, port = await self._learner.export(Announce(self._actors.spec.dtype))
            join = JoinNccl(address, port, self._actors.world_size, Broadcast(version, self._manifest))
            await asyncio.gather(self._learner.export(join), self._actors.connect(address, port))
        message = Broadcast(version, self._manifest)
        _, published = await asyncio.gather(self._learner.export(send_nccl), self._actors.publish(message))
        if not published.loaded:
            raise HandoffFailed(f"no actor serves version {version}: {published.stale}")


@dataclass(frozen=True)
class PutSnapshot:
    """Pack the tensors in the engines' dtype and leave them in Ray's object store."""

    version: int
    dtype: str

    def __call__(self, tensors: Tensors) -> tuple[list[Any], str]:
        """([reference], digest). The list keeps Ray from fetching the bytes to the driver."""
        import ray

        weights = snapshot(tensors, self.version, self.dtype)
        return [ray.put(weights)], weights.digest


@dataclass(frozen=True)
class Announce:
    """What will be broadcast, and where the actors can meet rank 0."""

    dtype: str

    def __call__(self, tensors: Tensors) -> tuple[tuple[tuple[str, str, tuple[int, ...]], ...], str, int]:
        """(manifest, address, port)."""
        import ray

        manifest = tuple(
            (name, self.dtype if t.is_floating_point() else str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in tensors
        )
        with socket.socket() as probe:
            probe.bind(("", 0))
            return manifest, ray.util.get_node_ip_address(), probe.getsockname()[1]


@dataclass(frozen=True)
class JoinNccl:
    """Make rank 0 the sender of a new NCCL group; blocks until all engines have joined."""

    address: str
    port: int
    world_size: int
    message: Broadcast

    def __call__(self, tensors: Tensors) -> None:
        """The tensors are not touched."""
        from actors.vllm_weights import NcclSender

        global _sender
        if _sender is not None:
            _sender.close()
        _sender = NcclSender(self.address, self.port, self.world_size, self.message)


_sender: Any = None  # lives in learner rank 0's process between the steps, as its NCCL group does


def send_nccl(tensors: Tensors) -> None:
    """Broadcast the tensors to all engines."""
    _sender.send(tensors)
