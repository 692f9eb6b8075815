"""The two sides of a bench in processes of their own, each taking its turn: its time, and its own peak of memory.

    def ours(turn: Turn, size: int) -> None:      # in the child: load, then work whenever it is its turn
        learner = ...
        while True:
            turn.begin()
            learner.step(...)
            turn.end(tokens=size)

    with Apart(ours, 512, threads=1) as side:
        done = side()                             # one turn: done.seconds, done.peak_gib, done.facts["tokens"]

A side that waits for its turn uses no core. A turn's peak is the largest resident memory of the whole process during
it (VmHWM, which `begin` sets back to what is resident): libraries, weights, optimizer and all.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Done:
    """One turn. `resident_gib`: before it, model and optimizer loaded; `peak_gib`: the most during it.

    cpu_seconds: of all threads. Beside a single thread's seconds it says how much the machine did for others.
    """

    seconds: float
    cpu_seconds: float
    resident_gib: float
    peak_gib: float
    facts: dict[str, Any]


class Turn:
    """The child's end: `begin` waits until it is its turn, `end` says what came of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def begin(self) -> Any:
        """Wait; then time and peak start anew. What the turn is about. SystemExit when nobody wants another turn."""
        try:
            about = self._connection.recv()
        except EOFError:
            raise SystemExit(0) from None
        Path("/proc/self/clear_refs").write_text("5")
        self._resident = memory_gib("VmRSS")
        self.restart()
        return about

    def restart(self) -> None:
        """The time counts from here: what came before is not what is compared."""
        self._started = time.perf_counter(), time.process_time()

    def end(self, **facts: Any) -> None:
        """The work is done."""
        began, used = self._started
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        self._connection.send(Done(seconds, cpu, self._resident, memory_gib("VmHWM"), facts))


def memory_gib(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 2**20  # kB
    raise OSError(f"/proc/self/status has no {name}")


class Apart:
    """The parent's end: a process that runs `side(turn, *arguments)`; calling it gives one turn.

    The first turn waits until the child has loaded what it needs. threads: of the child's compute. Raises RuntimeError
    where the child ends, or is silent for `patience` seconds.
    """

    def __init__(self, side: Callable[..., None], *arguments: Any, threads: int = 1, patience: float = 600.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._name, self._patience = side.__name__, patience
        self._process = context.Process(target=_run, args=(theirs, threads, side, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __call__(self, about: Any = None) -> Done:
        """One turn. `about`: what the child's `begin` returns."""
        try:
            self._connection.send(about)
            if self._connection.poll(self._patience):
                return self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise RuntimeError(f"{self._name} ended with {self._process.exitcode}; its last words are above") from None
        raise RuntimeError(f"{self._name} was silent for {self._patience:g} s")

    def close(self) -> None:
        """End the child."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _run(connection: Connection, threads: int, side: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The child's main. torch reads OMP_NUM_THREADS when it is imported: by the side, not by its module."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    side(Turn(connection), *arguments)
