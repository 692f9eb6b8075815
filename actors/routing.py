"""Many requests over all actors, each taking more when it has room: the book-keeping of one `ActorPool.run`."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

from actors.actor import Failure
from core.errors import UserError
from core.schema import Group, GroupRequest


class Errand:
    """Requests on their way to groups. A request is pending, given to one incarnation of one actor, or finished."""

    def __init__(self, requests: Iterable[GroupRequest], max_attempts: int) -> None:
        self._pending = deque(requests)
        self._left, self._max_attempts = len(self._pending), max_attempts
        self.finished = not self._left  # nothing is left to do
        self._given: dict[str, dict[str, GroupRequest]] = {}  # actor -> id -> request
        self._incarnations: dict[str, int] = {}
        self._results: asyncio.Queue[Group | Exception] = asyncio.Queue()
        ids = {request.id for request in self._pending}
        if len(ids) != self._left:
            raise ValueError(f"{self._left} requests have only {len(ids)} different ids")

    def given_to(self, actor: str) -> list[str]:
        """Ids that this actor holds."""
        return list(self._given.get(actor, ()))

    def take(self, actor: str, incarnation: int, room: int, actors: int) -> list[GroupRequest]:
        """More work for an actor: up to `room` samples at once, and no more than its fair share of all that is left.

        What an older incarnation of it held is given back first: that one is gone.
        """
        if self._incarnations.setdefault(actor, incarnation) != incarnation:
            self.give_back(actor)
            self._incarnations[actor] = incarnation
        held = self._given.setdefault(actor, {})
        samples = sum(len(request.seeds) for request in held.values())
        taken = []
        while self._pending and len(held) < math.ceil(self._left / actors) and samples < room:
            request = self._pending.popleft()
            held[request.id] = request
            samples += len(request.seeds)
            taken.append(request)
        return taken

    def give_back(self, actor: str) -> None:
        """The actor was lost: its requests wait again, first in the queue, with one more attempt behind them."""
        for request in reversed(list(self._given.pop(actor, {}).values())):
            attempt = request.attempt + 1
            if attempt >= self._max_attempts:
                reason = f"request {request.id} was lost with its actor {attempt} times (rollout.max_attempts)"
                self._results.put_nowait(RuntimeError(f"{reason}; see the actors' logs for why they died"))
            self._pending.appendleft(replace(request, attempt=attempt))

    def deliver(self, actor: str, result: Group | Failure) -> bool:
        """Take a result that answers this errand; False if it is somebody else's."""
        held = self._given.get(actor, {})
        if result.id not in held or held[result.id].attempt != result.attempt:
            return False
        del held[result.id]
        self._left -= 1
        self.finished = not self._left
        self._results.put_nowait(result if isinstance(result, Group) else UserError(result.reason))
        return True

    async def results(self, workers: list[asyncio.Task[None]]) -> AsyncIterator[Group]:
        """Groups in the order of finishing. Raises what made a request or one of the `workers` fail."""
        for worker in workers:
            worker.add_done_callback(self._watch)
        for _ in range(self._left):
            result = await self._results.get()
            if isinstance(result, Exception):
                raise result
            yield result

    def _watch(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()) is not None:
            self._results.put_nowait(error if isinstance(error, Exception) else RuntimeError(repr(error)))
