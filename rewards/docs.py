"""`python -m rewards.docs` rewrites the generated tables of docs/rewards.md; a test compares them with the code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rewards.metrics
from rewards.reward import rewards as registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"


def reward_table() -> str:
    """All registered rewards: name, options with defaults, meaning."""
    rows = [(f"`{name}`", f"`{options}`" if options else "", meaning) for name, options, meaning in registry.describe()]
    return _table(("name", "options", "value"), rows)


def metric_table() -> str:
    """All metrics of the composer: meaning, healthy range, what to do."""
    rows = [(f"`{name}`", *texts) for name, texts in rewards.metrics.METRICS.items()]
    return _table(("metric", "meaning", "healthy", "otherwise"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def filled(page: str) -> str:
    """The page with its generated parts made anew. They stand between <!-- name --> and <!-- end name -->."""
    for name, text in (("rewards", reward_table()), ("metrics", metric_table())):
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        after = rest.partition(f"<!-- end {name} -->")[2]
        page = f"{before}<!-- {name} -->\n{text}<!-- end {name} -->{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
