"""All actors of a run: requests and groups, weights, many requests over all. An asyncio face; no call waits for ever.

`ActorPool` knows actors by name ("actor-0", ...); who they are, and how one comes and goes, is `actors.roster`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.actor import EngineFailed, Failure, Poll, Stats
from actors.placement import Gone, Handle
from actors.roster import ActorLost, Roster
from actors.routing import Errand
from actors.weights import Broadcast, Interrupted, Refused, Snapshot, Stored
from core.schema import Group, GroupRequest

CALL_SECONDS = 60.0  # for calls that only queue something
GRACE_SECONDS = 30.0  # in which an actor that has a deadline itself still says that it has missed it
LOOK_SECONDS = 0.2  # between two looks at who has fallen silent


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of one publish: actors that serve the version now, and why the others do not (replace those)."""

    version: int
    digest: str
    loaded: tuple[str, ...]
    stale: dict[str, str]
    costs: Mapping[str, float] = field(default_factory=dict)  # by metric: what it took, of the slowest actor


class ActorPool(Roster):
    """
    pool = ActorPool(config, log_dir)                      # Ray must be running; host=ThreadHost() needs no Ray
    await pool.start()                                     # UserError if it cannot be placed or does not start
    published = await pool.publish(snapshot)               # a Snapshot, or one that is Stored already
    await pool.submit("actor-0", requests)                 # ActorLost
    poll = await pool.poll("actor-0")                      # ActorLost
    incarnation = await pool.replace("actor-0")            # serves the last published weights
    name = await pool.join()                               # one more, or None; `pool.names` is who is there
    await pool.leave("actor-0")                            # for good
    async for group in pool.run(requests): ...             # routing, retries and replacement inside
    await pool.close()
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As a Roster: config, log_dir, and optionally host, make and say."""
        super().__init__(*arguments, **options)
        self._weights: Any = None  # what was published last, as actors take it, for late joiners
        self._version = 0  # of it
        self.supply: Callable[[], Awaitable[Stored]] | None = None  # for those that join after a Broadcast
        self._members: dict[str, Handle] = {}  # of the learner's NCCL group
        self._polls = defaultdict[str, asyncio.Lock](asyncio.Lock)  # one poll at a time
        self._inboxes: dict[str, _Inbox] = {}
        self._errands: list[Errand] = []  # the runs in progress
        self._meter = _Meter()

    # One actor -----------------------------------------------------------------------------------------------------

    @property
    def _patience(self) -> float:
        """Seconds for calls that only queue something: an actor that may still come back is not given up for them."""
        return max(CALL_SECONDS, self.config.actors.silence_timeout)

    def suspect(self, name: str) -> None:
        """An actor is silent: until `trust` it gets no weights, and no publish waits for it."""
        if name not in self._lost:
            self._suspects.add(name)

    async def trust(self, name: str) -> int:
        """It has spoken again. It loads the newest weights, whose version this returns. Raises ActorLost."""
        return await self._load_newest(name, lambda: self._suspects.discard(name))

    async def submit(self, name: str, requests: Sequence[GroupRequest]) -> None:
        """Give an actor requests; they enter its engine together. Raises ActorLost."""
        await self._call(name, "submit", list(requests), timeout=self._patience)

    async def abort(self, name: str, ids: Sequence[str]) -> None:
        """Forget these requests; results that were finished already may still arrive. Raises ActorLost."""
        await self._call(name, "abort", list(ids), timeout=self._patience)

    async def poll(self, name: str, timeout: float = 1.0) -> Poll:
        """Finished groups and rejected requests, as soon as there are any or after `timeout` seconds. Raises ActorLost.

        Results of a `run` in progress go to that run, not here.
        """
        async with self._polls[name]:
            if not self._inbox(name).items:
                await self._receive(name, timeout)
            self._check(name)
            if self._seen[name] != self.incarnations[name]:
                raise ActorLost(name, self._seen[name], "it has been replaced")
            inbox = self._inbox(name)
            mail, inbox.items = inbox.items, []
        groups = tuple(item for item in mail if isinstance(item, Group))
        failures = tuple(item for item in mail if isinstance(item, Failure))
        return Poll(groups, failures, self._stats[name], inbox.sequence)

    async def _receive(self, name: str, timeout: float) -> None:
        """Poll once and sort what came: to the errand that asked for it, or into the inbox."""
        inbox, silence = self._inbox(name), self.config.actors.silence_timeout
        poll = await self._call(name, "poll", timeout, inbox.sequence, timeout=timeout + silence)
        if inbox.handle is not self._handles.get(name) or name in self._lost:
            return  # lost meanwhile: what it still says does not count
        inbox.sequence = poll.sequence
        self._note(poll.stats)
        if poll.stats.stalled_seconds > silence:
            self._lose(name, inbox.handle, f"its engine has been in one step for {poll.stats.stalled_seconds:.0f} s")
            return
        for item in (*poll.groups, *poll.failures):
            if not any(errand.deliver(name, item) for errand in self._errands):
                inbox.items.append(item)

    def _inbox(self, name: str) -> _Inbox:
        """Of the present incarnation; that of an older one is forgotten with all that it holds."""
        handle = self._handles.get(name)
        if name not in self._inboxes or self._inboxes[name].handle is not handle:
            self._inboxes[name] = _Inbox(handle)
        return self._inboxes[name]

    # Weights -------------------------------------------------------------------------------------------------------

    async def publish(self, weights: Snapshot | Stored | Broadcast, wait: bool = False) -> Published:
        """Make every actor serve these weights.

        Requests in flight go on under the new version; with `wait` they finish first. An actor that fails, refuses or
        misses `actors.publish_timeout` is stale: it gets no work until `replace`, and the others do not wait for it.
        If no actor is left to serve them, this waits for the first replacement that does.

        A Broadcast is for the members of the NCCL group. Those that it does not reach are stale and yet well: publish
        the same version in another form, which is for all.
        """
        broadcast = isinstance(weights, Broadcast)
        shared = weights if isinstance(weights, Broadcast) else self._host.share(weights)
        async with self._publishing:
            outcomes = await self._load_all(shared, wait)
            published = self._agree(weights, outcomes)
            refused = any(isinstance(outcome, Refused | Interrupted) for outcome in outcomes.values())
            if published.loaded or not refused:
                self._weights, self._version = shared, weights.version
            if (published.loaded or not refused) and not broadcast:
                for name, reason in published.stale.items():
                    if name not in self._suspects:
                        self._lose(name, self._handles.get(name), reason)
        if published.loaded or refused or broadcast:
            return published
        await self._revival()
        return self._agree(weights, {name: self._stats[name] for name in self.well})

    async def _load_all(self, shared: Any, wait: bool) -> dict[str, Stats | BaseException]:
        names = self.well
        if isinstance(shared, Broadcast):
            names = tuple(name for name in names if self._members.get(name) is self._handles[name])
        loads = {name: asyncio.ensure_future(self._load(name, shared, wait)) for name in names}
        while waiting := {name for name, load in loads.items() if not load.done()} - self._suspects:
            some = [loads[name] for name in waiting]
            await asyncio.wait(some, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for load in loads.values():
            load.cancel()  # of those that fell silent while they loaded
        outcomes = await asyncio.gather(*loads.values(), return_exceptions=True)
        return dict(zip(loads, outcomes, strict=True))

    def _agree(self, weights: Snapshot | Stored | Broadcast, outcomes: dict[str, Stats | BaseException]) -> Published:
        """Who serves the version. The digest of a Broadcast is known by those who have it: the most common one."""
        serving = {n: (o.version, o.digest) for n, o in outcomes.items() if isinstance(o, Stats)}
        if isinstance(weights, Broadcast):
            digests = Counter(digest for version, digest in serving.values() if version == weights.version)
            digest = max(digests, key=digests.__getitem__, default="")
        else:
            digest = weights.digest
        loaded = tuple(n for n in outcomes if serving.get(n) == (weights.version, digest) and n in self.names)
        others = {n: f"it serves version {serving[n][0]}" if n in serving else str(o) for n, o in outcomes.items()}
        outside = dict.fromkeys(self.well, "it is not in the NCCL group")
        silent = dict.fromkeys(self._suspects, "it is silent")
        reasons = {**outside, **others, **self._lost, **silent}
        stale = {n: reason for n, reason in reasons.items() if n in self.names and n not in loaded}
        fresh = [o for n, o in outcomes.items() if n in loaded and isinstance(o, Stats)]
        costs = {
            "weights/prepare_seconds": max((stats.prepare_seconds for stats in fresh), default=math.nan),
            "weights/stall_seconds": max((stats.stall_seconds for stats in fresh), default=math.nan),
        }
        return Published(weights.version, digest, loaded, stale, costs)

    async def _revival(self) -> None:
        """Until one actor is well again, or no replacement has succeeded and nobody may come back by itself."""
        tried, heard = dict[str, asyncio.Task[None]](), dict[str, asyncio.Task[None]]()
        while not self.well:
            tried = {name: self._renewal(name) for name in self._lost if name not in tried} | tried
            unheard = [name for name in self._suspects if name not in heard or heard[name].done()]
            heard |= {name: asyncio.create_task(self._hear(name)) for name in unheard}
            if not self._suspects and all(renewal.done() for renewal in tried.values()):
                break
            await asyncio.sleep(LOOK_SECONDS)
        for hearing in heard.values():
            hearing.cancel()
        for renewal in tried.values():
            if renewal.done():
                renewal.exception()  # says nothing new: its actor is still lost

    async def _hear(self, name: str) -> None:
        """Trust a silent actor when it speaks, lose it when it does not: who polls it may be waiting for a publish."""
        with suppress(ActorLost):
            await self._call(name, "status", timeout=self.config.actors.silence_timeout)
            await self.trust(name)

    async def _load(self, name: str, shared: Any, wait: bool = False) -> Stats:
        """Have one actor load weights. Raises ActorLost, weights.Refused or weights.Interrupted."""
        seconds, handle = self.config.actors.publish_timeout, self._handles[name]
        incarnation, joins = self.incarnations[name], name in self._lost
        if isinstance(shared, Broadcast):
            seconds = shared.seconds + GRACE_SECONDS
        try:
            stats = await handle.call("publish", shared, wait, timeout=seconds)
        except (Gone, EngineFailed, TimeoutError) as error:
            reason = f"no new weights in {seconds:g} s" if isinstance(error, TimeoutError) else str(error)
            self._lose(name, handle, reason)
            raise ActorLost(name, incarnation, reason) from None
        if self._handles.get(name) is not handle or (name in self._lost and not joins):
            raise ActorLost(name, incarnation, self._lost.get(name, "it has been replaced"))
        self._note(stats)
        return stats

    async def _catch_up(self, name: str) -> None:
        """A new incarnation takes the newest weights, if there were any; from then on it counts as well."""
        try:
            await self._load_newest(name, lambda: self._admit(name))
        except BaseException as error:
            self._handles[name].kill()
            if isinstance(error, Refused):
                raise ActorLost(name, self.incarnations[name], f"it joined late and got no weights: {error}") from None
            raise

    async def _load_newest(self, name: str, then: Callable[[], object]) -> int:
        """Have one actor load the newest weights, if there were any, and do `then` before newer ones can come."""
        loaded = None
        while True:
            shared, version = await self._newest()
            if loaded is None and shared is not None:
                await self._load(name, shared)  # a publish need not wait for an actor that may hang in its first load
                loaded = version
            async with self._publishing:
                if version < self._version:
                    continue  # a newer version was published meanwhile
                if shared is not None and loaded != version:
                    await self._load(name, shared)
                then()
                return version

    async def _newest(self) -> tuple[Any, int]:
        """Weights for a late joiner, and their version. After a Broadcast the learner is asked: the bytes went by.

        It may be in the middle of a step and take its time; then the weights are those after that step.
        """
        if not isinstance(self._weights, Broadcast):
            return self._weights, self._version
        if self.supply is None:
            raise RuntimeError("an actor joins after a Broadcast, and `supply` provides no weights")
        stored = await self.supply()
        return self._host.share(stored), stored.version

    @property
    def connected(self) -> bool:
        """Whether the NCCL group consists of exactly the actors that are well."""
        return bool(self._members) and self._members == {name: self._handles[name] for name in self.well}

    def disconnect(self) -> None:
        """The NCCL group is of no use any more: `connect` before the next Broadcast."""
        self._members = {}

    def group_size(self, names: Sequence[str]) -> int:
        """Members of an NCCL group: learner rank 0 and every worker of the engines of these actors."""
        return 1 + len(names) * self.config.actors.tensor_parallel

    async def connect(self, names: Sequence[str], address: str, port: int, seconds: float) -> str:
        """Form the NCCL group of these actors and learner rank 0, which builds its NcclSender at the same time.

        Returns "", or why there is no group. An actor that did not meet the others is as well as before.
        """
        parallel, size = self.config.actors.tensor_parallel, self.group_size(names)
        members = {name: self._handles[name] for name in names}
        joins = (
            self._call(name, "connect", address, port, 1 + i * parallel, size, seconds, timeout=seconds + GRACE_SECONDS)
            for i, name in enumerate(names)
        )
        outcomes = await asyncio.gather(*joins, return_exceptions=True)
        problems = [f"{n}: {brief(o)}" for n, o in zip(names, outcomes, strict=True) if isinstance(o, BaseException)]
        self._members = {} if problems else members
        return "; ".join(problems)

    # All actors ----------------------------------------------------------------------------------------------------

    async def run(self, requests: Iterable[GroupRequest]) -> AsyncIterator[Group]:
        """Groups as they finish. Lost actors are replaced and their requests given to others, `rollout.max_attempts`
        times at most. Raises UserError for a request that no engine can serve, RuntimeError for one that kills them."""
        errand = Errand(requests, self.config.rollout.max_attempts)
        self._errands.append(errand)
        for name in self.names:
            errand.staff(name, self._serve(name, errand))
        try:
            async for group in errand.results():
                yield group
        finally:
            self._errands.remove(errand)
            await errand.dismiss()
            forget = (self.abort(name, held) for name in self.names if (held := errand.given_to(name)))
            await asyncio.gather(*forget, return_exceptions=True)  # of an actor that is lost it is forgotten anyway

    async def join(self) -> str | None:
        """See Roster.join. The new one takes part in the runs in progress."""
        name = await super().join()
        if name is not None:
            for errand in self._errands:
                errand.staff(name, self._serve(name, errand))
        return name

    async def _serve(self, name: str, errand: Errand) -> None:
        """Keep one actor busy with an errand until nothing is left of it, or the actor leaves."""
        while not errand.finished and name in self.names:
            try:
                incarnation = self.incarnations[name]
                requests = errand.take(name, incarnation, 2 * self.config.actors.max_num_seqs, len(self.names))
                if requests:
                    await self.submit(name, requests)
                async with self._polls[name]:
                    await self._receive(name, 0.2)
            except ActorLost:
                errand.give_back(name, lost=name in self.names)
                try:
                    await self._renew(name)
                except ActorLost:
                    if name in self.names:
                        raise
        errand.give_back(name, lost=False)

    def processes(self) -> dict[str, tuple[int, str, Path]]:
        """(pid, host, log) of every actor's process."""
        return {
            name: (stats.pid, stats.host, self.log_dir / f"{name}.{stats.incarnation}.log")
            for name, stats in self._stats.items()
        }

    def metrics(self) -> dict[str, float]:
        """Since the last call: rollout/tokens_per_second of all actors; rollout/busy, their share of time in steps."""
        return self._meter.read(len(self.names))

    def _note(self, stats: Stats) -> None:
        if stats.incarnation == self.incarnations.get(stats.actor):
            self._meter.note(self._stats.get(stats.actor), stats)
            self._stats[stats.actor] = stats


@dataclass
class _Inbox:
    """What one incarnation has said to somebody else than who polled."""

    handle: Handle | None
    sequence: int = 0  # of the last poll
    items: list[Group | Failure] = field(default_factory=list)


class _Meter:
    """Tokens and busy seconds of all actors and incarnations, between two readings."""

    def __init__(self) -> None:
        self._tokens, self._busy, self._since = 0, 0.0, time.monotonic()

    def note(self, before: Stats | None, now: Stats) -> None:
        if before is None or before.incarnation != now.incarnation:
            before = replace(now, tokens=0, busy_seconds=0.0)
        self._tokens += now.tokens - before.tokens
        self._busy += now.busy_seconds - before.busy_seconds

    def read(self, actors: int) -> dict[str, float]:
        seconds = max(time.monotonic() - self._since, 1e-9)
        metrics = {
            "rollout/tokens_per_second": self._tokens / seconds,
            "rollout/busy": self._busy / seconds / actors,
        }
        self._tokens, self._busy, self._since = 0, 0.0, time.monotonic()
        return metrics


def brief(reason: object) -> str:
    """The last line of a reason, where a traceback says what went wrong."""
    return str(reason).strip().rpartition("\n")[2]
