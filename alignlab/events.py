"""What a coordinator is told (events) and what it answers (actions, and records for the ledger). Plain data.

A group is known by its ordinal in the prompt stream, an actor by its name and the number of its incarnation; what
groups hold stays outside and is named by its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


# ---------------------------------------------------------------- events: what happened
@dataclass(frozen=True, slots=True)
class Started:
    """A run begins with these actors, name -> incarnation; together, so that the first groups are spread over all."""

    actors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ActorStarting:
    """An incarnation is on its way; it takes no groups yet."""

    actor: str
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class ActorJoined:
    """An incarnation serves `version`; None is the newest. An older one makes it stale."""

    actor: str
    incarnation: int = 0
    version: int | None = None


@dataclass(frozen=True, slots=True)
class ActorSuspected:
    """It has been silent for a while. It may come back."""

    actor: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class ActorRecovered:
    """A suspected one has spoken again, and serves `version`; None is the newest."""

    actor: str
    incarnation: int
    version: int | None = None


@dataclass(frozen=True, slots=True)
class ActorLost:
    """This incarnation is gone for good."""

    actor: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class ActorLeaving:
    """It is to finish what it holds and take no more."""

    actor: str


@dataclass(frozen=True, slots=True)
class GroupDone:
    """The completions of a lease have arrived: `tokens` tokens, sampled by the versions `oldest` to `newest`."""

    ordinal: int
    actor: str
    incarnation: int
    attempt: int
    tokens: int = 0
    oldest: int = 0
    newest: int = 0
    payload: str = ""


@dataclass(frozen=True, slots=True)
class GroupFailed:
    """The engine refused this group (for instance, a prompt it cannot hold): its data, not the actor, is at fault."""

    ordinal: int
    actor: str
    incarnation: int
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class GroupScored:
    """Rewards are there; a method's filter may want the group replaced by the next prompt (`drop` says why)."""

    ordinal: int
    drop: str | None = None
    payload: str = ""


@dataclass(frozen=True, slots=True)
class Trained:
    """The learner has updated the weights. `masked` tokens of the batch were too old to count."""

    step: int
    masked: int = 0
    payload: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """The actors in `loaded` serve `version`; why the others do not is in `stale`."""

    version: int
    loaded: tuple[str, ...] = ()
    stale: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True, slots=True)
class StepDone:
    """All that belongs to a step is done and the learner is free."""

    step: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Finish the step that is under way, then end."""


Event = (
    Started | ActorStarting | ActorJoined | ActorSuspected | ActorRecovered | ActorLost | ActorLeaving
    | GroupDone | GroupFailed | GroupScored | Trained | Served | StepDone | Tick | StopRequested
)  # fmt: skip


# ---------------------------------------------------------------- actions: what to do now
@dataclass(frozen=True, slots=True)
class Record:
    """A line of the ledger. It is written before the actions that follow it are begun."""

    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Lease:
    """`attempt` tells this lease of a group from all others."""

    ordinal: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Generate:
    """Hand these groups to one actor, all at once."""

    actor: str
    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """These groups were taken from an actor that may still be sampling them."""

    actor: str
    ordinals: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replace:
    """Start a new incarnation of a lost actor."""

    actor: str


@dataclass(frozen=True, slots=True)
class Retire:
    """An actor that leaves holds nothing any more: end it."""

    actor: str


@dataclass(frozen=True, slots=True)
class Score:
    """Have the rewards of a group computed."""

    ordinal: int


@dataclass(frozen=True, slots=True)
class Train:
    """Train step `step` (from 0) on these groups: version `step` becomes version step + 1."""

    step: int
    ordinals: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Make the actors serve the weights that the last step made."""

    version: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The run cannot go on; `reason` says why and what to do."""

    reason: str


Action = Record | Generate | Cancel | Replace | Retire | Score | Train | Publish | Finish | Abort
