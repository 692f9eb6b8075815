"""One step of one rank under torch's profiler: which operators the time goes into, and when.

    with profiled(step_folder(run, 7), rank, device):
        learner.step(groups, version=6)

leaves `learner-R.json.gz`, a Chrome trace, and `learner-R.txt`, a table of the operators that take longest. The phases
of the step (`learner.meter`) are spans of the trace.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PHASES = ("collate", "passes", "gradients", "optimizer")
"""What a step of the learner is spent on; all that is in no other is in the first."""
PROFILED = 3
"""Which step of an attempt is profiled: those before it load, allocate and compile."""
LISTED = 20  # operators


def step_folder(run: Path, step: int) -> Path:
    """Where the profile of a step lies."""
    return run / "profile" / f"step-{step:06d}"


@contextmanager
def profiled(folder: Path, rank: int, kind: str) -> Iterator[None]:
    """Profile the block on a device of this kind, cpu or cuda. Raises OSError where the files cannot be written."""
    from torch.profiler import ProfilerActivity, profile

    own = [ProfilerActivity.CUDA] if kind == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *own]) as found:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    by = f"self_{'device' if own else 'cpu'}_time_total"
    (folder / f"learner-{rank}.txt").write_text(found.key_averages().table(sort_by=by, row_limit=LISTED) + "\n")
    plain, packed = folder / f"learner-{rank}.json", folder / f"learner-{rank}.json.gz"
    found.export_chrome_trace(str(plain))
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    os.unlink(plain)
