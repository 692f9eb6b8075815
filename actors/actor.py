"""One rollout actor: one engine on a thread of its own, which steps whenever there is something to do.

Everything that touches the engine runs on that thread between two steps, in the order in which it was asked for: a
batch of requests enters as a whole, and weights change while requests in flight wait for one moment.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from actors.engine import Engine, EngineSpec, Rejected
from actors.weights import Broadcast, Interrupted, Refused, Snapshot
from core.schema import Group, GroupRequest


class EngineFailed(Exception):
    """The engine of this actor died or never started; the message holds its traceback. Replace the actor."""


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
    stalled_seconds: float  # since the engine thread last finished a step it had to do; 0 while idle or loading weights
    max_rss_gib: float
    host: str
    pid: int
    prepare_seconds: float  # of the last publish, during which the engine went on
    stall_seconds: float  # of the last publish, during which it stood still


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


@dataclass(frozen=True, slots=True)
class _Job:
    """Something to do with the engine between two steps; `when_idle` waits until nothing is in flight."""

    work: Callable[[Engine], Any]
    result: Future[Any]
    when_idle: bool = False


class RolloutActor:
    """A plain class; `actors.placement` puts it into a Ray process or leaves it in this one.

    Its methods may be called from any thread. Once the engine has failed, each of them raises EngineFailed.
    """

    def __init__(self, name: str, incarnation: int, spec: EngineSpec, make: Callable[[EngineSpec], Engine]) -> None:
        """Returns at once; `ready` waits until the engine that `make` builds can serve."""
        self.name, self.incarnation, self.spec = name, incarnation, spec
        self._changed = threading.Condition()  # guards all that follows
        self._jobs: deque[_Job] = deque()
        self._results: list[Group | Failure] = []
        self._confirmed = 0  # results that have been handed over for good; _results[0] is number _confirmed
        self._closing = self._started = False
        self._failure = ""
        self._state = (0, "", 0, 0, 0)  # version, digest, running, waiting, tokens: written by the engine thread
        self._busy_seconds, self._waiting_since = 0.0, None  # type: float, float | None
        self._engine: Engine | None = None
        self._publishing = threading.Lock()  # one change of weights at a time, in the order of asking
        self._prepare_seconds = self._stall_seconds = 0.0
        self._thread = threading.Thread(target=self._live, args=(make,), name=f"{name}.{incarnation}", daemon=True)
        self._thread.start()

    # Called from outside -------------------------------------------------------------------------------------------

    def ready(self, timeout: float) -> Stats:
        """Wait until the engine serves. Raises TimeoutError or EngineFailed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._started or self._failure, timeout):
                raise TimeoutError(f"{self.name} did not serve within {timeout:g} s")
        return self.status()

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Queue requests; all of them enter the engine before its next step, so a batch is reproducible.

        A request that the engine rejects comes back as a Failure with a later poll.
        """
        self._ask(lambda engine: self._add(engine, requests))

    def poll(self, timeout: float, sequence: int = 0) -> Poll:
        """Wait up to `timeout` seconds for results. `sequence` is the last Poll's: what came with it is dropped."""
        with self._changed:
            arrived = sequence - self._confirmed
            if arrived > 0:
                del self._results[:arrived]
                self._confirmed = sequence
            self._changed.wait_for(lambda: self._results or self._failure, timeout)
            results = list(self._results)
            sequence = self._confirmed + len(results)
        stats = self.status()
        groups = tuple(r for r in results if isinstance(r, Group))
        return Poll(groups, tuple(r for r in results if isinstance(r, Failure)), stats, sequence)

    def publish(self, weights: Snapshot | Broadcast, wait: bool = False) -> Stats:
        """Serve these weights; their version and digest in the Stats.

        They are prepared on the caller's thread while the engine goes on, and take their place between two steps.
        Requests in flight stay, and their later tokens carry the new version; with `wait` they are finished first.
        Raises weights.Refused (the old version serves on), weights.Interrupted (nothing is sampled until whole weights
        are published) or EngineFailed.
        """
        with self._publishing:
            started = time.monotonic()
            ready = self._running().prepare(weights)
            self._prepare_seconds = time.monotonic() - started
            self._ask(lambda engine: self._update(engine, ready), when_idle=wait).result()
        return self.status()

    def connect(self, address: str, port: int, rank: int, world_size: int, seconds: float) -> None:
        """See Engine.connect."""
        self._ask(lambda engine: engine.connect(address, port, rank, world_size, seconds)).result()

    def abort(self, ids: Sequence[str]) -> None:
        """Forget these requests. Results that were finished already may still arrive."""
        self._ask(lambda engine: engine.abort(ids))

    def status(self) -> Stats:
        """How it is. Raises EngineFailed."""
        with self._changed:
            if self._failure:
                raise EngineFailed(f"the engine of {self.name} failed: {self._failure}")
            since = self._waiting_since
            return Stats(
                self.name,
                self.incarnation,
                *self._state,
                busy_seconds=self._busy_seconds,
                stalled_seconds=0.0 if since is None else time.monotonic() - since,
                max_rss_gib=_max_rss_gib(),
                host=socket.gethostname(),
                pid=os.getpid(),
                prepare_seconds=self._prepare_seconds,
                stall_seconds=self._stall_seconds,
            )

    def close(self, timeout: float = 10.0) -> None:
        """Stop the engine after its current step and free it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _running(self) -> Engine:
        """The engine, once it serves. Raises EngineFailed."""
        with self._changed:
            self._changed.wait_for(lambda: self._engine is not None or self._failure)
        self.status()
        return self._engine  # type: ignore[return-value]

    def _ask(self, work: Callable[[Engine], Any], when_idle: bool = False) -> Future[Any]:
        self.status()  # raises if the engine has failed
        job = _Job(work, Future(), when_idle)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        return job.result

    # On the engine thread ------------------------------------------------------------------------------------------

    def _live(self, make: Callable[[EngineSpec], Engine]) -> None:
        engine = None
        try:
            engine = self._engine = make(self.spec)
            self._note(engine, started=True)
            while self._wait_for_work(engine):
                self._do_jobs(engine)
                self._step(engine)
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        else:
            self._fail("it was closed")
        finally:
            if engine is not None:
                engine.close()

    def _wait_for_work(self, engine: Engine) -> bool:
        """False when the actor is to close."""
        with self._changed:
            busy = _can_step(engine)
            if not busy:
                self._waiting_since = None
            self._changed.wait_for(lambda: busy or self._jobs or self._closing)
            self._waiting_since = time.monotonic() if busy else None
            return not self._closing

    def _do_jobs(self, engine: Engine) -> None:
        while (job := self._next_job(engine)) is not None:
            self._waiting_since = None  # who asked keeps the time
            try:
                job.result.set_result(job.work(engine))
            except (Refused, Interrupted) as error:
                job.result.set_exception(error)
            except BaseException as error:
                job.result.set_exception(EngineFailed(f"the engine of {self.name} failed: {error!r}"))
                raise
            finally:
                self._note(engine)

    def _next_job(self, engine: Engine) -> _Job | None:
        with self._changed:
            if not self._jobs or (self._jobs[0].when_idle and _can_step(engine)):
                return None  # later jobs wait too: order is kept
            return self._jobs.popleft()

    def _step(self, engine: Engine) -> None:
        if not _can_step(engine):
            return
        start = self._waiting_since = time.monotonic()
        groups = engine.step()
        self._note(engine, [replace(group, actor=self.name) for group in groups], time.monotonic() - start)

    def _update(self, engine: Engine, ready: Any) -> None:
        started = time.monotonic()
        engine.update_weights(ready)
        self._stall_seconds = time.monotonic() - started

    def _add(self, engine: Engine, requests: Sequence[GroupRequest]) -> None:
        failures = []
        for request in requests:
            try:
                engine.add(request)
            except Rejected as error:
                failures.append(Failure(request.id, request.attempt, str(error)))
        self._note(engine, failures)

    def _note(
        self, engine: Engine, results: Sequence[Group | Failure] = (), busy: float = 0.0, started: bool = False
    ) -> None:
        with self._changed:
            self._state = (engine.version, engine.digest, *engine.unfinished(), engine.generated())
            self._busy_seconds += busy
            self._started |= started
            self._results.extend(results)
            if results or started:
                self._changed.notify_all()

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            jobs, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        for job in jobs:
            job.result.set_exception(EngineFailed(f"the engine of {self.name} failed: {reason}"))


def _can_step(engine: Engine) -> bool:
    """Something is in flight, and the weights are whole."""
    return engine.version >= 0 and sum(engine.unfinished()) > 0


def _max_rss_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB here
