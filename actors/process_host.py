"""Actors as child processes of this one, without Ray: an engine per process on one machine, on CPU.

    here (asyncio) --(number, method, arguments)--> child: a RolloutActor and threads that ask it
                   <--(number, whether it returned, what it returned or raised)--

Both ends are ours and the socket is theirs alone, so they talk in pickles. Weights lie in memory that all children map.
A child, with all that it has started, ends when it is killed, and when its parent ends in whatever way: the kernel
kills it then, even if it is stopped, and it looks for the end of its socket besides.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from actors.actor import RolloutActor, Stats
from actors.engine import Device, EngineSpec
from actors.placement import Gone, Handle, Make
from actors.weights import Entry, Snapshot, Stored, cut, write
from core import patience, stacks
from core.config import RunConfig
from core.errors import UserError

CALLS = 8  # that an actor answers at once: a poll waits while weights come
REAP_SECONDS = 5.0  # in which a killed process is gone
_SIZE = struct.Struct("!Q")
_PDEATHSIG = 1  # of prctl
# A child is killed at the end of the thread that has started it: this one lasts as long as the process.
_starter = ThreadPoolExecutor(1, thread_name_prefix="starter")


class ProcessHost:
    """A place for every actor that is asked for. `make` and the engine's class must be importable in a child."""

    def __init__(self) -> None:
        self._handles: set[_ProcessHandle] = set()

    async def place(self, config: RunConfig, names: Sequence[str]) -> Device:
        if config.actors.device == "cuda":
            raise UserError("actors.device cuda needs Ray, which shares out GPUs: child processes run on CPU")
        return "cpu"

    async def seat(self, name: str) -> str:
        return ""

    def vacate(self, name: str) -> None:
        """There is always room here."""

    def start(self, name: str, incarnation: int, spec: EngineSpec, make: Make, log: Path) -> Handle:
        handle = _ProcessHandle((name, incarnation, spec, make), log)
        self._handles.add(handle)
        handle.life.add_done_callback(lambda _: self._handles.discard(handle))
        return handle

    def share(self, weights: Snapshot | Stored) -> Any:
        """`Stored.reference` has to be the Snapshot itself: there is no object store here."""
        return _Mapped.of(weights.reference if isinstance(weights, Stored) else weights)

    async def close(self, last: list[Stats]) -> None:
        lives = [handle.life for handle in self._handles]
        for handle in self._handles:
            handle.kill()
        await asyncio.gather(*lives, return_exceptions=True)


class _ProcessHandle:
    """A child process and the calls that wait for its answers."""

    def __init__(self, arguments: tuple[Any, ...], log: Path) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._queue = [_packed(arguments)]  # what was said before the connection was open
        self._gone = ""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _starter.submit(_spawn, theirs, log).result()
        self.life = asyncio.get_running_loop().create_task(self._live(ours))

    async def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        if self._gone:
            raise Gone(self._gone)
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(_packed((number, method, arguments)))
        try:
            return await patience.within(answer, timeout)
        finally:
            self._waiting.pop(number, None)

    def kill(self) -> None:
        if self._process.returncode is None:  # not reaped yet, so its number is still its own
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: bytes) -> None:
        """Never waits: a stopped child reads later, or is killed."""
        if self._writer is None:
            self._queue.append(message)
        else:
            self._writer.write(message)

    async def _live(self, ours: socket.socket) -> None:
        """Hand on answers until the child has ended."""
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            for message in self._queue:
                self._writer.write(message)
            while True:
                size = _SIZE.unpack(await reader.readexactly(_SIZE.size))[0]
                self._hand_on(*pickle.loads(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            pass  # it has ended
        except Exception as error:
            self._gone = f"its answer cannot be read: {error!r}"
        finally:
            self.kill()  # with all that it has started
            await self._reap()
            if self._writer is not None:
                self._writer.close()

    def _hand_on(self, number: int, returned: bool, value: Any) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return  # nobody waits for it any more
        if returned:
            answer.set_result(value)
        else:
            answer.set_exception(value)

    async def _reap(self) -> None:
        for _ in range(int(REAP_SECONDS / 0.01)):
            if self._process.poll() is not None:
                break
            await asyncio.sleep(0.01)
        code = self._process.returncode
        how = "it does not die" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        self._gone = self._gone or f"its process ended: {how}"
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Gone(self._gone))


def _spawn(theirs: socket.socket, log: Path) -> subprocess.Popen[bytes]:
    """The child in a session of its own (Ctrl-C is for its parent), importing from where its parent does."""
    number = theirs.fileno()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", f"from actors.process_host import main; main({number}, {os.getpid()})"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


# ---------------------------------------------------------------- in the child
def main(descriptor: int, parent: int) -> None:
    """Be an actor: read what is asked from the socket until it ends, answer each question when its answer is there."""
    _die_with(parent)
    stacks.register(2)
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    stream, writing = connection.makefile("rb"), threading.Lock()
    actor = RolloutActor(*_read(stream))
    threads = ThreadPoolExecutor(CALLS)

    def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            opened = [each.open() if isinstance(each, _Mapped) else each for each in arguments]
            message = _packed((number, True, getattr(actor, method)(*opened)))
        except BaseException as error:
            message = _packed((number, False, _portable(error)))
        with writing:
            connection.sendall(message)

    while True:
        threads.submit(answer, *_read(stream))


def _read(stream: BinaryIO) -> Any:
    """The next message; at the end of the stream this process ends, and all that it has started."""
    size = stream.read(_SIZE.size)
    if len(size) == _SIZE.size:
        message = stream.read(_SIZE.unpack(size)[0])
        if len(message) == _SIZE.unpack(size)[0]:
            return pickle.loads(message)
    os.killpg(0, signal.SIGKILL)
    raise SystemExit  # it does not come to this


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os.killpg(0, signal.SIGKILL)


def _portable(error: BaseException) -> Exception:
    """The error, or where it would not arrive as itself, what it says."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return copy if isinstance(copy, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def _packed(message: Any) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _SIZE.pack(len(body)) + body


# ---------------------------------------------------------------- weights
@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Mapped:
    """A Snapshot whose bytes are in a file in memory, open in the parent; gone when nobody has it open any more."""

    version: int
    digest: str
    manifest: tuple[Entry, ...]
    size: int
    path: str

    @classmethod
    def of(cls, weights: Snapshot) -> _Mapped:
        file = os.memfd_create("weights")
        try:
            with open(file, "wb", closefd=False) as stream:
                write(weights, stream)
                size = stream.tell()
            path = f"/proc/{os.getpid()}/fd/{file}"
            mapped = cls(weights.version, weights.digest, weights.manifest, size, path)
        except BaseException:
            os.close(file)
            raise
        weakref.finalize(mapped, os.close, file)
        return mapped

    def open(self) -> Snapshot:
        """In a child, while the parent still has it."""
        with open(self.path, "rb") as file:
            memory = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        pieces = cut(np.frombuffer(memory, np.uint8), self.manifest)
        return Snapshot(self.version, self.digest, self.manifest, pieces)
