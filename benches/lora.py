"""LoRA against training all weights: bytes of a hand-off, memory of a learner's step, and whether it learns.

    python -m benches.lora [--rounds 5] [--json FILE]     # 15 minutes; `make smollm2` and `make quickstart` come first

Bytes and memory: SmolLM2-135M-Instruct in float32 with the defaults of `model.lora` (rank 8, all linear layers but the
head), each side in a process of its own with one thread. A step is GRPO without a reference on 2 prompts of 128 tokens
with 8 completions of 64 on average (sigma 0.8), a micro-batch for each prompt, one update of AdamW.

Memory is the largest resident memory of the process during a step, less what a process holds that has only imported the
same libraries. It is weights, gradients, moments and activations, and what malloc keeps between them. Activations are
as many with adapters as without, so the more of them there are, the closer the two come: the row with the limit
recomputes them (`learner.activation_checkpointing`), as one does who is short of memory; the next keeps them.

Learning: 20 steps of the quickstart with real engines, once each, adapters at ten times the learning rate: how far the
reward of the last five steps is above that of the first.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benches import runs, samples
from benches.apart import Apart, Done, Turn
from benches.harness import Ratio, alternate, main, need_model

TOKEN_BUDGET = 1024
SIDES = {"all weights": ["learner.optimizer.lr=1e-4"], "adapters": ["learner.optimizer.lr=1e-3", "model.lora.rank=8"]}


def measure(rounds: int) -> list[Ratio]:
    """Bytes are counted; memory with activations kept is measured twice; each run is one."""
    model = need_model()
    runs.need_warm_start()
    with Apart(libraries) as side:
        nothing = side().peak_gib
    recomputed, kept = steps(rounds, model, True), steps(min(rounds, 2), model, False)
    handed = [(a.facts["handed"], b.facts["handed"]) for a, b in recomputed]
    numbers = dict(zip(("numbers", "of"), handed[0], strict=True))
    gains = {name: gain(changes) for name, changes in SIDES.items()}
    learned = [gains["adapters"] / gains["all weights"]]
    return [
        Ratio("lora: bytes of a hand-off / all weights'", [a / b for a, b in handed], at_most=0.02, facts=numbers),
        memory("lora: memory of a step / all weights', activations recomputed", recomputed, nothing, at_most=0.6),
        memory("lora: memory of a step / all weights', activations kept", kept, nothing),
        Ratio("lora: reward gained in 20 steps / by all weights", learned, at_least=0.9, facts=gains),
    ]


def steps(rounds: int, model: str, recompute: bool) -> list[tuple[Done, Done]]:
    """(adapters, all weights) in turn."""
    with ExitStack() as stack:
        sides = [stack.enter_context(Apart(learner, model, lora, recompute)) for lora in ({}, None)]
        return alternate(rounds, *sides)


def memory(name: str, pairs: Sequence[tuple[Done, Done]], nothing: float, at_most: float | None = None) -> Ratio:
    """Of a step, beyond `nothing` GiB of libraries."""
    ours, theirs = ([done.peak_gib - nothing for done in side] for side in zip(*pairs, strict=True))
    seconds = statistics.median(a.seconds / b.seconds for a, b in pairs)
    facts = {"GiB": max(ours), "of": max(theirs), "libraries": nothing, "seconds, ratio": seconds}
    return Ratio(name, [a / b for a, b in zip(ours, theirs, strict=True)], at_most=at_most, facts=facts)


def gain(changes: list[str]) -> float:
    """Mean reward of steps 16 to 20 of a run of the quickstart, less that of its first step."""
    with tempfile.TemporaryDirectory() as out:
        rows = runs.train(Path(out), "run", "configs/quickstart.yaml", ["steps=20", *changes], warm=0)
    return statistics.mean(row["reward/total"] for row in rows[-5:]) - rows[0]["reward/total"]


def libraries(turn: Turn) -> None:
    """A process with what a learner imports, and nothing else."""
    import peft  # noqa: F401

    import learner.learner  # noqa: F401

    while True:
        turn.begin()
        turn.end()


def learner(turn: Turn, model: str, lora: dict[str, Any] | None, recompute: bool) -> None:
    """A turn is a step; `handed`: numbers of a hand-off."""
    from algos.methods import resolve
    from core.config import ModelConfig
    from learner.learner import Learner

    config = samples.config(model, token_budget=TOKEN_BUDGET, activation_checkpointing=recompute)
    config = config.model_copy(update={"model": ModelConfig(path=model, lora=lora)})
    worker, groups = Learner(config, resolve(config.method)), samples.groups(2, 8, 128, 64, vocabulary=49000)
    handed = worker.export(lambda tensors: sum(tensor.numel() for _, tensor in tensors))
    while True:
        given = samples.at_version(groups, worker.steps_done)
        turn.begin()
        worker.step(given, worker.steps_done)
        turn.end(handed=handed)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
