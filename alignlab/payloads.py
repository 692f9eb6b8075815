"""What groups hold, in files named by what is in them: RUN/payloads/ab/abcd….safetensors, the sha256 of its bytes.

    rollout   a group as its actor returned it       pack_rollout, unpack_rollout
    scores    what the rewards say of it             pack_scores, with_scores
    step      what the learner was given for a step  pack_step, with_step

Equal things have equal bytes, and what comes back is equal to what went in: floats to the last bit, columns to their
types. A file is safetensors: int32 tokens and versions (run-length coded), float64 numbers, and `text`, a JSON document
with everything else. Nothing here executes what a file says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from alignlab.plain import plain, restored
from core import disk
from core.schema import Completion, Group, Mixture, Prompt, Score


class Missing(LookupError):
    """There is no payload of this name."""


class Corrupt(ValueError):
    """The bytes of a payload are not those that its name was made of."""


# ---------------------------------------------------------------- files
class Payloads:
    """The payloads of a run in `folder`. Not synced but by `sync`: what a power cut has torn shows by its digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where the payload of this name lies."""
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def put(self, data: bytes) -> str:
        """Keep `data`; its name. Raises OSError (a full disk), and then there is nothing of it.

        What is there already is written anew: it may be torn.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{digest}.{os.getpid()}.partial")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return digest

    def sync(self, digests: Iterable[str]) -> None:
        """Have the disk keep these payloads, where they are there. Raises OSError."""
        paths = [path for path in map(self.path, digests) if path.exists()]
        for path in (*paths, *dict.fromkeys(path.parent for path in paths)):
            disk.sync(path)

    def read(self, digest: str) -> bytes:
        """The payload. Raises Missing and Corrupt; touches nothing."""
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise Missing(f"{path} does not exist") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise Corrupt(f"{path} does not hold what its name says: {len(data)} bytes, torn or changed")
        return data

    def get(self, digest: str) -> bytes:
        """The payload. Raises Missing and Corrupt; a corrupt file is moved to payloads/corrupt."""
        try:
            return self.read(digest)
        except Corrupt as error:
            aside = self.folder / "corrupt" / self.path(digest).name
            aside.parent.mkdir(exist_ok=True)
            os.replace(self.path(digest), aside)
            raise Corrupt(f"{error}; moved to {aside}") from None

    def prune(
        self,
        keep: set[str],
        removable: Iterable[str],
        max_bytes: int,
        record: Callable[[list[str]], None] = lambda digests: None,
    ) -> list[str]:
        """Remove payloads while all of them together have more than `max_bytes`; the names of those that went.

        removable: names, oldest first; those in `keep` stay. record: is told the names before anything is removed, so
        that a kill in between leaves files that may go, never a file that went and nobody knows why.
        """
        sizes = self._sizes()
        excess, gone = sum(sizes.values()) - max_bytes, []
        for digest in dict.fromkeys(removable):
            if excess <= 0:
                break
            if digest in sizes and digest not in keep:
                gone.append(digest)
                excess -= sizes[digest]
        if gone:
            record(gone)
        for digest in gone:
            self.path(digest).unlink(missing_ok=True)
        return gone

    def size(self) -> int:
        """Bytes of all payloads."""
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        """Bytes of every payload; temporary files of processes that were killed go."""
        sizes = {}
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if path.suffix == ".partial" and path.suffixes[-2:] != [f".{os.getpid()}", ".partial"]:
                path.unlink(missing_ok=True)
            elif path.suffix == ".safetensors":
                with suppress(FileNotFoundError):
                    sizes[path.stem] = path.stat().st_size
        return sizes


# ---------------------------------------------------------------- rollout
class Facts(NamedTuple):
    """What a rollout's payload says of it: id, ordinal, tokens, lowest and highest version of a token (or None)."""

    group: str
    ordinal: int
    tokens: int
    oldest: int | None
    newest: int | None


