"""Scaling in tokens: the cost of a step against P x G x length, and its memory beyond the token budget.

    python -m benches.tokens                         # about 5 minutes

`Learner.step` of a model with random weights (24 M parameters), token_budget 512, on steps of once to sixteen times
the budget: P, G and the mean length of completions (log-normal, sigma 0.8) vary together. A round takes every size
once, in random order; its R^2 is that of the line seconds = a + b x trained tokens. Prompts, which are read once for a
group, and attention, which grows with the square of a length, are not in the line: what they cost must be small enough
to leave it one. Memory: the peak of the process at sixteen times the budget over that at twice, in processes of their
own; a step's gradients and moments are part of it, its activations are those of one micro-batch. One thread.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benches import samples
from benches.apart import Apart, Done, Turn
from benches.harness import Ratio, alternate, main

BUDGET = 512
PROMPT_TOKENS, VOCABULARY = 32, 8192
SIZES = ((2, 4, 64), (2, 4, 128), (2, 8, 128), (4, 8, 96), (8, 8, 64), (6, 8, 128), (8, 8, 128))  # P, G, mean length
SMALL, LARGE = (2, 4, 128), (8, 8, 128)  # twice, sixteen times the budget


def measure(rounds: int) -> list[Ratio]:
    """The line and the memory."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        with Apart(steps, folder) as side:
            points = [in_random_order(side, seed) for seed in range(-1, rounds)][1:]  # the first round does not count
        with Apart(steps, folder) as small, Apart(steps, folder) as large:
            peaks = alternate(rounds, lambda: small(SMALL), lambda: large(LARGE))
    lines = [fit(tokens, seconds) for tokens, seconds in points]
    slope, rest, _ = lines[-1]
    line = {"tokens/s": 1 / slope, "a seconds": rest, "tokens": f"{min(points[0][0])}-{max(points[0][0])}"}
    return [
        Ratio("tokens: R^2 of seconds = a + b x P x G x length", [r for *_, r in lines], at_least=0.99, facts=line),
        Ratio(
            "tokens: peak memory at 16 x the budget / at 2 x",
            [large.peak_gib / small.peak_gib for small, large in peaks],
            at_most=1.1,
            facts=gib(peaks),
        ),
    ]


def fit(tokens: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """b, a and R^2 of seconds = a + b tokens, by least squares.

    >>> fit([1, 2, 3], [3, 5, 7])
    (2.0, 1.0, 1.0)
    """
    slope, rest = statistics.linear_regression(tokens, seconds)
    return slope, rest, statistics.correlation(tokens, seconds) ** 2


def gib(peaks: list[tuple[Done, Done]]) -> dict[str, float]:
    """Medians of both peaks."""
    small, large = zip(*peaks, strict=True)
    return {
        "GiB at 2 x": statistics.median(done.peak_gib for done in small),
        "GiB at 16 x": statistics.median(done.peak_gib for done in large),
    }


def in_random_order(side: Apart, seed: int) -> tuple[list[int], list[float]]:
    """(trained tokens, seconds) of every size, once."""
    done = [side(size) for size in random.Random(seed).sample(SIZES, len(SIZES))]
    return [d.facts["tokens"] for d in done], [d.seconds for d in done]


def steps(turn: Turn, model: str) -> None:
    """Steps of the learner, each of the size that is asked for."""
    from algos.methods import resolve
    from learner.learner import Learner

    config = samples.config(model, token_budget=BUDGET)
    learner = Learner(config, resolve(config.method))
    made = {(p, g, mean): samples.groups(p, g, PROMPT_TOKENS, mean, VOCABULARY) for p, g, mean in SIZES}
    for version in range(config.steps):
        given = {size: samples.at_version(groups, version) for size, groups in made.items()}
        groups = given[turn.begin()]
        learner.step(groups, version)
        turn.end(tokens=samples.trained(groups))


def make_model(folder: Path) -> None:
    """Random weights, and no tokenizer: nothing here depends on them but the time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, rounds=3))
