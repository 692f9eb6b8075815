"""The files that a run would have left, made from a simulated one: what is learned from files is known beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path

from alignlab.coordinator import Coordinator
from alignlab.events import Record
from alignlab.ledger import Ledger
from alignlab.outcome import outcome
from alignlab.workload import Workload
from alignlab.world import World
from core.config import RunConfig
from core.loading import dump_config


def record(folder: Path, workload: Workload, config: RunConfig, actors: int) -> float:
    """Write config, environment, ledger, metrics and rollouts of a run into `folder`; its steps per hour.

    A workload without shared cores is of a machine with a GPU. What actors and learner were busy is in the metrics,
    the same in every row: that of the whole run.
    """
    now, batched, published, steps = [0.0], dict[int, float](), dict[int, float](), list[list[int]]()
    (folder / "rollouts").mkdir(parents=True)
    ledger = Ledger.open(folder / "ledger.jsonl", sync_seconds=1e9, clock=lambda: now[0])
    ledger.append([{"kind": "begin"}])

    def heard(found: Record, at: float) -> None:
        now[0] = at
        ledger.append([{"kind": found.kind, **found.fields}])
        if found.kind == "batched":
            batched[found.fields["step"]] = at
            steps.append(found.fields["groups"])
        if found.kind == "published":
            published[found.fields["version"]] = at

    r = config.rollout
    capacity = 8 if r.max_staleness else None
    coordinator = Coordinator(r.prompts, config.steps, r.max_staleness, r.window, capacity=capacity)
    world = World(coordinator, workload, 0, None, heard).run(actors, math.inf)
    ledger.close()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "environment.json").write_text(json.dumps({"cpus": 2, "gpus": [] if workload.cores else ["H100"]}))
    found, rows = outcome(world, actors), []
    for step, groups in enumerate(steps):
        start = published[step] + workload.close_seconds if step else 0.0
        times = {"time/step": published[step + 1] - start, "time/wait_groups": batched[step] - start}
        busy = {"time/publish": workload.publish_seconds, "rollout/busy": 1 - found.actors_idle}
        rows.append({"step": step + 1, **times, **busy})
        lengths = [{"ordinal": o, "tokens": n} for o in groups for n in workload.lengths[o]]
        text = "".join(json.dumps(row) + "\n" for row in lengths)
        (folder / "rollouts" / f"step-{step + 1:06d}.jsonl").write_text(text)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found.steps_per_hour
