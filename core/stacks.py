"""Where the threads of our processes are, asked from outside: for a process that hangs and cannot say so itself.

    stacks.register(2)                                                 # in every process, once its log is open
    stacks.collect({"actor-0": (pid, host, log)}, seconds=5)           # in the one that wants to know

A thread of every process answers on a socket. Where it does not, because a call keeps the interpreter's lock, SIGUSR1
has the stacks written into the log, by C code that needs no lock. Not the signal first: it reads frames while other
threads change them, and has crashed a busy engine within 30 questions.

SIGUSR1 would end a process that has not registered, so whether it has is looked up. Ray's workers, vLLM and torch leave
that signal alone (Ray Tune takes it, in the driver; we do not use Ray Tune). Needs /proc; without it nobody is asked.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a scoring process does without
    import asyncio

LIMIT = 64_000  # bytes that are read of one process's answer
TASKS = 50  # places in which tasks of an event loop wait, at most that many are listed
_NAME = "stacks"  # of the file in memory of a process without a log
_STOPPED = {"T": "stopped by a signal (SIGSTOP or Ctrl-Z)", "t": "stopped by a debugger"}
_QUIET = 0.1  # seconds after which an answer that grows no more is whole
_own_file = -1

Process = tuple[int, str, Path | None]  # pid, host, log (none: `register_quietly`)


def register(file: int) -> None:
    """Answer from now on; on SIGUSR1, into `file` (a descriptor, which may be closed afterwards).

    From any thread, and again when the log is another one.
    """
    _on_signal(os.dup(file))
    if sys.platform != "linux":
        return
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(_address(os.getpid()))
    except OSError:  # it listens already
        server.close()
        return
    server.listen()
    threading.Thread(target=_serve, args=(server,), name="stacks", daemon=True).start()


def register_quietly() -> None:
    """Answer SIGUSR1 only, into a file in memory: for a process without a log, or one that should have no threads."""
    if hasattr(os, "memfd_create"):
        _on_signal(os.memfd_create(_NAME))


def ask(pid: int) -> str:
    """Have a process of this machine write its stacks where it registered. Empty if it was asked, else why not."""
    if problem := _problem(pid):
        return problem
    caught = int((_status(pid) or {}).get("SigCgt", "0"), 16)
    if not caught & 1 << signal.SIGUSR1 - 1:  # without a handler it would die of it
        return "it does not listen to SIGUSR1 (it has only just started, or is none of our processes)"
    try:
        os.kill(pid, signal.SIGUSR1)
    except ProcessLookupError:
        return "gone: it has ended"
    except PermissionError:
        return "it belongs to another user"
    return ""


def stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped by a signal or a debugger."""
    return ((_status(pid) or {}).get("State") or "?")[0] in _STOPPED


def collect(processes: Mapping[str, Process], seconds: float) -> dict[str, str]:
    """The stacks of each process, or in words why there are none; returns after `seconds` at the latest.

    All are asked at once. What a process prints into its log in the same moment may stand among its stacks.
    """
    until, found = time.monotonic() + seconds, dict[str, str]()
    for name, (pid, host, _) in processes.items():
        if host != socket.gethostname():
            found[name] = f"on another machine ({host}): `kill -USR1 {pid}` there writes its stacks into its log"
        elif problem := _problem(pid):
            found[name] = problem
    found |= _by_socket({n: p[0] for n, p in processes.items() if n not in found}, seconds / 2)
    left = {n: (p[0], p[2] or _memory_of(p[0])) for n, p in processes.items() if n not in found}
    found |= _by_signal(left, until - time.monotonic())
    return {name: found[name] for name in processes}


def own(loop: asyncio.AbstractEventLoop | None = None) -> str:
    """The stacks of all threads of this process, and where the tasks of `loop` wait, for any thread to ask."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    if loop is not None:
        parts.append(_tasks(loop))
    return "\n".join(parts)


def _tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Where the tasks wait, from the outermost coroutine to the innermost; equal ones once, with their number."""
    import asyncio

    chains = Counter(_chain(task.get_coro()) for task in asyncio.all_tasks(loop))
    listed = [f"{count} x waiting at\n{chain}" for chain, count in chains.most_common(TASKS)]
    left_out = f"and {len(chains) - TASKS} more places\n" if len(chains) > TASKS else ""
    return f"tasks of the event loop ({chains.total()}):\n" + "".join(listed) + left_out


