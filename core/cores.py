"""Cores of their own for processes that compute on CPU, so that an actor and a learner do not fight for one.

    mine = claim(2)     # this thread, and every thread and process that it starts, stays on two cores; () for none

A core is claimed by a lock on a file of this user, which lasts as long as the process: whatever ends it, the kernel
gives the core back. Only cores that the process may use are taken (containers, taskset). What is not ours is not seen.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PATIENCE = 2.0  # seconds: a process that was just killed may still hold its cores
_held: list[int] = []  # descriptors of the locks, open until this process ends


def claim(count: int, folder: Path | None = None, seconds: float = PATIENCE) -> tuple[int, ...]:
    """Pin the calling thread, and all that it starts, to `count` cores that nobody else has claimed; which those are.

    () where so many do not become free in `seconds`, or nothing can be locked: then it may run anywhere, as before.
    `folder`: of the locks.
    """
    place = folder or Path(tempfile.gettempdir()) / f"alignlab-cores-{os.getuid()}"
    end = time.monotonic() + seconds
    try:
        while not (cores := _take(count, place)):
            if time.monotonic() >= end or count > len(allowed()):
                return ()
            time.sleep(0.05)
    except OSError:
        return ()
    os.sched_setaffinity(0, cores)
    return cores


def allowed() -> list[int]:
    """The cores on which this process may run; none where the system does not say it (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def told(claimed: tuple[int, ...]) -> str:
    """What `claim` returned, for a log."""
    return f"cores: {', '.join(map(str, claimed)) or 'none are free, so this runs on any'}"


def _take(count: int, folder: Path) -> tuple[int, ...]:
    """So many free cores, locked; () and no lock if there are fewer, or the folder is not ours alone."""
    if not _private(folder):
        return ()
    locks: dict[int, int] = {}
    for core in _apart(allowed()):
        if len(locks) == count:
            break
        descriptor = os.open(folder / str(core), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks[core] = descriptor
        except OSError:
            os.close(descriptor)
    if len(locks) < count:
        for descriptor in locks.values():
            os.close(descriptor)
        return ()
    _held.extend(locks.values())
    return tuple(sorted(locks))


def _private(folder: Path) -> bool:
    """Whether the folder is there, or can be made, and nobody else can put anything into it."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _apart(cores: Iterable[int]) -> list[int]:
    """The cores, the second threads of physical ones last, where Linux says which they are."""

    def turn(core: int) -> int:
        file = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        with suppress(OSError, ValueError):
            first = int(file.read_text().replace("-", ",").split(",")[0])
            return int(core != first)
        return 0

    return sorted(cores, key=lambda core: (turn(core), core))
