"""Rewards for the length of a completion, in tokens with the end-of-sequence token.

A length reward that also pays wrong answers teaches the policy to fail briefly. So those that depend on correctness
here (`cosine_length`, `l1_max`, `kimi_length`) ask `math_answer.grade` themselves, and abstain where it does; the
others go beside `math_answer` with a small weight. `gold_column` names the one that holds the right answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from rewards.math_answer import Extract, grade
from rewards.reward import Column, rewards

Tokens = Annotated[int, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]


@rewards
def length(completion_ids: Sequence[int], *, target: Tokens, alpha: Amount | None = None) -> float:
    """-alpha * |target - tokens|: 0 at the target; alpha none is 1 / target, so -1 at none and at twice as many tokens.

    Beside `math_answer` this is L1's exact mode, 1[correct] - alpha * |target - tokens|, there with alpha 0.0003.
    Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks", https://arxiv.org/abs/2503.04697
    """
    return -(1 / target if alpha is None else alpha) * abs(target - len(completion_ids))


@rewards
def soft_overlong(completion_ids: Sequence[int], *, max_len: Tokens, cache: Tokens, factor: Amount = 1.0) -> float:
    """0 up to max_len - cache tokens, then falling linearly to -factor at max_len, -factor beyond.

    Yu et al., "DAPO", https://arxiv.org/abs/2503.14476, equation 13 (there factor = 1).
    """
    over = len(completion_ids) - (max_len - cache)
    return -factor * min(1.0, max(0.0, over / cache))


@rewards
def cosine_length(
    completion: str,
    completion_ids: Sequence[int],
    *,
    max_len: Tokens,
    min_wrong: float = -1.0,
    max_wrong: float = -0.5,
    min_correct: float = 0.5,
    max_correct: float = 1.0,
    gold_column: Column = "answer",
    extract: Extract = "marked",
    **columns: Any,
) -> float | None:
    """Correct: from max_correct when short to min_correct at max_len tokens. Wrong: from min_wrong up to max_wrong.

    low + (high - low) / 2 * (1 + cos(pi * min(1, tokens / max_len))).
    Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", https://arxiv.org/abs/2502.03373
    """
    correct = _correct(completion, columns.get(gold_column), extract)
    if correct is None:
        return None
    # Wrong answers run the other way round: the longer the better, since more thought may be what is lacking.
    short, long = (max_correct, min_correct) if correct else (min_wrong, max_wrong)
    return long + (short - long) / 2 * (1 + math.cos(math.pi * min(1.0, len(completion_ids) / max_len)))


@rewards
def l1_max(
    completion: str,
    completion_ids: Sequence[int],
    *,
    budget: Tokens,
    alpha: Amount = 0.01,
    delta: float = 0.5,
    gold_column: Column = "answer",
    extract: Extract = "marked",
    **columns: Any,
) -> float | None:
    """1[correct] * clip(alpha * (budget - tokens) + delta, 0, 1): stay below the budget, no reward for being wrong.

    Aggarwal and Welleck, https://arxiv.org/abs/2503.04697, "L1-Max" (their released code has half the slope).
    """
    correct = _correct(completion, columns.get(gold_column), extract)
    if correct is None:
        return None
    return correct * min(1.0, max(0.0, alpha * (budget - len(completion_ids)) + delta))


@rewards
def kimi_length(
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    gold_column: Column = "answer",
    extract: Extract = "marked",
    **columns: Any,
) -> list[float | None]:
    """1/2 - (tokens - shortest) / (longest - shortest) within the group; wrong ones get at most 0; all equal: 0.

    Kimi Team, "Kimi k1.5", https://arxiv.org/abs/2501.12599, section 2.3.3.
    """
    lengths = [len(ids) for ids in completion_ids]
    shortest, spread = min(lengths, default=0), max(lengths, default=0) - min(lengths, default=0)
    golds = columns.get(gold_column) or [None] * len(lengths)
    values: list[float | None] = []
    for text, right, tokens in zip(completions, golds, lengths, strict=True):
        correct = _correct(text, right, extract)
        place = 0.5 - (tokens - shortest) / spread if spread else 0.0
        values.append(None if correct is None else place if correct else min(0.0, place))
    return values


def _correct(completion: str, gold: object, extract: Extract) -> bool | None:
    """Whether the answer is right; none where that cannot be known."""
    score = grade(completion, gold, extract=extract)
    return bool(score.value) if score.status == "ok" else None
