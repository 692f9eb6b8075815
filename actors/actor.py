"""One rollout actor: one engine on a thread of its own, which steps whenever there is something to do.

Everything that touches the engine runs on that thread between two steps, in the order in which it was asked for: a
batch of requests enters as a whole, and weights change while requests in flight wait for one moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.schema import Group, GroupRequest

from actors.engine import Engine, EngineSpec
from actors.weights import Broadcast, Snapshot


@dataclass(frozen=True, slots=True)
class Stats:
    """An actor's sign of life."""

    actor: str
    incarnation: int
    version: int
    digest: str
    running: int  # samples being decoded
    waiting: int  # samples not started
    tokens: int  # generated since the start
    busy_seconds: float  # in engine steps, since the start
    stalled_seconds: float  # since the engine thread last did something it had to do; 0 while idle
    max_rss_gib: float
    pid: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that the engine rejected. Trying again does not help."""

    id: str
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Poll:
    """What an actor has to say: finished groups, rejected requests, and how it is."""

    groups: tuple[Group, ...]
    failures: tuple[Failure, ...]
    stats: Stats
    sequence: int  # hand this back with the next poll: it says what arrived, so a lost answer is sent again


class RolloutActor:
    def __init__(self, name: str, incarnation: int, spec: EngineSpec, make: Callable[[EngineSpec], Engine]) -> None: ...
    def ready(self, timeout: float) -> Stats: ...
    def submit(self, requests: Sequence[GroupRequest]) -> None: ...
    def poll(self, timeout: float, sequence: int = 0) -> Poll: ...
    def publish(self, weights: Snapshot | Broadcast, wait: bool = False) -> str: ...
    def connect(self, address: str, port: int, rank: int, world_size: int) -> None: ...
    def abort(self, ids: Sequence[str]) -> None: ...
    def status(self) -> Stats: ...
    def close(self) -> None: ...
