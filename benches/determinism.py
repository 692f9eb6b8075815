"""A deterministic run that dies at any record of its ledger ends like one that did not.

    python -m benches.determinism [--every 1]

20 steps with max_staleness 2, fake engines, and the real learner in this process. In peace the run writes N records;
then for each k it dies right after record k was written (every tenth time a half-written one follows) and goes on from
its files. Parameters, optimizer state and the order of the batches must be equal to those of the run in peace, bit for
bit, and the audit green. `kills.py` does the same with real engines.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignlab.audit import audit
from tests.rig import LocalLearner, Rig, batches, one_by_one, run_config
from tests.tiny import tiny_policy


class Killed(SystemExit):
    """Ends the run without a chance to do anything; asyncio hands it through."""


def dies_after(count: int) -> Any:
    """For `Rig.look`: the run dies when it has written so many records, and writes nothing afterwards."""

    def look(archive: Any) -> None:
        written = 0

        def after(record: Mapping[str, Any]) -> None:
            nonlocal written
            written += 1
            if written >= count:
                archive._ledger.append = _dead
                raise Killed

        one_by_one(archive, after)

    return look


def _dead(records: Any) -> None:
    raise Killed


def counts(rows: list[int]) -> Any:
    """For `Rig.look`: how many records are written."""
    return lambda archive: one_by_one(archive, lambda record: rows.append(1))


def config(folder: Path, policy: Path, steps: int) -> Any:
    """The run of this bench."""
    rollout = {"max_staleness": 2, "deterministic": True, "temperature": 1.0}
    return run_config(folder, steps=steps, model={"path": str(policy)}, rollout=rollout, actors={"count": 1})


def outcome(rig: Rig) -> tuple[str, list[tuple[int, list[int]]]]:
    """What must be equal."""
    return rig.learner.hash, batches(rig.folder)


def killed_at(number: int, folder: Path, policy: Path, steps: int, torn: bool) -> tuple[Rig, list[str]]:
    """A run that died after record `number` and went on; what the audit says of it."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = config(folder, policy, steps)
    with suppress(Killed):
        Rig(settings, LocalLearner, look=dies_after(number)).run()
    if torn:
        with (folder / "run" / "ledger.jsonl").open("a") as file:
            file.write('{"kind":"sco')
    rig = Rig(settings, LocalLearner)
    rig.run()
    return rig, audit(rig.folder).problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every so many records")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    wrong, rows, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        policy = tiny_policy(Path(home) / "policy")
        peace = Rig(config(Path(home) / "peace", policy, arguments.steps), LocalLearner, look=counts(rows))
        peace.run()
        expected, boundaries = outcome(peace), range(1, len(rows) + 1, arguments.every)
        print(f"in peace: {len(rows)} records, parameters {expected[0][:12]}", flush=True)
        for number in boundaries:
            rig, problems = killed_at(number, Path(home) / "killed", policy, arguments.steps, torn=number % 10 == 0)
            if outcome(rig) != expected or problems:
                wrong.append(number)
                print(f"record {number}: {rig.learner.hash[:12]} {problems[:3]}", flush=True)
            elif number % 50 == 0:
                print(f"record {number}: equal, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(boundaries)} of {len(rows)} records died at, {len(wrong)} with another end")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
