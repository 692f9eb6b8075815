"""Rules for the length of a completion as functions of token counts and correctness, some with state.

`rewards.length` has the rewards that a config names; these are for those who know correctness, or the group, already.
Give length rewards to correct completions only, else the policy learns to fail briefly.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def l1_exact(correct: bool, tokens: float, target: float, *, alpha: float = 0.0003) -> float:
    """1[correct] - alpha |target - tokens|.

    Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks", arXiv 2503.04697 [code].
    """
    return float(correct) - alpha * abs(target - tokens)


def l1_max_released(correct: bool, tokens: float, budget: float, *, alpha: float = 0.01) -> float:
    """1[correct] (clip(alpha (budget - tokens), -1, 1) + 1) / 2: L1-Max as released, half the slope of `l1_max`."""
    return float(correct) * (min(1.0, max(-1.0, alpha * (budget - tokens))) + 1) / 2


def drpo_weights(lengths: Sequence[float], correct: Sequence[bool], *, max_len: float, temper: float) -> list[float]:
    """exp((1 - tokens / max_len) / temper) over a group's correct ones, scaled to mean 1; the wrong ones get 0.

    DRPO, arXiv 2510.04474 [formula of the authors' loss; temper is its Lambda, 0.1, and there a group's weights sum to
    1]. In GRPO (ours): multiply the positive advantages by these, so that length never makes a right answer's advantage
    negative, which a subtracted length penalty can.
    """
    right = [length for length, is_right in zip(lengths, correct, strict=True) if is_right]
    if not right:
        return [0.0] * len(lengths)
    shortest = min(right)  # as reference: the exponent then never overflows
    size = [math.exp((shortest - length) / max_len / temper) for length in right]
    average = math.fsum(size) / len(size)
    found = iter(size)
    return [next(found) / average if is_right else 0.0 for is_right in correct]


def traac_length(
    tokens: float,
    pass_rate: float,
    history: Sequence[float],
    *,
    easy: float = 0.8,
    medium: float = 0.3,
    scales: tuple[float, float, float] = (1.0, 0.75, 0.5),
    eps: float = 1e-6,
) -> float:
    """d max(lin, soft) of a correct completion, from the lengths of earlier correct ones of its source and class.

        lin = clip((max - tokens) / max(max - min, eps), 0, 1);   soft = sigmoid(-(tokens - median) / (0.1 median))

    d: scale of the prompt's class, `easy` from a pass rate of 0.8, `medium` from 0.3, else hard. No history: 0.
    TRAAC, arXiv 2510.01581 [code]; its total is 4 correct + 0.25 + 0.25 for the format + this.
    """
    if not history:
        return 0.0
    low, high, middle = min(history), max(history), statistics.median(history)
    linear = min(1.0, max(0.0, (high - tokens) / max(high - low, eps)))
    exponent = (tokens - middle) / max(0.1 * middle, eps)
    soft = 1 / (1 + math.exp(min(exponent, 700.0)))
    return scales[_class(pass_rate, easy, medium)] * max(linear, soft)


def _class(pass_rate: float, easy: float = 0.8, medium: float = 0.3) -> int:
    """0 easy, 1 medium, 2 hard."""
    return 0 if pass_rate >= easy else 1 if pass_rate >= medium else 2


class TraacLengths:
    """Lengths of correct completions of the last `window` batches, by source and difficulty class.

    Score a batch from what is here, then `add` it. State: those lengths.
    """

    def __init__(self, *, window: int = 10) -> None:
        self.batches: deque[dict[str, list[float]]] = deque(maxlen=window)

    def reward(self, tokens: float, correct: bool, source: str, pass_rate: float) -> float:
        """`traac_length` of one completion from the lengths so far; 0 for a wrong one."""
        return traac_length(tokens, pass_rate, self.history(source, pass_rate)) if correct else 0.0

    def history(self, source: str, pass_rate: float) -> list[float]:
        """The lengths that a completion of this source and pass rate is compared with, oldest first."""
        key = f"{_class(pass_rate)}/{source}"
        return [length for batch in self.batches for length in batch.get(key, [])]

    def add(self, rows: Iterable[tuple[str, float, float]]) -> None:
        """Take in one batch: (source, pass rate of the prompt, tokens) of its correct completions."""
        batch: dict[str, list[float]] = {}
        for source, pass_rate, tokens in rows:
            batch.setdefault(f"{_class(pass_rate)}/{source}", []).append(float(tokens))
        self.batches.append(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": [dict(batch) for batch in self.batches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches.clear()
        self.batches.extend(state["batches"])


class Conciseness:
    """1 for a completion shorter than the mean length of all completions so far, the current batch included, else 0.

    The objective of "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting", arXiv
    2509.11452 [code]. State: that mean and its count.
    """

    def __init__(self) -> None:
        self.count, self.mean = 0, 0.0

    def __call__(self, lengths: Sequence[float]) -> list[float]:
        """Take in a batch's lengths, then score them."""
        if lengths:
            self.count += len(lengths)
            self.mean += math.fsum(length - self.mean for length in lengths) / self.count
        return [float(length < self.mean) for length in lengths]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean = state["count"], state["mean"]
