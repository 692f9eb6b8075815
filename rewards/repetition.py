"""Penalties for a completion that says the same thing again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rewards.reward import rewards


@rewards
def repetition(
    completion_ids: Sequence[int], *, n: Annotated[int, Field(ge=1)] = 3, max_penalty: float = -1.0
) -> float:
    """max_penalty * (1 - distinct n-grams / n-grams) of the tokens: 0 without repeats, near max_penalty in a loop.

    Fewer than n tokens give 0. On token ids, so that it is the same in every language (open-r1 counts words).
    """
    total = len(completion_ids) - n + 1
    if total <= 0:
        return 0.0
    distinct = len({tuple(completion_ids[i : i + n]) for i in range(total)})
    return max_penalty * (1 - distinct / total)
