"""The verb `fit-thresholds`: where to hold the components of a constrained run, from runs that were not constrained.

Every few steps of each run are a point: the means of the components, and of a gold score. A surface is fitted, and its
highest point among places with data printed as `thresholds` (`rewards.threshold_search.proxy_point`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError, nearest

MOST = 4  # components: the grid has 21 places in each
EVERY = 5  # steps whose mean is a point

Point = tuple[list[float], float]


def fit_thresholds(arguments: argparse.Namespace) -> int:
    """`alignlab fit-thresholds RUN... --gold METRIC [--components a,b] [--degree 2]`. Raises UserError."""
    from rewards.threshold_search import proxy_point

    runs = [_steps(Path(run)) for run in arguments.runs]
    names = arguments.components.split(",") if arguments.components else _components(runs, arguments.gold)
    seen = {metric for steps in runs for row in steps for metric in row}
    # Thresholds are compared with shaped scores, unless the policy is told otherwise.
    metrics = [f"reward/{n}_shaped" if f"reward/{n}_shaped" in seen else f"reward/{n}" for n in names]
    if len(names) > MOST:
        raise UserError(f"--components: a surface over {len(names)} of them is too large; name at most {MOST}")
    for name in (*metrics, arguments.gold):
        _known(name, runs)
    points = [point for steps in runs for point in points_of(steps, metrics, arguments.gold)]
    table = np.array([means for means, _ in points], dtype=np.float64).reshape(-1, len(names))
    try:
        found = proxy_point(table, np.array([gold for _, gold in points]), degree=arguments.degree)
    except ValueError as error:
        raise UserError(f"{error}; name more or longer runs, fewer --components, or a lower --degree") from None
    print(f"# {len(points)} points; the fit expects {arguments.gold} {found.value:.4g} there")
    print("thresholds: {" + ", ".join(f"{n}: {v:.4g}" for n, v in zip(names, found.point, strict=True)) + "}")
    return 0


def points_of(steps: Sequence[dict[str, Any]], metrics: Sequence[str], gold: str) -> Iterator[Point]:
    """Means over every `EVERY` steps, and the gold score's mean over those that have one; none where it is missing."""
    for start in range(0, len(steps), EVERY):
        stretch = steps[start : start + EVERY]
        means = [_mean([row.get(name) for row in stretch]) for name in metrics]
        score = _mean([row.get(gold) for row in stretch])
        if all(map(math.isfinite, (*means, score))):
            yield means, score


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else math.nan


def _steps(run: Path) -> list[dict[str, Any]]:
    """The steps of a run, each with what the evaluation after it found."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: no run; name a folder below runs/ that holds metrics.jsonl")
    merged: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged) if "reward/total" in merged[step]]


def _components(runs: Sequence[Sequence[dict[str, Any]]], gold: str) -> list[str]:
    """The objectives: what the runs have weighed."""
    weighed = [name for steps in runs for row in steps[:1] for name in row if name.startswith("weighting/weight/")]
    names = [name.removeprefix("weighting/weight/") for name in dict.fromkeys(weighed)]
    return [name for name in names if f"reward/{name}" != gold]


def _known(metric: str, runs: Sequence[Sequence[dict[str, Any]]]) -> None:
    names = {name for steps in runs for row in steps for name in row}
    if metric not in names:
        raise UserError(f"{metric}: no run has this metric; {nearest(metric, names)}")
