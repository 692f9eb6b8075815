"""`python -m rewards.docs` rewrites the generated tables of docs/rewards.md; a test compares them with the code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rewards.metrics
from core.registry import Registry
from rewards.derived import derived
from rewards.policies import weightings
from rewards.reward import rewards as registry
from rewards.shaping import shapings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"


TABLES: dict[str, tuple[Registry, str]] = {
    "rewards": (registry, "value"),
    "derived": (derived, "value"),
    "shapers": (shapings, "column"),
    "weightings": (weightings, "what decides the weights"),
}


def registry_table(members: Registry, about: str) -> str:
    """All members: name, options with defaults, meaning."""
    # By name: the order of registration is that of imports, which differs.
    rows = [
        (f"`{name}`", f"`{options}`" if options else "", meaning)
        for name, options, meaning in sorted(members.describe())
    ]
    return _table(("name", "options", about), rows)


def metric_table() -> str:
    """All metrics of the composer: meaning, healthy range, what to do."""
    rows = [(f"`{name}`", *texts) for name, texts in rewards.metrics.METRICS.items()]
    return _table(("metric", "meaning", "healthy", "otherwise"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def filled(page: str) -> str:
    """The page with its generated parts made anew. They stand between <!-- name --> and <!-- end name -->."""
    tables = {name: registry_table(*known) for name, known in TABLES.items()} | {"metrics": metric_table()}
    for name, text in tables.items():
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        after = rest.partition(f"<!-- end {name} -->")[2]
        page = f"{before}<!-- {name} -->\n{text}<!-- end {name} -->{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
