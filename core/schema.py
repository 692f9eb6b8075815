"""What travels between the folders before `learner.collate` turns it into tensors: ragged, frozen, no tensors.

    Prompt --GroupRequest--> actors --Group--> rewards (components, totals) --> learner

A stage returns a copy with its field filled (`dataclasses.replace`); it never edits what another stage holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
Status = Literal["ok", "abstain", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, rendered and tokenised.

    >>> Prompt(ordinal=7, text="<|user|>2+3?<|assistant|>", token_ids=(5, 9, 6), columns={"answer": "5"}).ordinal
    7
    """

    ordinal: int  # position in the run's endless prompt stream, counted from 0
    text: str  # after the chat template: exactly what the engine continues
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # the dataset's row; rewards read it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of a completion are drawn. Engine-independent.

    `top_k` 0 means all tokens. `stop` strings end a completion and are kept in its text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # benchmarks only: every completion then has max_tokens tokens


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """Asks an actor for `len(seeds)` completions of one prompt. The seeds make sampling independent of the actor."""

    id: str
    prompt: Prompt
    seeds: tuple[int, ...]
    sampling: Sampling
    greedy: bool = False  # one more completion, drawn at temperature 0
    attempt: int = 0  # counted up when an actor was lost and the request is given to another


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt, with what the engine knew when it sampled each token.

    The three tuples have one entry per generated token, the end-of-sequence token included.

    >>> c = Completion((11, 2), rollout_logprobs=(-0.1, -0.7), versions=(3, 3), text="5", finish_reason="stop")
    >>> c.truncated, c.staleness(learner_version=4)
    (False, 1)
    """

    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]  # nats, of the distribution that was sampled from (after temperature)
    versions: tuple[int, ...]  # weight version that produced each token
    text: str
    finish_reason: FinishReason

    @property
    def truncated(self) -> bool:
        """Cut off by the length limit, so the policy did not choose to end here."""
        return self.finish_reason == "length"

    def staleness(self, learner_version: int) -> int:
        """Updates between the weights of the oldest token and `learner_version`; 0 for an empty completion."""
        return learner_version - min(self.versions, default=learner_version)


@dataclass(frozen=True, slots=True)
class Score:
    """What one reward component says about one completion. Missing is never zero: `value` is NaN unless `ok`."""

    status: Status
    value: float = math.nan
    detail: str = ""  # why there is no value: the exception, the limit that was passed

    def __post_init__(self) -> None:
        if (self.status == "ok") != math.isfinite(self.value):
            raise ValueError(f"Score: status {self.status!r} does not go with value {self.value}")


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt, filled by one stage after another.

    `components[name][i]` is what component `name` says of completion i. `columns[name][i]` is the value of an
    objective, made of the components and shaped, NaN where it is missing; `weights[name][i]` how much it counts.
    `totals[i]` is their weighted sum, NaN when the completion could not be scored at all.

    >>> c = Completion((11, 2), (-0.1, -0.7), (0, 0), "5", "stop")
    >>> g = Group(id="g", prompt=Prompt(0, "2+3?", (5,), {"answer": "5"}), completions=(c, c))
    >>> from dataclasses import replace
    >>> scored = replace(g, components={"math_answer": (Score("ok", 1.0), Score("timeout"))}, totals=(1.0, math.nan))
    >>> scored.components["math_answer"][1].status
    'timeout'
    """

    id: str
    prompt: Prompt
    completions: tuple[Completion, ...]
    attempt: int = 0
    actor: str = ""  # which actor sampled it
    components: Mapping[str, tuple[Score, ...]] = field(default_factory=dict)
    references: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # component -> scores of other answers
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    totals: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()  # final answer of each completion, "" for none; for methods that compare them
    greedy: Group | None = None  # the greedy completion of the prompt, a group of one; for methods that ask for it

    @property
    def tokens(self) -> int:
        """Generated tokens of all completions."""
        return sum(len(c.token_ids) for c in self.completions) + (self.greedy.tokens if self.greedy else 0)


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the learner joins the columns of a step into advantages: what a weighting policy decides beside the weights.

    Not `apart`, the totals are the reward and the method does with them what it does with any reward.
    """

    apart: bool = False  # advantages of each column on its own, then their weighted sum
    whiten: bool = True  # apart only: standardise the sum over the step
    by_std: bool = True  # apart only: False centres each column in its group and divides by nothing
    task: float = 0.0  # apart only: weight of one more column, minus the completion's KL to the reference
    kl_mean: bool = False  # that KL per token instead of its sum
    sharpness: float | None = None  # apart only: the soft minimum of the columns instead of their sum
    scale: float = 1.0  # factor of the finished advantages
    kl_coef: float | None = None  # coefficient of the KL term in the loss; none is the method's


def group_id(run_seed: int, ordinal: int) -> str:
    """The name of the group at `ordinal` of the prompt stream: the same in every attempt and after every resume."""
    return hashlib.blake2b(f"group/{run_seed}/{ordinal}".encode(), digest_size=8).hexdigest()


def sample_seed(run_seed: int, ordinal: int, sample: int) -> int:
    """Seed of one completion, in 0 .. 2^31 - 1. It depends on nothing but its arguments, hence not on who generates."""
    digest = hashlib.blake2b(f"sample/{run_seed}/{ordinal}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31
