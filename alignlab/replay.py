"""The verb `replay`: a run's learner trains again, alone, on what ledger and payloads say it was given.

However free-running the run was, which groups made which step, in which order, with which tokens, log-probs, versions,
scores and weights is on disk; the learner draws nothing at random. So losses and weights come out bit for bit, or the
first step that differs is named.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab import payloads as p
from alignlab.cluster import cluster
from alignlab.ledger import read_ledger
from alignlab.plan import shown
from alignlab.run_dir import Checkpoint, RunDir
from alignlab.run_files import read_rows
from core.config import RunConfig
from core.errors import UserError
from core.loading import load_config
from core.schema import Group, Mixture

MEASURED = ("time/", "learner/tokens_per_second", "learner/flops_per_second", "learner/mfu")
MEASURED += ("learner/peak_memory_gib",)
"""Metrics of the learner that say how fast it was, not what it did."""


@dataclass
class Lineage:
    """The steps of a run that count: what was undone by a restart is not among them."""

    steps: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # step -> its record `trained`
    rollouts: dict[int, str] = field(default_factory=dict)  # group -> digest
    scores: dict[int, str] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)  # version -> digest

    @classmethod
    def read(cls, path: Path) -> Lineage:
        """The lineage of a ledger. Raises UserError."""
        records: list[tuple[int, Mapping[str, Any]]] = []
        for at, record in read_ledger(path):
            if record["kind"] == "begin":
                records = [(where, kept) for where, kept in records if where < record["offset"]]
            records.append((at, record))
        lineage = cls()
        for _, record in records:
            match record["kind"]:
                case "done" | "reused":
                    lineage.rollouts[record["group"]] = record["payload"]
                case "scored":
                    lineage.scores[record["group"]] = record["payload"]
                case "trained":
                    lineage.steps[record["step"]] = record
                case "published":
                    lineage.weights[record["version"]] = record["digest"]
        return lineage

    def batch(self, step: int, payloads: p.Payloads) -> tuple[list[Group], Mixture]:
        """What the learner was given in a step. Raises payloads.Missing, payloads.Corrupt."""
        record = self.steps[step]
        groups = []
        for ordinal in record["groups"]:
            group = p.unpack_rollout(payloads.read(self.rollouts[ordinal]))
            groups.append(p.with_scores(group, payloads.read(self.scores[ordinal])))
        return p.with_step(groups, payloads.read(record["payload"]))


@dataclass(frozen=True)
class Digest:
    """The digest of the learner's weights in the dtype in which the actors took them."""

    dtype: str

    def __call__(self, tensors: Any, version: int) -> str:
        """As it was published."""
        from actors.weights import snapshot

        return snapshot(tensors, version, self.dtype).digest


def replay(arguments: argparse.Namespace) -> int:
    """`alignlab replay RUN`: 0 if every step came out bit for bit, 1 if one did not. Raises UserError."""
    folder = Path(arguments.folder)
    if not (folder / "ledger.jsonl").exists():
        raise UserError(f"RUN: {folder} has no ledger.jsonl; a run that `alignlab train` made has one")
    config, lineage = load_config(folder / "config.yaml"), Lineage.read(folder / "ledger.jsonl")
    payloads = p.Payloads(folder / "payloads")
    start = _start(folder, lineage, payloads, getattr(arguments, "from"))
    first = start.step if start else 0
    last = len(lineage.steps) if arguments.steps is None else min(len(lineage.steps), first + arguments.steps)
    print(f"{shown(folder)}: steps {first + 1} to {last} again, from {shown(start.path) if start else 'the start'}")
    # No actors: what they sampled is there.
    alone = config.model_copy(update={"actors": config.actors.model_copy(update={"count": 1, "device": "cpu"})})
    with cluster(alone), tempfile.TemporaryDirectory() as scratch:
        different = asyncio.run(_replay(config, lineage, payloads, start, range(first, last), Path(scratch), folder))
    if different:
        print(f"replay: {different[0]}" + (f" (and {len(different) - 1} more)" if different[1:] else ""))
        return 1
    print(f"replay: {last - first} steps, losses and weights bit for bit")
    return 0


def _start(folder: Path, lineage: Lineage, payloads: p.Payloads, wanted: int | None) -> Checkpoint | None:
    """The checkpoint to begin with, none for the start of the run: the earliest whose steps all have their payloads."""
    kept = {checkpoint.step: checkpoint for checkpoint in RunDir(folder).checkpoints()}
    if wanted is not None and wanted not in (0, *kept):
        there = ", ".join(map(str, (0, *kept)))
        raise UserError(f"--from {wanted}: there is no checkpoint of that step; one can begin from {there}")
    for step in (0, *kept) if wanted is None else (wanted,):
        missing = [lacks for s in sorted(lineage.steps) if s >= step and (lacks := _lacks(s, lineage, payloads))]
        if not missing:
            return kept.get(step)
    why = "the oldest go once they take more room than ledger.payload_gib"
    raise UserError(f"{folder}: cannot be replayed, {missing[0]}; {why}")


def _lacks(step: int, lineage: Lineage, payloads: p.Payloads) -> str:
    record = lineage.steps[step]
    wanted = [d for o in record["groups"] for d in (lineage.rollouts.get(o, ""), lineage.scores.get(o, ""))]
    gone = [digest for digest in (*wanted, record["payload"]) if not payloads.path(digest).exists()]
    return f"step {step + 1} lacks {len(gone)} of its {len(wanted) + 1} payloads" if gone else ""


async def _replay(
    config: RunConfig,
    lineage: Lineage,
    payloads: p.Payloads,
    start: Checkpoint | None,
    steps: range,
    scratch: Path,
    folder: Path,
) -> list[str]:
    """Train the steps again; what came out otherwise, in words."""
    from learner.pool import LearnerPool
    from rewards.composer import Composer

    rows = {int(row["step"]): row for row in read_rows(folder / "metrics.jsonl", []) if "policy/loss" in row}
    composer = Composer(config.rewards, steps=config.steps)
    learner = await LearnerPool.start(config, scratch, reference="kl" in composer.needs)
    different = []
    try:
        if start is not None:
            await learner.load(start.path)
        for step in steps:
            groups, mixture = lineage.batch(step, payloads)
            result = await learner.step(groups, step, mixture)
            weights = await learner.export(Digest(config.actors.dtype or config.model.dtype))
            found = [*_compare(result.metrics, rows.get(step + 1, {})), *_weights(lineage, step + 1, weights)]
            different += [f"step {step + 1}: {text}" for text in found]
            print(f"step {step + 1}: loss {result.metrics.get('policy/loss', math.nan):.6g}  " + _verdict(found))
    finally:
        await learner.close()
    return different


def _compare(metrics: Mapping[str, float], row: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that are not those of the run's own row."""
    for name, value in metrics.items():
        # The row went through JSON, so this one does too.
        kept = json.loads(json.dumps(value)) if math.isfinite(value) else None
        if not name.startswith(MEASURED) and name in row and row[name] != kept:
            yield f"{name} is {kept!r}, it was {row[name]!r}"


def _weights(lineage: Lineage, version: int, digest: str) -> Iterator[str]:
    """What went over NCCL has a digest of another kind, and demonstrations were served to nobody."""
    published = lineage.weights.get(version, "")
    if published and not published.startswith("nccl:") and published != digest:
        yield f"the weights are {digest[:12]}..., they were {published[:12]}..."


def _verdict(found: list[str]) -> str:
    return "differs: " + "; ".join(found) if found else "equal"
