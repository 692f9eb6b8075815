"""How well generation and learning overlap: wall time of a step over the longer of the two, each pinned to a core.

    python benches/overlap.py [--rounds 5] [--steps 30]

Every round runs the quickstart's policy twice, in turn: on-policy (generation and learning alternate, so each is
measured alone) and with max_staleness 1. The ratio of a round is the median step of the second over the longer of the
two medians of the first. Prints median, min and max over the rounds; exits 1 if the median is above 1.15.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.15
WARM = 5  # first steps, which load and allocate
CORES = {"actor-0": 0, "learner-0": 1}


def writers(logs: Path) -> dict[str, int]:
    """Name -> pid of the processes whose output goes to these logs."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            target = entry.readlink()
        except OSError:
            continue
        if target.parent == logs:
            found[target.name.split(".")[0]] = int(entry.parts[2])
    return found


def pin(logs: Path) -> None:
    """Each process to its core, all of its threads."""
    pids = writers(logs)
    for name, core in CORES.items():
        for thread in Path(f"/proc/{pids[name]}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def train(out: Path, name: str, steps: int, staleness: int) -> list[dict[str, float]]:
    """One run; its rows of metrics after the warm-up."""
    command = [sys.executable, "-u", "-m", "alignlab.cli", "train", "configs/quickstart.yaml", f"name={name}"]
    command += [f"steps={steps}", f"output_dir={out}", f"rollout.max_staleness={staleness}"]
    command += ["eval.benchmarks=[]", "checkpoint.every=0", "rollout.prompts=64", "learner.token_budget=8192"]
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step") and "1/" in line.split()[1]:
                pin(out / name / "logs")
                break
        process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit((out / f"{name}.log").read_text()[-2000:])
    rows = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
    # The last steps have nothing left to overlap with: nothing more is admitted.
    return [row for row in rows if "time/step" in row and WARM < row["step"] <= steps - 2]


def median(rows: list[dict[str, float]], *names: str) -> float:
    """The median over the steps of a sum of times."""
    return statistics.median(sum(row[name] for name in names) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            alone = train(Path(folder), f"alone-{number}", arguments.steps, 0)
            both = train(Path(folder), f"both-{number}", arguments.steps, 1)
            generate = median(alone, "time/wait_groups")
            learn = median(alone, "time/train", "time/weigh", "time/publish")
            step = median(both, "time/step")
            ratios.append(step / max(generate, learn))
            print(
                f"round {number + 1}: generate {generate:.3f} s, learn {learn:.3f} s, one after the other "
                f"{median(alone, 'time/step'):.3f} s, overlapped {step:.3f} s: {ratios[-1]:.3f} of the longer",
                flush=True,
            )
            time.sleep(1)
    middle = statistics.median(ratios)
    print(f"step / max(generate, learn): {middle:.3f} ({min(ratios):.3f}-{max(ratios):.3f}), at most {LIMIT}")
    return int(middle > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
