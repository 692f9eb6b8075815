"""A run's files as rows, for those who only read: whatever is missing is empty, whatever cannot be read is told.

metrics.jsonl becomes series: name -> [(step, value)], without the values that do not exist. A last line that a running
or killed run left unfinished is no mistake; any other line that cannot be read is counted in `notes`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError, nearest
from core.loading import read_yaml

Row = Mapping[str, Any]
Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Evaluated:
    """One benchmark after so many steps. `how` says how it was asked: only equal ones may be compared."""

    benchmark: str
    how: str
    step: int
    result: Row  # as in the summary: accuracy, low, high, problems, samples, pass_at ...
    problems: Path  # its per-problem rows


@dataclass(frozen=True)
class RunFiles:
    """What a report needs of a run's folder."""

    path: Path
    label: str
    config: Row
    environment: Row
    attempts: int
    metrics: Mapping[str, Series]
    times: Sequence[float]  # when each row of the metrics was written, seconds since 1970
    evaluations: Sequence[Evaluated]
    rollouts: Sequence[Path]  # one file a step, in order
    warnings: Sequence[Row]
    notes: Sequence[str]  # what could not be read

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names of the metrics that begin with it."""
        return [name.removeprefix(prefix) for name in self.metrics if name.startswith(prefix)]

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(max((points[-1][0] for points in self.metrics.values()), default=0))

    @property
    def components(self) -> list[str]:
        """Reward components, those of the config first; one that scores several things has several, `name/key`."""
        configured = mapping(self.rewards.get("components"))
        measured = [n.removesuffix("_failed") for n in self.names("reward/") if n.endswith("_failed")]
        parts = {name.partition("/")[0] for name in measured if "/" in name}
        return [name for name in union([*configured, *measured]) if name not in parts or name in measured]

    @property
    def rewards(self) -> Row:
        """The config's section `rewards`."""
        return mapping(self.config.get("rewards"))


def read_run(path: Path, label: str | None = None) -> RunFiles:
    """The files of a run. Raises UserError if the folder holds no run at all."""
    if not (path / "metrics.jsonl").exists() and not (path / "config.yaml").exists():
        runs = sorted(str(p.parent) for p in path.parent.glob("*/metrics.jsonl")) if path.parent.is_dir() else []
        why = f"{path} holds no run (no metrics.jsonl, no config.yaml)"
        raise UserError(f"RUN: {why}; {nearest(str(path), runs)}" if runs else f"RUN: {why}")
    notes: list[str] = []
    rows = read_rows(path / "metrics.jsonl", notes)
    return RunFiles(
        path=path,
        label=label or path.resolve().name,
        config=_config(path / "config.yaml", notes),
        environment=_object(path / "environment.json", notes),
        attempts=max(1, len(list(path.glob("environment*.json")))),
        metrics=series_of(rows),
        times=[float(row["time"]) for row in rows if _is_number(row.get("time"))],
        evaluations=_evaluations(path / "evals", notes),
        rollouts=sorted((path / "rollouts").glob("step-*.jsonl"), key=_step),
        warnings=read_rows(path / "warnings.jsonl", notes),
        notes=notes,
    )


def read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines; without the file none. Lines that are none are counted in `notes`."""
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [_parsed(line) for line in lines if line.strip()]
    bad = sum(row is None for row in rows)
    if bad:
        notes.append(f"{path.name}: {bad} of {len(rows)} lines are not readable and left out")
    return [row for row in (*rows, _parsed(last)) if row is not None]


def series_of(rows: Iterable[Row]) -> dict[str, Series]:
    """name -> (step, value) in the order of steps; of a step written twice the last counts."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if not _is_number(row.get("step")):
            continue
        for name, value in row.items():
            if name not in ("step", "time") and _is_number(value):
                found.setdefault(name, {})[float(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def common_steps(series: Sequence[Series]) -> list[float]:
    """Steps that every one of the series has."""
    steps = [{step for step, _ in points} for points in series]
    return sorted(set.intersection(*steps)) if steps else []


def at_steps(points: Series, steps: Iterable[float]) -> list[float]:
    """The values at these steps, which the series must have."""
    values = dict(points)
    return [values[step] for step in steps]


def mean(values: Sequence[float]) -> float:
    """The mean of some values."""
    return sum(values) / len(values)


def last_mean(points: Series, share: float = 0.1) -> float:
    """The mean of the last tenth of a series, at least of one value."""
    return mean([y for _, y in points[-max(1, round(len(points) * share)) :]])


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted names.

    >>> leaves({"a": {"b": 1, "c": {}}})
    {'a.b': 1, 'a.c': {}}
    """
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    below = (leaves(value, f"{prefix}.{key}".lstrip(".")) for key, value in tree.items())
    return {name: value for each in below for name, value in each.items()}


def union(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of first appearance."""
    return list(dict.fromkeys(names))


def _evaluations(folder: Path, notes: list[str]) -> list[Evaluated]:
    """Every summary whose folder's name ends with the step, in the order of steps."""
    found = []
    for path in sorted(folder.glob("*/*.summary.json")):
        summary, step = _object(path, notes), _step(path.parent)
        result = mapping(summary.get("result"))
        if step < 0 or not all(_is_number(result.get(name)) for name in ("accuracy", "low", "high")):
            continue
        sampling = mapping(summary.get("sampling"))
        how = f"avg@{summary.get('samples', 1)}, temperature {sampling.get('temperature', '?')}"
        how += f", {result.get('problems', '?')} problems, at most {sampling.get('max_tokens', '?')} tokens"
        name = path.name.removesuffix(".summary.json")
        found.append(Evaluated(name, how, step, result, path.with_name(f"{name}.jsonl")))
    return sorted(found, key=lambda each: each.step)


def _config(path: Path, notes: list[str]) -> Row:
    if not path.exists():
        return {}
    try:
        return read_yaml(path)[0]
    except UserError as error:
        notes.append(str(error))
        return {}


def _object(path: Path, notes: list[str]) -> Row:
    """A file that is one JSON object."""
    if not path.exists():
        return {}
    found = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        notes.append(f"{path.name}: not readable, left out")
    return found or {}


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _step(path: Path) -> int:
    """The number at the end of a file's or folder's name; -1 without one."""
    digits = re.search(r"(\d+)$", path.stem)
    return int(digits[1]) if digits else -1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mapping(value: Any) -> Row:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
