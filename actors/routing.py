"""Many requests over all actors, each taking more when it has room: the book-keeping of one `ActorPool.run`."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import replace
from typing import Any

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
        self._crew: dict[str, asyncio.Task[None]] = {}
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

    def give_back(self, actor: str, lost: bool = True) -> None:
        """An actor's requests wait again, first in the queue; if it was lost, with one more attempt behind them."""
        for request in reversed(list(self._given.pop(actor, {}).values())):
            attempt = request.attempt + lost
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

    def staff(self, actor: str, work: Coroutine[Any, Any, None]) -> None:
        """`work` keeps an actor busy with this errand; what it raises ends the errand."""
        if actor in self._crew and not self._crew[actor].done():
            work.close()
            return
        self._crew[actor] = asyncio.create_task(work)
        self._crew[actor].add_done_callback(self._watch)

    async def results(self) -> AsyncIterator[Group]:
        """Groups in the order of finishing. Raises what made a request or one of the crew fail."""
        for _ in range(self._left):
            result = await self._results.get()
            if isinstance(result, Exception):
                raise result
            yield result

    async def dismiss(self) -> None:
        """Nobody works on it any more."""
        self.finished = True  # a cancelled wait may swallow the cancellation, so the crew also looks here
        for task in self._crew.values():
            task.cancel()
        await asyncio.gather(*self._crew.values(), return_exceptions=True)

    def _watch(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._results.put_nowait(error if isinstance(error, Exception) else RuntimeError(repr(error)))
