"""How well generation and learning overlap: wall time of a step over the longer of the two, each pinned to a core.

    python -m benches.overlap                        # about 7 minutes, with the quickstart's warm start

Every round runs the quickstart's policy twice, in turn: on-policy (generation and learning alternate, so each is
measured alone) and with max_staleness 1. The ratio of a round is the median step of the second over the longer of the
two medians of the first: 1 is perfect, and everything that is neither generation nor learning (scoring, records,
the hand-off of weights) is above it, as far as it is not hidden behind them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benches.harness import Ratio, alternate, main
from benches.runs import Row, median, need_warm_start, train

STEPS, WARM = 16, 4  # the first steps load and allocate
CORES = {"actor-0": 0, "learner-0": 1}
CHANGES = ["rollout.prompts=64", "learner.token_budget=8192"]


def measure(rounds: int) -> list[Ratio]:
    """One row."""
    model = need_warm_start()
    with tempfile.TemporaryDirectory() as folder:
        names = iter(f"run-{number}" for number in range(2 * rounds))

        def run(staleness: int) -> list[Row]:
            changes = [f"steps={STEPS}", f"rollout.max_staleness={staleness}", f"model.path={model}", *CHANGES]
            rows = train(Path(folder), next(names), "configs/quickstart.yaml", changes, warm=WARM, cores=CORES)
            return rows[:-2]  # the last steps have nothing left to overlap with: nothing more is admitted

        found = [parts(*pair) for pair in alternate(rounds, lambda: run(0), lambda: run(1), warm=0)]
    last = found[-1]
    ratios = [part["overlapped"] / max(part["generate"], part["learn"]) for part in found]
    return [Ratio("overlap: step / max(generate, learn)", ratios, at_most=1.1, facts=last)]


def parts(alone: list[Row], both: list[Row]) -> dict[str, float]:
    """Seconds of a step, medians."""
    return {
        "generate": median(alone, "time/wait_groups"),
        "learn": median(alone, "time/train", "time/weigh", "time/publish"),
        "one after the other": median(alone, "time/step"),
        "overlapped": median(both, "time/step"),
    }


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
