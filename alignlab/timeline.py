"""When which process of a run did what: spans of time from its ledger and metrics, as a trace that Perfetto opens.

The driver writes both files by its own clock: the ledger says when a group was leased, done and scored, a step batched,
trained and published; metrics.jsonl says how long the parts of a step took. So nothing has to be recorded for this, and
no clocks have to agree. Steps of which there are no metrics (undone by a loss) have spans of the ledger's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any

from learner.profiling import PHASES

Row = Mapping[str, Any]
PARTS = ("publish", "wait_publish", "train", "keep", "weigh", "wait_groups")  # of a step, the last one first
SHORTEST = 1e-4  # seconds of a part that is worth a span


@dataclass(frozen=True)
class Span:
    """What a process did from `start` to `end`, seconds since 1970. Spans of one track do not overlap, or nest."""

    process: str
    track: str
    name: str
    start: float
    end: float
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step that was published: when it was batched, trained, served, by whom, and its row of the metrics."""

    number: int
    batched: float
    trained: float
    published: float
    loaded: Sequence[str]
    row: Row = field(default_factory=dict)

    @property
    def publishing(self) -> float:
        """When its publication began."""
        return self.published - self.row.get("time/publish", self.published - self.trained)

    @property
    def learned(self) -> float:
        """When the learner was done."""
        return self.publishing - self.row.get("time/wait_publish", 0.0) if self.row else self.trained


def spans(records: Sequence[Row], rows: Sequence[Row]) -> list[Span]:
    """All spans of a run, from the records of its ledger and the rows of its metrics."""
    found = steps(records, rows)
    return [*_driver(records, rows, found), *_learner(found), *_actors(records, found), *_scorers(records)]


def trace(found: Iterable[Span]) -> dict[str, Any]:
    """Spans as a Chrome trace: `ts` and `dur` in microseconds since the first of them."""
    each = list(found)
    began = min((span.start for span in each), default=0.0)
    processes = {name: pid for pid, name in enumerate(dict.fromkeys(span.process for span in each), 1)}
    tracks = {key: tid for tid, key in enumerate(dict.fromkeys((s.process, s.track) for s in each), 1)}
    events = [_named("process_name", name, pid) for name, pid in processes.items()]
    events += [_named("thread_name", track, processes[name], tid) for (name, track), tid in tracks.items()]
    events += [
        {
            "name": span.name,
            "ph": "X",
            "ts": round(1e6 * (span.start - began), 1),
            "dur": round(1e6 * (span.end - span.start), 1),
            "pid": processes[span.process],
            "tid": tracks[span.process, span.track],
            "args": dict(span.about),
        }
        for span in each
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"began": began}}


def _named(kind: str, name: str, pid: int, tid: int = 0) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def steps(records: Sequence[Row], rows: Sequence[Row]) -> list[Step]:
    """The published steps of all attempts, in order. A step that was done again has its row in the last attempt."""
    found: list[Step] = []
    times: dict[str, float] = {}
    for record in records:
        match record["kind"]:
            case "begin":
                times = {}
            case "batched" | "trained" as kind:
                times[kind] = record["time"]
            case "published" if times.keys() == {"batched", "trained"}:
                found.append(Step(record["version"], **times, published=record["time"], loaded=record["loaded"]))
                times = {}
    last = {step.number: i for i, step in enumerate(found)}
    for row in rows:
        if "time/step" in row and (i := last.get(row["step"])) is not None:
            found[i] = replace(found[i], row={k: v for k, v in row.items() if v is not None})
    return found


# ---------------------------------------------------------------- who did what
def _driver(records: Sequence[Row], rows: Sequence[Row], found: Sequence[Step]) -> list[Span]:
    """The edges of the dataflow, those of a step inside its span."""
    parts = [(step.number, *part) for step in found for part in _parts(step)]
    later = {row["step"]: row for row in rows if "time/step" in row}  # which says what followed the step before
    for row in rows:
        if "time/eval" in row:
            parts.append((0, "evaluate", row["time"] - row["time/eval"], row["time"]))
        elif "time/step" in row and "time/write" in (after := later.get(row["step"] + 1, {})):
            parts.append((0, "write", row["time"], row["time"] + after["time/write"]))
    for record in records:
        if record["kind"] == "checkpoint" and "time/checkpoint" in (after := later.get(record["step"] + 1, {})):
            parts.append((0, "checkpoint", record["time"] - after["time/checkpoint"], record["time"]))
    parts.sort(key=lambda part: part[2])
    # The driver does one after the other: what seems to overlap was written down late.
    ends = [min(end, after[2]) for (*_, end), after in pairwise(parts)] + [part[3] for part in parts[-1:]]
    laid = [
        (number, Span("driver", "loop", name, start, end))
        for (number, name, start, _), end in zip(parts, ends, strict=True)
    ]
    whole = [
        Span("driver", "loop", f"step {number}", group[0].start, group[-1].end)
        for number, group in ((n, [span for _, span in g]) for n, g in groupby(laid, lambda each: each[0]))
        if number
    ]
    return sorted([*whole, *(span for _, span in laid)], key=lambda span: (span.start, -span.end))


