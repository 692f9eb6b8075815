"""How much the coordinator can do: events a second, and how long one takes, at 100, 1,000 and 10,000 actors.

    python benches/coordinator.py [--actors 100,1000,10000] [--hours 1]

One simulated hour of the real Coordinator with virtual actors that are all busy: two groups of 8 completions each, 8000
tokens on average (log-normal, sigma 0.8), 40 tokens/s a sequence when 16 are decoded; as many prompts in a step as
there are actors, max_staleness 2; an actor is lost once in 100 hours. Events are timed by the clock, with garbage
collection off, so a machine that is busy with other things shows in the slowest ones; what the simulated hour takes is
seconds of one core. The last two lines are about what else happens in the coordinator's process: records are written,
and the state for a checkpoint is taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from alignlab.ledger import Ledger
from alignlab.outcome import handling, outcome
from alignlab.simulate import world_of
from alignlab.workload import LogNormal, Workload, decode_seconds
from alignlab.world import World
from core.config import RolloutConfig

HEADS = (
    "actors", "steps", "actors idle", "events", "events/s", "median us", "p99 us", "longest ms", "in the coordinator",
    "simulated hour takes",
)  # fmt: skip
SEQUENCES, MEAN, TRAIN_SECONDS = 16, 8000, 60.0
RECORDS = 200_000


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", default="100,1000,10000")
    parser.add_argument("--hours", type=float, default=1.0)
    arguments = parser.parse_args()
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    for actors in map(int, arguments.actors.split(",")):
        world, seconds = simulated(actors, arguments.hours)
        o, h = outcome(world, actors), handling(world)
        cells = [
            actors, o.steps, f"{o.actors_idle:.1%}", h.events, f"{h.per_second:.0f}", f"{1e6 * h.p50:.0f}",
            f"{1e6 * h.p99:.0f}", f"{1e3 * h.longest:.0f}", f"{sum(world.handling):.1f} s", f"{seconds:.1f} s",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"\n{ledger()}\n{state(world)}")
    return 0


def simulated(actors: int, hours: float) -> tuple[World, float]:
    """A world that has run for so long, and the seconds of a core that it took."""
    base, each = decode_seconds(60, 40 * SEQUENCES, SEQUENCES)
    workload = Workload(
        LogNormal(MEAN, 0.8, 8, longest=65536), base, each, SEQUENCES,
        lease_seconds=0.05, score_seconds=0.1, scorers=max(actors // 10, 1), publish_seconds=5.0, close_seconds=1.0,
        failure_seconds=3600 * 100, restart_seconds=120,
    )  # fmt: skip
    rollout = RolloutConfig(prompts=actors, max_staleness=2)
    workload = replace(workload, train_token_seconds=TRAIN_SECONDS / (actors * 8 * MEAN))
    started = time.process_time()
    world = world_of(rollout, workload, capacity=2).run(actors, 3600 * hours)
    return world, time.process_time() - started


def ledger() -> str:
    """What it costs to record: a write for every event, a sync a second."""
    record = {"kind": "done", "group": 123456, "actor": "actor-1234", "incarnation": 0, "attempt": 0}
    record |= {"payload": 64 * "a", "tokens": 64000, "oldest": 12, "newest": 14}
    with TemporaryDirectory(dir=".") as folder:
        book = Ledger.open(Path(folder) / "ledger.jsonl")
        started = time.perf_counter()
        longest = max(append(book, [[record]] * RECORDS))
        rate = RECORDS / (time.perf_counter() - started)
        book.close()
    return f"ledger: {rate:.0f} records/s, longest write {1e3 * longest:.1f} ms (with a sync a second)"


def append(book: Ledger, events: Sequence[Sequence[dict[str, object]]]) -> list[float]:
    """Seconds of each write."""
    spent = []
    for records in events:
        started = time.perf_counter()
        book.append(records)
        spent.append(time.perf_counter() - started)
    return spent


def state(world: World) -> str:
    """What a checkpoint takes of the coordinator."""
    started = time.perf_counter()
    owed = len(world.coordinator.state_dict()["owed"])
    return f"checkpoint: the coordinator's state, {owed} groups, in {1e3 * (time.perf_counter() - started):.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
