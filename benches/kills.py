"""A deterministic run with real vLLM, Ray and FSDP2 that is killed at random times ends like one that was not.

    python benches/kills.py [--kills 10] [--seed 0]

20 steps of the quickstart's policy with max_staleness 2 and rollout.deterministic: once in peace, then once for each
kill. A kill is SIGKILL of the driver at a random moment of the 20 steps; `--resume` goes on from what is on disk.
Parameters, optimizer state and the order of the batches must be equal, bit for bit; the audit must be green.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alignlab.audit import audit
from alignlab.replay import Lineage

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
OPTIONS = [f"steps={STEPS}", "rollout.max_staleness=2", "rollout.deterministic=true", "checkpoint.every=3"]
OPTIONS += ["rollout.prompts=8", "rollout.group_size=8", "eval.benchmarks=[]"]


def start(out: Path, name: str, *more: str) -> subprocess.Popen[str]:
    """`alignlab train` in a session of its own."""
    command = [sys.executable, "-u", "-m", "alignlab.cli", "train", "configs/quickstart.yaml", f"name={name}"]
    return subprocess.Popen(
        [*command, f"output_dir={out}", *OPTIONS, *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def finish(run: subprocess.Popen[str]) -> tuple[str, float]:
    """What it said, and the seconds from its first to its last step. SystemExit if it failed."""
    said, first, last = [], 0.0, 0.0
    assert run.stdout is not None
    for line in run.stdout:
        said.append(line)
        if re.match(r"step +\d+/", line):
            first, last = first or time.monotonic(), time.monotonic()
    if run.wait(timeout=60):
        raise SystemExit("".join(said[-40:]))
    return "".join(said), last - first


def kill(run: subprocess.Popen[str], steps: int, seconds: float) -> str:
    """SIGKILL, `seconds` after it has done `steps` steps; the last line that it said."""
    assert run.stdout is not None
    line, done = "", 0
    while done < steps:
        line = next(run.stdout)
        done += line.startswith("step")
    time.sleep(seconds)
    os.kill(run.pid, 9)
    run.stdout.read()
    run.wait()
    return line.strip()


def end(folder: Path) -> dict[str, str]:
    """What must be equal."""
    checkpoint = folder / "checkpoints" / f"step-{STEPS:06d}"
    found = {"parameters": digest(checkpoint / "model" / "model.safetensors")}
    for path in sorted((checkpoint / "trainer").glob("*.distcp")):
        found[f"trainer/{path.name}"] = digest(path)
    found["batches"] = str(
        [record["groups"] for _, record in sorted(Lineage.read(folder / "ledger.jsonl").steps.items())]
    )
    return found


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, different = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as out:
        _, seconds = finish(start(Path(out), "peace"))
        expected = end(Path(out) / "peace")
        print(f"in peace: {seconds:.1f} s, parameters {expected['parameters'][:12]}", flush=True)
        for number in range(arguments.kills):
            name, after = f"killed-{number}", draw.randrange(STEPS)
            wait = draw.uniform(0, 2 * seconds / STEPS)
            last = kill(start(Path(out), name), after, wait)
            said, _ = finish(start(Path(out), name, "--resume"))
            found, problems = end(Path(out) / name), audit(Path(out) / name).problems
            wrong = [key for key in expected if found.get(key) != expected[key]] + problems
            different += bool(wrong)
            where = re.search(r"going on from \S+/(\S+)", said)
            print(
                f"killed {wait:.2f} s after step {after} ({last[:12]}), on from {where[1] if where else 'the start'}: "
                + (f"DIFFERS in {wrong}" if wrong else f"parameters {found['parameters'][:12]}, equal"),
                flush=True,
            )
    print(f"{arguments.kills} kills, {different} with another end")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
