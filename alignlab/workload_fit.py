"""The workload of a real run, from its files: the ledger says when, metrics.jsonl how long, rollouts/ how many tokens.

Where processes share the cores of one machine, all of them are slower while many are at work. Times are therefore
counted in seconds of work: of those that each would take with a core of its own.
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from alignlab.ledger import read_ledger
from alignlab.outcome import pace
from alignlab.virtual_actor import Job, Switch, VirtualActor
from alignlab.workload import Recorded, Workload
from core.config import RunConfig
from core.errors import UserError

MOST_LEASES = 1000  # of which the speed of the actors is fitted
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Lease:
    """A group on an actor, from the coordinator's word to its result: work seconds, and the lengths in tokens."""

    actor: str
    start: float
    end: float
    lengths: Sequence[int]


@dataclass(frozen=True)
class Measured:
    """A real run: the workload that was fitted to it, its pace, and how far the fit is from its groups (seconds)."""

    workload: Workload
    steps_per_hour: float
    steps: int
    actors: int
    error: float  # root mean square, of the time that a group takes


def measure(folder: Path, config: RunConfig, cores: int | None) -> Measured:
    """Read the longest attempt of a run and fit its workload. Raises UserError if files or steps are missing.

    cores: that all processes of the run shared; None if each had its own.
    """
    records = longest_attempt([record for _, record in read_ledger(folder / "ledger.jsonl")])
    published = [r["time"] for r in records if r["kind"] == "published" and r["version"] > 0]
    if len(published) < 4:
        raise UserError(f"{folder}: {len(published)} steps are too few to learn from; let it run for at least 4")
    metrics = {row["step"]: row for row in _rows(folder / "metrics.jsonl") if "time/step" in row}
    evals = [row["time/eval"] for row in _rows(folder / "metrics.jsonl") if "time/eval" in row]
    clock = WorkClock(records, cores)
    lengths = recorded_lengths(folder)
    workload = Workload(
        Recorded([lengths[ordinal] for ordinal in sorted(lengths)]),
        decode_base=0.0,
        sequences=config.actors.max_num_seqs,
        scorers=config.rewards.workers,
        checkpoint_every=config.checkpoint.every,
        checkpoint_seconds=_median(row["time/checkpoint"] for row in metrics.values() if "time/checkpoint" in row),
        eval_every=config.eval.every,
        eval_seconds=_median(evals),
        publish_seconds=_median(row["time/publish"] for row in metrics.values()),
        drop_share=_drop_share(records),
        cores=cores,
    )
    workload = replace(workload, **training(records, clock), close_seconds=closing(records, metrics, config))
    workload = replace(workload, score_seconds=scoring(records, clock, workload.scorers))
    held = leases(records, clock, lengths)
    if not held:
        raise UserError(f"{folder}: no actor has sampled anything here, so nothing says how fast actors are")
    speed, error = decoding(held, workload.sequences, loading(records, clock, metrics))
    actors = len({lease.actor for lease in held})
    return Measured(replace(workload, **speed), pace(published), len(published), actors, error)


def shared_cores(folder: Path, config: RunConfig) -> int | None:
    """How many cores all processes of a run shared: those of a single machine without GPUs; None for other runs."""
    machine = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return None if machine["gpus"] or config.cluster.address else machine["cpus"]


def longest_attempt(records: Records) -> Records:
    """The attempt that has published most: what follows one `begin`, up to the next."""
    starts = [i for i, record in enumerate(records) if record["kind"] == "begin"]
    attempts = [records[a:b] for a, b in zip(starts, [*starts[1:], len(records)], strict=True)]
    return max(attempts, key=lambda attempt: sum(r["kind"] == "published" for r in attempt), default=[])


