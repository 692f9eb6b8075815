"""What the benches of speed and memory share: both sides in turn, and one way to say what came out.

    from benches.harness import Ratio, alternate, main

    def measure(rounds: int) -> list[Ratio]:
        pairs = alternate(rounds, ours, theirs)             # seconds of each side, in turn, the first changing
        return [Ratio("tokens/s of ours / theirs", [b / a for a, b in pairs], at_least=0.95)]

    if __name__ == "__main__":
        sys.exit(main(__doc__, measure))

Absolute times mean nothing on a machine that others use, so a bench says ratios: median, min and max over the rounds,
and the limit that it holds itself to. `benches/all.py` runs all of them and writes one table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True)
class Ratio:
    """One row of the table: a ratio of each round, and the limit for their median. `facts`: numbers that explain it."""

    name: str
    values: list[float]
    at_least: float | None = None
    at_most: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        """Whether the median is within the limit; without one, yes."""
        low = self.at_least is None or self.median >= self.at_least
        return low and (self.at_most is None or self.median <= self.at_most)

    def limit(self) -> str:
        """As people read it."""
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None) or "-"

    def line(self) -> str:
        """Name, median, range, limit, facts."""
        facts = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.facts.items())
        span = f"{self.median:.4g} ({min(self.values):.4g}-{max(self.values):.4g})"
        return f"{'ok  ' if self.holds else 'MISS'} {self.name}: {span}, limit {self.limit()}; {facts}"


A = TypeVar("A")
B = TypeVar("B")


def alternate(rounds: int, first: Callable[[], A], second: Callable[[], B], *, warm: int = 1) -> list[tuple[A, B]]:
    """(first, second) of each round, each what that side returns: seconds, tokens/s, bytes.

    Who begins changes from round to round. `warm` rounds before do not count.
    """
    found = []
    for number in range(-warm, rounds):
        if number % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        if number >= 0:
            found.append((a, b))
    return found


def main(doc: str | None, measure: Callable[..., list[Ratio]], rounds: int = 5, **options: Any) -> int:
    """Run a bench from its command line: `--rounds N`, `--json FILE`. 1 when a limit is missed.

    options: name -> default of what else `measure` takes, each a `--name`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    rows = measure(arguments.rounds, **{name: getattr(arguments, name) for name in options})
    for row in rows:
        print(row.line(), flush=True)
    if arguments.json is not None:
        listed = [{**asdict(row), "median": row.median, "limit": row.limit(), "holds": row.holds} for row in rows]
        arguments.json.write_text(json.dumps(listed, indent=1) + "\n")
    return int(not all(row.holds for row in rows))


def need_model(folder: str = "build/smollm2") -> str:
    """The folder, or exit with what makes it."""
    if not Path(folder, "config.json").exists():
        sys.exit(f"{folder} is missing: `make smollm2` makes it")
    return folder
