"""Does the simulator say what real runs do? Short runs with 1, 2, 3 actors, and what it makes of each of them.

    python benches/scaling.py OUT [--actors 1,2,3] [--steps 40] [--config configs/quickstart.yaml] [key=value ...]

Trains the config with each number of actors and max_staleness 1, without evaluations and checkpoints; a run that OUT
has already is not made again. Each run's own fit (`alignlab simulate --run`) and the fit of the run with the fewest
actors predict its steps/h. On one machine without GPUs all processes share its cores, and the simulator knows it; what
else runs there it does not know, so keep the machine quiet. Half a minute a run; `make quickstart` comes first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from alignlab.outcome import outcome
from alignlab.simulate import world_of
from alignlab.workload_fit import Measured, measure, shared_cores
from core.config import RunConfig
from core.loading import load_config

SETTINGS = ("rollout.max_staleness=1", "checkpoint.every=0", "eval.every=0", "eval.benchmarks=[]")
LIMIT = 1800  # seconds a run may take
HEADS = ("actors", "cores", "measured steps/h", "from its own fit", "error", "from the first run's fit", "error")


def main() -> int:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--actors", default="1,2,3")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    arguments = parser.parse_args()
    runs = {}
    for actors in sorted(map(int, arguments.actors.split(","))):
        folder = train(arguments, actors)
        config = load_config(folder / "config.yaml")
        runs[actors] = (config, measure(folder, config, shared_cores(folder, config)))
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    first = next(iter(runs.values()))[1]
    for actors, (config, found) in runs.items():
        own, other = predicted(config, found, actors), predicted(config, first, actors)
        real = found.steps_per_hour
        cells = [actors, found.workload.cores or "own", f"{real:.0f}", f"{own:.0f}", f"{own / real - 1:+.0%}"]
        print("| " + " | ".join(map(str, [*cells, f"{other:.0f}", f"{other / real - 1:+.0%}"])) + " |")
    return 0


def train(arguments: argparse.Namespace, actors: int) -> Path:
    """The folder of the run with so many actors. Exits if it fails."""
    folder = arguments.out / f"actors-{actors}"
    if (folder / "ledger.jsonl").exists() and '"kind":"end"' in (folder / "ledger.jsonl").read_text():
        return folder
    words = [f"name={folder.name}", f"output_dir={arguments.out}", f"steps={arguments.steps}", f"actors.count={actors}"]
    command = [sys.executable, "-m", "alignlab.cli", "train", arguments.config, *words, *SETTINGS, *arguments.overrides]
    log = arguments.out / f"{folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=output, stderr=output, timeout=LIMIT, env=environment).returncode
    if code:
        sys.exit(f"the run with {actors} actors ended with {code}; see {log}")
    return folder


def predicted(config: RunConfig, found: Measured, actors: int) -> float:
    """Steps/h of a simulated run of this config with so many actors and these durations."""
    world = world_of(config.rollout, found.workload, config.steps).run(actors)
    return outcome(world, actors).steps_per_hour


if __name__ == "__main__":
    sys.exit(main())