class WorkClock:
    """Seconds of work at a moment of the ledger: slower than the clock while more processes work than there are cores.

    An actor works while it holds a group, the learner from `batched` to `published`.
    """

    def __init__(self, records: Records, cores: int | None) -> None:
        held: dict[str, int] = {}
        learner = False
        self._times, self._work = [records[0]["time"]], [0.0]
        working = 0
        for record in records:
            speed = 1.0 if cores is None else min(1.0, cores / max(working, 1))
            time = max(record["time"], self._times[-1])
            self._work.append(self._work[-1] + (time - self._times[-1]) * speed)
            self._times.append(time)
            match record["kind"]:
                case "leased":
                    held[record["actor"]] = held.get(record["actor"], 0) + 1
                case "done" | "returned":
                    held[record["actor"]] = held.get(record["actor"], 0) - 1
                case "batched":
                    learner = True
                case "published":
                    learner = False
            working = learner + sum(count > 0 for count in held.values())

    def __call__(self, time: float) -> float:
        """Only differences mean something."""
        i = bisect_right(self._times, time) - 1
        if i + 1 >= len(self._times):
            return self._work[i] + time - self._times[i]
        share = (time - self._times[i]) / max(self._times[i + 1] - self._times[i], 1e-9)
        return self._work[i] + share * (self._work[i + 1] - self._work[i])


def recorded_lengths(folder: Path) -> dict[int, list[int]]:
    """Ordinal -> tokens of each completion, of all groups that were trained. Raises UserError without any."""
    lengths: dict[int, list[int]] = {}
    for path in sorted((folder / "rollouts").glob("step-*.jsonl")):
        for row in _rows(path):
            lengths.setdefault(row["ordinal"], []).append(row["tokens"])
    if not lengths:
        raise UserError(f"{folder}/rollouts: no completions are there; name a run that has done a few steps")
    return lengths


def training(records: Records, clock: WorkClock) -> dict[str, float]:
    """train_seconds and train_token_seconds: a line through the steps, the first one (compilation) left out."""
    begun = {r["step"]: clock(r["time"]) for r in records if r["kind"] == "batched"}
    steps = [r for r in records if r["kind"] == "trained" and r["step"] in begun][1:]
    seconds = np.array([clock(r["time"]) - begun[r["step"]] for r in steps])
    tokens = np.array([r["tokens"] for r in steps], dtype=float)
    fixed, each = _line(tokens, seconds)
    return {"train_seconds": fixed, "train_token_seconds": each}


def closing(records: Records, metrics: Mapping[int, Mapping[str, float]], config: RunConfig) -> float:
    """Seconds from a publication to the end of its step, where neither checkpoint nor evaluation falls into them.

    What is left between training and the next batch once the publication and the learner's wait for groups are taken
    off. A deterministic run also waits before it publishes, so there it is what is left after the publication.
    """
    if config.rollout.deterministic:
        since = {r["version"]: r["time"] for r in records if r["kind"] == "published"}
    else:
        trained = {r["step"] + 1: r["time"] for r in records if r["kind"] == "trained"}
        since = {
            version: at + metrics[version]["time/publish"] for version, at in trained.items() if version in metrics
        }
    batched = {r["step"]: r["time"] for r in records if r["kind"] == "batched" and r["step"] + 1 in metrics}
    every = [n for n in (config.checkpoint.every, config.eval.every) if n]
    plain = [version for version in batched if version in since and not any(version % n == 0 for n in every)]
    return max(_median(batched[v] - since[v] - metrics[v + 1]["time/wait_groups"] for v in plain), 0.0)


def scoring(records: Records, clock: WorkClock, scorers: int) -> float:
    """Seconds of a group at a scorer, the wait for a free one taken off."""
    arrived = {r["group"]: clock(r["time"]) for r in records if r["kind"] == "done"}
    scored = [
        (clock(r["time"]), arrived[r["group"]]) for r in records if r["kind"] == "scored" and r["group"] in arrived
    ]
    before = [-math.inf] * scorers + [end for end, _ in scored]
    return max(_median(end - max(start, free) for (end, start), free in zip(scored, before, strict=False)), 0.0)


