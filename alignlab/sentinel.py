"""A small process outside the driver that hears its watchdog tick, for what stops all of its threads at once.

A call that keeps the interpreter's lock (a regular expression that does not come to an end, a library's own wait) stops
the driver's event loop and its watchdog together. `python -m alignlab.sentinel` hears nothing then: it has the stacks
written, which needs no lock, names the edge, and after a grace kills the driver. It does not count time in which the
driver was stopped, or itself, and ends with the driver or with `Sentinel.close`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from core import stacks

BEATS = 8  # within a deadline
SHOWN = 16_000  # bytes of a message: the first that a pipe takes at once, whoever reads it


def next_report(logs: Path) -> Path:
    """The first `watchdog-N.txt` that is not there yet."""
    number = 1
    while (path := logs / f"watchdog-{number}.txt").exists():
        number += 1
    return path


class Sentinel:
    """The process, seen from the driver. `edge` is the name of what it finds, after `limit` seconds of silence."""

    def __init__(self, logs: Path, edge: str, limit: float, grace: float) -> None:
        self._every, self._due = limit / BEATS, 0.0
        hello = {"driver": os.getpid(), "logs": str(logs.resolve()), "edge": edge, "limit": limit, "grace": grace}
        root = str(Path(__file__).resolve().parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "alignlab.sentinel", json.dumps(hello)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C or Ctrl-Z is the driver's
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def beat(self, state: Callable[[], str]) -> None:
        """A sign of life with what a report would say of the driver; cheap unless one is due. Never blocks."""
        if (now := time.monotonic()) < self._due:
            return
        self._due = now + self._every
        with suppress(OSError):  # it has ended, or does not read
            os.write(self._pipe, state().encode()[:SHOWN] + b"\0")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._pipe = -1  # a beat that comes after this must not go to whatever gets the number
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Listen until the driver closes the pipe or ends."""
    hello = json.loads(sys.argv[1])
    driver, limit, edge = hello["driver"], hello["limit"], hello["edge"]
    reported = False
    for silent, state in _silences(driver, limit / BEATS):
        if not silent:
            reported = False
        elif silent > limit and not reported:
            reported = True
            file = next_report(Path(hello["logs"]))
            what = f"blocked on {edge}: none of its threads runs for {silent:.3g} s, its deadline is {limit:g} s"
            _say(f"{what}; see {file}")
            answer = stacks.collect({edge: (driver, socket.gethostname(), None)}, min(5.0, limit / 2))[edge]
            file.write_text(
                f"== {time.strftime('%Y-%m-%d %H:%M:%S')}, driver {driver} ==\n{what}\n"
                f"A call keeps the interpreter's lock; it is at the top of one of the stacks.\n\n"
                f"== waits in progress, as last heard ==\n{state}\n\n== driver ==\n{answer}\n"
            )
        elif silent > limit + hello["grace"]:
            _say(f"the {edge} is blocked for {silent:.3g} s and no thread of the process runs; it is killed")
            with suppress(ProcessLookupError):
                os.kill(driver, signal.SIGKILL)
            return


def _silences(driver: int, slice_: float) -> Iterator[tuple[float, str]]:
    """(seconds of silence that count, the last message), at least once a slice, until the driver is no more."""
    silent, unfinished, state = 0.0, b"", ""
    while True:
        started = time.monotonic()
        heard, _, _ = select.select([0], [], [], slice_)
        if heard:
            block = os.read(0, 65536)
            if not block:
                return
            *whole, unfinished = (unfinished + block).split(b"\0")
            silent, state = 0.0, whole[-1].decode(errors="replace") if whole else state
        elif not stacks.stopped(driver):
            silent += min(time.monotonic() - started, slice_)
        yield silent, state


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"watchdog: {line}\n".encode())


if __name__ == "__main__":
    main()
