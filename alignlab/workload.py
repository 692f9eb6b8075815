"""What a simulated run is made of: how long completions are, and how long everything takes.

Numbers are given by hand, or fitted to the files of a real run (`alignlab.workload_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

BLOCK = 4096  # groups whose lengths are drawn at once


@dataclass
class LogNormal:
    """Lengths of completions in tokens, all independent. sigma: of their logarithm. longest: where they are cut off.

    `lengths[ordinal]` are the group_size lengths of a group, the same whenever and wherever it is sampled.
    """

    mean: float
    sigma: float
    group_size: int
    longest: int
    seed: int = 0
    _blocks: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)

    def __getitem__(self, ordinal: int) -> Sequence[int]:
        number, place = divmod(ordinal, BLOCK)
        if number not in self._blocks:
            draw = np.random.default_rng((self.seed, number))
            mu = math.log(self.mean) - self.sigma**2 / 2
            block = draw.lognormal(mu, self.sigma, (BLOCK, self.group_size)).round().clip(1, self.longest)
            self._blocks[number] = block.astype(int).tolist()
        return self._blocks[number][place]


@dataclass(frozen=True)
class Recorded:
    """Lengths of the groups of a real run, in the order of its prompts; over again when they are used up."""

    groups: Sequence[Sequence[int]]

    def __getitem__(self, ordinal: int) -> Sequence[int]:
        return self.groups[ordinal % len(self.groups)]


Lengths = LogNormal | Recorded


@dataclass(frozen=True)
class Wave:
    """A share of the actors that are there goes, `at` so many seconds.

    notice: seconds in which they may finish what they hold; 0 is a loss without any. They do not come back.
    """

    share: float
    at: float
    notice: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Durations in seconds, lengths in tokens. The defaults are those of parts that take no time and never fail.

    A decode step of an engine takes decode_base + decode_each x (sequences that it decodes), at most `sequences` at
    once, and gives each of them a token. Actors stand still while they load weights.
    """

    lengths: Lengths
    decode_base: float
    decode_each: float = 0.0
    sequences: int = 256
    lease_seconds: float = 0.0  # from the coordinator's word to the first decode step: messages, prefill
    score_seconds: float = 0.0  # of one group, by one of the scorers
    scorers: int = 1
    train_seconds: float = 0.0  # of a step, whatever is in it
    train_token_seconds: float = 0.0  # more for each token of completions
    publish_seconds: float = 0.0
    close_seconds: float = 0.0  # from the publication to the end of the step
    checkpoint_every: int = 0  # steps; 0 is never
    checkpoint_seconds: float = 0.0
    eval_every: int = 0  # steps; 0 is never, and none is made after the last step
    eval_seconds: float = 0.0
    slow_share: float = 0.0  # of the actors
    slow_factor: float = 1.0  # how many times longer their decode steps take
    failure_seconds: float = math.inf  # mean life of an actor
    restart_seconds: float = 0.0
    joins: Sequence[tuple[int, float]] = ()  # (actors, seconds at which they join)
    waves: Sequence[Wave] = ()
    drop_share: float = 0.0  # of the groups, by a method's filter
    cores: int | None = None  # of one machine that all processes share; None: each has its own


def decode_seconds(alone: float, full: float, sequences: int) -> tuple[float, float]:
    """(decode_base, decode_each) of an actor that decodes `alone` tokens/s of one sequence, `full` of `sequences`."""
    each = (sequences / full - 1 / alone) / max(sequences - 1, 1)
    return 1 / alone - each, each
