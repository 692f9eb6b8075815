"""The report's ten rollouts: the best and the worst of a few groups from the start, the middle and the end of a run.

The groups are those whose totals are farthest apart, for there the advantage says most; read more in `rollouts/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.markup import Markup, Text, join, number, tag
from alignlab.run_files import Row, RunFiles, read_rows

GROUPS = {1: (5,), 2: (3, 2), 3: (2, 1, 2)}  # of how many files: how many groups of each
MOST = 3000  # characters of a text


def rollouts(runs: Sequence[RunFiles]) -> Markup:
    """Ten completions of each run with their prompts, scores and advantages."""
    parts = []
    for run in runs:
        groups = [group for path, count in chosen(run.rollouts) for group in widest(read_rows(path, []), count)]
        if groups:
            parts.append(join((tag("h3", run.label) if len(runs) > 1 else None, *map(_group, groups))))
    return join(parts)


def chosen(files: Sequence[Path]) -> list[tuple[Path, int]]:
    """The first, the middle and the last file, and how many groups to show of each."""
    places = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    return [*zip((files[i] for i in places), GROUPS.get(len(places), ()), strict=True)]


def widest(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """The `count` groups whose totals are farthest apart, in the file's order where they are equally far."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("group"), []).append(row)
    return sorted(groups.values(), key=lambda group: -_spread(group))[:count]


def _spread(group: Sequence[Row]) -> float:
    totals = [row["total"] for row in group if _known(row.get("total"))]
    return max(totals) - min(totals) if totals else -1.0


def ends(group: Sequence[Row]) -> list[Row]:
    """The best and the worst of a group; one of them where all are equal, any one where nothing has a total."""
    known = [row for row in group if _known(row.get("total"))]
    if not known:
        return [group[0]]
    best, worst = max(known, key=lambda row: row["total"]), min(known, key=lambda row: row["total"])
    return [best] if best["total"] == worst["total"] else [best, worst]


def _group(group: Sequence[Row]) -> Markup:
    rows = ends(group)
    largest = max((abs(row["advantage"]) for row in group if _known(row.get("advantage"))), default=0.0)
    labels = [f"best of {len(group)}", f"worst of {len(group)}"] if len(rows) > 1 else [f"one of {len(group)}"]
    head = f"step {rows[0].get('step', '?')}, group {rows[0].get('group', '?')}"
    cards = [_completion(row, label, largest) for row, label in zip(rows, labels, strict=True)]
    prompt = tag("pre", shortened(str(rows[0].get("prompt", ""))), class_="prompt")
    return tag("article", tag("div", head, class_="note"), prompt, tag("div", *cards, class_="pair"), class_="rollout")


def _completion(row: Row, label: str, largest: float) -> Markup:
    advantage = row.get("advantage")
    missing = row.get("missing")
    told: dict[str, Text] = {"total": _number(row.get("total")), "advantage": _number(advantage)}
    told |= {name: _number(value) for name, value in _items(row.get("components"))}
    told |= {name: str(why) for name, why in _items(missing)}
    told |= {"tokens": str(row.get("tokens", "–")), "ended by": str(row.get("finish_reason", "–"))}
    values = [tag("span", f"{name} ", tag("b", value)) for name, value in told.items()]
    text = tag("pre", shortened(str(row.get("completion", ""))))
    return tag("div", tag("div", tag("b", label), *values, class_="scores"), text, style=tint(advantage, largest))


def tint(advantage: Any, largest: float) -> str:
    """A background for an advantage: blue above 0, orange below, stronger the nearer it is to the group's largest."""
    if not _known(advantage) or not advantage or not largest:
        return "background:#f6f6f6"
    colour = "0,114,178" if advantage > 0 else "213,94,0"
    return f"background:rgba({colour},{0.04 + 0.2 * min(1.0, abs(advantage) / largest):.2f})"


def shortened(text: str, most: int = MOST) -> str:
    """The text, or its beginning and its end with a word on what lies between.

    >>> shortened("abcdefghij", 4)
    'ab\\n[... 6 characters left out ...]\\nij'
    """
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _items(value: Any) -> Sequence[tuple[str, Any]]:
    return [*value.items()] if isinstance(value, Mapping) else []


def _number(value: Any) -> str:
    return number(value) if _known(value) else "–"


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
