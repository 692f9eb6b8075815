"""Credit for part of an answer, and means of two classifiers that cannot be traded off to nothing.

Not registered as rewards: functions of what was extracted or scored, for rewards to call.
"""

from __future__ import annotations

import math
from typing import NamedTuple


def soft_multichoice(predicted: str, gold: str) -> float:
    """|P| / |Y| if P is a subset of Y, else 0, of comma-separated labels; 0 if either is empty.

    Spaces are removed, blank labels dropped, case matters. The authors let a symbolic match count 1 first and add the
    format reward. TW-GRPO, "Reinforcing Video Reasoning with Focused Thinking", arXiv 2505.24718 [code].

    >>> soft_multichoice("A", "A,C"), soft_multichoice("A,B", "A,C")
    (0.5, 0.0)
    """
    named, right = _labels(predicted), _labels(gold)
    return len(named) / len(right) if named and right and named <= right else 0.0


def _labels(text: str) -> set[str]:
    return {label for part in text.split(",") if (label := "".join(part.split()))}


class Means(NamedTuple):
    """Three ways to join two scores."""

    arithmetic: float  # w_a a + w_b b
    geometric: float  # a^w_a b^w_b
    harmonic: float  # (w_a + w_b) / (w_a / a + w_b / b)


def weighted_means(a: float, b: float, wa: float, wb: float) -> Means:
    """Means of two scores in [0, 1] under weights that add up to 1; geometric and harmonic are 0 if either is <= 0.

    "LLM-based Rewriting of Inappropriate Argumentation using Reinforcement Learning from Machine Feedback", arXiv
    2406.03363 [code]: a appropriateness, b similarity, arithmetic with w_a in .4 .. .6; w_a = 1 is the control that
    shows the loss of content.
    """
    arithmetic = wa * a + wb * b
    if a <= 0 or b <= 0:
        return Means(arithmetic, 0.0, 0.0)
    return Means(arithmetic, math.exp(wa * math.log(a) + wb * math.log(b)), (wa + wb) / (wa / a + wb / b))
