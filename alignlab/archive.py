"""What a run keeps of every group: the ledger says what happened, payloads hold what it was.

archive = Archive(run_dir.path, config.ledger)
found = archive.begin(facts, checkpoint)      # what of an interrupted run need not be sampled again
digest = archive.keep_rollout(group)          # before the record that names it
archive.record(records)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab import payloads as p
from alignlab.events import Record
from alignlab.ledger import Ledger, read_ledger
from alignlab.states import Sampled
from core.config import LedgerConfig
from core.schema import Group, Mixture

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Known:
    """What the ledger says of a group that was sampled."""

    sampled: Sampled
    scores: str = ""  # digest, once it is scored


class Archive:
    """The ledger and the payloads of one run; one process writes them."""

    def __init__(self, folder: Path, config: LedgerConfig, say: Say = print) -> None:
        """Raises UserError if the ledger is damaged or another process writes it."""
        self._config, self._say = config, say
        self._path = folder / "ledger.jsonl"
        self._payloads = p.Payloads(folder / "payloads")
        self._bytes = self._payloads.size()
        self._ledger = Ledger.open(self._path, sync_seconds=config.sync_seconds)
        self.groups: dict[int, Group] = {}  # found sampled, some of them scored, until somebody takes them
        self._scores: dict[int, str] = {}  # digests of the scores of those that have them
        self._under_way: dict[int, list[str]] = {}  # payloads of the groups that are neither trained nor dropped
        if self._ledger.torn:
            say(f"ledger: its last {self._ledger.torn} bytes were half-written and are cut off")

    def begin(self, facts: Mapping[str, Any], step: int, offset: int) -> dict[int, Sampled]:
        """A new attempt goes on from `step`, whose checkpoint was taken at `offset`; what is sampled already.

        Everything after `offset` is undone. Completions survive it if no token is of a version that the run has yet to
        make. Those that cannot be read are said and sampled again.
        """
        next(read_ledger(self._path, offset), None)  # raises if the ledger ends before the checkpoint
        known = self._known(step, offset)
        attempt = sum(record["kind"] == "begin" for _, record in read_ledger(self._path))
        self.record([Record("begin", {"attempt": attempt, **facts, "from_step": step, "offset": offset})])
        self.groups, self._scores = {}, {}
        for ordinal, entry in known.items():
            try:
                self.groups[ordinal] = p.unpack_rollout(self._payloads.get(entry.sampled.payload))
            except (p.Missing, p.Corrupt) as error:
                self._say(f"group {ordinal} is sampled again: {error}")
                continue
            self._scores[ordinal] = entry.scores
        return {ordinal: known[ordinal].sampled for ordinal in self.groups}

    def _known(self, step: int, offset: int) -> dict[int, _Known]:
        """Groups that were sampled by versions up to `step` of the lineage that goes on, and have not left it."""
        known: dict[int, _Known] = {}
        left: list[tuple[int, list[int]]] = []  # (offset, groups) of those trained or dropped
        now = {"kind": "begin", "from_step": step, "offset": offset}
        for at, record in [*read_ledger(self._path), (self._ledger.size, now)]:
            match record["kind"]:
                case "begin":  # what later versions have sampled is of a past that did not happen
                    known = {o: k for o, k in known.items() if k.sampled.newest <= record["from_step"]}
                    left = [(where, groups) for where, groups in left if where < record["offset"]]
                case "done":
                    sampled = Sampled(record["payload"], record["tokens"], record["oldest"], record["newest"])
                    known[record["group"]] = _Known(sampled)
                case "scored" if record["group"] in known:
                    known[record["group"]] = _Known(known[record["group"]].sampled, record["payload"])
                case "dropped":
                    left.append((at, [record["group"]]))
                case "trained":
                    left.append((at, record["groups"]))
        gone = {ordinal for _, groups in left for ordinal in groups}
        return {ordinal: entry for ordinal, entry in known.items() if ordinal not in gone}

    # ------------------------------------------------------------ writing
    def record(self, records: Iterable[Record]) -> None:
        """Append to the ledger. Raises OSError."""
        records = list(records)
        self._ledger.append({"kind": record.kind, **record.fields} for record in records)
        for record in records:
            self._note(record.kind, record.fields)

    def _note(self, kind: str, fields: Mapping[str, Any]) -> None:
        match kind:
            case "begin":
                self._under_way.clear()
            case "done" | "reused" | "scored":
                self._under_way.setdefault(fields["group"], []).append(fields["payload"])
            case "dropped" | "trained":
                for ordinal in fields["groups"] if kind == "trained" else [fields["group"]]:
                    self._under_way.pop(ordinal, None)

    def keep_rollout(self, group: Group) -> str:
        """Keep a group as its actor has returned it; the digest."""
        return self._keep(p.pack_rollout(group))

    def keep_scores(self, group: Group) -> str:
        """Keep what the rewards say of a group."""
        return self._keep(p.pack_scores(group))

    def keep_step(self, groups: Sequence[Group], mixture: Mixture) -> str:
        """Keep what a step makes of its groups: the learner's input, with theirs."""
        return self._keep(p.pack_step(groups, mixture))

    def _keep(self, data: bytes) -> str:
        self._bytes += len(data)
        return self._payloads.put(data)

    def take(self, ordinal: int) -> tuple[Group, str]:
        """A group that `begin` has found, and the digest of its scores; empty if it has to be scored."""
        group, digest = self.groups.pop(ordinal), self._scores.pop(ordinal)
        if not digest:
            return group, ""
        try:
            return p.with_scores(group, self._payloads.get(digest)), digest
        except (p.Missing, p.Corrupt) as error:
            self._say(f"group {ordinal} is scored again: {error}")
            return group, ""

    def sync(self) -> int:
        """Have the disk keep all records; the byte offset of their end."""
        return self._ledger.sync()

    def under_way(self) -> list[str]:
        """The payloads of the groups that are neither trained nor dropped."""
        return [digest for digests in self._under_way.values() for digest in digests]

    def sync_payloads(self, digests: Iterable[str]) -> None:
        """Have the disk keep these payloads; for any thread. Raises OSError."""
        self._payloads.sync(digests)

    def prune(self, offset: int) -> None:
        """Remove the oldest payloads of steps trained before `offset`, once all are larger than ledger.payload_gib."""
        limit = int(self._config.payload_gib * 2**30)
        if self._bytes > limit:
            must_stay, removable = self._by_need(offset)
            self._payloads.prune(must_stay, removable, limit, self._pruned)
            self._bytes = self._payloads.size()

    def _pruned(self, digests: list[str]) -> None:
        self.record([Record("pruned", {"payloads": digests, "reason": "ledger.payload_gib"})])

    def _by_need(self, offset: int) -> tuple[set[str], list[str]]:
        trained: set[int] = set()
        removable: dict[str, None] = {}
        of_group: dict[int, list[str]] = {}
        for _, record in read_ledger(self._path, end=offset):
            match record["kind"]:
                case "done" | "scored" | "reused":
                    of_group.setdefault(record["group"], []).append(record["payload"])
                case "trained":
                    trained.update(record["groups"])
                    digests = [d for o in record["groups"] for d in of_group.pop(o, [])]
                    removable |= dict.fromkeys([*digests, record["payload"]])
                case "dropped":
                    removable |= dict.fromkeys(of_group.pop(record["group"], []))
        return {digest for digests in of_group.values() for digest in digests}, list(removable)

    def close(self) -> None:
        """Let go of the ledger."""
        self._ledger.close()
