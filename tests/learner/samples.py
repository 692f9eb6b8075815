"""Configs and groups for the learner's tests: random tokens, two rewards, lengths of every kind."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config import RunConfig
from core.schema import Completion, Group, Prompt, Score

VOCABULARY = 400


def config(model: Path, baseline_column: str | None = None, **learner: Any) -> RunConfig:
    return RunConfig(
        name="t",
        steps=10,
        model={"path": str(model)},
        data={"path": "none.jsonl", "baseline_column": baseline_column},
        rollout={"prompts": 4, "group_size": 4},
        rewards={"components": {"right": {}, "short": {"weight": 0.5}}},
        # AdamW divides by the root of tiny second moments: a large eps keeps it from amplifying rounding.
        learner={**learner, "optimizer": {"lr": 1e-3, "eps": 1e-4, **learner.get("optimizer", {})}},
    )


def pairs(seed: int = 0) -> list[Group]:
    """Given completions of which the first was chosen."""
    return [replace(g, totals=(1.0, 0.0)) for g in groups(size=2, seed=seed, sampled=False)]


def groups(prompts: int = 4, size: int = 4, seed: int = 0, longest: int = 20, sampled: bool = True) -> list[Group]:
    """Groups with rewards 0 and 1 in turn; `sampled` False makes demonstrations of them."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, VOCABULARY) for _ in range(count))

    def completion() -> Completion:
        ids = tokens(draw.randint(1, longest))
        known = (tuple(-5.0 for _ in ids), tuple(0 for _ in ids)) if sampled else ((), ())
        return Completion(ids, *known, text="", finish_reason="stop")

    return [
        Group(
            id=f"g{n}",
            prompt=Prompt(n, "", tokens(draw.randint(1, 9)), {"value": 0.25}),
            completions=tuple(completion() for _ in range(size)),
            components={
                "right": tuple(Score("ok", float((n + i) % 2)) for i in range(size)),
                "short": tuple(Score("ok", float(i % 3 == 0)) for i in range(size)),
            },
            columns={
                "right": tuple(float((n + i) % 2) for i in range(size)),
                "short": tuple(float(i % 3 == 0) for i in range(size)),
            },
            weights={"right": (1.0,) * size, "short": (0.5,) * size},
            totals=tuple(float((n + i) % 2) for i in range(size)) if sampled else (),
            answers=tuple(str(i % 3) for i in range(size)),
            greedy=Group(f"g{n}", Prompt(n, "", (5,)), (completion(),), totals=(0.5,)) if sampled else None,
        )
        for n in range(prompts)
    ]
