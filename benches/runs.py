"""Whole runs of `alignlab train` for benches: started, put on their cores, and what their metrics say.

    rows = train(folder, "alone", "configs/quickstart.yaml", ["steps=20"], warm=5, cores={"actor-0": 0, "learner-0": 1})
    median(rows, "time/train", "time/weigh")

Real vLLM engines and real Ray, so a run takes about 40 s before its first step; its warm-up is not in the rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_START = "runs/quickstart-warmstart/checkpoints/step-000600/model"
RUN_SECONDS = 900.0  # of a whole run; a bench is not to hang

QUIET = ["eval.benchmarks=[]", "checkpoint.every=0"]  # nothing beside the steps

Row = dict[str, float]
"""One line of metrics.jsonl."""


def need_warm_start() -> str:
    """The quickstart's policy, or exit with what makes it."""
    if not (ROOT / WARM_START / "config.json").exists():
        sys.exit(f"{WARM_START} is missing: `make quickstart` makes it")
    return WARM_START


def train(
    out: Path, name: str, config: str, changes: Sequence[str], *, warm: int, cores: Mapping[str, int] | None = None
) -> list[Row]:
    """One run in `out`; its rows of metrics after the first `warm` steps.

    cores: process -> the core on which all of its threads are put once the first step is done; what they start before
    is on any. Exits with the run's last words when it fails.
    """
    command = [sys.executable, "-u", "-m", "alignlab.cli", "train", config, f"name={name}", f"output_dir={out}"]
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *QUIET, *changes], cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True
        )
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("step") and line.split()[1].startswith("1/"):
                    pin(out / name / "logs", cores or {})
                    break
            said.append(process.communicate(timeout=RUN_SECONDS)[0])
        except BaseException:
            process.terminate()
            process.wait(60)
            raise
    if process.returncode:
        sys.exit("".join(said)[-1000:] + log.read_text()[-2000:])
    return list(steps(out / name / "metrics.jsonl", warm))


def steps(metrics: Path, warm: int) -> Iterator[Row]:
    """The rows of steps (not of evaluations) after the first `warm`."""
    for row in map(json.loads, metrics.read_text().splitlines()):
        if "time/step" in row and row["step"] > warm:
            yield row


def median(rows: Sequence[Row], *names: str) -> float:
    """The median over the steps of a sum of metrics."""
    return statistics.median(sum(row[name] for name in names) for row in rows)


def mean(rows: Sequence[Row], name: str) -> float:
    """The mean over the steps, where they come in waves: sampling ahead, a slow one is followed by fast ones."""
    return statistics.mean(row[name] for row in rows)


def pin(logs: Path, cores: Mapping[str, int]) -> None:
    """Each process to its core, all of its threads."""
    pids = writers(logs)
    for name, core in cores.items():
        for thread in Path(f"/proc/{pids[name]}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


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
