"""What a run's files say, held against the lives of its groups (`alignlab.audit_lives`): payloads, the manifests of
checkpoints, rollouts, metrics. Everything is read, nothing is changed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignlab.audit_lives import Life, Lives, Step
from alignlab.payloads import Corrupt, Missing, Payloads, rollout_facts, scored_group, step_groups
from alignlab.run_files import read_rows
from core.schema import group_id

MANIFESTS = "checkpoints/step-*/run.json"


# ---------------------------------------------------------------- payloads
@dataclass
class PayloadCheck:
    """Holds the payloads of a lineage against its lives.

    pruned: digests that were removed on purpose. kept: the step of the oldest checkpoint that is kept (damaged ones
    too): payloads of groups that were trained before it may be pruned.
    """

    store: Payloads
    lives: Lives
    pruned: Collection[str]
    kept: int
    checked: int = 0
    missing: dict[str, str] = field(default_factory=dict)  # digest -> what is said of it
    problems: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Check all payloads that the surviving records name."""
        for ordinal, life in self.lives.groups.items():
            self._group(ordinal, life)
        for step in self.lives.steps:
            self._step(step)

    def _group(self, ordinal: int, life: Life) -> None:
        may_go = life.state == "dropped" or (life.step is not None and life.step < self.kept)
        if life.state in ("done", "scored", "batched", "trained") or life.sample:
            what = f"group {ordinal}: its rollout"
            self._check(what, life.sample, lambda data: self._rollout(ordinal, life, data), may_go)
        if life.state in ("scored", "batched", "trained") or life.scores:
            what = f"group {ordinal}: its scores"
            self._check(what, life.scores, lambda data: self._scores(ordinal, data), may_go)

    def _rollout(self, ordinal: int, life: Life, data: bytes) -> str | None:
        facts = rollout_facts(data)
        if (facts.group, facts.ordinal) != (self._id(ordinal), ordinal):
            return f"is of group {facts.ordinal} ({facts.group})"
        if facts.tokens != life.tokens or facts.oldest not in (None, life.oldest):  # a demonstration has no versions
            said = f"the ledger says {life.tokens} and {life.oldest}"
            return f"has {facts.tokens} tokens, the oldest of version {facts.oldest}; {said}"
        if facts.newest is not None and life.step is not None and facts.newest > life.step:
            return f"has tokens of version {facts.newest} and was trained in step {life.step}"
        return None

    def _scores(self, ordinal: int, data: bytes) -> str | None:
        return None if (group := scored_group(data)) == self._id(ordinal) else f"is of group {group}"

    def _step(self, step: Step) -> None:
        names = [self._id(ordinal) for ordinal in step.groups]

        def groups(data: bytes) -> str | None:
            return None if step_groups(data) == names else "is of other groups, or in another order"

        self._check(f"step {step.number}: its batch", step.payload, groups, step.number < self.kept)

    def _check(self, what: str, digest: str, differs: Callable[[bytes], str | None], may_go: bool) -> None:
        """One payload: there, whole, and what it is said to be. `differs` says how it is not."""
        if not digest:
            self.problems.append(f"{what} has no payload")
            return
        try:
            wrong = differs(self.store.read(digest))
            self.checked += 1
        except Missing:
            if digest not in self.pruned:
                self.missing[digest] = f"{what} is missing: payload {digest}"
            elif not may_go:
                self.problems.append(f"{what} was pruned, and a resume needs it: payload {digest}")
            return
        except Corrupt as error:
            wrong = f"is damaged: {error}"
        except (ValueError, LookupError, SafetensorError) as error:
            wrong = f"cannot be read: {error}"
        if wrong:
            self.problems.append(f"{what} {wrong}: payload {digest}")

    def _id(self, ordinal: int) -> str:
        return group_id(self.lives.begin["seed"], ordinal)


