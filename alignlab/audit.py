"""The verb `audit`: the life of every group of a run, counted anew from its files.

    ledger.jsonl --lineage--> surviving records --audit_lives--> problems, counts
                              payloads, checkpoints, rollouts, metrics --audit_files--> problems

A resumed run goes on from a checkpoint's byte offset in the ledger: the records of behind it are undone. What has
survived all resumes is the lineage; in it nothing may be lost and nothing be trained twice. Shares no counter with the
coordinator; reads only, so it may be asked of a run that is at work or was killed.
"""

from __future__ import annotations

import argparse
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab.audit_files import PayloadCheck, check_manifest, check_rows, oldest_checkpoint, read_manifests
from alignlab.audit_lives import Lives
from alignlab.ledger import read_ledger
from alignlab.payloads import Payloads
from core.errors import UserError, nearest

SHOWN = 20  # problems that are printed


@dataclass(frozen=True)
class Attempt:
    """One `begin`: at byte `position` the run went on from `offset`, which has undone `undone` records."""

    position: int
    offset: int
    from_step: int
    reason: str
    undone: int


@dataclass(frozen=True)
class Audit:
    """What was found. `groups`, `results`, `tokens` and `payloads` are counts by name; `problems` are sentences."""

    attempts: list[Attempt]
    steps: int  # done, of `wanted`
    wanted: int
    finished: bool
    records: int
    surviving: int
    groups: dict[str, int]
    results: dict[str, int]
    tokens: dict[str, int]
    payloads: dict[str, int]
    problems: list[str]


