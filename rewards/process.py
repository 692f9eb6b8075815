"""Rewards of the steps of a reasoning: as token advantages, or collapsed to one number.

Process supervision of DeepSeekMath, arXiv 2402.03300 [from other implementations]. Process reward models are hacked by
many trivially right steps and by repeating verified lines: cap the number of scored steps, or score up to the first
wrong one (`counted`), and log the correlation of the advantage with the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rewards.numeric import Floats, finite, mean, sigmoid, std

How = Literal["min", "mean", "last", "prod", "mean_logit"]


def process_advantages(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    ddof: int = 0,
    eps: float = 1e-6,
    per_step: bool = False,
) -> list[Floats]:
    """Token advantages of one group, ragged [i][t]: the sum of the normalised rewards of this and later steps.

        r~ = (r - mean) / (std + eps) over all steps of the group;   A_it = sum over j with e_ij >= t of r~_ij

    `step_ends` are 0-based token positions; tokens after the last step get 0, a missing step adds 0. The papers do not
    say whether std divides by n (ddof 0). The sum grows with the number of steps; `per_step` (ours) divides it by the
    number of remaining steps.
    """
    pool = finite([reward for rewards in step_rewards for reward in rewards])
    middle, spread = mean(pool), std(pool, ddof) + eps
    found = []
    for rewards, ends, length in zip(step_rewards, step_ends, lengths, strict=True):
        normalised = (finite(rewards) - middle) / spread
        counts = (np.asarray(ends, dtype=np.int64)[:, None] >= np.arange(length)) & np.isfinite(normalised)[:, None]
        total = np.nan_to_num(normalised) @ counts
        found.append(total / np.maximum(counts.sum(axis=0), 1) if per_step else total)
    return found


def with_outcome(outcome: Floats, process: Sequence[Floats], *, weight: float = 1.0) -> list[Floats]:
    """Token advantages A_outcome + weight A_process, each normalised on its own before: outcome [B], process ragged."""
    return [own + weight * tokens for own, tokens in zip(outcome, process, strict=True)]


def collapse(scores: Sequence[float], how: How = "min") -> float:
    """One number of a completion's step scores: min (usual for verification), mean, last, prod or mean_logit.

    mean_logit = sigmoid(mean logit), probabilities clipped to [1e-6, 1 - 1e-6]. Missing steps are left out; NaN of
    none.
    """
    known = finite(scores)
    known = known[np.isfinite(known)]
    if not known.size:
        return float("nan")
    if how == "mean_logit":
        p = np.clip(known, 1e-6, 1 - 1e-6)
        return float(sigmoid(np.mean(np.log(p / (1 - p)))))
    return float({"min": known.min(), "mean": known.mean(), "last": known[-1], "prod": known.prod()}[how])


def counted(scores: Sequence[float], *, limit: int | None = None, wrong_below: float | None = None) -> list[float]:
    """The step scores that count: the first `limit`, and none after the first one below `wrong_below` (ours)."""
    kept = list(scores[:limit])
    wrong = next((i for i, s in enumerate(kept) if wrong_below is not None and s < wrong_below), len(kept))
    return kept[: wrong + 1]
