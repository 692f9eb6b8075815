"""All actors of a run: start, route, publish, notice a loss, replace. An asyncio face; no call waits for ever.

`ActorPool` knows actors by name ("actor-0", ...). A lost actor keeps its name and gets the next incarnation number.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.actor import Poll
from actors.weights import Broadcast, Snapshot
from core.config import RunConfig
from core.schema import Group, GroupRequest


class ActorLost(Exception):
    """This incarnation of an actor is gone or presumed dead; nothing it still sends counts."""

    def __init__(self, name: str, incarnation: int, reason: str) -> None:
        super().__init__(f"{name} (incarnation {incarnation}) was lost: {reason}")
        self.name, self.incarnation, self.reason = name, incarnation, reason


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of one publish: actors that serve the version now, and why the others do not (replace those)."""

    version: int
    digest: str
    loaded: tuple[str, ...]
    stale: dict[str, str]


class ActorPool:
    """
    pool = ActorPool(config, log_dir)                      # Ray must be running; host=ThreadHost() needs no Ray
    await pool.start()                                     # UserError if the cluster cannot place it
    await pool.publish(snapshot)                           # Snapshot or a Ray reference to one
    await pool.submit("actor-0", requests)                 # ActorLost
    poll = await pool.poll("actor-0", timeout=1.0)         # ActorLost
    incarnation = await pool.replace("actor-0")            # with the last published weights loaded
    async for group in pool.run(requests): ...             # routing, retries and replacement inside
    await pool.close()
    """

    names: tuple[str, ...]
    incarnations: dict[str, int]

    def __init__(self, config: RunConfig, log_dir: Path, *, host: Any = None, make: Any = None) -> None: ...
    async def start(self) -> None: ...
    async def submit(self, name: str, requests: Sequence[GroupRequest]) -> None: ...
    async def poll(self, name: str, timeout: float = 1.0) -> Poll: ...
    async def abort(self, name: str, ids: Sequence[str]) -> None: ...
    async def publish(self, weights: Snapshot | Broadcast | Any, wait: bool = False) -> Published: ...
    async def connect(self, address: str, port: int) -> int: ...
    async def replace(self, name: str) -> int: ...
    def run(self, requests: Iterable[GroupRequest]) -> AsyncIterator[Group]: ...
    def metrics(self) -> dict[str, float]: ...
    async def close(self) -> None: ...
