"""The pure state machine of a run: which group is sampled where, scored, trained on and when. No I/O, no clock, no Ray.

    event --> Coordinator.step(event, now) --> actions

`run.py` executes the actions and turns what happens into events; the same class runs in property tests. A group is
known by its ordinal in the prompt stream; payloads (tokens, rewards) stay outside.

    WAITING -> LEASED(actor, attempt) -> DONE -> SCORED -> BATCHED(step) -> trained | dropped(reason)

Staleness: (S+1) x P slots. A group takes a slot at admission and gives it back when the actors serve the version that
trained it. A batch is the P oldest scored groups; it waits where going on without an unfinished group would leave that
group no step within S versions of its admission. So S = 0 is on-policy, a long completion may be overtaken but never
starves, and no finished group is thrown away for its age.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


# ---------------------------------------------------------------- events: what happened
@dataclass(frozen=True)
class ActorJoined:
    actor: str


@dataclass(frozen=True)
class ActorLost:
    actor: str
    reason: str


@dataclass(frozen=True)
class GroupDone:
    """The completions of a lease have arrived."""

    ordinal: int
    actor: str
    attempt: int


@dataclass(frozen=True)
class GroupFailed:
    """The engine refused this group (for instance, a prompt it cannot hold): its data, not the actor, is at fault."""

    ordinal: int
    actor: str
    attempt: int
    reason: str


@dataclass(frozen=True)
class GroupScored:
    """Rewards are there; a method's filter may want the group replaced by the next prompt (`drop` says why)."""

    ordinal: int
    drop: str | None = None


@dataclass(frozen=True)
class StepDone:
    """The learner has trained and the actors serve the new version."""

    step: int


@dataclass(frozen=True)
class StopRequested:
    """Finish the step that is under way, then end."""


Event = ActorJoined | ActorLost | GroupDone | GroupFailed | GroupScored | StepDone | StopRequested


# ---------------------------------------------------------------- actions: what to do now
@dataclass(frozen=True)
class Lease:
    ordinal: int
    attempt: int


@dataclass(frozen=True)
class Generate:
    """Hand these groups to one actor, all at once: what it samples then does not depend on message timing."""

    actor: str
    leases: tuple[Lease, ...]


@dataclass(frozen=True)
class Score:
    ordinal: int


@dataclass(frozen=True)
class Train:
    """Train step `step` (from 0) on these groups, then serve version step + 1."""

    step: int
    ordinals: tuple[int, ...]


@dataclass(frozen=True)
class Finish:
    """Nothing is left to do."""


@dataclass(frozen=True)
class Abort:
    """The run cannot go on; `reason` says why and what to do."""

    reason: str


Action = Generate | Score | Train | Finish | Abort


class State(Enum):
    WAITING = "waiting"
    LEASED = "leased"
    DONE = "done"
    SCORED = "scored"
    BATCHED = "batched"


@dataclass
class _Group:
    state: State = State.WAITING
    attempt: int = 0
    actor: str | None = None
    version: int = 0  # the newest version served when the group was admitted