def _chain(awaited: Any) -> str:
    lines = []
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        lines.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}\n")
        awaited = awaited.cr_await
    return "".join(lines) or f"  {awaited!r:.200}\n"


def _on_signal(file: int) -> None:
    global _own_file
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True, chain=False)
    if _own_file >= 0:
        os.close(_own_file)
    _own_file = file


def _serve(server: socket.socket) -> None:
    while True:
        with contextlib.suppress(OSError), server.accept()[0] as client:
            client.settimeout(1.0)
            if _peer(client)[1] == os.getuid():
                client.sendall(own().encode(errors="replace")[:LIMIT])


def _by_socket(pids: Mapping[str, int], seconds: float) -> dict[str, str]:
    """What the threads of the processes answer; those are missing that have none, or in which it cannot run."""
    texts, whole, until = dict.fromkeys(pids, b""), set[str](), time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for name, pid in pids.items():
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(OSError):
                client.connect(_address(pid))
                if _peer(client)[0] == pid:
                    selector.register(client, selectors.EVENT_READ, name)
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                block = _received(key.fileobj)
                texts[key.data] += block
                if not block:
                    selector.unregister(key.fileobj)
                    whole.add(key.data)
    return {name: text.decode(errors="replace") for name, text in texts.items() if text and name in whole}


def _received(client: Any) -> bytes:
    with contextlib.suppress(OSError):  # it ended in this moment
        return client.recv(LIMIT)
    return b""


def _by_signal(waiting: Mapping[str, tuple[int, Path | None]], seconds: float) -> dict[str, str]:
    """What the processes (pid, log) write when they are asked to, or why they do not."""
    sizes = {name: _size(log) for name, (_, log) in waiting.items()}
    found = {name: "it has no log" if log is None else ask(pid) for name, (pid, log) in waiting.items()}
    asked = {name: (log, sizes[name]) for name, (_, log) in waiting.items() if log is not None and not found[name]}
    for name, text in _appended(asked, time.monotonic() + seconds).items():
        state = (_status(waiting[name][0]) or {}).get("State", "gone")
        found[name] = text or f"no answer in time; its state is {state}"
    return found


def _appended(logs: Mapping[str, tuple[Path, int]], until: float) -> dict[str, str]:
    """What came to each file after its first bytes; waits until all have grown and grow no more, or `until`."""
    sizes, grown = {name: size for name, (_, size) in logs.items()}, dict.fromkeys(logs, 0.0)
    while (now := time.monotonic()) < until and not all(since and now - since >= _QUIET for since in grown.values()):
        time.sleep(0.01)
        for name, (path, _) in logs.items():
            if (size := _size(path)) != sizes[name]:
                sizes[name], grown[name] = size, time.monotonic()
    return {name: _read(path, start) for name, (path, start) in logs.items()}


def _address(pid: int) -> str:
    return f"\0alignlab-stacks-{pid}"  # abstract: no file, gone with the process


def _peer(connection: socket.socket) -> tuple[int, int]:
    """(process id, user id) at the other end."""
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def _problem(pid: int) -> str:
    """Why a process cannot answer at all; empty if it can."""
    state = (_status(pid) or {}).get("State", "")
    if not state:
        return "gone: there is no such process any more" if Path("/proc/self").exists() else "this system has no /proc"
    if state[0] in "ZX":
        return "gone: it has ended"
    return f"{_STOPPED[state[0]]}; `kill -CONT {pid}` lets it go on" if state[0] in _STOPPED else ""


def _read(path: Path, start: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(LIMIT).decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read: {error}"


def _size(path: Path | None) -> int:
    try:
        return os.stat(path).st_size if path is not None else 0
    except OSError:
        return 0


def _status(pid: int) -> dict[str, str] | None:
    """The lines of /proc/PID/status; none where there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _memory_of(pid: int) -> Path | None:
    """The file in memory that `register` has opened in a process."""
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(path).startswith(f"/memfd:{_NAME}"):
                return path
    except OSError:
        pass
    return None
