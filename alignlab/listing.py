"""The verb `ls`: tables made from the registries, so they are never out of date."""

from __future__ import annotations

from collections.abc import Sequence


def listing(what: str) -> str:
    """Methods, parts, rewards or benchmarks as a table: name, options, first line of the description."""
    return table(_ROWS[what]())


def _methods() -> list[tuple[str, ...]]:
    from algos.methods import methods

    return [("method", "row", ""), *((name, method.describe(), "") for name, method in methods.items())]


def _parts() -> list[tuple[str, ...]]:
    from algos.methods import pieces

    rows: list[tuple[str, ...]] = [("part", "options", "meaning")]
    for piece, registry in pieces.items():
        rows += [(f"{piece}: {name}", options, about) for name, options, about in registry.describe()]
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