@dataclass
class Survey:
    """What one reading of the whole ledger says, undone parts included."""

    starts: array[int] = field(default_factory=lambda: array("q"))  # byte offset of each record
    end: int = 0  # of the last record
    ranges: list[tuple[int, int]] = field(default_factory=list)  # [from, to) in bytes: what has survived
    attempts: list[Attempt] = field(default_factory=list)
    samples: Counter[tuple[int, str]] = field(default_factory=Counter)  # (group, digest): times that it was sampled
    tokens: dict[tuple[int, str], int] = field(default_factory=dict)  # of each of them
    refused: int = 0  # tokens
    pruned: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def count(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Records that begin in the ranges."""
        return sum(bisect_left(self.starts, end) - bisect_left(self.starts, start) for start, end in ranges)

    def survives(self, offset: int) -> bool:
        """Whether a record that has survived ends at `offset`; or nothing, at 0."""
        at = bisect_left(self.starts, offset)
        ends_here = offset == self.end or (at < len(self.starts) and self.starts[at] == offset)
        return offset == 0 or (ends_here and any(start < offset <= end for start, end in self.ranges))


def audit(run_folder: Path) -> Audit:
    """Count the run in `run_folder` anew. Raises UserError where there is no ledger."""
    path = run_folder / "ledger.jsonl"
    if not path.exists():
        runs = sorted(str(p.parent) for p in run_folder.parent.glob("*/ledger.jsonl"))
        near = f"; {nearest(str(run_folder), runs)}" if runs else ""
        raise UserError(f"RUN: {run_folder} holds no ledger.jsonl, so there is nothing to audit{near}")
    manifests, problems = read_manifests(run_folder)
    survey = _survey(path)
    problems += survey.problems
    lives, said = _tell(path, survey, manifests)
    problems += lives.problems + said + list(_lost(lives))
    tokens = _tokens(survey, lives)
    problems += _unbalanced(tokens)
    check = PayloadCheck(Payloads(run_folder / "payloads"), lives, survey.pruned, oldest_checkpoint(run_folder))
    if lives.begin:
        check.run()
        problems += check.problems + _missing(check, path, survey) + list(check_rows(run_folder, lives))
    return Audit(
        attempts=survey.attempts,
        steps=lives.trained,
        wanted=lives.begin.get("steps", 0),
        finished=lives.finished,
        records=len(survey.starts),
        surviving=survey.count(survey.ranges),
        groups=_groups(lives),
        results={name: lives.counts[name] for name in ("leased", "retried", "done", "refused", "reused")},
        tokens=tokens,
        payloads={"checked": check.checked, "missing": len(check.missing), "pruned": len(survey.pruned)},
        problems=problems,
    )


def audit_run(arguments: argparse.Namespace) -> int:
    """`alignlab audit RUN`. 0: nothing is wrong, 1: something is. Raises UserError."""
    found = audit(Path(arguments.folder))
    print("\n".join(summary(found)))
    return 1 if found.problems else 0


# ---------------------------------------------------------------- the lineage
def _survey(path: Path) -> Survey:
    """Read everything once: where attempts begin and what they undo, what was sampled, what was removed."""
    survey = Survey()
    try:
        for offset, record in read_ledger(path):
            survey.starts.append(offset)
            survey.end = offset  # of the records before this one
            survey.ranges[-1:] = [(start, offset) for start, _ in survey.ranges[-1:]]
            try:
                _note(survey, offset, record)
            except (KeyError, TypeError) as error:
                kind = record.get("kind")
                survey.problems.append(f"byte {offset}: {kind} lacks something or has it wrong: {error!r}")
    except UserError as error:  # a damaged line: what stands before it is audited
        survey.problems.append(str(error))
    if survey.starts:
        with path.open("rb") as file:
            file.seek(survey.starts[-1])
            survey.end = survey.starts[-1] + len(file.readline())
        survey.ranges[-1:] = [(start, survey.end) for start, _ in survey.ranges[-1:]]
    return survey


def _note(survey: Survey, offset: int, record: dict[str, Any]) -> None:
    kind = record.get("kind")
    if kind == "begin":
        _undo(survey, offset, record)
    elif not survey.ranges:
        survey.problems.append(f"byte {offset}: the first record is of kind {kind}, not begin")
        survey.ranges = [(0, 0)]
    elif kind == "done":
        sample = record["group"], record["payload"]
        survey.tokens[sample] = record["tokens"]
        survey.samples[sample] += 1
    elif kind == "refused":
        survey.refused += record["tokens"]
    elif kind == "pruned":
        survey.pruned.update(record["payloads"])
    elif kind == "checkpoint" and not survey.survives(record["offset"]):
        where = f"byte {record['offset']}, where no record of the lineage ends"
        survey.problems.append(f"byte {offset}: the checkpoint of step {record['step']} goes on from {where}")


def _undo(survey: Survey, position: int, record: dict[str, Any]) -> None:
    """An attempt begins at byte `position`: what is behind its offset is undone."""
    offset = record["offset"]
    if not survey.survives(offset):
        survey.problems.append(f"byte {position}: goes on from byte {offset}, where no record of the lineage ends")
        offset = position
    kept = [(start, min(end, offset)) for start, end in survey.ranges if start < offset]
    undone = survey.count(survey.ranges) - survey.count(kept)
    survey.ranges = [*kept, (position, position)]
    survey.attempts.append(Attempt(position, offset, record["from_step"], record["reason"], undone))


def _tell(path: Path, survey: Survey, manifests: dict[int, dict[str, Any]]) -> tuple[Lives, list[str]]:
    """The lives of the lineage's groups, and what is wrong with the manifests of checkpoints."""
    lives, problems = Lives(survey.tokens), []
    places = sorted((manifest["ledger_offset"], step) for step, manifest in manifests.items())
    for offset, step in places:
        if not survey.survives(offset):
            why = "no record of the lineage ends there" if offset <= survey.end else f"the ledger has {survey.end}"
            problems.append(f"checkpoint step-{step:06d} goes on from byte {offset}, and {why}")

    def compare(upto: int) -> None:
        while places and places[0][0] <= upto:
            offset, step = places.pop(0)
            if survey.survives(offset):
                problems.extend(check_manifest(step, manifests[step], lives))

    for start, end in survey.ranges:
        for offset, record in read_ledger(path, start, end):
            compare(offset)
            lives.take(offset, record)
    compare(survey.end)
    return lives, problems


# ---------------------------------------------------------------- what must add up
def _lost(lives: Lives) -> Iterator[str]:
    """Groups that have left the lineage without a trace."""
    if never := sorted(set(range(max(lives.groups, default=0))) - lives.groups.keys()):
        yield f"groups {_few(never)}: never admitted, and later ones were"
    last = max((ordinal for ordinal, life in lives.groups.items() if life.step is not None), default=-1)
    for ordinal, life in lives.pending.items():
        if lives.finished and ordinal < last:
            yield f"group {ordinal}: lost; the run has finished, and it is {life.state}, neither trained nor dropped"
        elif life.state == "owed" and lives.fresh:
            yield f"group {ordinal}: lost; it was under way when the run was resumed, and only later ones were admitted"
        elif life.state == "batched" and lives.end is not None:
            yield f"group {ordinal}: batched, and the run has ended without training it"


def _tokens(survey: Survey, lives: Lives) -> dict[str, int]:
    """Every token that was ever sampled by what became of it; what is reused was sampled once."""
    sampled = sum(times * survey.tokens[sample] for sample, times in survey.samples.items())
    held = ((ordinal, life.sample) for ordinal, life in lives.groups.items())
    fates = {name: lives.tokens[name] for name in ("trained", "masked", "dropped")}
    fates["refused"] = survey.refused
    fates["pending"] = sum(life.tokens for life in lives.pending.values())
    fates["undone"] = sampled - sum(survey.tokens.get(sample, 0) for sample in held)
    return {"generated": sampled + survey.refused, **fates}


def _unbalanced(tokens: dict[str, int]) -> list[str]:
    fates = {name: count for name, count in tokens.items() if name != "generated"}
    if tokens["generated"] == sum(fates.values()):
        return []
    parts = " + ".join(f"{name} {count}" for name, count in fates.items())
    return [f"tokens do not add up: generated {tokens['generated']}, but {parts} = {sum(fates.values())}"]


def _missing(check: PayloadCheck, path: Path, survey: Survey) -> list[str]:
    """Payloads that are not there; a run at work may have removed one, and have said so, since the ledger was read."""
    late: set[str] = set()
    if check.missing:
        with suppress(UserError):
            late.update(d for _, r in read_ledger(path, survey.end) if r["kind"] == "pruned" for d in r["payloads"])
    return [said for digest, said in check.missing.items() if digest not in late]


def _groups(lives: Lives) -> dict[str, int]:
    dropped = {name: count for name, count in lives.counts.items() if name.startswith("dropped/")}
    counts = {"admitted": len(lives.groups), "trained": lives.counts["trained"], "dropped": sum(dropped.values())}
    return {**counts, "pending": len(lives.pending), **dropped}


# ---------------------------------------------------------------- what a person reads
def summary(found: Audit) -> list[str]:
    """The lines that are printed; the last ones are the counts, then the verdict."""
    lines = [f"{'attempt':>7} {'from step':>9} {'at byte':>10} {'undid':>8}  why"]
    for number, each in enumerate(found.attempts):
        lines.append(f"{number:>7} {each.from_step:>9} {each.position:>10} {each.undone:>8}  {each.reason}")
    state = "finished" if found.finished else "not finished"
    lines.append(
        f"steps     {found.steps} of {found.wanted}, {state}; {found.surviving} of {found.records} records survive"
    )
    names = ("trained", "dropped", "pending")
    why = ", ".join(f"{n} {name.partition('/')[2]}" for name, n in found.groups.items() if "/" in name)
    lines.append(f"groups    {_sum('admitted', names, found.groups)}" + (f" (dropped: {why})" if why else ""))
    results = found.results
    lines.append(
        f"results   {results['leased']} leases, {results['retried']} returned, {results['done']} results, "
        f"{results['refused']} refused as late, {results['reused']} reused"
    )
    names = tuple(name for name in found.tokens if name != "generated")
    lines.append(f"tokens    {_sum('generated', names, found.tokens)}")
    lines.append("payloads  " + ", ".join(f"{count} {name}" for name, count in found.payloads.items()))
    if not found.problems:
        return [*lines, "audit: green"]
    more = len(found.problems) - SHOWN
    lines += [f"  {problem}" for problem in found.problems[:SHOWN]] + ([f"  ... and {more} more"] if more > 0 else [])
    return [*lines, f"audit: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"]


def _sum(total: str, names: Sequence[str], counts: dict[str, int]) -> str:
    return f"{counts[total]} {total} = " + " + ".join(f"{counts[name]} {name}" for name in names)


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" ... ({len(numbers)})" if len(numbers) > 5 else "")
