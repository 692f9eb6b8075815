"""The lives of a run's groups, told again from the records of its ledger and from nothing else.

    lives = Lives()
    for offset, record in the surviving records:
        lives.take(offset, record)
    lives.problems           what ought not to have happened, with the byte of the record that says it

After a problem a group is where the record says it is, so that one mistake is not told many times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Record = Mapping[str, Any]


@dataclass(slots=True)
class Life:
    """Where a group is, and what it holds."""

    version: int
    state: str = "waiting"  # leased, done, scored, batched, trained, dropped; owed: to be admitted again after a resume
    lease: tuple[str, int, int] | None = None  # actor, incarnation, attempt
    attempt: int = -1  # of the latest lease since the run was begun or resumed
    sample: str = ""  # digest of the rollout
    tokens: int = 0
    oldest: int | None = None
    scores: str = ""  # digest
    step: int | None = None  # that trained it
    reason: str = ""  # why it was dropped


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was trained."""

    number: int
    groups: Sequence[int]
    payload: str
    offset: int


@dataclass
class Lives:
    """See the module's docstring. `sampled`: tokens of every rollout that the ledger knows, by (group, digest)."""

    sampled: Mapping[tuple[int, str], int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    begin: Record = field(default_factory=dict)  # the newest
    end: Record | None = None  # of the newest attempt
    groups: dict[int, Life] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # groups by fate, leases, results
    tokens: Counter[str] = field(default_factory=Counter)  # trained, masked, refused, dropped
    fresh: bool = False  # a group was admitted for the first time since the newest begin
    _offset: int = 0  # of the record that is being read
    _under_way: set[int] = field(default_factory=set)
    _batch: tuple[int, list[int]] | None = None
    _published: int | None = None  # newest version since the last step; None: the attempt has not trained yet
    _digests: dict[tuple[int, str], str] = field(default_factory=dict)  # (version, kind of digest) -> of its weights
    _dead: set[tuple[str, int]] = field(default_factory=set)  # (actor, incarnation)
    _gone: set[tuple[str, int]] = field(default_factory=set)

    def take(self, offset: int, record: Record) -> None:
        """Go on with one record. What is wrong with it goes to `problems`; kinds that tell nothing of groups pass."""
        reader = self._READERS.get(record.get("kind", ""))
        self._offset = offset
        try:
            if reader is not None:
                reader(self, record)
        except (KeyError, TypeError, ValueError) as error:
            self._problem(f"the record {dict(record)!r:.200} lacks something or has it wrong: {error!r}")

    @property
    def trained(self) -> int:
        """Steps done."""
        return len(self.steps)

    @property
    def pending(self) -> dict[int, Life]:
        """The groups under way by ordinal."""
        return {ordinal: self.groups[ordinal] for ordinal in sorted(self._under_way)}

    @property
    def finished(self) -> bool:
        """Whether the run came to its last step."""
        return self.end is not None and self.trained >= self.begin.get("steps", 0)

    # ------------------------------------------------------------ attempts and actors
    def _begin(self, record: Record) -> None:
        if record["from_step"] != self.trained:
            self._problem(
                f"the run goes on from step {record['from_step']}; up to its offset {self.trained} are trained"
            )
        for name in ("seed", "prompts", "group_size") if self.begin else ():
            if record[name] != self.begin[name]:
                self._problem(f"{name} was {self.begin[name]}, is {record[name]}")
        for ordinal in self._under_way:
            life = self.groups[ordinal]
            life.state, life.lease, life.attempt = "owed", None, -1
        self._dead.clear()
        self._gone.clear()
        self.begin, self.end, self._batch, self._published, self.fresh = record, None, None, None, False

    def _actor(self, record: Record) -> None:
        who, state = (record["actor"], record["incarnation"]), record["state"]
        for name, those in (("dead", self._dead), ("gone", self._gone)):
            (those.add if state == name else those.discard)(who)

    def _serve(self, record: Record) -> None:
        version, digest = record["version"], record["digest"]
        kind = digest.rpartition(":")[0]  # other ways of publishing digest otherwise, as "nccl:..." says
        if version > self.trained:
            self._problem(f"version {version} was published when {self.trained} steps were trained")
        if digest and self._digests.setdefault((version, kind), digest) != digest:
            self._problem(f"version {version} was published with other weights than before: {digest}")
        self._published = version

    def _ended(self, record: Record) -> None:
        self.end = record
        if record["step"] != self.trained:
            self._problem(f"the end says step {record['step']}; {self.trained} steps are trained")

    # ------------------------------------------------------------ one group
    def _admitted(self, record: Record) -> None:
        ordinal, version = record["group"], record["version"]
        life = self.groups.get(ordinal)
        if life is not None and life.state != "owed":
            self._wrong(record, f"admitted while it is {life.state}")
        self.fresh |= life is None
        self.groups[ordinal] = Life(version, step=None if life is None else life.step)
        self._under_way.add(ordinal)
        if version > self.trained:
            self._wrong(record, f"admitted under version {version} when {self.trained} steps were trained")
        slots = (self.begin["max_staleness"] + 1) * self.begin["prompts"]
        if len(self._under_way) > slots:
            self._wrong(record, f"admitted as one of {len(self._under_way)} groups under way; there are {slots} slots")

    def _leased(self, record: Record) -> None:
        life, lease = self._move(record, ("waiting",), "leased"), _lease(record)
        if lease[2] <= life.attempt:
            self._wrong(record, f"leased as attempt {lease[2]} after attempt {life.attempt}")
        if lease[:2] in self._dead | self._gone:
            self._wrong(record, f"leased to {lease[0]}.{lease[1]}, which is no more")
        life.lease, life.attempt = lease, lease[2]
        self.counts["leased"] += 1

    def _returned(self, record: Record) -> None:
        life, lease = self._move(record, ("leased",), "waiting"), _lease(record)
        if life.lease not in (None, lease):
            self._wrong(record, f"returned from {_named(lease)}; the lease is {_named(life.lease)}")
        life.lease = None
        self.counts["retried"] += 1

    def _done(self, record: Record) -> None:
        life, lease = self._move(record, ("leased",), "done"), _lease(record)
        if life.lease not in (None, lease):
            self._wrong(record, f"a late result was accepted, {_named(lease)}; the lease is {_named(life.lease)}")
        if lease[:2] in self._dead:
            self._wrong(record, f"a result of {lease[0]}.{lease[1]} was accepted after its death")
        self._hold(record, life)
        self.counts["done"] += 1

    def _reused(self, record: Record) -> None:
        life, payload, tokens = self._move(record, ("waiting",), "done"), record["payload"], record["tokens"]
        sampled = self.sampled.get((record["group"], payload))
        if sampled is None:
            self._wrong(record, f"reuses payload {payload}, which was never sampled for it")
        elif sampled != tokens:
            self._wrong(record, f"reuses {tokens} tokens; {sampled} were sampled")
        self._hold(record, life)
        self.counts["reused"] += 1

    def _hold(self, record: Record, life: Life) -> None:
        life.lease, life.sample = None, record["payload"]
        life.tokens, life.oldest = record["tokens"], record["oldest"]
        if life.oldest is not None and life.oldest > self.trained:
            self._wrong(record, f"sampled by version {life.oldest} when {self.trained} steps were trained")
        if self.begin.get("deterministic") and life.oldest not in (None, life.version):
            self._wrong(record, f"deterministic, yet sampled by version {life.oldest}, admitted under {life.version}")

    def _refused(self, record: Record) -> None:
        life, lease = self.groups.get(record["group"]), _lease(record)
        if life is not None and life.lease == lease:
            self._wrong(record, f"the result of its own lease was refused, {_named(lease)}")
        self.counts["refused"] += 1
        self.tokens["refused"] += record["tokens"]

    def _scored(self, record: Record) -> None:
        self._move(record, ("done",), "scored").scores = record["payload"]

    def _dropped(self, record: Record) -> None:
        life, reason = self._move(record, ("waiting", "leased", "done", "scored"), "dropped"), record["reason"]
        if not reason:
            self._wrong(record, "dropped without a reason")
        if record["tokens"] != life.tokens:
            self._wrong(record, f"dropped with {record['tokens']} tokens; {life.tokens} were sampled")
        life.lease, life.reason = None, reason
        self.counts[f"dropped/{reason}"] += 1
        self.tokens["dropped"] += record["tokens"]

    # ------------------------------------------------------------ one step
    def _batched(self, record: Record) -> None:
        step, groups, wanted = record["step"], list(record["groups"]), self.begin["prompts"]
        if self._batch is not None:
            self._problem(f"step {step}: batched while step {self._batch[0]} is under way")
        elif step != self.trained:
            self._problem(f"step {step}: batched when {self.trained} steps were trained")
        if self._published not in (None, step):
            self._problem(f"step {step}: batched before version {step} was published")
        if len(groups) != wanted or len(set(groups)) != wanted:
            self._problem(f"step {step}: a batch of {len(set(groups))} groups, not of {wanted}")
        for ordinal in groups:
            self._move({**record, "group": ordinal}, ("scored",), "batched")
        self._batch = (step, groups)

    def _trained(self, record: Record) -> None:
        step, groups, tokens, masked = record["step"], list(record["groups"]), record["tokens"], record["masked"]
        if self._batch is None:
            self._problem(f"step {step}: trained without a batch")
        elif (step, groups) != self._batch:
            self._problem(
                f"step {step}: trained on groups {groups}; batched was step {self._batch[0]} of {self._batch[1]}"
            )
        if step != self.trained:
            self._problem(f"step {step}: trained after {self.trained} steps")
        sampled = sum(self._train({**record, "group": ordinal}, step).tokens for ordinal in groups)
        if tokens != sampled or not 0 <= masked <= tokens:
            self._problem(
                f"step {step}: trained on {tokens} tokens, {masked} of them masked; its groups have {sampled}"
            )
        self.tokens["trained"] += tokens - masked
        self.tokens["masked"] += masked
        self.steps.append(Step(step, groups, record["payload"], self._offset))
        self._batch, self._published = None, -1  # the next step waits for a publication

    def _train(self, record: Record, step: int) -> Life:
        before = self.groups.get(record["group"])
        if before is not None and before.step is not None:
            self._wrong(record, f"trained in step {before.step} and again in step {step}")
        life = self._move(record, ("batched",), "trained")
        bound, oldest = self.begin.get("max_age"), life.oldest
        if bound is not None and oldest is not None and step - oldest > bound:
            self._wrong(record, f"step {step} trained tokens of version {oldest}; max_age is {bound}")
        life.step = step
        self.counts["trained"] += 1
        return life

    # ------------------------------------------------------------ parts
    def _move(self, record: Record, allowed: Sequence[str], state: str) -> Life:
        """The group of a record, which takes it from one of the states `allowed` to `state`."""
        ordinal, life = record["group"], self.groups.get(record["group"])
        if life is None:
            self._wrong(record, f"{record['kind']}, and it was never admitted")
            life = self.groups[ordinal] = Life(self.trained)
        elif life.state not in allowed:
            self._wrong(record, f"{record['kind']} while it is {life.state}")
        life.state = state
        (self._under_way.discard if state in ("trained", "dropped") else self._under_way.add)(ordinal)
        return life

    def _wrong(self, record: Record, text: str) -> None:
        self._problem(f"group {record['group']}: {text}")

    def _problem(self, text: str) -> None:
        self.problems.append(f"byte {self._offset}: {text}")

    _READERS: ClassVar = {
        "begin": _begin, "actor": _actor, "published": _serve, "end": _ended,
        "admitted": _admitted, "leased": _leased, "returned": _returned, "done": _done, "reused": _reused,
        "refused": _refused, "scored": _scored, "dropped": _dropped, "batched": _batched, "trained": _trained,
    }  # fmt: skip


def _lease(record: Record) -> tuple[str, int, int]:
    return record["actor"], record["incarnation"], record["attempt"]


def _named(lease: tuple[str, int, int]) -> str:
    return f"{lease[0]}.{lease[1]} attempt {lease[2]}"
