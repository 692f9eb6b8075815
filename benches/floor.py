"""How near a packed step of the learner is to what its matrix products alone would take on this machine.

    python -m benches.floor [--rounds 5] [--json FILE]

FLOPs that a GRPO step needs (`learner.flops`: nothing that is padded, masked or computed twice counts) over its
seconds, over the rate of torch's matrix product in the same dtype on the same thread, measured right before each step.
SmolLM2-135M, 8 prompts of 128 tokens, 4 completions each, lengths log-normal with mean 64; the optimizer's update is
included. bfloat16 is shown beside it: matrices are four times as fast there, and everything else is not. Three minutes;
`make smollm2` comes first.
"""

from __future__ import annotations

import sys
import time

import torch

from algos.methods import resolve
from benches.harness import Ratio, main, need_model
from benches.samples import at_version, config, groups
from learner.learner import Learner

SIZE = 2048  # of the square matrices: as fast as any here


def measure(rounds: int) -> list[Ratio]:
    """Achieved over achievable, of float32 and of bfloat16."""
    torch.set_num_threads(1)
    path = need_model()
    rows = []
    for dtype, limit in (("float32", 0.6), ("bfloat16", None)):
        settings = config(path, dtype)
        learner = Learner(settings, resolve(settings.method))
        data = groups(8, 4, 128, 64, 49152)
        learner.step(data, 0)  # allocates
        shares, facts = [], {}
        for version in range(1, rounds + 1):
            best = max(rate(getattr(torch, dtype)) for _ in range(3))
            metrics = learner.step(at_version(data, version), version).metrics
            shares.append(metrics["learner/flops_per_second"] / best)
            facts = {"GFLOP/s of matrices": best / 1e9, "tokens/s": metrics["learner/tokens_per_second"]}
        rows.append(Ratio(f"learner, {dtype}: needed FLOP/s / matrix product's", shares, at_least=limit, facts=facts))
    return rows


def rate(dtype: torch.dtype) -> float:
    """FLOP/s of one product of large matrices."""
    a, b = torch.ones(2, SIZE, SIZE, dtype=dtype)
    a @ b
    started = time.perf_counter()
    a @ b
    return 2 * SIZE**3 / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
