"""The actors of a run as its coordinator sees them: how each one is, what it holds, which one is next.

    starting -> serving <-> stale        loads the newest weights, or has missed them
                serving <-> suspect      silent for a while; its groups go to others
                serving  -> draining     finishes what it holds, then it is retired
                any      -> dead         until its next incarnation serves

Only a serving actor is given groups: the one with the fewest, of equals the one that joined first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum


class Health(Enum):
    """How an actor is; see the module's docstring."""

    STARTING = "starting"
    SERVING = "serving"
    STALE = "stale"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True)
class Actor:
    """One actor: `order` in which it first joined, and the ordinals of the groups that it holds."""

    order: int
    incarnation: int
    health: Health
    version: int = 0
    holds: set[int] = field(default_factory=set)


@dataclass
class Fleet:
    """Actors by name. `capacity`: groups that one actor may hold; None is any number."""

    capacity: int | None = None
    actors: dict[str, Actor] = field(default_factory=dict)
    _joined: int = 0
    _free: list[tuple[int, int, str]] = field(default_factory=list)  # (groups held, order, name), some of them outdated

    def current(self, name: str, incarnation: int) -> Actor | None:
        """The actor, unless what is said comes from another incarnation of it."""
        actor = self.actors.get(name)
        return actor if actor is not None and actor.incarnation == incarnation else None

    def enter(self, name: str, incarnation: int, health: Health, version: int = 0) -> Actor | None:
        """A new actor, or a new incarnation of one; None if a newer one is there already."""
        actor = self.actors.get(name)
        if actor is None:
            actor = self.actors[name] = Actor(self._joined, incarnation, health)
            self._joined += 1
        elif incarnation < actor.incarnation:
            return None
        actor.incarnation, actor.version = incarnation, version
        self.mark(name, health)
        return actor

    def mark(self, name: str, health: Health) -> None:
        """Note how an actor is."""
        self.actors[name].health = health
        self._offer(name)

    def leave(self, name: str) -> None:
        """Forget an actor that has left."""
        del self.actors[name]

    def lease(self, ordinal: int, name: str) -> None:
        """The actor holds one group more."""
        self.actors[name].holds.add(ordinal)
        self._offer(name)

    def release(self, ordinal: int, name: str) -> None:
        """The actor holds one group less."""
        self.actors[name].holds.discard(ordinal)
        self._offer(name)

    def take_back(self, name: str) -> list[int]:
        """All groups that an actor holds, oldest first; it holds none any more."""
        actor = self.actors[name]
        held, actor.holds = sorted(actor.holds), set()
        self._offer(name)
        return held

    def next(self) -> str | None:
        """The serving actor that holds the fewest groups and has room for another."""
        while self._free:
            held, _, name = self._free[0]
            actor = self.actors.get(name)
            if actor is not None and actor.health is Health.SERVING and len(actor.holds) == held:
                return name if self.capacity is None or held < self.capacity else None
            heapq.heappop(self._free)
        return None

    def serve(self, version: int, loaded: Iterable[str], stale: Iterable[str]) -> None:
        """New weights are out: who has them serves, who has not is stale."""
        for name in loaded:
            if (actor := self.actors.get(name)) is not None:
                actor.version = version
                if actor.health is Health.STALE:
                    self.mark(name, Health.SERVING)
        for name in stale:
            if (actor := self.actors.get(name)) is not None and actor.health is Health.SERVING:
                self.mark(name, Health.STALE)

    def count(self) -> Counter[str]:
        """Actors by health."""
        return Counter(actor.health.value for actor in self.actors.values())

    def _offer(self, name: str) -> None:
        actor = self.actors[name]
        if actor.health is Health.SERVING:
            heapq.heappush(self._free, (len(actor.holds), actor.order, name))
        if len(self._free) > 64 + 8 * len(self.actors):  # most entries are outdated
            self._free = [(len(a.holds), a.order, n) for n, a in self.actors.items() if a.health is Health.SERVING]
            heapq.heapify(self._free)
