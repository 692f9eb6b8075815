"""The verb `ls`: tables made from the registries, so they are never out of date."""

from __future__ import annotations

from collections.abc import Sequence


def listing(what: str) -> str:
    """Methods, parts, rewards or benchmarks as a table: name, options, first line of the description."""
    return table(_ROWS[what]())


def _methods() -> list[tuple[str, ...]]:
    from algos.methods import ROWS

    return [("method", "source", "meaning"), *((name, row.source, row.about) for name, row in ROWS.items())]


def _parts() -> list[tuple[str, ...]]:
    from algos.method import PIECES

    rows: list[tuple[str, ...]] = [("piece: part", "options", "meaning")]
    for piece, choice in PIECES.items():
        rows += [(f"{piece}: {name}", options, about) for name, options, about in choice.registry.describe()]
    return rows


def _rewards() -> list[tuple[str, ...]]:
    from rewards.reward import rewards

    return [("reward", "options", "meaning"), *rewards.describe()]


def _benchmarks() -> list[tuple[str, ...]]:
    from alignlab.benchmarks import benchmarks

    return [("benchmark", "file", "about"), *((name, b.file, b.about) for name, b in benchmarks.items())]


_ROWS = {"methods": _methods, "parts": _parts, "rewards": _rewards, "benchmarks": _benchmarks}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first row underlined."""
    widths = [min(max(len(row[i]) for row in rows), 60) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
