"""The verb `grade`: what the answer checker says of the rows of a file, in the same killable processes that reward and
evaluate. One JSON line a row goes out, in the order of the rows."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.prompts import Row, read_rows
from alignlab.run_dir import write_atomically
from core.config import RewardsConfig
from core.errors import UserError, nearest
from core.schema import Score

COLUMNS = ("gold", "completion")


def grade_file(arguments: argparse.Namespace) -> int:
    """`alignlab grade FILE.jsonl [--out FILE] [--extract any] [--workers N] [--timeout S]`. Raises UserError."""
    rows = read_rows(arguments.file)
    for number, row in enumerate(rows, 1):
        for column in COLUMNS:
            if column not in row:
                raise UserError(f"{arguments.file}: row {number} has no '{column}'; {nearest(column, row)}")
        if not isinstance(row["completion"], str):
            raise UserError(f"{arguments.file}: row {number}: 'completion' is {row['completion']!r:.60}, not a text")
    if arguments.out and not Path(arguments.out).absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {Path(arguments.out).absolute().parent}; make it, or name another")
    settings = RewardsConfig(workers=arguments.workers, timeout=arguments.timeout)
    verdicts = asyncio.run(grade(rows, settings, arguments.extract))
    lines = "".join(json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in verdicts)
    if arguments.out:
        write_atomically(Path(arguments.out), lines)
    else:
        sys.stdout.write(lines)
    print(summary(verdicts), file=sys.stderr)
    return 0


async def grade(rows: Sequence[Row], settings: RewardsConfig, extract: str = "marked") -> list[dict[str, Any]]:
    """Per row: verdict (true, false, or null where there is none), status, milliseconds, and why."""
    from rewards.reward import Samples
    from rewards.workers import Workers

    component = {"fn": "math_answer", "options": {"gold_column": "gold", "extract": extract}}
    workers = Workers({"math_answer": component}, settings.workers, settings.timeout, settings.memory_gib)

    async def one(row: Mapping[str, Any]) -> dict[str, Any]:
        samples = Samples("", {"gold": row["gold"]}, [row["completion"]], [[]], [False])
        (scored,) = await workers.score("math_answer", samples, batch=False)
        score = scored.scores
        assert isinstance(score, Score)
        verdict = score.value > 0.5 if score.status == "ok" else None
        milliseconds = round(scored.seconds * 1000, 3)
        return {"verdict": verdict, "status": score.status, "ms": milliseconds, "detail": score.detail}

    try:
        return list(await asyncio.gather(*map(one, rows)))
    finally:
        await workers.close()


def summary(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The counts in one line."""
    right, wrong = (sum(v["verdict"] is said for v in verdicts) for said in (True, False))
    longest = max((v["ms"] for v in verdicts), default=0.0)
    none = len(verdicts) - right - wrong
    return f"{len(verdicts)} rows: {right} right, {wrong} wrong, {none} without a verdict; the longest {longest:.0f} ms"
