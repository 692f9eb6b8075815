"""A world of virtual actors, scorers and a learner around the real coordinator, under a virtual clock.

    events of the world (a heap) --> Coordinator.step --> actions --> more events

Nothing here decides anything about groups. The same seed gives the same run.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import math
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from alignlab import events as e
from alignlab.coordinator import Coordinator
from alignlab.virtual_actor import Job, Switch, VirtualActor
from alignlab.workload import Wave, Workload

TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step: when its version was served, its tokens, those too old to count, all of them by age in versions."""

    time: float
    tokens: int
    masked: int
    ages: Counter[int]


@dataclass
class World:
    """See the module's docstring. `max_token_age`: tokens older than that are masked; None masks none.

    now: seconds of the virtual clock. wall: the same, longer where processes share cores. heard: is given every record
    and its time, as a ledger would be.
    """

    coordinator: Coordinator
    workload: Workload
    seed: int = 0
    max_token_age: int | None = None
    heard: Callable[[e.Record, float], None] | None = None
    now: float = 0.0
    wall: float = 0.0
    actors: dict[str, VirtualActor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    finished: bool = False
    aborted: str = ""
    records: int = 0  # lines of the ledger
    handling: array[float] = field(default_factory=lambda: array("d"))  # real seconds in Coordinator.step, each event
    learning: float = 0.0  # seconds in which the learner was at work
    lost_tokens: int = 0  # sampled of groups that their actor did not finish
    losses: int = 0  # actors
    recoveries: list[float] = field(default_factory=list)  # seconds from a loss to the end of its last group
    tallies: list[dict[str, int]] = field(default_factory=list)  # groups by state, once a second
    alive: float = 0.0  # seconds of all actors together, up to now
    busy: float = 0.0
    decoded: float = 0.0
    _events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _switches: list[Switch] = field(default_factory=list)
    _tokens: dict[int, dict[int, int]] = field(default_factory=dict)  # of finished groups: version -> tokens
    _scorers: list[float] = field(default_factory=list)  # when each is free
    _missing: dict[int, list[_Loss]] = field(default_factory=dict)  # groups of lost actors, not done yet
    _gone: set[str] = field(default_factory=set)  # will not be replaced
    _joined: int = 0
    _work: int = 0  # processes at work, actors apart

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._scorers = [0.0] * self.workload.scorers

    def run(self, actors: int, seconds: float = math.inf) -> World:
        """Start so many actors; go on until the coordinator has finished, or for so many seconds."""
        for _ in range(actors):
            self._join()
        for count, at in self.workload.joins:
            self._at(at, self._join_many, count)
        for wave in self.workload.waves:
            self._at(wave.at, self._wave, wave)
        self._at(TICK_SECONDS, self._tick)
        with _no_garbage():
            while self._events and not (self.finished or self.aborted) and self._events[0][0] <= seconds:
                at, _, work, arguments = heapq.heappop(self._events)
                self._pass(at)
                work(*arguments)
        if not (self.finished or self.aborted) and seconds < math.inf:
            self._pass(seconds)
        for actor in list(self.actors.values()):
            self._end(actor)
        return self

    # ------------------------------------------------------------ time
    def _at(self, when: float, work: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), work, arguments))

    def _pass(self, until: float) -> None:
        """Processes that share cores all go slower at the same rate; so the clock of what they do is just stretched."""
        seconds, self.now = until - self.now, until
        if self.workload.cores is None:
            self.wall = until
        elif seconds > 0:
            working = self._work + sum(bool(actor.running) for actor in self.actors.values())
            self.wall += seconds * max(working / self.workload.cores, 1.0)

    def _tick(self) -> None:
        self.tallies.append(self.coordinator.tally())
        self._tell(e.Tick())
        self._at(self.now + TICK_SECONDS, self._tick)

    # ------------------------------------------------------------ the coordinator
    def _tell(self, event: e.Event) -> list[e.Action]:
        started = time.perf_counter()
        actions = self.coordinator.step(event, self.wall)
        self.handling.append(time.perf_counter() - started)
        for action in actions:
            if type(action) is e.Record:
                self.records += 1
                if self.heard is not None:
                    self.heard(action, self.wall)
            else:
                self._ACTIONS[type(action)](self, action)
        return actions

    def _generate(self, action: e.Generate) -> None:
        actor = self.actors[action.actor]
        self._at(self.now + self.workload.lease_seconds, self._submit, actor, action.leases)

    def _submit(self, actor: VirtualActor, leases: Sequence[e.Lease]) -> None:
        if self.actors.get(actor.name) is not actor:
            return
        done = actor.advance(self.now, self._switches)
        for lease in leases:
            group = self.coordinator.groups.get(lease.ordinal)
            if group is not None and (group.actor, group.attempt) == (actor.name, lease.attempt):
                lengths = self.workload.lengths[lease.ordinal]
                actor.add(Job(lease.ordinal, lease.attempt, len(lengths)), lengths)
        self._deliver(actor, done)

    def _cancel(self, action: e.Cancel) -> None:
        if (actor := self.actors.get(action.actor)) is None:
            return
        done = actor.advance(self.now, self._switches)
        before = actor.sampled()
        for ordinal in action.ordinals:
            actor.remove(ordinal)
        self.lost_tokens += before - actor.sampled()
        self._deliver(actor, done)

    def _wake(self, actor: VirtualActor, stamp: int) -> None:
        if actor.stamp == stamp:
            self._deliver(actor, actor.advance(self.now, self._switches))

    def _deliver(self, actor: VirtualActor, done: Sequence[Job]) -> None:
        """Set the actor's next alarm, and tell what it has finished."""
        actor.stamp += 1
        if (alarm := actor.alarm(self._switches)) is not None:
            self._at(alarm, self._wake, actor, actor.stamp)
        for job in done:
            self._tokens[job.ordinal] = job.tokens
            where = (job.ordinal, actor.name, actor.incarnation, job.attempt)
            total, versions = sum(job.tokens.values()), job.tokens
            self._tell(e.GroupDone(*where, total, min(versions), max(versions)))

    # ------------------------------------------------------------ scorers and learner
    def _score(self, action: e.Score) -> None:
        self._found(action.ordinal)
        free = max(heapq.heappop(self._scorers), self.now) + self.workload.score_seconds
        heapq.heappush(self._scorers, free)
        drop = "filter" if self._random.random() < self.workload.drop_share else None
        self._at(free, self._scored, e.GroupScored(action.ordinal, drop))

    def _scored(self, event: e.GroupScored) -> None:
        self._tell(event)
        if event.drop:
            self._tokens.pop(event.ordinal, None)

    def _train(self, action: e.Train) -> None:
        ages: Counter[int] = Counter()
        for ordinal in action.ordinals:
            for version, tokens in self._tokens.pop(ordinal).items():
                ages[action.step - version] += tokens
        bound = math.inf if self.max_token_age is None else self.max_token_age
        tokens, masked = ages.total(), sum(n for age, n in ages.items() if age > bound)
        seconds = self.workload.train_seconds + self.workload.train_token_seconds * tokens
        self._busy_for(seconds, self._trained, Step(0.0, tokens, masked, ages), action.step)

    def _trained(self, step: Step, number: int) -> None:
        self.steps.append(step)
        self._tell(e.Trained(number, step.masked))

    def _publish(self, action: e.Publish) -> None:
        seconds = self.workload.publish_seconds
        self._switches.append(Switch(self.now, self.now + seconds, action.version))
        self._busy_for(seconds, self._served, action.version)

    def _served(self, version: int) -> None:
        last = self.steps[-1]
        self.steps[-1] = Step(self.wall, last.tokens, last.masked, last.ages)
        self._tell(e.Served(version, tuple(self.actors)))
        w, seconds = self.workload, self.workload.close_seconds
        if w.checkpoint_every and version % w.checkpoint_every == 0:
            seconds += w.checkpoint_seconds
        if w.eval_every and version % w.eval_every == 0 and version < self.coordinator.steps:
            seconds += w.eval_seconds
        self._busy_for(seconds, self._tell, e.StepDone(version - 1))

    def _busy_for(self, seconds: float, work: Callable[..., Any], *arguments: Any) -> None:
        self._work += 1
        self._at(self.now + seconds, self._learner_done, seconds, work, arguments)

    def _learner_done(self, seconds: float, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._work -= 1
        self.learning += seconds
        work(*arguments)

    # ------------------------------------------------------------ actors come and go
    def _join_many(self, count: int) -> None:
        for _ in range(count):
            self._join()

    def _join(self) -> None:
        self._joined += 1
        self._enter(f"actor-{self._joined - 1}", 0)

    def _enter(self, name: str, incarnation: int) -> None:
        w = self.workload
        slow = w.slow_factor if _share(name, self.seed) < w.slow_share else 1.0
        loading = bool(self._switches) and self._switches[-1].end > self.now
        actor = VirtualActor(
            name, incarnation, w.decode_base * slow, w.decode_each * slow, w.sequences,
            since=self.now, version=self.coordinator.version, seen=len(self._switches) - loading, time=self.now,
        )  # fmt: skip
        self.actors[name] = actor
        if w.failure_seconds < math.inf:
            self._at(self.now + self._random.expovariate(1 / w.failure_seconds), self._fail, actor)
        self._tell(e.ActorJoined(name, incarnation))

    def _fail(self, actor: VirtualActor) -> None:
        """An actor is lost without notice, and what it was sampling with it."""
        if self.actors.get(actor.name) is not actor:
            return
        self.losses += 1
        actor.advance(self.now, self._switches)
        self.lost_tokens += actor.sampled()
        self._end(actor)
        loss = _Loss(self.wall, set(self.coordinator.fleet.actors[actor.name].holds))
        for ordinal in loss.missing:
            self._missing.setdefault(ordinal, []).append(loss)
        for action in self._tell(e.ActorLost(actor.name, actor.incarnation, "killed")):
            if isinstance(action, e.Record) and action.kind == "dropped":
                self._found(action.fields["group"])

    def _end(self, actor: VirtualActor) -> None:
        actor.advance(self.now, self._switches)
        actor.stamp += 1  # its alarm is off
        self.alive += self.now - actor.since
        self.busy += actor.busy
        self.decoded += actor.decoded
        del self.actors[actor.name]

    def _replace(self, action: e.Replace) -> None:
        if action.actor not in self._gone:
            self._at(self.now + self.workload.restart_seconds, self._again, action.actor)

    def _again(self, name: str) -> None:
        self._enter(name, self.coordinator.fleet.actors[name].incarnation + 1)

    def _wave(self, wave: Wave) -> None:
        names = self._random.sample(sorted(self.actors), round(wave.share * len(self.actors)))
        self._gone.update(names)
        for name in names:
            actor = self.actors[name]
            if wave.notice:
                self._at(self.now + wave.notice, self._fail, actor)
                self._tell(e.ActorLeaving(name))
            else:
                self._fail(actor)

    def _retire(self, action: e.Retire) -> None:
        if (actor := self.actors.get(action.actor)) is not None:
            self._end(actor)

    def _found(self, ordinal: int) -> None:
        """A group of a lost actor is done, or is not wanted any more."""
        for loss in self._missing.pop(ordinal, ()):
            loss.missing.discard(ordinal)
            if not loss.missing:
                self.recoveries.append(self.wall - loss.time)

    def _finish(self, action: e.Finish) -> None:
        self.finished = True

    def _abort(self, action: e.Abort) -> None:
        self.aborted = action.reason

    _ACTIONS: ClassVar = {
        e.Generate: _generate,
        e.Cancel: _cancel,
        e.Replace: _replace,
        e.Retire: _retire,
        e.Score: _score,
        e.Train: _train,
        e.Publish: _publish,
        e.Finish: _finish,
        e.Abort: _abort,
    }


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing here refers to itself in circles, and looking for that among all objects takes half of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(eq=False)
class _Loss:
    """An actor lost at `time`, and its groups that are not done yet."""

    time: float
    missing: set[int]


def _share(name: str, seed: int) -> float:
    """A number in [0, 1) of its own for each actor, whatever else is drawn."""
    return random.Random(f"{seed}/{name}").random()