def _parts(step: Step) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of the parts of a step, the last one first; each begins where the one before it ended.

    How long they took is better known than when: a record is written a little after what it tells.
    """
    if not step.row:
        yield "publish", step.trained, step.published
        yield "train", step.batched, step.trained
        return
    end = step.published
    for name in PARTS:
        start = end - step.row.get(f"time/{name}", 0.0)
        if end - start > SHORTEST:
            yield name.replace("_", " "), start, end
        end = start


def _learner(found: Sequence[Step]) -> Iterator[Span]:
    """A step of the slowest rank with its phases in order, each in one piece though those of minibatches take turns."""
    for step in found:
        at = step.learned - step.row.get("time/learner", step.learned - step.batched)
        about = {k: v for k, v in step.row.items() if k.startswith(("learner/", "optim/"))}
        yield Span("learner", "steps", f"step {step.number}", at, step.learned, about)
        for phase in PHASES:
            if (seconds := step.row.get(f"time/learner_{phase}", 0.0)) > 0:
                yield Span("learner", "steps", phase, at, min(at + seconds, step.learned))
                at += seconds


def _actors(records: Sequence[Row], found: Sequence[Step]) -> Iterator[Span]:
    """Of each actor: when it held any group, when it took new weights, and every group, from lease to result."""
    held = sorted(_leases(records), key=attrgetter("process"))
    for actor, group in groupby(held, attrgetter("process")):
        groups = sorted(group, key=attrgetter("start"))
        yield from _joined(groups)
        taken = [step for step in found if actor in step.loaded]
        yield from (Span(actor, "weights", f"version {s.number}", s.publishing, s.published) for s in taken)
        yield from _lanes(groups)


def _leases(records: Sequence[Row]) -> Iterator[Span]:
    """Every group on an actor, until it was done, returned, or its attempt ended."""
    open_: dict[tuple[int, int], Row] = {}
    last = 0.0

    def closed(lease: Row, end: float, about: Mapping[str, Any]) -> Span:
        name = f"group {lease['group']}"
        return Span(lease["actor"], "groups", name, lease["time"], end, {"attempt": lease["attempt"], **about})

    for record in records:
        match record["kind"]:
            case "begin":
                yield from (closed(lease, last, {"ended": "with the attempt"}) for lease in open_.values())
                open_ = {}
            case "leased":
                open_[record["group"], record["attempt"]] = record
            case "done" | "returned" if (lease := open_.pop((record["group"], record["attempt"]), None)) is not None:
                about = {k: record[k] for k in ("tokens", "oldest", "newest", "reason") if k in record}
                yield closed(lease, record["time"], about)
        last = record["time"]
    yield from (closed(lease, last, {"ended": "with the run"}) for lease in open_.values())


def _scorers(records: Sequence[Row]) -> Iterator[Span]:
    """Every group from its arrival to its scores, the wait for a scorer included."""
    arrived: dict[int, float] = {}
    scored = []
    for record in records:
        match record["kind"]:
            case "begin":
                arrived = {}
            case "done" | "reused":
                arrived[record["group"]] = record["time"]
            case "scored" if record["group"] in arrived:
                start = arrived.pop(record["group"])
                scored.append(Span("rewards", "groups", f"group {record['group']}", start, record["time"]))
    yield from _lanes(sorted(scored, key=attrgetter("start")))


def _joined(groups: Sequence[Span]) -> Iterator[Span]:
    """The times in which there was any of the groups, which are in the order of their starts."""
    at = None
    for span in groups:
        if at is None or span.start > at.end:
            if at is not None:
                yield at
            at = replace(span, track="samples", name="samples", about={})
        at = replace(at, end=max(at.end, span.end))
    if at is not None:
        yield at


def _lanes(groups: Sequence[Span]) -> Iterator[Span]:
    """The spans, in the order of their starts, each on the first track on which there is room for it."""
    ends: list[float] = []
    for span in groups:
        lane = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
        ends[lane:] = [span.end, *ends[lane + 1 :]]
        yield replace(span, track=f"{span.track} {lane + 1}")
