"""The durable truth about every group of a run: RUN/ledger.jsonl, one JSON object a line, only ever appended to.

    ledger = Ledger.open(run / "ledger.jsonl")
    ledger.append([{"kind": "admitted", "group": 7, "version": 2}])   # a kill -9 from here on loses nothing
    offset = ledger.sync()                                            # nor does a power cut

A line ends with the checksum of what stands before it: {"kind":"admitted","group":7,"version":2,"time":17.5,"crc":"…"}.
What follows the last line that is whole was cut off while it was written, and is cut away; a damaged line that others
follow was changed later, and is an error.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from core import disk
from core.errors import UserError

Record = Mapping[str, Any]

# One encoder for all lines: json.dumps with options of its own makes a new one for each.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_LINE = re.compile(rb'(\{.*), ?"crc": ?"([0-9a-f]{8})"\}\n')


@dataclass
class Ledger:
    """An open ledger; `open` makes it. One process writes it, and only one.

    torn: bytes of a half-written end that `open` cut away. size: bytes of whole lines, synced or not.
    """

    path: Path
    sync_seconds: float
    size: int
    torn: int
    _file: FileIO
    _clock: Callable[[], float] = time.time
    _synced: float = field(default_factory=time.monotonic)
    _ragged: bool = False  # bytes of a failed write may follow the whole lines

    @classmethod
    def open(cls, path: Path, *, sync_seconds: float = 1.0, clock: Callable[[], float] = time.time) -> Ledger:
        """Open or make the ledger at `path`. Raises UserError for a damaged line, or if another process writes it.

        sync_seconds: how long records may wait for the disk itself. clock: unix seconds, for `time` in the records.
        """
        file = FileIO(path, "a")
        try:
            _lock(file, path)
            length, size = os.fstat(file.fileno()).st_size, 0
            for offset, line in _lines(path):
                size = offset + len(line)
            file.truncate(size)
            os.fsync(file.fileno())
            disk.sync(path.parent)
        except BaseException:
            file.close()
            raise
        return cls(path, sync_seconds, size, length - size, file, clock)

    def append(self, records: Iterable[Record]) -> None:
        """Write the records as whole lines, with one write. Raises OSError (a full disk) and has then written none.

        They are in the kernel's hands then, and on the disk at the next `sync`, which is here if it is due.
        """
        now = round(self._clock(), 3)
        data = b"".join([_line(record, now) for record in records])
        if not data:
            return
        if self._ragged:
            self._take_back()
        try:
            _write(self._file.fileno(), data)
        except OSError:
            self._ragged = True
            with suppress(OSError):  # then it is tried again before the next line, or at the next start
                self._take_back()
            raise
        self.size += len(data)
        if time.monotonic() - self._synced >= self.sync_seconds:
            self.sync()

    def sync(self) -> int:
        """Have the disk keep all records so far; returns the byte offset of their end. Raises OSError."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()
        return self.size

    def close(self) -> None:
        """Sync, and let go of the file."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _take_back(self) -> None:
        self._file.truncate(self.size)
        self._ragged = False


def read_ledger(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, record) of each line that begins at `start` or later and before `end`; one line at a time.

    A half-written end is left out, so a ledger may be read while it is written. Raises UserError for a damaged line,
    and for a ledger that ends before `start`.
    """
    for offset, line in _lines(path, start, end):
        yield offset, json.loads(line)


def _line(record: Record, now: float) -> bytes:
    text = _encode({**record, "time": now})[:-1].encode()
    return b'%b,"crc":"%08x"}\n' % (text, zlib.crc32(text))


def _whole(line: bytes) -> bool:
    """Whether a line is as it was written."""
    found = _LINE.fullmatch(line)
    return found is not None and zlib.crc32(found[1]) == int(found[2], 16)


def _hides(line: bytes) -> bool:
    """Whether a damaged line ends with a whole one: what is damaged is the end of the line between them."""
    return any(_whole(line[found.start() :]) for found in re.finditer(rb'(?<!^)\{"', line))


def _lines(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of all lines up to `end` or the torn end, if there is one. Raises UserError."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such ledger; it is written by `alignlab train`") from None
    with file:
        if start > (length := os.fstat(file.fileno()).st_size):
            raise UserError(
                f"{path} ends at byte {length}, and byte {start} of it is asked for: its end is lost. "
                "Put a copy of the whole file back, or go on from a checkpoint whose ledger_offset (run.json) it has"
            )
        file.seek(start)
        offset = start
        for line in file:
            if end is not None and offset >= end:
                return
            if not _whole(line):
                if _hides(line) or any(map(_whole, file)):
                    raise _damaged(path, offset)
                return
            yield offset, line
            offset += len(line)


def _damaged(path: Path, offset: int) -> UserError:
    with path.open("rb") as file:
        number = 1
        while file.tell() < offset:
            number += file.read(min(1 << 20, offset - file.tell())).count(b"\n")
    return UserError(
        f"{path}: line {number} (byte {offset}) is not as it was written, and good lines follow it. Put a copy of the "
        f"file back; or keep what is before it (truncate -s {offset} {path.name}), and remove the checkpoints whose "
        f"run.json has a ledger_offset above {offset}: the run goes on from the one before"
    )


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a write may take less than it is given; on a disk that is full the next one then raises
        rest = rest[os.write(file, rest) :]


def _lock(file: FileIO, path: Path) -> None:
    """Two processes that write one ledger would each undo what the other does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path}: another process is at work on this run; end that one first, or start another run with name=OTHER"
        ) from None
    except OSError:  # a file system without locks
        return
