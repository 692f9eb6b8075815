"""Where a group is, and where the step under way is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Where a group is; see alignlab.coordinator."""

    WAITING = "waiting"
    LEASED = "leased"
    DONE = "done"
    SCORED = "scored"
    BATCHED = "batched"


class Phase(Enum):
    """Where the step under way is."""

    GATHERING = "gathering"  # there is none: a batch is waited for
    TRAINING = "training"
    TRAINED = "trained"  # and not to be published yet
    PUBLISHING = "publishing"
    CLOSING = "closing"  # the actors serve what it made; evaluation and checkpoint may follow


@dataclass(slots=True)
class Entry:
    """What a coordinator knows of a group that is under way."""

    version: int  # served when the group was admitted; of tokens that were there already, the oldest one's
    state: State = State.WAITING
    attempt: int = 0  # leases so far
    losses: int = 0  # leases that ended with the loss of the actor, or with their deadline
    actor: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """Completions that a run finds when it goes on: they need not be sampled again.

    `oldest` and `newest` are versions of their tokens.
    """

    payload: str
    tokens: int
    oldest: int
    newest: int
