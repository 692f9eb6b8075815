"""Finds what blocks a run, names it, and ends it: every wait of the driver is on an edge of the dataflow.

    with Watchdog(run_folder, say, limits, describe, processes) as watchdog:
        with watchdog.waiting("score", f"group {ordinal}"):
            await composer.score(group)

A thread looks at all waits. One past its deadline is an alarm: `logs/watchdog-N.txt` (what waits on what, what the run
says of itself, where every thread of every process is), one line that names the edge, and `Blocked` in the task that
waited. The thread also looks whether the event loop still turns ("driver loop"). When a wait does not end or the loop
does not turn after an alarm, the process ends. From the block to its name it takes at most twice the deadline.

A wait is not blamed for what is not its own: not for time in which this process was stopped, and not while the loop is
blocked by another task, for the answer may be there and nobody can read it. A call that holds the interpreter's lock
stops the thread too; `alignlab.sentinel`, a small process, finds that.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignlab.sentinel import Sentinel, next_report
from core import stacks

FLOW = ("prompts", "submit", "generate", "score", "weigh", "train", "publish", "evaluate", "checkpoint")
EDGES = (*FLOW, "ledger", "start")
LOOP = "driver loop"
GRACE = 30.0  # seconds, or its deadline if that is shorter: what a wait that was told to fail has for ending
TICKS = 16  # looks within the shortest deadline
LISTED = 100  # waits in a report
TURNS = 3  # of the loop that a wait which is past its deadline still gets: enough to read an answer that is there


class Blocked(RuntimeError):
    """A wait passed its deadline; `edge` is where, `file` what the watchdog saw."""

    def __init__(self, edge: str, about: str, seconds: float, limit: float, file: Path) -> None:
        self.edge, self.about, self.seconds, self.limit, self.file = edge, about, seconds, limit, file
        lasted = f"nothing for {seconds:.3g} s, its deadline is {limit:g} s"
        super().__init__(f"blocked on {_where(edge, about)}: {lasted}; see {file}")


class Watchdog:
    """Watches the waits of one driver from `start` to `close`; without `start` it only keeps them for `slowest`.

    limits: seconds for every edge in EDGES, and for LOOP. describe: what a report says of the run (oldest lease,
    lengths of queues, tally). processes: name -> (pid, host, log) of all that report. Both are called in threads of
    their own, with little time; they may fail. `say` gets one line an alarm.
    """

    def __init__(
        self,
        run_folder: Path,
        say: Callable[[str], None],
        limits: Mapping[str, float],
        describe: Callable[[], str],
        processes: Callable[[], Mapping[str, stacks.Process]],
    ) -> None:
        if missing := {*EDGES, LOOP} - limits.keys():
            raise ValueError(f"no deadline for {', '.join(sorted(missing))}")
        self.logs, self.limits = run_folder / "logs", dict(limits)
        self._say, self._describe, self._processes = say, describe, processes
        self._waits: dict[_Wait, None] = {}  # in the order in which they began
        self._tick = _tick(min(limits.values()))
        self._clock = (0.0, time.monotonic())  # seconds that count, and when they were last added to
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sent = self._answered = 0  # heartbeats
        self._sent_at = 0.0
        self._loop_told: tuple[int, float] | None = None  # of the alarm about the loop: the heartbeat, and when
        self._wake, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._sentinel: Sentinel | None = None

    def start(self) -> Watchdog:
        """Start watching; called on the event loop, that loop's heart is watched from now on."""
        self.logs.mkdir(parents=True, exist_ok=True)
        stacks.register_quietly()
        with suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        self._sentinel = Sentinel(self.logs, LOOP, self.limits[LOOP], _grace(self.limits[LOOP]))
        self._clock = (0.0, time.monotonic())
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Watch no longer. Waits go on."""
        self._closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=GRACE)
        if self._sentinel is not None:
            self._sentinel.close()

    def __enter__(self) -> Watchdog:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def waiting(self, edge: str, about: str = "", seconds: float | None = None) -> _Wait:
        """A context in which a task waits on `edge`, `seconds` at most (none: the edge's limit). Raises Blocked.

        It may be entered in a thread without a loop too, but there nothing can be made to fail: past its deadline, and
        the grace, the process ends.
        """
        return _Wait(self, edge, about, self.limits[edge] if seconds is None else seconds)

    def slowest(self) -> dict[str, float]:
        """The age in seconds of the longest present wait of every edge that has one."""
        now, found = self.now(), dict[str, float]()
        for wait in list(self._waits):
            found[wait.edge] = max(found.get(wait.edge, 0.0), now - wait.started)
        return found

    def now(self) -> float:
        """Seconds since `start` in which this process ran."""
        counted, at = self._clock
        return counted + min(time.monotonic() - at, 2 * self._tick)

    def hurry(self, limit: float) -> None:
        """Look more often, for a deadline that is shorter than all before it."""
        if (tick := _tick(limit)) < self._tick:
            self._tick = tick
            self._wake.set()

    # ------------------------------------------------------------ the thread
    def _watch(self) -> None:
        while not self._closed:
            self._wake.wait(self._tick)
            self._wake.clear()
            try:
                self._look()
            except Exception as error:  # nothing else would notice that nobody watches
                self._line(f"{error!r}")

    def _look(self) -> None:
        self._count()
        self._beat()
        if overdue := self._overdue():
            self._alarm(overdue)
        self._judge_loop()
        for wait in list(self._waits):
            if wait.told is not None and self.now() - wait.told > _grace(wait.limit):
                self._end(f"the wait on {_where(wait.edge, wait.about)} was told to fail and did not end")

    def _count(self) -> None:
        """A tick counts with twice its length at most: whatever more it took, this process did not run."""
        self._clock = (self.now(), time.monotonic())

    def _beat(self) -> None:
        """Ask the loop for a sign of life, if it has answered the last one."""
        loop = self._loop
        if loop is None or not loop.is_running():
            self._answered = self._sent
        elif self._answered == self._sent:
            self._sent, self._sent_at = self._sent + 1, self.now()
            with suppress(RuntimeError):  # it was closed in this moment
                loop.call_soon_threadsafe(self._hear, self._sent)
        if self._sentinel is not None:
            self._sentinel.beat(self._listed)

    def _hear(self, number: int) -> None:
        self._answered = number

    def _silence(self) -> float:
        """Seconds for which the loop has not answered."""
        return self.now() - self._sent_at if self._answered < self._sent else 0.0

    def _overdue(self) -> list[_Wait]:
        """The waits to blame now: of each task the innermost, and those first that come first in the dataflow."""
        now, running, found = self.now(), self._running(), dict[Any, _Wait]()
        for wait in list(self._waits):
            if wait.told is not None or now - wait.started <= wait.limit:
                continue
            if wait.late is None:
                wait.late = self._answered
            # Of tasks that do not run: only once the loop has turned, so that they could have read an answer.
            if wait.task is None or wait.task is running or self._answered >= wait.late + TURNS:
                found[wait.task or wait] = wait
        return sorted(found.values(), key=lambda wait: (EDGES.index(wait.edge), wait.started))

    def _judge_loop(self) -> None:
        silent, limit = self._silence(), self.limits[LOOP]
        if self._loop_told is None:
            if silent > limit and not any(wait.told is not None for wait in list(self._waits)):
                running = self._running()
                inside = [f"in {w.edge} {w.about}".strip() for w in list(self._waits) if running and w.task is running]
                self._report(Blocked(LOOP, ", ".join(inside), silent, limit, next_report(self.logs)))
                self._loop_told = self._sent, self.now()
        elif not silent or self._sent != self._loop_told[0]:
            self._line(f"the {LOOP} goes on")
            self._loop_told = None
        elif self.now() - self._loop_told[1] > _grace(limit):
            self._end(f"the {LOOP} is blocked for {silent:.3g} s")

    def _running(self) -> asyncio.Task[Any] | None:
        """The task that blocks the loop, if one does."""
        if self._loop is None or self._silence() <= 2 * self._tick:
            return None
        return asyncio.current_task(self._loop)

    # ------------------------------------------------------------ an alarm
    def _alarm(self, waits: list[_Wait]) -> None:
        """One report, named after the first; then all of them fail."""
        file, now = next_report(self.logs), self.now()
        errors = [Blocked(w.edge, w.about, now - w.started, w.limit, file) for w in waits]
        self._report(errors[0])
        for wait, error in zip(waits, errors, strict=True):
            wait.told = self.now()
            if wait.task is not None:
                with suppress(RuntimeError):  # its loop was closed in this moment
                    wait.task.get_loop().call_soon_threadsafe(wait.fail, error)

    def _report(self, error: Blocked) -> None:
        """Write the file, say the line; in threads of their own, for disks and terminals block too."""
        self._aside(lambda: self._write(error), _report_seconds(error.limit))
        self._line(str(error))

    def _line(self, text: str) -> None:
        self._aside(lambda: self._say(f"watchdog: {text}"), 1.0)

    def _write(self, error: Blocked) -> None:
        """Part by part, so that what was learned is there when the next part blocks."""
        at, seconds = time.strftime("%Y-%m-%d %H:%M:%S"), _report_seconds(error.limit) / 2
        with open(error.file, "w") as file:
            for title, part in (
                (f"{at}, driver {os.getpid()}", lambda: str(error)),
                ("waits in progress, oldest first", self._listed),
                ("the run", lambda: self._bounded(self._describe, seconds / 2)),
                ("driver", lambda: stacks.own(self._loop)),
                ("processes", lambda: self._stacks(seconds)),
            ):
                file.write(f"== {title} ==\n{_told(part)}\n\n")
                file.flush()

    def _listed(self) -> str:
        now, running = self.now(), self._running()
        waits = sorted(self._waits, key=lambda wait: wait.started)
        lines = [
            f"{wait.edge:<10} {now - wait.started:8.3g} s of {wait.limit:g} s  {wait.about}"
            + ("  (its task runs and does not return)" if running and wait.task is running else "")
            for wait in waits[:LISTED]
        ]
        return "\n".join([*lines, *([f"and {len(waits) - LISTED} more"] if len(waits) > LISTED else [])]) or "none"

    def _stacks(self, seconds: float) -> str:
        found = self._processes()
        answers = stacks.collect(found, seconds)
        return "\n\n".join(f"-- {name} (pid {found[name][0]}) --\n{text}" for name, text in answers.items()) or "none"

    def _bounded(self, ask: Callable[[], str], seconds: float) -> str:
        answer: list[str] = []
        thread = threading.Thread(target=lambda: answer.append(_told(ask)), daemon=True)
        thread.start()
        thread.join(seconds)
        return answer[0] if answer else f"no answer within {seconds:.3g} s"

    def _aside(self, work: Callable[[], object], seconds: float) -> None:
        """Do it in a thread, and wait `seconds` at most; the clock goes on meanwhile."""

        def guarded() -> None:
            try:
                work()
            except Exception as error:
                os.write(2, f"watchdog: {error!r}\n".encode())

        thread = threading.Thread(target=guarded, name="watchdog-report", daemon=True)
        thread.start()
        until = self.now() + seconds
        while thread.is_alive() and self.now() < until:
            thread.join(self._tick)
            self._count()

    def _end(self, why: str) -> None:
        """End the process without asking anybody: who could be asked is blocked."""
        line = f"watchdog: {why}; the process ends (exit code 1)\n"
        self._aside(lambda: (sys.stdout.flush(), os.write(2, line.encode())), 1.0)
        os._exit(1)


class _Wait:
    """One wait; see `Watchdog.waiting`. Hot: one for every group."""

    __slots__ = ("_cancelling", "_error", "_watchdog", "about", "edge", "late", "limit", "started", "task", "told")

    def __init__(self, watchdog: Watchdog, edge: str, about: str, limit: float) -> None:
        self._watchdog, self.edge, self.about, self.limit = watchdog, edge, about, limit
        self.told: float | None = None  # when the alarm was
        self.late: int | None = None  # the heartbeat at which it was first seen past its deadline
        self._error: Blocked | None = None

    def __enter__(self) -> None:
        watchdog = self._watchdog
        try:
            self.task = asyncio.current_task()
        except RuntimeError:  # in a thread without a loop: there is nobody to cancel
            self.task = None
        if self.task is not None:
            watchdog._loop, self._cancelling = self.task.get_loop(), self.task.cancelling()
        self.started = watchdog.now()
        watchdog._waits[self] = None
        watchdog.hurry(self.limit)

    def fail(self, error: Blocked) -> None:
        """Have the task raise `error` out of its wait; called on its loop."""
        if self in self._watchdog._waits and self.task is not None:
            self._error = error
            self.task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        del self._watchdog._waits[self]
        if self._error is None:
            return
        # As asyncio.timeout does it: a cancellation that somebody else asked for as well goes on as one.
        assert self.task is not None
        if self.task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._error from None


def _where(edge: str, about: str) -> str:
    return f"{edge} ({about})" if about else edge


def _tick(limit: float) -> float:
    return min(0.25, max(0.01, limit / TICKS))


def _report_seconds(limit: float) -> float:
    return min(10.0, limit / 2)


def _grace(limit: float) -> float:
    return min(limit, GRACE)


def _told(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except Exception as error:  # a report says what it can
        return f"it could not be told: {error!r}"
