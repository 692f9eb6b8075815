"""What a person must be told of a step: a name, what was seen against which threshold, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """One finding."""

    name: str
    text: str
    advice: str
    about: str = ""  # which component or objective
    pause: int = 20  # steps for which it is not said again


CORRELATION = -0.7  # of two objectives within groups
SATURATED = 0.95  # share of an objective's values at its upper bound
FAILING = 0.05  # share of completions that a component could not score


def warnings(metrics: Mapping[str, float], run: Path) -> list[Finding]:
    """The findings of a step, from its metrics; `run` is the run's folder."""
    return [*_updates(metrics, run), *_rewards(metrics), *_each(metrics)]


def _updates(metrics: Mapping[str, float], run: Path) -> Iterator[Finding]:
    if metrics.get("optim/skipped", 0) > 0:
        text = f"{metrics['optim/skipped']:g} update(s) skipped: loss or gradient was not finite"
        yield Finding("skipped", text, f"the weights stayed as they were; the batch is in {run / 'skipped'}", pause=0)
    if metrics.get("optim/empty", 0) > 0:
        text = f"{metrics['optim/empty']:g} update(s) had nothing to train on"
        advice = "every completion was filtered, rejected or empty: see policy/filtered, policy/rejected"
        yield Finding("empty", text, advice, pause=0)


def _rewards(metrics: Mapping[str, float]) -> Iterator[Finding]:
    if metrics.get("overoptimization/alarm", 0) > 0:
        drop = metrics.get("overoptimization/drop", math.nan)  # where gold has had no value for a while
        text = f"the gold component is {drop:.3f} below its peak while the reward rises"
        yield Finding("overoptimization", text, "the reward is being gamed: constrain it, use an ensemble, or stop")
    if metrics.get("weighting/slow", 0) > 0:
        text = f"{metrics['weighting/slow']:g} multiplier(s) beyond 10"
        yield Finding(
            "multiplier", text, "the constraint is out of reach, or the policy's lr too high: loosen or lower"
        )


def _each(metrics: Mapping[str, float]) -> Iterator[Finding]:
    """Findings about single objectives and components."""
    for name, value in metrics.items():
        kind, _, what = name.partition("/")
        part, _, objective = what.partition("/")
        if kind == "diagnostics" and part == "saturated" and value > SATURATED:
            text = f"{value:.0%} of '{objective}' at its upper bound"
            yield Finding("saturated", text, "it is solved or gamed: lower its weight, or harder prompts", what)
        if kind == "diagnostics" and part == "correlation" and value < CORRELATION:
            text = f"{objective.replace('/', ' and ')} correlate at {value:.2f} within groups"
            yield Finding("divergence", text, "the policy writes what they judge differently: read the rollouts", what)
        if kind == "reward" and what.endswith("_failed") and value > FAILING:
            text = f"'{what.removesuffix('_failed')}' failed on {value:.0%} of the completions"
            yield Finding(
                "failing", text, "read `missing` in the rollouts; above rewards.max_failed the run stops", what
            )
