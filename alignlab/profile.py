"""Profiles of a run: `alignlab profile RUN` makes the timeline of all its processes from its files, at any time.

`profile: true` in a config also has the learner profile one step (`learner.profiling`); the timeline up to that step is
put beside it. Both are Chrome traces: open them in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path

from alignlab.ledger import read_ledger
from alignlab.plan import shown
from alignlab.run_files import read_rows
from alignlab.timeline import spans, trace
from core.errors import UserError

NAME = "timeline.json.gz"


def profile(arguments: argparse.Namespace) -> int:
    """`alignlab profile RUN [--out FILE]`. Raises UserError."""
    run = Path(arguments.folder).expanduser()
    out = Path(arguments.out).expanduser() if arguments.out else run / "profile" / NAME
    count = write_timeline(run, out)
    print(f"timeline: {shown(out.absolute())}, {count} spans; open it in ui.perfetto.dev or chrome://tracing")
    for folder in sorted((run / "profile").glob("step-*")):
        print(f"profile of a step: {shown(folder.absolute())}")
    return 0


def write_timeline(run: Path, out: Path) -> int:
    """The timeline of a run, ended or not, as a gzipped Chrome trace; the number of its spans. Raises UserError."""
    records = [record for _, record in read_ledger(run / "ledger.jsonl")]
    found = spans(records, read_rows(run / "metrics.jsonl", notes=[]))
    data = gzip.compress(json.dumps(trace(found), separators=(",", ":")).encode(), mtime=0)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f"{out.name}.partial")
        part.write_bytes(data)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from None
    return len(found)
