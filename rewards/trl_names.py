"""The rewards of TRL 1.16 under their names there and with their options, for configs that come from it.

    trl.rewards.get_soft_overlong_punishment(512, 128)
    ->   soft_overlong: {fn: get_soft_overlong_punishment, max_completion_len: 512, soft_punish_cache: 128}

What is right is decided by `math_answer.grade`, on boxed answers; TRL also takes formulas between dollars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from core.schema import Score
from rewards import length, repetition
from rewards.format import think_format
from rewards.math_answer import grade
from rewards.reward import rewards

Count = Annotated[int, Field(gt=0)]


@rewards
def accuracy_reward(completion: str, solution: Any) -> Score:
    """TRL's name for `math_answer` on boxed answers, the right one in the column `solution`."""
    return grade(completion, solution, extract="boxed")


@rewards
def reasoning_accuracy_reward(
    completion: str, solution: Any, *, reasoning_delimiters: tuple[str, ...] = ("</think>",)
) -> Score:
    """TRL: `accuracy_reward` of what follows the first delimiter that occurs; 0 where none does."""
    mark = next((mark for mark in reasoning_delimiters if mark in completion), None)
    score = grade("" if mark is None else completion.rpartition(mark)[2], solution, extract="boxed")
    # As in TRL, thinking that does not end is wrong even where there is nothing to compare with.
    return Score("ok", 0.0, "no end of the reasoning") if mark is None else score


@rewards
def think_format_reward(completion: str) -> float:
    """TRL's name for `think_format`."""
    return think_format(completion)


@rewards
def get_soft_overlong_punishment(
    completion_ids: Sequence[int], *, max_completion_len: Count, soft_punish_cache: Count
) -> float:
    """TRL's name for `soft_overlong`."""
    return length.soft_overlong(completion_ids, max_len=max_completion_len, cache=soft_punish_cache)


@rewards
def get_cosine_scaled_reward(
    completion: str,
    completion_ids: Sequence[int],
    solution: Any,
    *,
    max_len: Count,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> float | None:
    """TRL's name for `cosine_length` on boxed answers, the right one in the column `solution`."""
    return length.cosine_length(
        completion,
        completion_ids,
        max_len=max_len,
        min_wrong=min_value_wrong,
        max_wrong=max_value_wrong,
        min_correct=min_value_correct,
        max_correct=max_value_correct,
        gold_column="solution",
        extract="boxed",
        solution=solution,
    )


@rewards
def get_repetition_penalty_reward(
    completion_ids: Sequence[int], *, ngram_size: Count = 3, max_penalty: float = -1.0
) -> float:
    """TRL's name for `repetition`."""
    return repetition.repetition(completion_ids, n=ngram_size, max_penalty=max_penalty)
