"""`python -m alignlab.docs` rewrites docs/configuration.md and docs/metrics.md from the code; a test compares them."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core.config import RunConfig
from core.section import Section

DOCS = Path(__file__).resolve().parents[1] / "docs"


def configuration() -> str:
    """Every option of every section: type, default, meaning."""
    head = (
        "# Configuration\n\n"
        "One YAML file is one run; `key.sub=value` on the command line changes it. Options not written have the "
        "default. An unknown key, a wrong type or an impossible combination is refused before anything starts. Options "
        "of methods and rewards are listed by `alignlab ls parts` and `alignlab ls rewards`.\n"
    )
    return head + "".join(_section(name, section) for name, section in _sections("", RunConfig))


def _sections(name: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield name, section
    for key, field in section.model_fields.items():
        # A section that may be left out is a union with None.
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if _is_section(part):
                yield from _sections(f"{name}.{key}".lstrip("."), part)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section(name: str, section: type[Section]) -> str:
    rows = [
        (f"`{key}`", _kind(field.annotation), _default(field), field.description or "")
        for key, field in section.model_fields.items()
        if not _is_section(field.annotation)
    ]
    return f"\n## {name or 'the run'}\n\n" + _table(("option", "type", "default", "meaning"), rows)


def _kind(annotation: Any) -> str:
    """A type as a person writes it: "int", "float or none", "'a' or 'b'"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is dict or annotation is dict or _is_section(annotation):
        return "mapping"
    if arguments:  # a union
        return " or ".join(dict.fromkeys(_kind(part) for part in arguments))
    return {str: "text", float: "number", int: "whole number", bool: "true or false"}.get(annotation, str(annotation))


def _default(field: Any) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{value}`" if value != "" else ""


def metrics() -> str:
    """Every metric: meaning, healthy range, what to do when it leaves it."""
    head = (
        "# Metrics\n\n"
        "A line a step and a line an evaluation in `metrics.jsonl`, the same names in TensorBoard. A value that does "
        "not exist (a mean over nothing) is null, never 0.\n"
    )
    rows = dict(sorted(_metric_rows()))
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, texts in rows.items():
        groups.setdefault(name.partition("/")[0], []).append((f"`{name}`", *texts))
    columns = ("metric", "meaning", "healthy", "otherwise")
    return head + "".join(f"\n## {group}\n\n" + _table(columns, lines) for group, lines in groups.items())


def _metric_rows() -> Iterator[tuple[str, tuple[str, ...]]]:
    import algos.metrics
    import alignlab.metrics
    import learner.metrics
    import rewards.metrics

    for table in (learner.metrics, rewards.metrics, alignlab.metrics):
        yield from ((name, tuple(texts)) for name, texts in table.METRICS.items())  # type: ignore[attr-defined]
    for name, metric in algos.metrics.METRICS.items():
        yield name, (metric.meaning, metric.healthy, metric.otherwise)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ([_cell(text) for text in line] for line in (head, tuple("---" for _ in head), *rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(configuration(), encoding="utf-8")
    (DOCS / "metrics.md").write_text(metrics(), encoding="utf-8")