def leases(records: Records, clock: WorkClock, lengths: Mapping[int, Sequence[int]]) -> list[Lease]:
    """The first leases that ended with a result, in the order in which they were given.

    A group that left no rollouts (a filter's) counts as completions of equal length.
    """
    ended = {(r["group"], r["attempt"]): r for r in records if r["kind"] == "done"}
    size = len(next(iter(lengths.values())))
    found = []
    for record in records:
        done = ended.get((record["group"], record["attempt"])) if record["kind"] == "leased" else None
        if done is not None:
            group = lengths.get(done["group"], [max(done["tokens"] // size, 1)] * size)
            found.append(Lease(record["actor"], clock(record["time"]), clock(done["time"]), group))
    return found[:MOST_LEASES]


def loading(records: Records, clock: WorkClock, metrics: Mapping[int, Mapping[str, float]]) -> list[Switch]:
    """When the actors stood still for new weights."""
    ends = [(r["time"], r["version"]) for r in records if r["kind"] == "published" and r["version"] in metrics]
    return [Switch(clock(end - metrics[version]["time/publish"]), clock(end), version) for end, version in ends]


def decoding(held: Sequence[Lease], sequences: int, switches: Sequence[Switch]) -> tuple[dict[str, float], float]:
    """lease_seconds, decode_base and decode_each that bring virtual actors closest to these leases; the error left.

    Gauss-Newton on the moments at which groups are done. A fourth number, a pause before the first decode step of all,
    takes up what engines compile then, and is thrown away.
    """
    ends = np.array([lease.end for lease in held])
    low = np.array([0.0, 1e-6, 0.0, 0.0])

    def late(numbers: np.ndarray) -> np.ndarray:
        return _replay(held, sequences, switches, numbers) - ends

    found = _guess(held, sequences)
    best, error = found, math.inf
    for _ in range(24):  # a step may be one for the worse: the order in which sequences find room jumps
        now = late(found)
        if _size(now) < error:
            best, error = found, _size(now)
        elif _size(now) > 3 * error:
            found = (found + best) / 2
            continue
        moves = np.diag(np.maximum(np.abs(found) * 1e-3, (1e-4, 1e-6, 1e-8, 1e-4)))
        slopes = np.array([(late(found + move) - now) / move.sum() for move in moves])
        found = np.maximum(found + np.linalg.lstsq(slopes.T, -now, rcond=None)[0], low)
    names = ("lease_seconds", "decode_base", "decode_each")
    return dict(zip(names, map(float, best), strict=False)), error


def _guess(held: Sequence[Lease], sequences: int) -> np.ndarray:
    """Half of a decode step for each of its two parts, with as many sequences at once as there are on average."""
    step = median((lease.end - lease.start) / max(lease.lengths) for lease in held)
    at_work = sum((lease.end - lease.start) * len(lease.lengths) for lease in held)
    span = max(lease.end for lease in held) - min(lease.start for lease in held)
    together = at_work / span / len({lease.actor for lease in held})
    return np.array([0.0, step / 2, step / 2 / min(max(together, 1.0), sequences), 0.0])


def _replay(held: Sequence[Lease], sequences: int, switches: Sequence[Switch], numbers: np.ndarray) -> np.ndarray:
    """When virtual actors would have had each lease done. numbers: as in `decoding`."""
    latency, base, each, pause = map(float, numbers)
    ends = np.zeros(len(held))
    for name in {lease.actor for lease in held}:
        starts = [(lease.start + latency, i) for i, lease in enumerate(held) if lease.actor == name]
        first = min(starts)[0] + pause
        mine = sorted((max(start, first), i) for start, i in starts)
        actor = VirtualActor(name, 0, base, each, sequences, since=first, version=0, seen=0, time=first)
        for start, at in itertools.groupby(mine, lambda item: item[0]):
            _decode(actor, start, switches, ends)
            for _, i in at:
                actor.add(Job(i, 0, len(held[i].lengths)), held[i].lengths)
        _decode(actor, math.inf, switches, ends)
    return ends


def _decode(actor: VirtualActor, until: float, switches: Sequence[Switch], ends: np.ndarray) -> None:
    while (alarm := actor.alarm(switches)) is not None and alarm <= until:
        for job in actor.advance(alarm, switches):
            ends[job.ordinal] = alarm
    if until < math.inf:
        for job in actor.advance(until, switches):
            ends[job.ordinal] = until


def _drop_share(records: Records) -> float:
    dropped = sum(r["kind"] == "dropped" and not r["reason"].startswith(("failed", "retries")) for r in records)
    return dropped / max(sum(r["kind"] == "scored" for r in records), 1)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(offset, slope) of the least squares, neither below 0."""
    slope, offset = np.polyfit(x, y, 1) if len(set(x)) > 1 else (0.0, float(y.mean()))
    if slope < 0:
        return float(y.mean()), 0.0
    if offset < 0:
        return 0.0, float((x @ y) / (x @ x))
    return float(offset), float(slope)


def _size(errors: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(errors**2)))


def _median(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return float(median(found)) if found else 0.0


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); it is written by `alignlab train`") from None
