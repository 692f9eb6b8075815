"""Scoring processes that can be killed, because reward functions run foreign code on foreign text.

    driver (asyncio) --one JSON line per (component, group)--> process: the loaded rewards, one thread, limited memory
                     <--one JSON line per completion---------

What goes wrong costs the one completion it went wrong on. Past its deadline the process and all it has started are
killed and that completion's status is `timeout`; a process that dies makes it `error`, with the exit code. A fresh
process scores the remaining ones. SIGKILL (by hand, or for want of memory) says little of the completion: the first
time it is scored once more. What user code prints goes nowhere near the answers. Nothing waits without a limit.

Nothing is left behind: what user code starts ends with its process (on Linux also what left the session), at the latest
by `close`, or when the driver dies.

A process imports the reward functions and what they import: no torch, no Ray, no vLLM of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.schema import Score
from rewards.reward import Samples, Scores
from rewards.worker import decode

START_TIMEOUT = 120.0  # seconds for a process to start, and for a component to load in it
REPLY_LIMIT = 2**20  # bytes of one answer
_POLL = 0.2  # seconds between looks at whether a silent process still lives
_LOG_TAIL = 2000  # bytes of what a process printed that are kept, for the message about its death
_GRACE = 5.0  # seconds a killed process gets to be gone


class RewardFailure(UserError):
    """Scoring cannot go on: too many completions of a step failed, or no scoring process starts."""


@dataclass(frozen=True)
class Scored:
    """What a component says of one completion, and how many seconds it took (the deadline where that passed)."""

    scores: Scores
    seconds: float


class _Dead(Exception):
    """The process went away; the message says how. `killed`: by SIGKILL."""

    def __init__(self, message: str, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed


class Workers:
    """A few scoring processes, started when first needed, replaced when they fail. Belongs to one asyncio loop.

    `components` maps a name to {"fn": ..., "options": {...}} as `rewards.reward.bind` takes them, already checked.
    """

    def __init__(self, components: Mapping[str, Mapping[str, Any]], count: int, timeout: float, memory_gib: float):
        self.timeout = timeout
        self._hello = {"components": dict(components), "memory_bytes": int(memory_gib * 2**30)}
        self._slots = asyncio.Semaphore(count)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._closed = False

    async def score(self, component: str, samples: Samples, batch: bool) -> list[Scored]:
        """Every completion of `samples` under `component`, in order. Raises RewardFailure if no process starts.

        `batch`: the function scores the group in one call, so the group shares one deadline of timeout x completions.
        """
        return (await self._score({"component": component, "samples": asdict(samples)}, batch))[0]

    async def score_from(self, state: Any, component: str, samples: Samples, batch: bool) -> tuple[list[Scored], Any]:
        """`score` of a reward with state, from `state` (none: a new one), and the state after the group.

        Where a process fails, the completions left are scored from `state` again.
        """
        request = {"component": component, "samples": asdict(samples), "state": state}
        scored, after = await self._score(request, batch)
        return scored, state if after is None else after

    async def _score(self, request: dict[str, Any], batch: bool) -> tuple[list[Scored], Any]:
        count = len(request["samples"]["completions"])
        todo, after = list(range(count)), None
        done: dict[int, Scored] = {}
        spared: set[int | None] = set()
        async with self._slots:
            while todo:
                async with self._process() as process:
                    after = await self._drain(process, request, batch, todo, done, spared)
        return [done[i] for i in range(count)], after

    async def _drain(
        self,
        process: _Process,
        request: dict[str, Any],
        batch: bool,
        todo: list[int],
        done: dict[int, Scored],
        spared: set[int | None],
    ) -> Any:
        """Let `process` score `todo`, moving indices from there to `done`; return early when the process fails.

        The result is the state after the group, none where there is none to be had. spared: completions during which
        a process was killed before, None for the end of the group.
        """
        limit = self.timeout * len(todo) if batch else self.timeout
        loaded, killed, started = False, False, time.monotonic()
        try:
            await process.send({**request, "todo": todo})
            # Imports and models are loaded on a clock of their own: the first completion is not to blame for them.
            answer = await process.receive(START_TIMEOUT)
            loaded = "failed" not in answer
            if not loaded:
                self._blame(Score("error", detail=answer["failed"]), 0.0, todo, todo, done)
                return None
            while todo:
                started = time.monotonic()
                reply = await process.receive(limit)
                done[todo.pop(0)] = Scored(decode(reply["scores"]), reply["seconds"])
            return (await process.receive(limit))["state"] if "state" in request else None
        except TimeoutError:
            score = Score("timeout", detail=f"took longer than {limit if loaded else START_TIMEOUT:g} s")
        except (_Dead, ValueError, KeyError) as error:
            score = Score("error", detail=f"{error}{process.log()}")
            killed = isinstance(error, _Dead) and error.killed
        await process.kill()
        self._check_open()  # else that is what killed it
        if killed and (first := todo[0] if todo else None) not in spared:
            spared.add(first)
            if "state" in request:  # it has seen a part of the group: all of it is scored again from the one before
                todo[:] = range(len(request["samples"]["completions"]))
            return None
        if not todo:  # all are scored, but the state after them is lost: what comes next would start from another
            done.update({i: Scored(replace(score, detail=f"its state: {score.detail}"), 0.0) for i in done})
            return None
        # The completion that was being scored is the culprit; all are where the group is scored at once, or none was.
        culprits = todo if batch or not loaded else todo[:1]
        self._blame(score, time.monotonic() - started, culprits, todo, done)
        return None

    @staticmethod
    def _blame(score: Score, seconds: float, culprits: list[int], todo: list[int], done: dict[int, Scored]) -> None:
        for index in list(culprits):
            done[index] = Scored(score, seconds)
            todo.remove(index)

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[_Process]:
        """A living process, given back afterwards if it still lives."""
        process = None
        while self._idle and not self._idle[-1].alive:  # nobody's completion is to blame for that
            await self._idle.pop().kill()
        if not self._closed:
            process = self._idle.pop() if self._idle else await _Process.start(self._hello)
        if process is not None and self._closed:  # while it started
            await process.kill()
        self._check_open()
        assert process is not None
        self._busy.add(process)
        whole = False
        try:
            yield process
            whole = True
        finally:
            self._busy.discard(process)
            # After a cancellation the process is in the middle of something, so it is of no more use.
            if whole and process.alive:
                self._idle.append(process)
            else:
                await process.kill()

    def _check_open(self) -> None:
        if self._closed:
            raise RewardFailure("the scoring processes were closed while completions were being scored")

    def processes(self) -> dict[str, tuple[int, str, Path | None]]:
        """(pid, host, no log) of the processes that are up."""
        pids = [process.pid for process in (*self._idle, *self._busy)]
        return {f"scorer-{i}": (pid, socket.gethostname(), None) for i, pid in enumerate(pids)}

    async def close(self) -> None:
        """Kill all processes and what they have started."""
        self._closed = True
        processes = [*self._idle, *self._busy]
        self._idle.clear()
        await asyncio.gather(*(process.kill() for process in processes))


class _Process:
    """One scoring process with its watcher, in a session of their own, seen from the driver."""

    @property
    def pid(self) -> int:
        """Of the watcher."""
        return self._process.pid

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        replies: asyncio.StreamReader,
        requests: asyncio.StreamWriter,
        printed: asyncio.StreamReader,
        ends: contextlib.ExitStack,
    ) -> None:
        self._process = process
        self._replies, self._requests, self._printed = replies, requests, printed
        self._ends = ends  # closes the three
        self._tail = b""
        self._log_task = asyncio.ensure_future(self._keep_log())
        self._killed = False

    @classmethod
    async def start(cls, hello: Mapping[str, Any]) -> _Process:
        """Start a process and wait until it answers; another one if it is killed meanwhile. Raises RewardFailure."""
        for last in (False, True):
            process = await cls._spawn()
            try:
                await process.send(hello)
                await process.receive(START_TIMEOUT)
                break
            except (TimeoutError, _Dead, ValueError) as error:
                await process.kill()
                if last or not (isinstance(error, _Dead) and error.killed):
                    why = f"{error or 'no answer'} {process.log()}"
                    raise RewardFailure(f"a scoring process does not start: {why}") from None
            except BaseException:
                await process.kill()
                raise
        return process

    @classmethod
    async def _spawn(cls) -> _Process:
        """Start a process, connected by a socket for messages and a pipe for what it prints.

        Not by the pipes of asyncio's own: cancelled while they are connected it would wait for ever (Python 3.11), and
        it takes a process for running as long as a child of it holds them.
        """
        # -P and the package's own folder: what lies in the working directory cannot take the place of our modules.
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            ends, log = socket.socketpair(), os.pipe()
            ours.callback(ends[0].close)
            theirs.callback(ends[1].close)
            theirs.callback(os.close, log[1])
            printed = asyncio.StreamReader()
            pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(printed), os.fdopen(log[0], "rb", 0)
            )
            ours.callback(pipe.close)
            replies, requests = await asyncio.open_connection(sock=ends[0], limit=REPLY_LIMIT)
            ours.callback(requests.transport.abort)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "rewards.worker"),
                stdin=ends[1].fileno(),
                stdout=ends[1].fileno(),
                stderr=log[1],
                start_new_session=True,
                env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(paths)},
            )
            return cls(process, replies, requests, printed, ours.pop_all())

    @property
    def alive(self) -> bool:
        return not self._killed and self._process.returncode is None

    async def send(self, message: Mapping[str, Any]) -> None:
        """Hand over one message. Raises TimeoutError when the process does not take it, _Dead when it is gone."""
        self._requests.write(json.dumps(message, default=str).encode() + b"\n")
        try:
            async with asyncio.timeout(START_TIMEOUT):  # wait_for would now and then lose a cancellation
                await self._requests.drain()
        except ConnectionError:
            raise await self._dead() from None

    async def receive(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises TimeoutError, _Dead when there will be none, ValueError when it is none."""
        left = seconds
        line = asyncio.ensure_future(self._replies.readline())
        try:
            while True:
                # Children may hold the socket open, so its end is no sure sign of death; and what a process has sent
                # before it died counts, though its death may be noticed first.
                alive, length, began = self.alive, max(0.0, min(_POLL, left)), time.monotonic()
                done, _ = await asyncio.wait({line}, timeout=length)
                if done or not alive:
                    break
                if left <= 0:
                    raise TimeoutError
                left -= min(time.monotonic() - began, length)  # no time in which this process itself was stopped
            if line.done() and (text := line.result()):
                answer = json.loads(text)
                if not isinstance(answer, dict):
                    raise ValueError("the scoring process answered with something else than a JSON object")
                return answer
        except ConnectionError:  # it died with a message unread
            pass
        finally:
            line.cancel()
        raise await self._dead()

    async def _dead(self) -> _Dead:
        await self._ended()
        await asyncio.wait({self._log_task}, timeout=_POLL)  # its last words
        code = self._process.returncode
        if code is not None and code < 0:
            reason = f"the scoring process died of {signal.Signals(-code).name} (exit code {code})"
        else:
            reason = f"the scoring process ended with exit code {code}"
        return _Dead(reason, code == -signal.SIGKILL)

    async def _ended(self) -> None:
        """Wait, within limits, until the process has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                await self._process.wait()

    def log(self) -> str:
        """The end of what the process printed, as a part of a sentence; empty if it printed nothing."""
        text = self._tail.decode(errors="replace").strip()
        return f"; it had printed: ...{text[-300:]}" if text else ""

    async def _keep_log(self) -> None:
        while block := await self._printed.read(65536):
            self._tail = (self._tail + block)[-_LOG_TAIL:]

    async def kill(self) -> None:
        """End the process and all that came of it, at once; returns within seconds in any case."""
        self._killed = True
        if self._process.returncode is None:
            self._process.terminate()  # it takes everything along, if it can: see rewards.worker
            await self._ended()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._ended()
        self._log_task.cancel()
        self._ends.close()
