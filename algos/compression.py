"""TRAAC: shorten the thinking of easy prompts, guided by attention.

"Think Right: Learning to Mitigate Under-Over Thinking via Adaptive, Attentive Compression", arXiv 2510.01581.
Difficulty, amount of eviction and length reward were run against the authors' code. Correct rows lose the thinking
steps that the end of the thinking attends to least, and their answers are sampled again; the edited rows join the
group, with `old_logprobs` recomputed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TARGET = {"easy": 0.6, "medium": 0.4, "hard": 0.2}
SCALE = {"easy": 1.0, "medium": 0.75, "hard": 0.5}
CUES = ("Wait", "But", "Alternatively", "However", "Hmm", "Let me")


def difficulty(correct: Sequence[float], *, easy: float = 0.8, medium: float = 0.3) -> str:
    """Band of a prompt by the pass rate of its rollouts: "easy", "medium" or "hard"."""
    rate = sum(correct) / len(correct)
    return "easy" if rate >= easy else "medium" if rate >= medium else "hard"


def split_steps(thinking: str, *, cues: Sequence[str] = CUES) -> list[str]:
    """Thinking text cut before each cue word; the pieces joined give the text."""
    pieces = re.split(r"(?=\b(?:" + "|".join(map(re.escape, cues)) + r")\b)", thinking)
    return [piece for piece in pieces if piece]


class Eviction(NamedTuple):
    uniformity: float
    fraction: float
    evict: list[int]


def evict_steps(
    scores: Sequence[float],
    band: str,
    *,
    target: Mapping[str, float] = TARGET,
    uniform_cut: float = 0.8,
    max_evict: float = 0.8,
) -> Eviction:
    """Which thinking steps to remove, from their scores [K]: mean attention per token from the end of the thinking.

        u = entropy of the normalised scores / ln K;   fraction = 0 if u > uniform_cut else min(target (1 - u),
        max_evict)

    then the int(K fraction) lowest steps go, ties by index (ours); indices ascending. One step, or no attention: u = 1.
    """
    u = _uniformity(scores)
    fraction = 0.0 if u > uniform_cut else min(target[band] * (1 - u), max_evict)
    order = sorted(range(len(scores)), key=lambda k: (scores[k], k))
    return Eviction(u, fraction, sorted(order[: int(len(scores) * fraction)]))


def _uniformity(scores: Sequence[float]) -> float:
    total = sum(scores)
    if len(scores) <= 1 or total <= 0:
        return 1.0
    return -sum(s / total * math.log(s / total) for s in scores if s > 0) / math.log(len(scores))


def length_reward(
    length: float, correct: bool, band: str, history: Sequence[float], *, scale: Mapping[str, float] = SCALE
) -> float:
    """Reward for a short correct row, from the lengths of correct rows of the same source and band in recent batches.

        lin = clip((max - L) / max(max - min, 1e-6), 0, 1);   soft = 1 / (1 + exp((L - med) / (0.1 med)))
        scale * max(lin, soft);   0 for a wrong row and without history

    The exponent is held within [-60, 60] (ours; the release overflows).
    """
    if not correct or not history:
        return 0.0
    low, high, middle = min(history), max(history), statistics.median(history)
    linear = min(max((high - length) / max(high - low, 1e-6), 0.0), 1.0)
    exponent = (length - middle) / max(0.1 * middle, 1e-6)
    soft = 1 / (1 + math.exp(min(max(exponent, -60.0), 60.0)))
    return scale[band] * max(linear, soft)


class LengthHistory:
    """Lengths of correct rows by (data source, band), of the last `window` batches."""

    def __init__(self, *, window: int = 10) -> None:
        self.batches: deque[dict[str, list[float]]] = deque(maxlen=window)

    def add(self, rows: Sequence[tuple[str, str, float]]) -> None:
        """Take in one batch: (source, band, length) of its correct rows."""
        batch: dict[str, list[float]] = {}
        for source, band, length in rows:
            batch.setdefault(f"{source}/{band}", []).append(length)
        self.batches.append(batch)

    def lengths(self, source: str, band: str) -> list[float]:
        return [length for batch in self.batches for length in batch.get(f"{source}/{band}", [])]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": [dict(batch) for batch in self.batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.clear()
        self.batches.extend(state["batches"])
