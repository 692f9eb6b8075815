"""The report's first and last tables: what a run was and what it reached; its config and its machine.

Pure functions of `RunFiles`; only the gain on a benchmark reads the per-problem rows of `evals/`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from alignlab.markup import Markup, Text, join, number, table, tag
from alignlab.plots import Line, Point, intervals_plot, round_range
from alignlab.report_curves import colour_of
from alignlab.run_files import Evaluated, RunFiles, leaves, mapping, read_rows, union
from core.loading import parse_config

REQUIRED = {"name": "any", "steps": 1, "model": {"path": "-"}, "data": {"path": "-"}}


# ---------------------------------------------------------------- what it was
def facts(runs: Sequence[RunFiles]) -> Markup:
    """Steps, method, model, rewards, time."""
    return _compared(runs, [_facts(run) for run in runs])


def _facts(run: RunFiles) -> dict[str, str]:
    config = run.config
    found: dict[str, str] = {}
    found["steps"] = f"{run.steps} of {config['steps']}" if "steps" in config else str(run.steps)
    if "method" in config:
        found["method"] = _method(config["method"])
    for name in ("model", "data"):
        if path := mapping(config.get(name)).get("path"):
            found[name] = str(path)
    rollout = mapping(config.get("rollout"))
    if {"prompts", "group_size"} <= rollout.keys():
        found["a step"] = f"{rollout['prompts']} prompts × {rollout['group_size']} completions"
    if run.components:
        policy = mapping(run.rewards.get("weighting")).get("policy")
        found["rewards"] = ", ".join(run.components) + (f"; weighting: {policy}" if policy else "")
    if total := run.metrics.get("reward/total"):
        found["total reward"] = " → ".join(number(value) for value in Line(total).ends())
    found["time"] = _time(run)
    if run.warnings:
        found["warnings"] = str(len(run.warnings))
    return {name: value for name, value in found.items() if value}


def _method(method: Any) -> str:
    """A row of the table of methods, or a row with changed parts."""
    if not isinstance(method, Mapping):
        return str(method)
    parts = ", ".join(f"{name}: {_plain(value)}" for name, value in method.items() if name != "row")
    row = str(method.get("row", "parts"))
    return f"{row} ({parts})" if parts else row


def _time(run: RunFiles) -> str:
    """Wall time from the command to the last row, and what of it were steps and evaluations; "" where unknown."""
    parts = {name: sum(y for _, y in run.metrics.get(f"time/{name}", ())) for name in ("step", "eval", "checkpoint")}
    words = {"step": "steps", "eval": "evaluations", "checkpoint": "checkpoints"}
    told = ", ".join(f"{words[name]} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    if run.attempts > 1:  # The time between two attempts is nobody's
        return f"{run.attempts} attempts: {told}"
    try:
        whole = run.times[-1] - datetime.fromisoformat(run.environment["time"]).timestamp()
    except (IndexError, KeyError, TypeError, ValueError):
        return told
    if whole < 0:  # the rows are older than the environment: copied from elsewhere
        return told
    return f"{duration(whole)} ({told})" if told else duration(whole)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(3.21), duration(200), duration(7500)
    ('3.2 s', '3 min 20 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# ---------------------------------------------------------------- what it reached
def benchmarks(runs: Sequence[RunFiles]) -> Markup:
    """Each benchmark before and after, with 95 % intervals; the gain is paired by problem."""
    found = [(i, own) for i, run in enumerate(runs) for own in _same(run.evaluations)]
    found.sort(key=lambda pair: pair[1][0].benchmark)
    if not found:
        return Markup("")
    values = [own[k].result[name] for _, own in found for k in (0, -1) for name in ("low", "high", "accuracy")]
    low, high = round_range(values)
    rows = [_benchmark(runs, i, own, (low, high)) for i, own in found]
    axis = f"{number(low)} to {number(high)}"
    head = ["benchmark", "how", "before", "after", "gain, by problem", axis]
    return table(head, rows, class_="benchmarks")


def _benchmark(runs: Sequence[RunFiles], i: int, own: Sequence[Evaluated], axis: Point) -> list[Text]:
    first, last = own[0], own[-1]
    name = f"{first.benchmark}: {runs[i].label}" if len(runs) > 1 else first.benchmark
    ends = [first, last] if len(own) > 1 else [last]
    bars = [(colour_of(i), (e.result["low"], e.result["high"]), e.result["accuracy"]) for e in ends]
    before = _accuracy(first) if len(own) > 1 or not first.step else "–"
    after = _accuracy(last) if last.step else "–"
    difference = gain(first, last) if len(own) > 1 else None
    told: Text = "–"
    if difference:
        ends_ = f" [{difference[1]:+.3f}, {difference[2]:+.3f}]"
        told = tag("span", tag("b", f"{difference[0]:+.3f}"), ends_, class_="number")
    return [name, first.how, before, after, told, intervals_plot(bars, axis)]


def _same(evaluations: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """Those that may be compared, together, in the order of steps."""
    found: dict[tuple[str, str], list[Evaluated]] = {}
    for each in evaluations:
        found.setdefault((each.benchmark, each.how), []).append(each)
    return [*found.values()]


def _accuracy(each: Evaluated) -> Text:
    result = each.result
    ends = f" [{result['low']:.3f}, {result['high']:.3f}]"
    told = tag("span", tag("b", f"{result['accuracy']:.3f}"), ends, class_="number")
    return join((told, tag("div", f"after step {each.step}", class_="note")))


def gain(before: Evaluated, after: Evaluated) -> tuple[float, float, float] | None:
    """Mean over problems of the change in the share of right completions, with its 95 % interval (+- 1.96 errors).

    Only problems that both have count; none where there are fewer than two.
    """
    shares = [_shares(each) for each in (before, after)]
    changes = [shares[1][problem] - share for problem, share in shares[0].items() if problem in shares[1]]
    n = len(changes)
    if n < 2:
        return None
    middle = sum(changes) / n
    half = 1.96 * math.sqrt(sum((change - middle) ** 2 for change in changes) / (n - 1) / n)
    return middle, middle - half, middle + half


def _shares(each: Evaluated) -> dict[Any, float]:
    """problem -> share of its judged completions that are right."""
    verdicts: dict[Any, list[bool]] = {}
    for row in read_rows(each.problems, []):
        if isinstance(row.get("correct"), bool):
            verdicts.setdefault(str(row.get("problem")), []).append(row["correct"])
    return {problem: sum(own) / len(own) for problem, own in verdicts.items()}


# ---------------------------------------------------------------- config and machine
def options(runs: Sequence[RunFiles]) -> Markup:
    """Every option that differs from its default in one of the runs."""
    defaults, columns = _defaults(), [leaves(run.config) for run in runs]
    keys = union(key for column in columns for key in column)
    changed = [key for key in keys if any(column.get(key) != defaults.get(key) for column in columns)]
    shown = [{key: _plain(column[key]) for key in changed if key in column} for column in columns]
    plain = {key: _plain(defaults[key]) for key in changed if key in defaults}
    return _compared(runs, shown, plain, class_="options")


def environment(runs: Sequence[RunFiles]) -> Markup:
    """Command, versions, machine."""
    columns = [{key: _plain(value) for key, value in leaves(run.environment).items()} for run in runs]
    return _compared(runs, columns, class_="options")


def _compared(
    runs: Sequence[RunFiles],
    columns: Sequence[Mapping[str, str]],
    defaults: Mapping[str, str] | None = None,
    class_: str | None = None,
) -> Markup:
    """What all runs have alike, one row each; below it where they differ, one row a run."""
    keys = union(key for column in columns for key in column)
    alike = [key for key in keys if len({column.get(key, "–") for column in columns}) == 1]
    apart = [key for key in keys if key not in alike]
    default = [[defaults.get(key, "–")] if defaults is not None else [] for key in alike]
    rows = [[key, columns[0][key], *told] for key, told in zip(alike, default, strict=True)]
    head = ["", "value" if len(runs) == 1 else "all runs", "default"] if defaults is not None else []
    parts = [table(head, rows, class_=class_)] if rows else []
    if apart:
        each = [[run.label, *(c.get(key, "–") for key in apart)] for run, c in zip(runs, columns, strict=True)]
        each += [["default", *(defaults.get(key, "–") for key in apart)]] if defaults is not None else []
        parts.append(tag("div", table(["", *apart], each, class_=class_), class_="wide"))
    return join(parts)


def _defaults() -> dict[str, Any]:
    """Dotted name -> default of every option that has one."""
    config = parse_config(REQUIRED, "defaults")
    found = leaves(json.loads(config.model_dump_json()))
    return {key: value for key, value in found.items() if key not in ("name", "steps", "model.path", "data.path")}


def _plain(value: Any) -> str:
    """A value as a config writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
