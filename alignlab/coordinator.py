"""The pure state machine of a run: which group is sampled where, scored, trained on and when. No I/O, no clock, no Ray.

    event --> Coordinator.step(event, now) --> actions

`run.py` executes the actions and turns what happens into events; the same class runs in property tests, in the chaos
bench and in the simulator.

    WAITING -> LEASED(actor, incarnation, attempt) -> DONE -> SCORED -> BATCHED(step) -> trained | dropped(reason)

Slots: a group takes one of (S+1) x P at admission and gives it back when the actors serve the version that trained it.
Batches (`backlog.py`): the P oldest scored groups, never so many that an unfinished one would be left behind for more
than `window` versions. So with S = 0 a run is on-policy, a long completion may be overtaken but never starves, and no
finished group is thrown away for its age.
Deterministic: a version is published when all groups admitted before it are scored, and batches are taken in order; so
every group is sampled by one version, which depends on its ordinal alone.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from alignlab import events as e
from alignlab.backlog import Backlog
from alignlab.fleet import Fleet, Health
from alignlab.states import Entry, Phase, Sampled, State


@dataclass
class Coordinator:
    """See the module's docstring. `prompts` is P, `max_staleness` S, `steps` the step count of the whole run.

    window: versions within which a group must be trained after its admission; None is S, at least S otherwise.
    in_order: batches hold the P oldest groups, scored or not: they wait for each of them.
    lease_seconds: a lease that lasts longer is taken back. capacity: groups that an actor may hold, None for any.
    """

    prompts: int
    steps: int
    max_staleness: int = 0
    window: int | None = None
    deterministic: bool = False
    in_order: bool = False
    max_attempts: int = 3
    max_dropped: int = 10  # dropped groups per batch slot, in a row, before the run is stopped as hopeless
    lease_seconds: float | None = None
    capacity: int | None = None
    version: int = 0  # the newest version that the actors serve
    trained: int = 0  # steps done
    next_ordinal: int = 0
    groups: dict[int, Entry] = field(default_factory=dict)  # admitted and neither trained nor dropped
    counts: Counter[str] = field(default_factory=Counter)  # admitted, trained, refused, retried, dropped/<reason>
    tokens: Counter[str] = field(default_factory=Counter)  # generated, trained, masked, refused, dropped
    oldest_lease: float = 0.0  # seconds, at the last tick
    phase: Phase = Phase.GATHERING
    first_attempt: int = 0  # attempts below it are of leases that an earlier coordinator of this process gave
    last_attempt: int = 0
    _held: int = 0  # slots of groups that are trained, by a version that is not served yet
    _batched: list[int] = field(default_factory=list)
    _stopping: bool = False
    _finished: bool = False
    _dropped_since_step: int = 0
    _now: float = 0.0
    _out: list[e.Action] = field(default_factory=list)
    _owed: list[tuple[int, int]] = field(default_factory=list)  # (ordinal, version) to admit again after a resume
    _found: dict[int, Sampled] = field(default_factory=dict)
    _waiting: list[int] = field(default_factory=list)  # a heap of ordinals, some of them outdated
    _pending: Counter[State] = field(default_factory=Counter)
    _leases: deque[tuple[float, int, int]] = field(default_factory=deque)  # (since, ordinal, attempt), in order

    def __post_init__(self) -> None:
        self.window = max(self.max_staleness if self.window is None else self.window, self.max_staleness)
        self.fleet = Fleet(self.capacity)
        self.backlog = Backlog(self.prompts, self.window, self.in_order or self.deterministic)

    def step(self, event: e.Event, now: float) -> list[e.Action]:
        """Take in one event, say what to do next. `now` is in seconds of any steady clock."""
        self._now, self._out = now, []
        self._EVENTS[type(event)](self, event)
        self._advance()
        return self._out

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: enough to train every other group once, and none twice.

        It is taken when a step has been trained and before the next is begun. Groups under way count as not admitted.
        """
        owed = {ordinal: group.version for ordinal, group in sorted(self.groups.items())} | dict(self._owed)
        counts, tokens = Counter(self.counts), Counter(self.tokens)
        counts["admitted"] -= len(self.groups)
        tokens["generated"] -= sum(group.tokens for group in self.groups.values())
        return {
            "version": self.trained,
            "next_ordinal": self.next_ordinal,
            "owed": owed,
            "counts": dict(counts),
            "tokens": dict(tokens),
        }

    def load_state_dict(self, state: Mapping[str, Any], found: Mapping[int, Sampled] | None = None) -> None:
        """Go on from a checkpoint. Groups that were under way are sampled again from the same seeds, unless `found`."""
        self.version = self.trained = state["version"]
        self.next_ordinal, self._found = state["next_ordinal"], dict(found or {})
        self._owed = sorted((int(ordinal), version) for ordinal, version in dict(state["owed"]).items())
        self.counts, self.tokens = Counter(state["counts"]), Counter(state["tokens"])

    def tally(self) -> dict[str, int]:
        """Groups by state. Invariant: admitted = waiting + leased + done + scored + batched + trained + dropped."""
        dropped = sum(n for name, n in self.counts.items() if name.startswith("dropped/"))
        states = {state.value: self._pending[state] for state in State}
        return {"admitted": self.counts["admitted"], **states, "trained": self.counts["trained"], "dropped": dropped}

    def token_tally(self) -> dict[str, int]:
        """Tokens by fate. Invariant: generated = trained + masked + refused + dropped + pending."""
        pending = sum(group.tokens for group in self.groups.values())
        names = ("generated", "trained", "masked", "refused", "dropped")
        return {**{name: self.tokens[name] for name in names}, "pending": pending}

    # ------------------------------------------------------------ what happens to actors
    def _started(self, event: e.Started) -> None:
        for name, incarnation in event.actors.items():
            self._joined(e.ActorJoined(name, incarnation))

    def _starting(self, event: e.ActorStarting) -> None:
        if self.fleet.enter(event.actor, event.incarnation, Health.STARTING):
            self._record_actor(event.actor)

    def _joined(self, event: e.ActorJoined) -> None:
        version = self.version if event.version is None else event.version
        known = self.fleet.actors.get(event.actor)
        if known is not None and event.incarnation > known.incarnation:
            self._return_all(event.actor, "its next incarnation has joined", lost=True)
        health = Health.SERVING if version >= self.version else Health.STALE
        if self.fleet.enter(event.actor, event.incarnation, health, version):
            self._record_actor(event.actor)

    def _suspected(self, event: e.ActorSuspected) -> None:
        if event.actor not in self.fleet.actors:  # it was silent before this coordinator began
            self.fleet.enter(event.actor, event.incarnation, Health.STARTING)
        actor = self.fleet.current(event.actor, event.incarnation)
        if actor is None or actor.health in (Health.DEAD, Health.SUSPECT):
            return
        self.fleet.mark(event.actor, Health.SUSPECT)
        self._record_actor(event.actor, event.reason)
        if held := self._return_all(event.actor, event.reason):
            self._out.append(e.Cancel(event.actor, tuple(held)))

    def _recovered(self, event: e.ActorRecovered) -> None:
        actor = self.fleet.current(event.actor, event.incarnation)
        if actor is not None and actor.health is Health.SUSPECT:
            actor.version = self.version if event.version is None else event.version
            self.fleet.mark(event.actor, Health.SERVING if actor.version >= self.version else Health.STALE)
            self._record_actor(event.actor)

    def _lost(self, event: e.ActorLost) -> None:
        actor = self.fleet.current(event.actor, event.incarnation)
        if actor is None or actor.health is Health.DEAD:
            return
        leaving = actor.health is Health.DRAINING
        self.fleet.mark(event.actor, Health.DEAD)
        self._record_actor(event.actor, event.reason)
        self._return_all(event.actor, event.reason, lost=True)
        if leaving:
            self._retire(event.actor)
        else:
            self._out.append(e.Replace(event.actor))

    def _leaving(self, event: e.ActorLeaving) -> None:
        if event.actor in self.fleet.actors:
            self.fleet.mark(event.actor, Health.DRAINING)
            self._record_actor(event.actor)
            self._retire_if_empty(event.actor)

    def _retire_if_empty(self, name: str) -> None:
        actor = self.fleet.actors.get(name)
        if actor is not None and actor.health is Health.DRAINING and not actor.holds:
            self._retire(name)

    def _retire(self, name: str) -> None:
        self._record("actor", actor=name, incarnation=self.fleet.actors[name].incarnation, state="gone", reason="")
        self.fleet.leave(name)
        self._out.append(e.Retire(name))

    # ------------------------------------------------------------ what happens to groups
    def _done(self, event: e.GroupDone) -> None:
        self.tokens["generated"] += event.tokens
        group = self._release(event)
        if group is None:
            self.tokens["refused"] += event.tokens
            return
        self._move(group, State.DONE)
        group.tokens = event.tokens
        fields = {"payload": event.payload, "tokens": event.tokens, "oldest": event.oldest, "newest": event.newest}
        self._record("done", **_lease(event), **fields)
        self._out.append(e.Score(event.ordinal))

    def _failed(self, event: e.GroupFailed) -> None:
        group = self._release(event)
        if group is not None:
            self._drop(event.ordinal, f"failed: {event.reason}")

    def _release(self, event: e.GroupDone | e.GroupFailed) -> Entry | None:
        """End a lease; None (counted and recorded) where the result does not come from the current one."""
        group, actor = self.groups.get(event.ordinal), self.fleet.current(event.actor, event.incarnation)
        known = group is not None and actor is not None and group.state is State.LEASED
        if known and (group.actor, group.attempt) == (event.actor, event.attempt):  # type: ignore[union-attr]
            self.fleet.release(event.ordinal, event.actor)
            self._retire_if_empty(event.actor)
            return group
        self.counts["refused"] += 1
        self._record("refused", **_lease(event), tokens=getattr(event, "tokens", 0), reason="not the current lease")
        return None

    def _return_all(self, name: str, reason: str, *, lost: bool = False) -> list[int]:
        """An actor's groups wait again. With `lost`, they may have been what it died of, and that is counted."""
        held = self.fleet.take_back(name)
        for ordinal in held:
            self._return(ordinal, reason, lost=lost)
        return held

    def _return(self, ordinal: int, reason: str, *, lost: bool) -> None:
        group = self.groups[ordinal]
        incarnation = self.fleet.actors[group.actor].incarnation
        lease = {"actor": group.actor, "incarnation": incarnation, "attempt": group.attempt}
        self._record("returned", group=ordinal, **lease, reason=reason)
        self._move(group, State.WAITING)
        group.actor, group.attempt, group.losses = "", group.attempt + 1, group.losses + lost
        self.counts["retried"] += 1
        heapq.heappush(self._waiting, ordinal)
        if group.losses < self.max_attempts:
            return
        if self.deterministic:  # a prompt less is another run
            self._abort(
                f"group {ordinal} was lost with its actor {group.losses} times (rollout.max_attempts): {reason}; see "
                "logs/ for how the actors ended"
            )
        else:
            self._drop(ordinal, f"retries: lost with its actor {group.losses} times")

    def _was_scored(self, event: e.GroupScored) -> None:
        group = self.groups.get(event.ordinal)
        if group is None or group.state is not State.DONE:
            return
        self._record("scored", group=event.ordinal, payload=event.payload)
        self._move(group, State.SCORED)
        if event.drop is not None:
            self._drop(event.ordinal, event.drop)
        else:
            self.backlog.ready(event.ordinal)

    def _drop(self, ordinal: int, reason: str) -> None:
        group = self.groups.pop(ordinal)
        self._pending[group.state] -= 1
        self.backlog.leave(ordinal)
        self.counts[f"dropped/{reason}"] += 1
        self.tokens["dropped"] += group.tokens
        self._record("dropped", group=ordinal, reason=reason, tokens=group.tokens)
        self._dropped_since_step += 1

    # ------------------------------------------------------------ what happens to steps
    def _was_trained(self, event: e.Trained) -> None:
        tokens = sum(self.groups.pop(ordinal).tokens for ordinal in self._batched)
        self._pending[State.BATCHED] -= len(self._batched)
        self.counts["trained"] += len(self._batched)
        self.tokens["trained"] += tokens - event.masked
        self.tokens["masked"] += event.masked
        fields = {"payload": event.payload, "tokens": tokens, "masked": event.masked}
        self._record("trained", step=event.step, groups=self._batched, **fields)
        self.trained, self._held, self.phase = event.step + 1, len(self._batched), Phase.TRAINED
        self._dropped_since_step = 0

    def _served(self, event: e.Served) -> None:
        self.version, self._held, self.phase = event.version, 0, Phase.CLOSING
        self.fleet.serve(event.version, event.loaded, event.stale)
        who = {"loaded": list(event.loaded), "stale": dict(event.stale)}
        self._record("published", version=event.version, digest=event.digest, **who)

    def _step_done(self, event: e.StepDone) -> None:
        self.phase = Phase.GATHERING

    def _tick(self, event: e.Tick) -> None:
        """Leases that have lasted too long go to others; the actor may be well, so it is not blamed."""
        leases = self._leases
        while leases:
            since, ordinal, attempt = leases[0]
            group = self.groups.get(ordinal)
            current = group is not None and group.state is State.LEASED and group.attempt == attempt
            if current and (self.lease_seconds is None or self._now - since < self.lease_seconds):
                break
            leases.popleft()
            if current:
                name = group.actor  # type: ignore[union-attr]
                self.fleet.release(ordinal, name)
                self._out.append(e.Cancel(name, (ordinal,)))
                self._return(ordinal, f"no result in {self.lease_seconds:g} s (rollout.timeout)", lost=True)
        self.oldest_lease = self._now - leases[0][0] if leases else 0.0

    def _stop(self, event: e.StopRequested) -> None:
        self._stopping = True

    _EVENTS: ClassVar = {
        e.Started: _started,
        e.ActorStarting: _starting,
        e.ActorJoined: _joined,
        e.ActorSuspected: _suspected,
        e.ActorRecovered: _recovered,
        e.ActorLost: _lost,
        e.ActorLeaving: _leaving,
        e.GroupDone: _done,
        e.GroupFailed: _failed,
        e.GroupScored: _was_scored,
        e.Trained: _was_trained,
        e.Served: _served,
        e.StepDone: _step_done,
        e.Tick: _tick,
        e.StopRequested: _stop,
    }

    # ------------------------------------------------------------ decisions
    def _advance(self) -> None:
        if self._finished:
            return
        if self.phase is Phase.GATHERING and (self.trained >= self.steps or (self._stopping and self._idle())):
            self._finished = True
            self._out.append(e.Finish())
            return
        if self._dropped_since_step > self.max_dropped * self.prompts:
            reasons = ", ".join(f"{n} {name}" for name, n in self.counts.items() if name.startswith("dropped/"))
            self._abort(
                f"{self._dropped_since_step} groups were dropped while {self.prompts} were wanted (so far: {reasons}); "
                "use easier or harder prompts, or a method without this filter"
            )
            return
        self._admit()
        self._dispatch()
        self._batch()
        self._publish()

    def _abort(self, reason: str) -> None:
        if not self._finished:
            self._finished = True
            self._out.append(e.Abort(reason))

    def _idle(self) -> bool:
        """Nothing is begun that a stop has to wait for: on-policy groups are for the step under way."""
        return self.max_staleness > 0 or not self.groups

    def _admit(self) -> None:
        """Fill the slots. Where versions must not mix, nothing enters from a publication to the end of its step."""
        settled = self.max_staleness == 0 or self.deterministic
        if settled and self.phase in (Phase.PUBLISHING, Phase.CLOSING):
            return
        if self._stopping and self._idle() and not (self.deterministic and self.phase is not Phase.GATHERING):
            return
        slots = (self.max_staleness + 1) * self.prompts - len(self.groups) - self._held
        wanted = (self.steps - self.trained) * self.prompts - len(self.groups)
        for _ in range(min(slots, wanted)):
            self._admit_one()

    def _admit_one(self) -> None:
        """Admit the next group: with the completions found for it, where they are as fresh as new ones would be."""
        owed = bool(self._owed)
        ordinal, version = self._owed.pop(0) if owed else (self.next_ordinal, self.version)
        self.next_ordinal = max(self.next_ordinal, ordinal + 1)
        found = self._found.pop(ordinal, None)
        if found is not None and not owed and found.oldest < self.version:
            found = None  # then it was admitted earlier than now
        group = self.groups[ordinal] = Entry(version if found else self.version, attempt=self.first_attempt)
        self._pending[State.WAITING] += 1
        self.backlog.enter(ordinal, group.version)
        self.counts["admitted"] += 1
        self._record("admitted", group=ordinal, version=group.version)
        if found is None:
            heapq.heappush(self._waiting, ordinal)
            return
        group.tokens = found.tokens
        self.tokens["generated"] += found.tokens
        self._move(group, State.DONE)
        self._record("reused", group=ordinal, **asdict(found))
        self._out.append(e.Score(ordinal))

    def _dispatch(self) -> None:
        """Waiting groups to the least loaded actors, oldest first."""
        leases: dict[str, list[e.Lease]] = {}
        while self._waiting and (name := self.fleet.next()) is not None:
            ordinal = heapq.heappop(self._waiting)
            group = self.groups.get(ordinal)
            if group is None or group.state is not State.WAITING:
                continue
            self._move(group, State.LEASED)
            group.actor = name
            self.fleet.lease(ordinal, name)
            self._leases.append((self._now, ordinal, group.attempt))
            incarnation = self.fleet.actors[name].incarnation
            self._record("leased", group=ordinal, actor=name, incarnation=incarnation, attempt=group.attempt)
            leases.setdefault(name, []).append(e.Lease(ordinal, group.attempt))
            self.last_attempt = max(self.last_attempt, group.attempt)
        self._out += [e.Generate(name, tuple(wanted)) for name, wanted in leases.items()]

    def _batch(self) -> None:
        if self.phase is not Phase.GATHERING or not (batch := self.backlog.take(self.trained)):
            return
        for ordinal in batch:
            self._move(self.groups[ordinal], State.BATCHED)
        self.phase, self._batched = Phase.TRAINING, batch
        self._record("batched", step=self.trained, groups=batch)
        self._out.append(e.Train(self.trained, tuple(batch)))

    def _publish(self) -> None:
        if self.phase is not Phase.TRAINED:
            return
        open_ = self._pending[State.WAITING] + self._pending[State.LEASED] + self._pending[State.DONE]
        if self.deterministic and open_:
            return
        self.phase = Phase.PUBLISHING
        self._out.append(e.Publish(self.trained))

    # ------------------------------------------------------------ book-keeping
    def _move(self, group: Entry, state: State) -> None:
        self._pending[group.state] -= 1
        self._pending[state] += 1
        group.state = state

    def _record(self, kind: str, **fields: Any) -> None:
        self._out.append(e.Record(kind, fields))

    def _record_actor(self, name: str, reason: str = "") -> None:
        actor = self.fleet.actors[name]
        self._record("actor", actor=name, incarnation=actor.incarnation, state=actor.health.value, reason=reason)


def _lease(event: e.GroupDone | e.GroupFailed) -> dict[str, Any]:
    return {
        "group": event.ordinal,
        "actor": event.actor,
        "incarnation": event.incarnation,
        "attempt": event.attempt,
    }
