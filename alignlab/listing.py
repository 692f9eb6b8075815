"""The verb `ls`: tables made from the registries, so they are never out of date."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

WIDEST = 80  # of a column; what is longer pushes the rest of its line aside


def listing(what: str | None = None) -> str:
    """One kind of things as a table: name, options, first line of the description. Without `what`, all names."""
    if what is not None:
        return table(_ROWS[what]())
    return "\n\n".join(_names(kind) for kind in _ROWS)


def _names(kind: str) -> str:
    names = [row[0].replace(": ", ":") for row in _ROWS[kind]()[1:]]
    text = textwrap.fill(", ".join(names), 120, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"{kind} (`alignlab ls {kind}` says more)\n{text}"


def _methods() -> list[tuple[str, ...]]:
    from algos.methods import ROWS

    return [
        ("method", "source", "meaning", "parts and options that differ from the defaults"),
        *((name, row.source, row.about, _choices(row.spec)) for name, row in ROWS.items()),
    ]


def _choices(spec: Mapping[str, Any]) -> str:
    """What a row of the methods chooses, in short: "filter mixed, surrogate ppo_clip(high=0.28, dual=10)"."""
    from algos.method import PIECES, parse
    from algos.parts import Part

    shown = []
    for key, value in parse(spec, "method").items():
        if piece := PIECES.get(key):
            parts = [Part(name, piece.registry[name]) for name, _ in value]
            changed = [{k: v for k, v in o.items() if v != p.option(k)} for p, (_, o) in zip(parts, value, strict=True)]
            value = " + ".join(str(replace(p, options=o)) for p, o in zip(parts, changed, strict=True)) or "none"
        if not piece or value != (piece.default or "none"):
            shown.append(f"{key} {value}")
    return ", ".join(shown)


def _parts() -> list[tuple[str, ...]]:
    from algos.method import PIECES

    rows: list[tuple[str, ...]] = [("piece: part", "options", "meaning")]
    for piece, choice in PIECES.items():
        rows += [(f"{piece}: {name}", options, about) for name, options, about in choice.registry.describe()]
    return rows


def _rewards() -> list[tuple[str, ...]]:
    from rewards.derived import derived
    from rewards.reward import rewards

    return [("reward", "options", "meaning"), *rewards.describe(), *derived.describe()]


def _shapers() -> list[tuple[str, ...]]:
    from rewards.shaping import shapings

    return [("shaper", "options", "meaning"), *shapings.describe()]


def _weightings() -> list[tuple[str, ...]]:
    from rewards.policies import weightings

    return [("weighting policy", "options", "meaning"), *weightings.describe()]


def _benchmarks() -> list[tuple[str, ...]]:
    from alignlab.benchmarks import benchmarks

    return [("benchmark", "file", "about"), *((name, b.file, b.about) for name, b in benchmarks.items())]


_ROWS = {
    "methods": _methods,
    "parts": _parts,
    "rewards": _rewards,
    "shapers": _shapers,
    "weightings": _weightings,
    "benchmarks": _benchmarks,
}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first row underlined."""
    widths = [min(max(len(row[i]) for row in rows), WIDEST) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
