"""Who the actors of a pool are: placed and started, replaced when they are lost, more of them and fewer.

A lost actor keeps its name and gets the next incarnation number. One that joins has a name that none had before, one
that leaves takes its name with it. What actors do, and with which weights, is `actors.pool`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.actor import EngineFailed, Stats
from actors.engine import Engine, EngineSpec
from actors.placement import Gone, Handle, Host, Make, RayHost
from core.config import RunConfig
from core.errors import UserError

PAUSE_SECONDS = 1.0  # before a replacement that failed is tried again, growing with every failure
LONGEST_PAUSE = 5  # times PAUSE_SECONDS between two looks for a place: one that comes up is not left empty for long


class ActorLost(Exception):
    """This incarnation of an actor is gone or presumed dead; nothing it still sends counts."""

    def __init__(self, name: str, incarnation: int, reason: str) -> None:
        super().__init__(f"{name} (incarnation {incarnation}) was lost: {reason}")
        self.name, self.incarnation, self.reason = name, incarnation, reason


class Roster:
    """Actors by name. `actors.pool.ActorPool` is the one roster there is."""

    def __init__(
        self,
        config: RunConfig,
        log_dir: Path,
        *,
        host: Host | None = None,
        make: Make | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`host` is where actors live (Ray), `make` builds an engine from an EngineSpec (vLLM)."""
        self.config, self.log_dir, self.say = config, Path(log_dir), say
        self.names = tuple(f"actor-{i}" for i in range(config.actors.count))  # of all that have joined and not left
        self.incarnations = dict.fromkeys(self.names, 0)  # of these, and of one that is about to join
        self.waiting_for_place: dict[str, str] = {}  # lost actors for which there is no room yet, and why not
        self._host, self._make = host or RayHost(), make or _vllm
        self._spec: EngineSpec | None = None
        self._handles: dict[str, Handle] = {}
        self._stats: dict[str, Stats] = {}
        self._lost: dict[str, str] = {}  # name -> why its current incarnation must be replaced
        self._left: dict[str, int] = {}  # the last incarnation of those that have left
        self._suspects: set[str] = set()  # silent for a while: nobody waits for them
        self._seen = dict.fromkeys(self.names, 0)  # the incarnation that the caller of `poll` knows of
        self._renewals: dict[str, asyncio.Task[None]] = {}  # replacements on their way
        self._publishing = asyncio.Lock()  # nobody comes or goes while new weights go out
        self._joining = asyncio.Lock()  # one looks for a place at a time
        self._next = config.actors.count  # number of the next one that joins
        self._closed = False

    @property
    def spec(self) -> EngineSpec:
        """What every engine is like; known once the pool has started."""
        if self._spec is None:
            raise RuntimeError("the pool has not been started")
        return self._spec

    @property
    def well(self) -> tuple[str, ...]:
        """Actors that are neither lost nor suspected nor being replaced."""
        gone = self._lost.keys() | self._suspects
        return tuple(name for name in self.names if name in self._handles and name not in gone)

    @property
    def suspects(self) -> frozenset[str]:
        """Actors that are silent; see `ActorPool.suspect`."""
        return frozenset(self._suspects)

    def present(self) -> dict[str, int]:
        """The incarnations of those that are well, for a new caller of `poll`; it has the others replaced."""
        self._seen |= {name: self.incarnations[name] for name in self.well}
        return {name: self.incarnations[name] for name in self.well}

    async def start(self) -> None:
        """Place and start all actors in parallel. Raises UserError that says what did not start and why."""
        self._spec = EngineSpec.of(self.config, await self._host.place(self.config, self.names))
        outcomes = await asyncio.gather(*(self._launch(name) for name in self.names), return_exceptions=True)
        failures = {n: o for n, o in zip(self.names, outcomes, strict=True) if isinstance(o, BaseException)}
        if failures:
            await self.close()
            first, *others = failures
            also = f"\nalso not started: {', '.join(others)} (logs in {self.log_dir})" if others else ""
            raise UserError(f"{first}: {getattr(failures[first], 'reason', failures[first])}{also}")

    async def _launch(self, name: str) -> None:
        """Start the incarnation that `incarnations` says in the place that the actor has. Raises ActorLost."""
        incarnation, seconds = self.incarnations[name], self.config.actors.start_timeout
        log = self.log_dir / f"{name}.{incarnation}.log"
        handle = self._host.start(name, incarnation, self.spec, self._make, log)
        try:
            stats = await handle.call("ready", seconds, timeout=seconds)
        except asyncio.CancelledError:
            handle.kill()
            raise
        except Exception as error:
            handle.kill()
            reason = f"no sign of life for {seconds:g} s" if isinstance(error, TimeoutError) else str(error)
            raise ActorLost(name, incarnation, f"it did not start: {reason}{_tail(log)}") from None
        self._handles[name], self._stats[name] = handle, stats

    async def _catch_up(self, name: str) -> None:
        """Have an incarnation load the newest weights, and `_admit` it before newer ones can come. Raises ActorLost."""
        raise NotImplementedError

    def _admit(self, name: str) -> None:
        """From now on it counts as well."""
        self._lost.pop(name, None)
        if name not in self.names:
            self.names += (name,)

    # Lost and replaced ---------------------------------------------------------------------------------------------

    def _check(self, name: str) -> None:
        """Raises ActorLost for an actor that is lost or has left."""
        if name in self._left:
            raise ActorLost(name, self._left[name], "it has left")
        if name in self._lost:
            raise ActorLost(name, self.incarnations[name], self._lost[name])

    async def _call(self, name: str, method: str, *arguments: Any, timeout: float) -> Any:
        self._check(name)
        handle, incarnation = self._handles[name], self.incarnations[name]
        try:
            return await handle.call(method, *arguments, timeout=timeout)
        except (Gone, EngineFailed, TimeoutError) as error:
            silent = isinstance(error, TimeoutError)
            reason = f"no answer to {method} in {timeout:g} s" if silent else str(error)
            self._lose(name, handle, reason)
            raise ActorLost(name, incarnation, reason) from None

    def _lose(self, name: str, handle: Handle | None, reason: str) -> None:
        if handle is None or self._handles.get(name) is not handle or name in self._lost:
            return
        if name not in self._left:
            self._lost[name] = reason
            self._suspects.discard(name)
        handle.kill()  # a presumed dead actor must not come back

    async def replace(self, name: str) -> int:
        """A new incarnation in place of a lost or stale one, serving the last published weights; its number.

        Does nothing if the actor is well: a `run` in progress has replaced it. An actor whose place is gone, with its
        machine, waits for another one; `waiting_for_place` says so. Raises ActorLost if the actor leaves meanwhile,
        or if no other actor is well and `rollout.max_attempts` new ones have failed, or no place has come in
        `cluster.start_timeout`.
        """
        await self._renew(name)
        self._seen[name] = self.incarnations[name]
        return self._seen[name]

    async def _renew(self, name: str) -> None:
        """Wait for the one replacement of a lost actor, which goes on even if a caller gives up (a `run` that ends)."""
        if name in self._lost and name not in self._left:
            await asyncio.shield(self._renewal(name))
        if name in self._left:
            self._check(name)

    def _renewal(self, name: str) -> asyncio.Task[None]:
        def ended(task: asyncio.Task[None]) -> None:
            del self._renewals[name]
            task.cancelled() or task.exception()  # nobody may be waiting for it any more

        if name not in self._renewals:
            self._renewals[name] = asyncio.create_task(self._relaunch(name))
            self._renewals[name].add_done_callback(ended)
        return self._renewals[name]

    async def _relaunch(self, name: str) -> None:
        """Incarnation after incarnation until one serves: what ails one place must not end a run that others serve."""
        try:
            for attempt in itertools.count(1):
                await self._find_place(name)
                self.incarnations[name] += 1
                try:
                    await self._launch(name)
                    return await self._catch_up(name)
                except ActorLost as lost:
                    self._lost[name] = lost.reason
                    if attempt >= self.config.rollout.max_attempts and not self.well:
                        raise
                    pause = PAUSE_SECONDS * min(attempt, 60)
                    self.say(f"{lost}; a new one is started in {pause:g} s")
                await asyncio.sleep(pause)
        except asyncio.CancelledError:  # by `leave` or `close`: whoever waits for it is not to be cancelled too
            reason = "it is not replaced, for it leaves or the pool closes"
            raise ActorLost(name, self.incarnations[name], reason) from None

    async def _find_place(self, name: str) -> None:
        """Until the host has a place for a lost actor. Raises ActorLost when that may never be: see `replace`."""
        patience, since, says = self.config.cluster.start_timeout, time.monotonic(), 0
        try:
            for attempt in itertools.count(1):
                problem = await self._host.seat(name)
                waited = time.monotonic() - since
                if not problem:
                    break
                self.waiting_for_place[name] = problem
                if waited > patience and not self._others_may_serve():
                    reason = f"no place for it in {patience:g} s (cluster.start_timeout), and no other actor is well"
                    raise ActorLost(name, self.incarnations[name], f"{reason}: {problem}")
                if waited >= says * patience:  # at once, and then ever so often
                    says += 1
                    self.say(f"{name} waits for a place ({waited:.0f} s by now): {problem}")
                await asyncio.sleep(PAUSE_SECONDS * min(attempt, LONGEST_PAUSE))
        finally:
            self.waiting_for_place.pop(name, None)
        if says:
            self.say(f"{name} has a place again, after {waited:.0f} s")

    def _others_may_serve(self) -> bool:
        """Somebody is well, may become so by itself, or has a place and is being started."""
        return bool(self.well or self._suspects or self._renewals.keys() - self.waiting_for_place.keys())

    # More and fewer ------------------------------------------------------------------------------------------------

    async def join(self) -> str | None:
        """One more actor, which serves the newest weights; its name, or None.

        None when there are `actors.max_count` already (none: `actors.count`), when the host has no room, which takes
        seconds, or a lost actor waits for it, or when the new one did not come to serve (this is said).
        """
        name = await self._newcomer()
        if name is None:
            return None
        try:
            await self._launch(name)
            if self._closed:
                raise ActorLost(name, 0, "the pool has closed")
            await self._catch_up(name)
        except BaseException as error:
            self._forget(name)
            if not isinstance(error, ActorLost):
                raise
            self.say(f"{name} could not join: {error.reason}")
            return None
        return name

    async def _newcomer(self) -> str | None:
        """The name of an actor that has got a place and nothing more yet."""
        actors = self.config.actors
        async with self._joining:
            name = f"actor-{self._next}"
            if self._closed or len(self.incarnations) >= (actors.max_count or actors.count) or self.waiting_for_place:
                return None
            if await self._host.seat(name):
                return None
            self._next += 1
            self.incarnations[name] = self._seen[name] = 0
        return name

    async def leave(self, name: str) -> None:
        """An actor goes for good, with what it holds; its place is given back. Nothing if it has left already.

        It gets no work from now on, and ends when a publish under way is over. Raises UserError for the last one.
        """
        if name not in self.names:
            return
        if self.names == (name,):
            raise UserError(f"{name} cannot leave: it is the only actor, and nobody else would sample; stop the run")
        self.names = tuple(each for each in self.names if each != name)
        async with self._publishing:  # the others of a broadcast would wait for it
            self._left[name] = self.incarnations[name]
            if renewal := self._renewals.get(name):
                renewal.cancel()
                await asyncio.gather(renewal, return_exceptions=True)
        if name in self._handles and name not in self._lost:
            with suppress(Exception):  # it is killed in any case
                await self._handles[name].call("close", 5.0, timeout=10.0)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """No trace is left of an actor but its log, and its number where it has left."""
        if (handle := self._handles.pop(name, None)) is not None:
            handle.kill()
        for table in (self.incarnations, self._seen, self._stats, self._lost):
            table.pop(name, None)
        self._suspects.discard(name)
        self._host.vacate(name)

    async def close(self) -> None:
        """End all actors and give their places back; no process stays behind. May be called twice."""
        async with self._joining:
            self._closed = True
        renewals = list(self._renewals.values())
        for renewal in renewals:
            renewal.cancel()
        await asyncio.gather(*renewals, return_exceptions=True)
        handles, self._handles = self._handles, {}
        closing = (handle.call("close", 5.0, timeout=10.0) for handle in handles.values())
        await asyncio.gather(*closing, return_exceptions=True)  # what does not close is killed
        for handle in handles.values():
            handle.kill()
        await self._host.close(list(self._stats.values()))


def _vllm(spec: EngineSpec) -> Engine:
    from actors.vllm_engine import make

    return make(spec)


def _tail(log: Path, lines: int = 12) -> str:
    """The end of a log for an error message; nothing if it lies on another machine."""
    with suppress(OSError):
        last = log.read_text(errors="replace").strip().splitlines()[-lines:]
        if last:
            return f"\nlast lines of {log}:\n  " + "\n  ".join(last)
    return ""
