"""The ledger keeps whole lines and nothing else, whatever happens to the process, the disk or the file."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zlib

import pytest

from alignlab.ledger import Ledger, read_ledger
from core.errors import UserError

THREE = [{"kind": "admitted", "group": group, "version": 0} for group in (7, 8, 9)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def written(path, records=THREE):
    """A closed ledger with these records; its bytes."""
    ledger = Ledger.open(path, clock=lambda: 17.25)
    ledger.append(records)
    ledger.close()
    return path.read_bytes()


def groups(path, *bounds):
    return [record["group"] for _, record in read_ledger(path, *bounds)]


def test_a_line_ends_with_the_checksum_of_what_stands_before_it(path):
    line = written(path, THREE[:1]).decode()
    text = '{"kind":"admitted","group":7,"version":0,"time":17.25'
    assert line == f'{text},"crc":"{zlib.crc32(text.encode()):08x}"}}\n'
    assert next(read_ledger(path)) == (0, json.loads(line))


def test_records_are_read_from_any_line_to_any_other(path):
    length = len(written(path)) // 3  # the three lines are equally long
    assert [offset for offset, _ in read_ledger(path)] == [0, length, 2 * length]
    assert groups(path, length) == [8, 9]
    assert groups(path, length, 2 * length) == [8]
    assert groups(path, length, 2 * length + 1) == [8, 9]  # a line that begins before the end is in
    assert groups(path, 3 * length) == []
    with pytest.raises(UserError, match=f"ends at byte {3 * length}, and byte 999 of it is asked for"):
        groups(path, 999)
    with pytest.raises(UserError, match="no such ledger"):
        groups(path.with_name("other.jsonl"))


def test_a_line_of_another_writer_with_spaces_counts_too(path):
    text = '{"kind": "end", "step": 3'
    path.write_text(f'{text}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n')
    assert next(read_ledger(path))[1]["step"] == 3


def test_an_end_torn_at_any_byte_is_cut_and_the_ledger_goes_on(path):
    whole = written(path)
    length = len(whole) // 3
    for torn in range(length):
        path.write_bytes(whole[: 2 * length + torn])
        assert groups(path) == [7, 8]  # who only reads leaves it out
        ledger = Ledger.open(path)
        assert (ledger.torn, ledger.size, path.stat().st_size) == (torn, 2 * length, 2 * length)
        ledger.append([{"kind": "admitted", "group": 10}])
        ledger.close()
        assert groups(path) == [7, 8, 10]


@pytest.mark.parametrize("end", [b"\0" * 300, b"\0" * 50 + b"\n" + b"\0" * 50, b"{}\n{}\n"])
def test_what_a_power_cut_leaves_behind_the_last_whole_line_is_torn_too(path, end):
    path.write_bytes(written(path) + end)
    with_end = Ledger.open(path)
    assert with_end.torn == len(end) and groups(path) == [7, 8, 9]


def test_a_changed_byte_in_the_middle_is_an_error_wherever_it_is(path):
    whole = written(path)
    length = len(whole) // 3
    for at in range(length, 2 * length):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for use in (Ledger.open, groups):
            with pytest.raises(UserError, match=rf"line 2 \(byte {length}\) is not as it was written.*truncate -s"):
                use(path)
        assert path.stat().st_size == len(whole)  # nothing is cut away then


def test_the_number_of_a_damaged_line_is_that_in_the_file_even_when_reading_begins_behind_the_start(path):
    whole = written(path, THREE * 3)
    length = len(whole) // 9
    path.write_bytes(whole[: 6 * length] + b"x" + whole[6 * length + 1 :])
    with pytest.raises(UserError, match=rf"line 7 \(byte {6 * length}\)"):
        groups(path, 4 * length)


class FullDisk:
    """os.write that takes half of what it is given, once, and has no room after that."""

    def __init__(self, monkeypatch):
        self.write, self.calls = os.write, 0
        monkeypatch.setattr("alignlab.ledger.os.write", self)

    def __call__(self, file, data):
        self.calls += 1
        if self.calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(file, data[: len(data) // 2])


def test_a_full_disk_leaves_the_ledger_as_it_was_and_room_lets_it_go_on(path, monkeypatch):
    ledger = Ledger.open(path)
    ledger.append(THREE)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        FullDisk(patch)
        with pytest.raises(OSError, match="No space left"):
            ledger.append([{"kind": "admitted", "group": 10}])
    assert path.read_bytes() == before
    assert ledger.sync() == len(before)
    ledger.append([{"kind": "admitted", "group": 11}])
    assert groups(path) == [7, 8, 9, 11]


def test_what_could_not_be_taken_back_at_once_is_taken_back_before_the_next_line(path, monkeypatch):
    ledger = Ledger.open(path)
    with monkeypatch.context() as patch:
        FullDisk(patch)
        patch.setattr(Ledger, "_take_back", lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="No space left"):
            ledger.append(THREE)  # half of it: a whole line and half of the second
    assert groups(path) == [7]
    ledger.append([{"kind": "admitted", "group": 11}])
    assert groups(path) == [11]


def test_a_write_that_takes_only_a_part_is_gone_on_with(path, monkeypatch):
    write = os.write
    monkeypatch.setattr("alignlab.ledger.os.write", lambda file, data: write(file, data[:10]))
    written(path)
    assert groups(path) == [7, 8, 9]


def test_records_reach_the_disk_when_the_last_time_is_longer_ago_than_sync_seconds(path, monkeypatch):
    synced = []
    ledger = Ledger.open(path, sync_seconds=1.0)
    now = time.monotonic()
    monkeypatch.setattr("alignlab.ledger.time.monotonic", lambda: now)
    ledger.sync()
    monkeypatch.setattr("alignlab.ledger.os.fsync", lambda file: synced.append(now))
    for passed in (0.4, 0.4, 0.4, 0.4):  # 1.2 s after the sync it is due, 1.6 s after it that one was 0.4 s ago
        now += passed
        ledger.append(THREE[:1])
    assert len(synced) == 1
    assert ledger.sync() == path.stat().st_size and len(synced) == 2


def test_a_second_writer_is_refused_until_the_first_has_ended(path):
    first = Ledger.open(path)
    with pytest.raises(UserError, match="another process is at work on this run"):
        Ledger.open(path)
    first.close()
    first.close()  # once more does no harm
    Ledger.open(path).close()


def test_a_record_that_is_no_json_is_refused_as_a_whole(path):
    ledger = Ledger.open(path)
    with pytest.raises(ValueError):
        ledger.append([*THREE, {"kind": "done", "tokens": float("nan")}])
    assert ledger.size == path.stat().st_size == 0


KILLED = """
import sys; from pathlib import Path; from alignlab.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]), sync_seconds=1e9)
for group in range(10**9):
    ledger.append([{"kind": "admitted", "group": group}])
    sys.stdout.write(f"{group}\\n"); sys.stdout.flush()
"""


def test_a_kill_loses_nothing_that_was_appended_and_frees_the_ledger(path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = [199, *map(int, process.communicate(timeout=30)[0].split())]  # what was in the pipe at the end
    ledger = Ledger.open(path)
    kept = groups(path)
    assert ledger.torn == 0  # a line is one write
    assert kept == list(range(len(kept))) and len(kept) > said[-1] >= 199


def test_ten_thousand_records_take_less_than_a_second(path):
    ledger = Ledger.open(path)
    record = {"kind": "done", "group": 1, "actor": "actor-3", "incarnation": 2, "attempt": 1, "payload": "ab" * 32}
    started = time.monotonic()
    for _ in range(10_000):
        ledger.append([record])  # 0.05 s on a free core
    assert time.monotonic() - started < 1