@dataclass
class Coordinator:
    """See the module's docstring. `prompts` is P, `max_staleness` S, `steps` the step count of the whole run."""

    prompts: int
    steps: int
    max_staleness: int = 0
    max_attempts: int = 3
    max_dropped: int = 10  # dropped groups per batch slot, in a row, before the run is stopped as hopeless
    version: int = 0  # the newest version that the actors serve: the number of steps done
    next_ordinal: int = 0
    groups: dict[int, _Group] = field(default_factory=dict)  # admitted and neither trained nor dropped
    actors: dict[str, int] = field(default_factory=dict)  # serving actor -> groups it holds
    counts: Counter[str] = field(default_factory=Counter)  # admitted, trained, refused, retried, dropped/<reason>
    _training: bool = False
    _stopping: bool = False
    _finished: bool = False
    _dropped_since_step: int = 0
    _owed: list[int] = field(default_factory=list)  # ordinals to admit again after a resume

    def step(self, event: Event, now: float) -> list[Action]:
        """Take in one event, say what to do next. `now` is in seconds of any steady clock."""
        del now  # ages and deadlines of leases will need it; today deadlines are kept where the waiting happens
        match event:
            case ActorJoined(actor):
                self.actors[actor] = 0
            case ActorLost(actor):
                self._take_back(actor)
            case GroupDone(ordinal, actor, attempt):
                if not self._release(ordinal, actor, attempt):
                    return []
                self.groups[ordinal].state = State.DONE
                return [Score(ordinal)]
            case GroupFailed(ordinal, actor, attempt, reason):
                if self._release(ordinal, actor, attempt):
                    self._drop(ordinal, f"failed: {reason}")
            case GroupScored(ordinal, drop):
                self.groups[ordinal].state = State.SCORED
                if drop is not None:
                    self._drop(ordinal, drop)
            case StepDone(step):
                self._close_step(step)
            case StopRequested():
                self._stopping = True
        return self._advance()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: enough to train every other group once, and none twice.

        It is taken when the learner has finished a step, so the groups of a batch count as trained.
        """
        batched = [o for o, g in self.groups.items() if g.state is State.BATCHED]
        return {
            "version": self.version + self._training,
            "next_ordinal": self.next_ordinal,
            "owed": sorted([*self._owed, *(o for o in self.groups if o not in batched)]),
            "counts": {**self.counts, "trained": self.counts["trained"] + len(batched)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: groups that were under way are sampled again, from the same seeds."""
        self.version, self.next_ordinal = state["version"], state["next_ordinal"]
        self._owed, self.counts = list(state["owed"]), Counter(state["counts"])
        self.counts["admitted"] -= len(self._owed)

    def tally(self) -> dict[str, int]:
        """Groups by state. Invariant: admitted = waiting + leased + done + scored + batched + trained + dropped."""
        states = Counter(group.state.value for group in self.groups.values())
        dropped = sum(n for name, n in self.counts.items() if name.startswith("dropped/"))
        tally = {state.value: states[state.value] for state in State}
        return {"admitted": self.counts["admitted"], **tally, "trained": self.counts["trained"], "dropped": dropped}

    # ------------------------------------------------------------ transitions
    def _release(self, ordinal: int, actor: str, attempt: int) -> bool:
        """End a lease; False (and counted) where the result does not come from the current one."""
        group = self.groups.get(ordinal)
        if group is None or (group.state, group.actor, group.attempt) != (State.LEASED, actor, attempt):
            self.counts["refused"] += 1
            return False
        self.actors[actor] -= 1
        return True

    def _take_back(self, actor: str) -> None:
        self.actors.pop(actor, None)
        for group in self.groups.values():
            if group.state is State.LEASED and group.actor == actor:
                group.state, group.actor, group.attempt = State.WAITING, None, group.attempt + 1
                self.counts["retried"] += 1

    def _drop(self, ordinal: int, reason: str) -> None:
        del self.groups[ordinal]
        self.counts[f"dropped/{reason}"] += 1
        self._dropped_since_step += 1

    def _close_step(self, step: int) -> None:
        trained = [ordinal for ordinal, group in self.groups.items() if group.state is State.BATCHED]
        for ordinal in trained:
            del self.groups[ordinal]
        self.counts["trained"] += len(trained)
        self.version = step + 1
        self._training = False
        self._dropped_since_step = 0

    # ------------------------------------------------------------ decisions
    def _advance(self) -> list[Action]:
        if self._finished:
            return []
        if self.version >= self.steps or (self._stopping and self._idle()):
            self._finished = True
            return [Finish()]
        if problem := self._hopeless():
            self._finished = True
            return [Abort(problem)]
        self._admit()
        return [*self._dispatch(), *self._batch()]

    def _idle(self) -> bool:
        """At a step's end: nothing is being trained, and no batch of this version was begun on-policy."""
        begun = self.max_staleness == 0 and self.groups
        return not self._training and not begun

    def _hopeless(self) -> str | None:
        for ordinal, group in self.groups.items():
            if group.attempt >= self.max_attempts:
                return (
                    f"group {ordinal} lost its actor {group.attempt} times (rollout.max_attempts); "
                    "see logs/ for how the actors died"
                )
        if self._dropped_since_step > self.max_dropped * self.prompts:
            reasons = ", ".join(f"{n} {name}" for name, n in self.counts.items() if name.startswith("dropped/"))
            return (
                f"step {self.version}: {self._dropped_since_step} groups were dropped while {self.prompts} were wanted "
                f"(so far: {reasons}); use easier or harder prompts, or a method without this filter"
            )
        return None

    def _admit(self) -> None:
        if self._stopping and (self.max_staleness > 0 or not self.groups):
            return
        slots = (self.max_staleness + 1) * self.prompts - len(self.groups)
        wanted = (self.steps - self.version) * self.prompts - len(self.groups)
        for _ in range(min(slots, wanted)):
            ordinal = self._owed.pop(0) if self._owed else self.next_ordinal
            self.next_ordinal = max(self.next_ordinal, ordinal + 1)
            self.groups[ordinal] = _Group(version=self.version)
            self.counts["admitted"] += 1

    def _dispatch(self) -> list[Action]:
        """Waiting groups to the least loaded actors, oldest first; ties go to the first name."""
        if not self.actors:
            return []
        leases: dict[str, list[Lease]] = {}
        for ordinal, group in sorted(self.groups.items()):
            if group.state is State.WAITING:
                actor = min(self.actors, key=lambda name: (self.actors[name], name))
                self.actors[actor] += 1
                group.state, group.actor = State.LEASED, actor
                leases.setdefault(actor, []).append(Lease(ordinal, group.attempt))
        return [Generate(actor, tuple(wanted)) for actor, wanted in leases.items()]

    def _batch(self) -> list[Action]:
        """The P oldest scored groups, unless leaving the unfinished ones behind would make one of them too stale."""
        scored = [o for o, g in self.groups.items() if g.state is State.SCORED]
        batch = sorted(scored, key=lambda o: (self.groups[o].version, o))[: self.prompts]
        if self._training or len(batch) < self.prompts or not self._in_time(set(self.groups) - set(batch)):
            return []
        self._training = True
        for ordinal in batch:
            self.groups[ordinal].state = State.BATCHED
        return [Train(self.version, tuple(sorted(batch)))]

    def _in_time(self, left: set[int]) -> bool:
        """Whether the groups left can all be trained within S versions of their admission, P in each later step."""
        steps_left = [self.groups[o].version + self.max_staleness - self.version for o in left]
        return all(sum(n <= k for n in steps_left) <= k * self.prompts for k in range(self.max_staleness + 1))