def pack_rollout(group: Group) -> bytes:
    """A group as its actor returned it. Raises UserError for a column of its prompt that cannot be kept."""
    chain = list(_with_greedy(group))
    completions = [c for g in chain for c in g.completions]
    runs = [[(v, len(list(same))) for v, same in groupby(c.versions)] for c in completions]
    numbers = _Numbers()
    document = {"groups": [_head(g, numbers, None if g is group else group.prompt) for g in chain]}
    # Of each completion: tokens, log-probs, spans of versions. A demonstration has tokens only.
    lengths = [(len(c.token_ids), len(c.rollout_logprobs), len(r)) for c, r in zip(completions, runs, strict=True)]
    tensors = {
        "tokens": _int32(t for c in completions for t in c.token_ids),
        "logprobs": np.array([x for c in completions for x in c.rollout_logprobs], dtype=np.float64),
        "versions": _int32(v for spans in runs for v, _ in spans),
        "version_counts": _int32(n for spans in runs for _, n in spans),
        "lengths": _int32(n for each in lengths for n in each),
        "numbers": numbers.array(),
    }
    return _pack("rollout", document, tensors)


def unpack_rollout(data: bytes) -> Group:
    """The group that was packed. Raises ValueError for another kind of payload."""
    document, tensors = _unpack("rollout", data)
    tokens, logprobs = tensors["tokens"].tolist(), tensors["logprobs"].tolist()
    spans = list(zip(tensors["versions"].tolist(), tensors["version_counts"].tolist(), strict=True))
    lengths, numbers = iter(tensors["lengths"].reshape(-1, 3).tolist()), _Numbers(tensors["numbers"])
    at = [0, 0, 0]
    found: list[Group] = []
    for head in document["groups"]:
        completions = []
        for text, reason in head["completions"]:
            end = [a + n for a, n in zip(at, next(lengths), strict=True)]
            versions = tuple(v for v, n in spans[at[2] : end[2]] for _ in range(n))
            completions.append(
                Completion(tuple(tokens[at[0] : end[0]]), tuple(logprobs[at[1] : end[1]]), versions, text, reason)
            )
            at = end
        prompt = found[0].prompt if head["prompt"] is None else _prompt(head["prompt"])
        group = Group(head["id"], prompt, tuple(completions), head["attempt"], head["actor"])
        found.append(_scored(group, head["scores"], numbers) if head["scores"] else group)
    return _joined(found)


def rollout_facts(data: bytes) -> Facts:
    """The facts of a packed rollout, without making the group. Raises ValueError for another kind of payload."""
    document, tensors = _unpack("rollout", data)
    head, versions = document["groups"][0], tensors["versions"]
    oldest, newest = (int(versions.min()), int(versions.max())) if len(versions) else (None, None)
    return Facts(head["id"], head["prompt"]["ordinal"], len(tensors["tokens"]), oldest, newest)


def _head(group: Group, numbers: _Numbers, shared: Prompt | None) -> dict[str, Any]:
    """The part of a group that is text. A greedy completion has the prompt of its group, which is not kept twice."""
    return {
        "id": group.id,
        "attempt": group.attempt,
        "actor": group.actor,
        "prompt": None if group.prompt is shared else _prompt_text(group.prompt),
        "completions": [[c.text, c.finish_reason] for c in group.completions],
        "scores": _scores(group, numbers) if _has_scores(group) else None,
    }


def _prompt_text(prompt: Prompt) -> dict[str, Any]:
    columns = plain(prompt.columns, f"data: prompt {prompt.ordinal}: columns")
    return {"ordinal": prompt.ordinal, "text": prompt.text, "tokens": list(prompt.token_ids), "columns": columns}


def _prompt(own: Mapping[str, Any]) -> Prompt:
    return Prompt(own["ordinal"], own["text"], tuple(own["tokens"]), restored(own["columns"]))


# ---------------------------------------------------------------- scores
def pack_scores(group: Group) -> bytes:
    """What the rewards say of a group and of its greedy completion: everything but the completions themselves."""
    numbers = _Numbers()
    document = {"group": group.id, "scores": [_scores(g, numbers) for g in _with_greedy(group)]}
    return _pack("scores", document, {"numbers": numbers.array()})


def with_scores(group: Group, data: bytes) -> Group:
    """`group` with the scores that were packed. Raises ValueError if they are of another group."""
    document, tensors = _unpack("scores", data)
    return _with(group, document["group"], document["scores"], _Numbers(tensors["numbers"]))


def scored_group(data: bytes) -> str:
    """The id of the group that packed scores are of."""
    return _unpack("scores", data)[0]["group"]


# ---------------------------------------------------------------- step
def pack_step(groups: Sequence[Group], mixture: Mixture) -> bytes:
    """What the learner was given for a step, beside the completions: everything that rewards say, and the mixture."""
    numbers = _Numbers()
    each = [{"group": group.id, "scores": [_scores(g, numbers) for g in _with_greedy(group)]} for group in groups]
    return _pack("step", {"mixture": asdict(mixture), "groups": each}, {"numbers": numbers.array()})


