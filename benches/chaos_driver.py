"""One run of the chaos bench, and the process that drives it: alignlab's loop with fake engines and a fake learner.

    python -m benches.chaos_driver FOLDER [--calm]

FOLDER/case.json says what the run is like (`Case`); the run is FOLDER/run, begun or gone on with. So a case that went
wrong can be looked at by hand. `--calm` runs it as a reference does: actors are threads of this process, the learner is
not lost. Ends with 0 when the last step is done.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.placement import ThreadHost
from actors.process_host import ProcessHost
from alignlab import run_dir
from core.config import RunConfig
from tests.rig import HashLearner, PickyEngine, Rig, run_config


@dataclass(frozen=True)
class Case:
    """What a run is like; everything follows from the number and the seed of the bench."""

    number: int
    seed: int  # of the run, and of all that befalls it
    deterministic: bool
    steps: int
    prompts: int
    group_size: int
    staleness: int
    window: int | None
    token_age: int | None
    actors: int
    every: int  # checkpoints
    latency: float  # seconds of an engine's step
    train_seconds: float
    refuse: int  # of so many prompts the engines refuse one; 0: none
    filtered: bool  # the method drops groups whose rewards are equal
    losing: float  # chance that the learner is lost in a step, or while it is saved
    attempts: int  # rollout.max_attempts
    lease: float  # seconds, rollout.timeout
    small: bool  # so little room for payloads that they are pruned

    @classmethod
    def draw(cls, number: int, seed: int) -> Case:
        """Case `number`. Every second one is deterministic; S goes through 0 .. 3."""
        draw = random.Random(f"case/{seed}/{number}")
        deterministic, staleness = number % 2 == 0, number // 2 % 4
        return cls(
            number=number,
            seed=draw.randrange(10**6),
            deterministic=deterministic,
            steps=draw.randint(6, 9),
            prompts=draw.randint(2, 3),
            group_size=draw.randint(2, 3),
            staleness=staleness,
            window=draw.choice((None, staleness, staleness + 1)),
            token_age=draw.choice((None, 0, 1)),
            actors=draw.choice((2, 2, 2, 3, 3, 4)),
            every=draw.choice((1, 2, 3, 4)),
            latency=draw.uniform(0.005, 0.03),
            train_seconds=draw.uniform(0.0, 0.15),
            refuse=draw.choice((0, 0, 5, 9)),
            filtered=draw.random() < 0.4,
            losing=draw.choice((0.0, 0.0, 0.08)),
            # A deterministic run ends rather than leave a group out; here it is to come to its end.
            attempts=1000 if deterministic else draw.choice((2, 3, 1000)),
            lease=3600.0 if deterministic else draw.choice((0.7, 3600.0, 3600.0)),
            small=draw.random() < 0.2,
        )

    @classmethod
    def read(cls, folder: Path) -> Case:
        """As `write` has left it."""
        return cls(**json.loads((folder / "case.json").read_text()))

    def write(self, folder: Path) -> None:
        """Into a new folder."""
        folder.mkdir(parents=True)
        (folder / "case.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    def config(self, folder: Path) -> RunConfig:
        """The run in `folder`/run."""
        method = {"row": "grpo", "kl": "none"} | ({"filter": "mixed"} if self.filtered else {})
        tree: dict[str, Any] = {
            "seed": self.seed,
            "steps": self.steps,
            "method": method,
            "rollout": {
                "prompts": self.prompts,
                "group_size": self.group_size,
                "max_staleness": self.staleness,
                "window": self.window,
                "max_token_age": self.token_age,
                "deterministic": self.deterministic,
                "max_attempts": self.attempts,
                "timeout": self.lease,
            },
            "actors": {
                "count": self.actors,
                "suspect_timeout": 0.5,
                "silence_timeout": 2.0,
                "publish_timeout": 10.0,
            },
            "rewards": {"components": {"tokens": {"per": 8}}, "workers": 1 + self.number % 2},
            "learner": {"max_restarts": 1000},
            "checkpoint": {"every": self.every, "keep": 2},
            "ledger": {"payload_gib": 2e-5 if self.small else 20.0},
        }
        return run_config(folder, **tree)


def rig_of(folder: Path, calm: bool = False) -> Rig:
    """The run of a folder, ready to begin or to go on."""
    case = Case.read(folder)
    draw = random.Random(f"learner/{case.seed}/{os.getpid()}")  # another chance in every process
    lose = (lambda step: False) if calm else (lambda step: draw.random() < case.losing)
    return Rig(
        case.config(folder),
        partial(HashLearner, lose=lose, seconds=0.0 if calm else case.train_seconds),
        host=ThreadHost if calm else ProcessHost,
        make=partial(PickyEngine, latency=0.0 if calm else case.latency, every=case.refuse),
        say=partial(print, flush=True),
    )


def drive(folder: Path, calm: bool = False) -> int:
    """0 when the run has done its last step; 1, with the reason printed, when it ended before."""
    try:
        rig = rig_of(folder, calm)
        return int(rig.run() < rig.config.steps)
    except Exception:
        traceback.print_exc()
        return 1


def preload() -> None:
    """Import all that a driver needs: the processes that are forked from this one begin at once."""
    for name in ("torch.utils.tensorboard", "algos.methods", "learner.pool", "alignlab.lab", "alignlab.replay"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    run_dir._commit = lambda: None  # asks git, which takes its time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calm", action="store_true")
    arguments = parser.parse_args()
    preload()
    return drive(arguments.folder, arguments.calm)


if __name__ == "__main__":
    sys.exit(main())
