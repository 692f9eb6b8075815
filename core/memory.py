"""Memory of a process that frees and asks for the same large blocks again and again, as a model does in every step."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # of glibc's mallopt
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have this process keep what it frees, instead of giving it back to the system and asking for it again.

    A new page costs a fault and 4 KiB of zeros, which is several times slower than to write to one that is there. The
    process stays as large as it once was. Nothing happens where malloc is not glibc's.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST}.items():
            mallopt(option, value)
