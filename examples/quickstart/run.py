"""The quickstart: make a task and a tiny policy, warm-start it, train it with GRPO, show what changed.

`make quickstart` runs this; every command it runs is printed, so that it can be run by hand. A second quickstart gets
folders of its own (quickstart-2, ...): earlier runs stay.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TASK = Path("build/quickstart")


def main() -> None:
    """From nothing to an evaluated policy."""
    started = time.monotonic()
    warm, grpo = free_name("quickstart-warmstart"), free_name("quickstart")
    run(sys.executable, "examples/quickstart/make_task.py", str(TASK))
    run("alignlab", "train", "configs/quickstart-warmstart.yaml", f"name={warm}")
    model = max((ROOT / "runs" / warm / "checkpoints").glob("step-*/model")).relative_to(ROOT)
    run("alignlab", "train", "configs/quickstart.yaml", f"name={grpo}", f"model.path={model}")
    print(f"the quickstart took {(time.monotonic() - started) / 60:.1f} minutes")


def free_name(name: str) -> str:
    """`name`, or name-2, name-3 ...: the first whose folder in runs/ is not there yet."""
    names = (name if i == 1 else f"{name}-{i}" for i in range(1, 1000))
    return next(n for n in names if not (ROOT / "runs" / n).exists())


def run(*command: str) -> None:
    """Print a command, run it from the project's folder, stop here if it fails."""
    print(f"\n$ {' '.join('python' if word == sys.executable else word for word in command)}", flush=True)
    program = Path(sys.executable).with_name(command[0]) if command[0] == "alignlab" else command[0]
    done = subprocess.run([str(program), *command[1:]], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
