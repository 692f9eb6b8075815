"""A few of the runs of benches/chaos.py: killed in every part, and nothing lost, trained twice or left behind."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_runs_that_are_killed_in_every_part_account_for_everything(tmp_path):
    command = [sys.executable, "-m", "benches.chaos", "--runs", "6", "--jobs", "2", "--seed", "7"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    counts = "counts: 0 lost, 0 twice, 0 unexplained, 0 audit, 0 learner, 0 differs, 0 unfinished, 0 behind"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == counts, done.stdout[-3000:] + done.stderr[-2000:]
    (strikes,) = [line for line in done.stdout.splitlines() if line.startswith("strikes:")]
    assert all(kind in strikes for kind in ("driver", "actor")), "somebody was killed"
