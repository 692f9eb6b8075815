"""Rollouts that nobody sampled, for benches of the learner: random tokens, lengths as they are in practice."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from core.config import RunConfig
from core.schema import Completion, Group, Prompt

SIGMA = 0.8


def log_normal(count: int, mean: float, longest: int) -> list[int]:
    """`count` lengths: the quantiles of the distribution, so no luck is in them, cut at `longest`.

    >>> log_normal(4, 64, 256)
    [18, 36, 60, 117]
    """
    normal = NormalDist(math.log(mean) - SIGMA**2 / 2, SIGMA)
    return [min(max(round(math.exp(normal.inv_cdf((i + 0.5) / count))), 1), longest) for i in range(count)]


def groups(prompts: int, size: int, prompt_tokens: int, mean: float, vocabulary: int, seed: int = 0) -> list[Group]:
    """`prompts` groups of `size` completions, up to four times as long as their mean; rewards 0 and 1 in turn."""
    draw = random.Random(seed)
    lengths = log_normal(prompts * size, mean, round(4 * mean))
    draw.shuffle(lengths)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(10, vocabulary) for _ in range(count))

    def completion() -> Completion:
        ids = tokens(lengths.pop())
        return Completion(ids, (-10.0,) * len(ids), (0,) * len(ids), text="", finish_reason="stop")

    return [
        Group(
            id=f"g{n}",
            prompt=Prompt(n, "", tokens(prompt_tokens)),
            completions=tuple(completion() for _ in range(size)),
            totals=tuple(float(i % 2) for i in range(size)),
        )
        for n in range(prompts)
    ]


def trained(groups: list[Group]) -> int:
    """Tokens that are trained on: those of completions."""
    return sum(len(completion.token_ids) for group in groups for completion in group.completions)


def at_version(groups: list[Group], version: int) -> list[Group]:
    """The same, as if the present weights had sampled them."""

    def now(completion: Completion) -> Completion:
        return replace(completion, versions=(version,) * len(completion.token_ids))

    return [replace(group, completions=tuple(map(now, group.completions))) for group in groups]


def config(model: str, dtype: str = "float32", **learner: Any) -> RunConfig:
    """GRPO without a reference, one update a step."""
    return RunConfig.model_validate(
        {
            "name": "bench",
            "steps": 1_000_000,
            "method": {"row": "grpo", "kl": "none"},
            "model": {"path": model, "dtype": dtype},
            "data": {"path": "none.jsonl"},
            "rewards": {"components": {"right": {}}},
            "learner": learner,
        }
    )