# ---------------------------------------------------------------- checkpoints
def read_manifests(run: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """(step -> manifest of every checkpoint that knows its place in the ledger, what cannot be read)."""
    found, problems = {}, []
    for path in sorted(run.glob(MANIFESTS)):
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError:  # removed meanwhile, as too old
            continue
        except ValueError as error:
            problems.append(f"{path.relative_to(run)} cannot be read: {error}")
            continue
        if "ledger_offset" in manifest:
            found[_number(path.parent)] = manifest
    return found, problems


def oldest_checkpoint(run: Path) -> int:
    """The step of the oldest checkpoint that is kept, damaged or not; 0 without any."""
    return min(map(_number, run.glob("checkpoints/*step-*")), default=0)


def check_manifest(step: int, manifest: Mapping[str, Any], lives: Lives) -> Iterable[str]:
    """Where the coordinator of a checkpoint differs from `lives` as they were at the manifest's place in the ledger."""
    where, kept = f"checkpoint step-{step:06d}:", manifest["coordinator"]
    found = {
        "version": (kept["version"], lives.trained),
        "next_ordinal": (kept["next_ordinal"], max(lives.groups, default=-1) + 1),
        "groups under way": (sorted(map(int, kept["owed"])), list(lives.pending)),
    }
    counts, tokens = kept.get("counts"), kept.get("tokens")
    if counts is not None:
        dropped = {name for name in (*counts, *lives.counts) if name.startswith("dropped/")}
        for name in ("trained", "refused", "retried", *sorted(dropped)):
            found[f"groups {name}"] = (counts.get(name, 0), lives.counts[name])
    if tokens is not None:
        for name in ("trained", "masked", "refused", "dropped"):
            found[f"tokens {name}"] = (tokens.get(name, 0), lives.tokens[name])
    if step != lives.trained:
        yield f"{where} {lives.trained} steps are trained at its place in the ledger, byte {manifest['ledger_offset']}"
    for name, (said, counted) in found.items():
        if said != counted:
            yield f"{where} {name} {said!r:.200}; the ledger has {counted!r:.200}"


# ---------------------------------------------------------------- rollouts and metrics
def check_rows(run: Path, lives: Lives) -> Iterable[str]:
    """Where rollouts and metrics differ from the steps that were trained.

    They are written after a step is trained and, behind the newest checkpoint, taken away before it is done again. So
    until a run has ended the last steps behind that checkpoint may lack them, and later steps may have them.
    """
    notes: list[str] = []
    lines = Counter(row["step"] for row in read_rows(run / "metrics.jsonl", notes) if "time/step" in row)
    files = {_number(path): path for path in run.glob("rollouts/step-*.jsonl")}
    saved = max(map(_number, run.glob("checkpoints/step-*")), default=0)
    needed = lives.trained if lives.end is not None else max(saved, *lines, *files, 0)
    for version, step in enumerate(lives.steps[:needed], 1):
        may_lack = version == lives.trained and lives.end is None
        if version in files:
            yield from _check_rollouts(files[version], step, lives.begin["group_size"], notes)
        elif not may_lack:
            yield f"step {step.number}: rollouts/step-{version:06d}.jsonl is missing"
        if lines[version] != 1 and not (may_lack and lines[version] == 0):
            yield f"step {step.number}: metrics.jsonl has {lines[version]} lines of it (step {version} there), not one"
    later = sorted({version for version in (*lines, *files) if version > lives.trained})
    if later and lives.end is not None:
        yield f"metrics or rollouts of steps that were never trained: {later}"
    yield from notes


def _check_rollouts(path: Path, step: Step, size: int, notes: list[str]) -> Iterable[str]:
    samples: dict[int, list[int]] = {}
    for row in read_rows(path, notes):
        samples.setdefault(row["ordinal"], []).append(row["sample"])
    if samples.keys() != set(step.groups):
        said, trained = sorted(samples.keys() - set(step.groups)), sorted(set(step.groups) - samples.keys())
        yield f"step {step.number}: {path.name} has groups {said} that were not trained, and lacks {trained}"
    for ordinal, each in samples.items():
        if sorted(each) != list(range(size)):
            yield f"step {step.number}: {path.name} has samples {sorted(each)} of group {ordinal}, not {size} once each"


def _number(path: Path) -> int:
    """The step in the name of a file or folder."""
    return int(path.stem.rpartition("-")[2])
