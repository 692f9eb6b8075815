"""docs/rewards.md shows what the code has."""

from rewards.docs import PAGE, filled
from rewards.metrics import METRICS
from rewards.reward import rewards


def test_the_tables_are_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run `python -m rewards.docs`"
    assert all(f"| `{name}` |" in page for name in (*rewards, *METRICS))