def with_step(groups: Sequence[Group], data: bytes) -> tuple[list[Group], Mixture]:
    """The groups (rollouts are enough, in the order of the step) as the learner was given them, and the mixture.

    Raises ValueError if the step was of other groups.
    """
    document, tensors = _unpack("step", data)
    numbers = _Numbers(tensors["numbers"])
    if len(groups) != len(document["groups"]):
        raise ValueError(f"the step was of {len(document['groups'])} groups, not of {len(groups)}")
    found = [_with(g, own["group"], own["scores"], numbers) for g, own in zip(groups, document["groups"], strict=True)]
    return found, Mixture(**document["mixture"])


def step_groups(data: bytes) -> list[str]:
    """The ids of the groups that a packed step is of, in its order."""
    return [own["group"] for own in _unpack("step", data)[0]["groups"]]


# ---------------------------------------------------------------- parts
class _Numbers:
    """float64 numbers, written and read one run after the other."""

    def __init__(self, values: np.ndarray | None = None) -> None:
        self._values: list[float] = [] if values is None else values.tolist()
        self._at = 0

    def put(self, values: Iterable[float]) -> int:
        before = len(self._values)
        self._values += values
        return len(self._values) - before

    def take(self, count: int) -> tuple[float, ...]:
        self._at += count
        return tuple(self._values[self._at - count : self._at])

    def array(self) -> np.ndarray:
        return np.array(self._values, dtype=np.float64)


TABLES = ("references", "columns", "weights")  # fields of a group: name -> numbers


def _has_scores(group: Group) -> bool:
    return bool(group.components or group.totals or group.answers or any(getattr(group, name) for name in TABLES))


def _scores(group: Group, numbers: _Numbers) -> dict[str, Any]:
    """The document of a group's scores; their numbers go to `numbers`, in the order in which `_scored` takes them."""
    components = {}
    for name, scores in group.components.items():
        numbers.put(score.value for score in scores)
        details = {str(i): score.detail for i, score in enumerate(scores) if score.detail}
        components[name] = [[score.status for score in scores], details]
    tables = {table: {k: numbers.put(v) for k, v in getattr(group, table).items()} for table in TABLES}
    return {"components": components, **tables, "totals": numbers.put(group.totals), "answers": list(group.answers)}


def _scored(group: Group, own: Mapping[str, Any], numbers: _Numbers) -> Group:
    components = {}
    for name, (statuses, details) in own["components"].items():
        values = numbers.take(len(statuses))
        each = enumerate(zip(statuses, values, strict=True))
        components[name] = tuple(Score(status, value, details.get(str(i), "")) for i, (status, value) in each)
    tables = {table: {name: numbers.take(n) for name, n in own[table].items()} for table in TABLES}
    totals = numbers.take(own["totals"])
    return replace(group, components=components, **tables, totals=totals, answers=tuple(own["answers"]))


def _with(group: Group, name: str, scores: Sequence[Mapping[str, Any]], numbers: _Numbers) -> Group:
    each = list(_with_greedy(group))
    if group.id != name or len(each) != len(scores):
        also = " and its greedy completion" if len(scores) > 1 else ""
        raise ValueError(f"the scores are of group {name}{also}, not of group {group.id}")
    return _joined([_scored(g, own, numbers) for g, own in zip(each, scores, strict=True)])


def _with_greedy(group: Group) -> Iterable[Group]:
    """The group, its greedy completion, and so on."""
    while group is not None:
        yield group
        group = group.greedy  # type: ignore[assignment]


def _joined(groups: Sequence[Group]) -> Group:
    joined = None
    for group in reversed(groups):
        joined = replace(group, greedy=joined)
    assert joined is not None
    return joined


def _int32(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


def _pack(kind: str, document: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    text = json.dumps({"kind": kind, **document}, ensure_ascii=False, separators=(",", ":"))
    # An engine may give half of a surrogate pair, which is no UTF-8 but a text of Python's all the same.
    return save({**tensors, "text": np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)})


def _unpack(kind: str, data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors = load(data)
    document = json.loads(tensors.pop("text").tobytes().decode("utf-8", "surrogatepass"))
    if document["kind"] != kind:
        raise ValueError(f"this payload is of kind {document['kind']}, not {kind}")
    return document, tensors
