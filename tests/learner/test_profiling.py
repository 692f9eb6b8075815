"""The profile of a step: a trace whose phases last as long as the metrics say, and a table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from algos.methods import resolve
from learner.learner import Learner
from learner.meter import PHASES
from learner.profiling import LISTED, profiled, step_folder
from tests.learner import samples


def test_a_profiled_step_leaves_a_trace_and_a_table(tiny: Path, tmp_path: Path) -> None:
    learner = Learner(samples.config(tiny), resolve("grpo"))
    learner.step(samples.groups(), version=0)
    folder = step_folder(tmp_path, 2)
    with profiled(folder, 0, "cpu"):
        metrics = learner.step(samples.groups(seed=1), version=1).metrics
    assert {path.name for path in folder.iterdir()} == {"learner-0.json.gz", "learner-0.txt"}
    events = json.loads(gzip.decompress((folder / "learner-0.json.gz").read_bytes()))["traceEvents"]
    lasted = {e["name"]: e["dur"] / 1e6 for e in events if e.get("ph") == "X" and e["name"] in PHASES}
    # The optimiser is inside the gradients' block, and its own phase.
    gradients = metrics["time/learner_gradients"] + metrics["time/learner_optimizer"]
    assert lasted["gradients"] == pytest.approx(gradients, rel=0.05, abs=0.005)
    assert lasted["optimizer"] == pytest.approx(metrics["time/learner_optimizer"], rel=0.05, abs=0.005)
    table = (folder / "learner-0.txt").read_text()
    assert table.count("aten::") in range(5, LISTED + 1) and "aten::mm" in table
