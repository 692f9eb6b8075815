"""Which pool a run waits for, and how the same devices would be split best: from what was measured, or nothing at all.

How long learner and actors stood still is in the run's metrics. What other splits would do is simulated: the real
coordinator among actors whose speed was fitted to the run (`alignlab simulate --run` answers more questions), and a
learner that is taken to be m / r times as fast with m ranks instead of r. What ranks say to each other is not counted,
so many ranks look better than they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cluster import on_gpu
from core.errors import UserError

if TYPE_CHECKING:
    from alignlab.workload import Workload
    from core.config import RunConfig

TRIED = 12  # splits, at most
STEPS = 20  # that are simulated of each
GAIN = 1.05  # times as fast as the present split: what is worth saying
BUSY = 0.1  # a pool that stands still for less of the time is what the others wait for


@dataclass(frozen=True)
class Split:
    """So many actors and learner ranks, and the steps per hour that are simulated for them."""

    actors: int
    ranks: int
    pace: float

    def __str__(self) -> str:
        return f"{_count(self.actors, 'actor')} + {_count(self.ranks, 'rank')}"


@dataclass(frozen=True)
class Balance:
    """Shares of the steps' time in which a pool stood still; the present split, and the best (of equals the present).

    devices: of both pools together, for instance "8 GPUs", and into how many splits they go at all. overlap: the actors
    sample while the learner learns.
    """

    pace: float
    learner_idle: float
    actors_idle: float
    overlap: bool
    devices: str
    ways: int
    present: Split
    best: Split


def balance(folder: Path) -> Balance | None:
    """That of a run with actors; None where it was not measured: too few steps, or its files are not there."""
    from alignlab.workload_fit import measure, shared_cores
    from core.loading import load_config

    try:
        config = load_config(folder / "config.yaml")
        idle = standing_still(_rows(folder / "metrics.jsonl"))
        gpus = bool(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["gpus"])
        if idle is None or (each := devices(config, gpus)) is None:
            return None
        measured = measure(folder, config, shared_cores(folder, config))
    except (UserError, OSError, ValueError, KeyError):  # files that are missing, cut off or of an older run
        return None
    ranks, kind = config.learner.ranks, "GPUs" if gpus else "cores"
    total = measured.actors * each[0] + ranks * each[1]
    tried = [
        Split(a, r, _pace(config, faster(measured.workload, r / ranks), a))
        for a, r in splits(total, *each, (measured.actors, ranks))
    ]
    present = next(split for split in tried if (split.actors, split.ranks) == (measured.actors, ranks))
    best = max(tried, key=lambda split: (split.pace, split == present))
    overlap = config.rollout.max_staleness > 0
    return Balance(measured.steps_per_hour, *idle, overlap, f"{total} {kind}", len(tried), present, best)


def said(found: Balance) -> list[str]:
    """What a balance tells, in sentences."""
    lines = [
        f"{found.pace:.1f} steps/h with {found.present}; of a step's time the learner waits {found.learner_idle:.0%}, "
        f"the actors stand still {found.actors_idle:.0%}",
        f"bottleneck: {_bottleneck(found)}",
    ]
    if found.ways == 1:
        lines.append(f"{found.present} is the only split of {found.devices}")
    elif found.best.pace >= GAIN * found.present.pace:
        times = found.best.pace / found.present.pace
        lines.append(
            f"best split of {found.devices}: {found.best}, {times:.2f} times the present steps/h (simulated; ranks are "
            "taken to share the work evenly)"
        )
    else:
        lines.append(f"no other split of {found.devices} would be faster by more than {GAIN - 1:.0%} (simulated)")
    return lines


def _bottleneck(found: Balance) -> str:
    if not found.overlap:
        longer = "sampling" if found.learner_idle > found.actors_idle else "learning"
        return (
            f"on-policy each pool waits for the other, most of the time for {longer}; rollout.max_staleness=1 overlaps"
        )
    if max(found.learner_idle, found.actors_idle) < BUSY:
        return "neither, both are at work"
    if min(found.learner_idle, found.actors_idle) > 3 * BUSY:
        return "neither, both wait for what is between them: rewards, weights, or a small rollout.max_staleness"
    return "the actors" if found.learner_idle > found.actors_idle else "the learner"


def standing_still(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """(learner, actors): shares of the steps' time, those of the first step left out; None where no row says it."""
    steps = [row for row in rows if None not in (row.get("time/step"), row.get("rollout/busy"))][1:]
    if not steps:
        return None
    whole = sum(row["time/step"] for row in steps)
    waits = sum(row["time/wait_groups"] + row.get("time/wait_publish", 0.0) for row in steps)
    busy = sum(row["time/step"] * min(row["rollout/busy"], 1.0) for row in steps)
    return waits / whole, 1 - busy / whole


def devices(config: RunConfig, gpus: bool) -> tuple[int, int] | None:
    """Devices of an actor and of a learner rank; None where one pool has GPUs and the other does not."""
    parallel = config.actors.tensor_parallel
    match [on_gpu(device, int(gpus)) for device in (config.actors.device, config.learner.device)]:
        case [True, True]:
            return parallel, 1
        case [False, False]:
            return config.actors.threads * parallel, config.learner.threads
    return None


def splits(total: int, actor: int, rank: int, present: tuple[int, int]) -> list[tuple[int, int]]:
    """(actors, ranks) that use `total` devices, an actor so many and a rank so many; some of them if they are many."""
    every = {(total - ranks * rank) // actor: ranks for ranks in range(1, (total - actor) // rank + 1)}
    last, *others = sorted(every.items())
    return sorted({last, present, *others[:: math.ceil(len(every) / TRIED)]}, reverse=True)


def faster(workload: Workload, times: float) -> Workload:
    """The workload with a learner that is so many times as fast."""
    fixed, each = workload.train_seconds / times, workload.train_token_seconds / times
    return replace(workload, train_seconds=fixed, train_token_seconds=each)


def _pace(config: RunConfig, workload: Workload, actors: int) -> float:
    from alignlab.outcome import pace
    from alignlab.simulate import world_of

    plain = replace(workload, checkpoint_every=0, eval_every=0)  # they are not what the pools are balanced for
    world = world_of(config.rollout, plain, min(config.steps, STEPS)).run(actors, math.inf)
    return pace([step.time for step in world.steps])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
