"""Inside a scoring process: `python -m rewards.worker`, started and explained by `rewards.workers`.

Reads one JSON line per (component, group) and answers one line per completion. Only this module writes to the pipe that
the driver reads: what reward functions print, or child processes of theirs, goes to the error stream.

    driver -> watcher -> scoring process -> whatever user code starts

On Linux the process that the driver knows only watches the one that scores: when that one ends, or the driver says so
or dies, it kills all that came of it, also what left its group and session or was orphaned, and ends the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from core import stacks
from core.schema import Score
from rewards.reward import DETAIL_LIMIT, Reward, Samples, Scores, bind, describe_error

_PDEATHSIG, _SUBREAPER = 1, 36  # of prctl
_SWEEP = 3.0  # seconds for killing all that came of a scoring process; the driver waits longer


def main() -> None:
    """Serve until the driver closes the pipe."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stacks.register_quietly()  # the watcher has the same file, and the driver knows no other of the two
    if sys.platform == "linux":
        _fork_watched()
    requests, replies = _own_the_pipes()
    hello = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_AS, (hello["memory_bytes"],) * 2)
    replies.send({"ready": True})
    loaded: dict[str, Reward] = {}
    for line in requests:
        request = json.loads(line)
        name = request["component"]
        try:
            if name not in loaded or request.get("state", ...) is None:  # none: a reward with state starts anew
                loaded[name] = _load(name, hello["components"][name])
            if request.get("state") is not None:
                loaded[name].keeper.load_state_dict(request["state"])
        except BaseException as error:
            replies.send({"failed": describe_error(error)})
            continue
        replies.send({"loaded": name})
        for scores, seconds in _score(loaded[name], Samples(**request["samples"]), request["todo"]):
            replies.send({"scores": encode(scores), "seconds": seconds})
        if "state" in request:
            replies.send({"state": loaded[name].keeper.state_dict()})


def _score(reward: Reward, samples: Samples, todo: list[int]) -> Iterator[tuple[Scores, float]]:
    """(scores, seconds) of each completion in `todo`; a batch function is called once, for all of them."""
    started = time.perf_counter()
    if reward.batch:
        every = reward.score_all(samples)
        share = (time.perf_counter() - started) / max(1, len(every))
        yield from ((every[i], share) for i in todo)
        return
    for index in todo:
        started = time.perf_counter()
        scores = reward.score_one(samples, index)
        yield scores, time.perf_counter() - started


def _load(name: str, component: Mapping[str, Any]) -> Reward:
    reward = bind(component["fn"], component["options"], name)
    if reward.prepare is not None:
        reward.prepare()
    return reward


def _own_the_pipes() -> tuple[TextIO, _Replies]:
    """(requests, replies) on descriptors of their own; 0 is empty and 1 is the error stream for everybody else."""
    requests, replies = os.fdopen(os.dup(0)), _Replies(os.fdopen(os.dup(1), "w"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _fork_watched() -> None:
    """Fork, and return in the child; the parent watches, and never returns."""
    signals = {signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    prctl = ctypes.CDLL(None).prctl
    # Both die with their parents: busy in user code, the child would not see the driver's pipe close.
    prctl(_PDEATHSIG, signal.SIGTERM)
    prctl(_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        prctl(_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)  # a signal that user code sends to its own group leaves the watcher alone
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return
    code = None
    while code is None and (sent := signal.sigwait(signals)) != signal.SIGTERM:
        if sent == signal.SIGUSR1:  # where the threads are is asked of the process that scores
            os.kill(child, sent)
        code = _reap().get(child)
    _end_all(child)
    if code is not None and code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.kill(os.getpid(), -code)
    os._exit(code or 0)


def _reap() -> dict[int, int]:
    """Exit codes, by process id, of the children that have ended."""
    codes = {}
    with contextlib.suppress(ChildProcessError):  # there are none at all
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


def _end_all(child: int) -> None:
    """Kill the child's group and then our children until we have none; those of a killed one become ours."""
    deadline = time.monotonic() + _SWEEP
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _reap()
    while (left := _children()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(PermissionError):  # it has become another user's
                os.kill(pid, signal.SIGKILL)  # until it is reaped its number is its own
        time.sleep(0.001)
        _reap()


def _children() -> list[int]:
    """Process ids of our children, from the process table."""
    found, own = [], str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if stat.read_text(errors="replace").rpartition(")")[2].split()[1] == own:
                found.append(int(stat.parent.name))
    return found


class _Replies:
    """The way to the driver, which is this process's alone."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._owner = os.getpid()

    def send(self, message: Mapping[str, Any]) -> None:
        if os.getpid() != self._owner:  # a child that user code forked and did not end
            os._exit(0)
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()


def encode(scores: Scores) -> Any:
    """JSON has no NaN, so a missing value travels as null."""
    if isinstance(scores, Score):
        return [scores.status, scores.value if scores.status == "ok" else None, scores.detail[:DETAIL_LIMIT]]
    return {key: encode(score) for key, score in scores.items()}


def decode(data: Any) -> Scores:
    """The inverse of `encode`. Raises ValueError for anything else."""
    if isinstance(data, dict):
        return {key: _decode_one(score) for key, score in data.items()}
    return _decode_one(data)


def _decode_one(data: Any) -> Score:
    status, value, detail = data
    return Score(status, math.nan if value is None else value, detail)


if __name__ == "__main__":
    main()
