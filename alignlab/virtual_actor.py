"""An engine of the simulator: continuous batching, weights that change under way, every token with its version.

All sequences that an engine decodes gain a token in each of its decode steps, so one number, `progress` (tokens per
sequence since the engine was last idle), says how far each of them is.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NEARLY = 1e-6  # of a token: what rounding may leave


class Switch(NamedTuple):
    """All actors load `version` from `start` to `end` (seconds)."""

    start: float
    end: float
    version: int


@dataclass(slots=True)
class Job:
    """A group on its actor: `left` sequences are not finished; tokens of the others by version."""

    ordinal: int
    attempt: int
    left: int
    tokens: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class VirtualActor:
    """One incarnation. `since`: when it joined; `base` and `each` seconds as in Workload; `seen`: switches it knows.

    `stamp` tells its newest alarm from older ones.
    """

    name: str
    incarnation: int
    base: float
    each: float
    sequences: int
    since: float
    version: int
    seen: int
    time: float = 0.0
    progress: float = 0.0
    stamp: int = 0
    busy: float = 0.0  # seconds with something to decode
    decoded: float = 0.0  # sequence-seconds
    jobs: dict[int, Job] = field(default_factory=dict)
    running: list[tuple[float, int, float, Job]] = field(default_factory=list)  # (end, number, start, job): a heap
    waiting: deque[tuple[int, Job]] = field(default_factory=deque)  # (length, job)
    marks: list[tuple[float, int]] = field(default_factory=list)  # (progress, version from there on)
    _number: int = 0

    def add(self, job: Job, lengths: Sequence[int]) -> None:
        """A group begins, or waits for room. Call `advance` before."""
        self.jobs[job.ordinal] = job
        self.waiting.extend((length, job) for length in lengths)
        self._fill()

    def remove(self, ordinal: int) -> None:
        """Forget a group. Call `advance` before."""
        job = self.jobs.pop(ordinal, None)
        if job is not None:
            self.running = [entry for entry in self.running if entry[3] is not job]
            heapq.heapify(self.running)
            self.waiting = deque(entry for entry in self.waiting if entry[1] is not job)
            self._fill()

    def advance(self, now: float, switches: Sequence[Switch]) -> list[Job]:
        """Decode until `now`; the groups that are finished by then."""
        while self.seen < len(switches) and (switch := switches[self.seen]).start <= now:
            self._decode(switch.start)
            if switch.end > now:
                return self._collect()
            self.time, self.version = max(self.time, switch.end), switch.version
            self.marks.append((self.progress, switch.version))
            self.seen += 1
        self._decode(now)
        return self._collect()

    def alarm(self, switches: Sequence[Switch]) -> float | None:
        """When the next sequence ends, unless something happens before; None if there is none."""
        if not self.running:
            return None
        start = self.time
        if self.seen < len(switches) and switches[self.seen].start <= start:
            start = switches[self.seen].end
        end = start + (self.running[0][0] - self.progress) * self._step()
        return end if end > self.time else math.nextafter(self.time, math.inf)  # rounding must not stop the clock

    def sampled(self) -> int:
        """Tokens of groups that are not finished. Call `advance` before."""
        begun = sum(int(self.progress - start) for _, _, start, _ in self.running)
        return begun + sum(sum(job.tokens.values()) for job in self.jobs.values())

    def _step(self) -> float:
        return self.base + self.each * len(self.running)

    def _decode(self, until: float) -> None:
        seconds = until - self.time
        if seconds > 0:
            if self.running:
                self.progress += seconds / self._step()
                self.busy += seconds
                self.decoded += seconds * len(self.running)
            self.time = until

    def _collect(self) -> list[Job]:
        done, reached = [], self.progress + NEARLY
        while self.running and self.running[0][0] <= reached:
            end, _, start, job = heapq.heappop(self.running)
            self._count(job.tokens, round(end - start), start)
            job.left -= 1
            if not job.left:
                done.append(self.jobs.pop(job.ordinal))
        self._fill()
        return done

    def _fill(self) -> None:
        if not self.running:
            self.progress = 0.0
            self.marks = [(0.0, self.version)]
        while self.waiting and len(self.running) < self.sequences:
            length, job = self.waiting.popleft()
            self._number += 1
            heapq.heappush(self.running, (self.progress + length, self._number, self.progress, job))

    def _count(self, tokens: dict[int, int], length: int, start: float) -> None:
        """Add the tokens of a sequence, by version: token i (from 1) came when progress was start + i."""
        for at, version in reversed(self.marks):
            first = max(int(at - start + NEARLY), 0)
            if first < length:
                tokens[version] = tokens.get(version, 0) + length - first
                length = first
            if not first:
                return
