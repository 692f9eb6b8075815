"""Completions that share their prompt, against the same rows packed each with its own copy of it.

    python -m benches.shared_prompts [--rounds 5] [--json FILE]

One group, forward and backward of the log-probs of SmolLM2-135M in float32, one thread. Long prompts (512 tokens, 8
completions of 64): the row has 1016 tokens instead of 4600. Short ones (64 tokens, 8 of 512): 4152 instead of 4600, and
sharing must not cost more than it saves. The gradients of both ways are compared once: the norm of the difference over
the norm, of the parameter where it is largest. Ten minutes; `make smollm2` comes first.
"""

from __future__ import annotations

import sys
import time

import torch

from benches.harness import Ratio, alternate, main, need_model
from core.config import ModelConfig
from learner.collate import Micro, Sequences
from learner.model import Policy, load_policy
from learner.ranks import Ranks

G = 8
CASES = {"long prompt": (512, 64, 3.5), "short prompt": (64, 512, 1.0)}  # prompt, completion, at least


def measure(rounds: int) -> list[Ratio]:
    """Tokens/s with sharing over tokens/s without, and how far the gradients are apart."""
    torch.set_num_threads(1)
    path = need_model()
    policy = load_policy(ModelConfig(path=path), path, Ranks(), temperature=1.0, chunk=1024)
    rows, worst = [], 0.0
    for name, (prompt, completion, limit) in CASES.items():
        sequences = group(prompt, completion)
        shared, apart = (Micro.of(sequences, range(G), torch.device("cpu"), share) for share in (True, False))
        if name == "long prompt":
            worst = difference(policy, shared, apart)
        pairs = alternate(rounds, lambda m=shared: seconds(policy, m), lambda m=apart: seconds(policy, m), warm=0)
        facts = {"prompt": prompt, "completion": completion, "G": G, "seconds shared": min(a for a, _ in pairs)}
        rows.append(Ratio(f"shared prompts, {name}: speed", [b / a for a, b in pairs], at_least=limit, facts=facts))
    return [*rows, Ratio("shared prompts: gradients apart, relative", [worst], at_most=1e-5)]


def group(prompt: int, completion: int) -> Sequences:
    """Random tokens; the same for all runs."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 49000, (count,), generator=draw).tolist())

    return Sequences([tokens(prompt)] * G, [tokens(completion) for _ in range(G)], [0] * G)


def gradient(policy: Policy, micro: Micro) -> list[torch.Tensor]:
    """Of the mean log-prob, with respect to every parameter."""
    parameters = list(policy.parameters())
    logprobs, _ = policy(micro)
    return list(torch.autograd.grad(logprobs.mean(), parameters))


def seconds(policy: Policy, micro: Micro) -> float:
    """Of one forward and backward pass."""
    started = time.perf_counter()
    gradient(policy, micro)
    return time.perf_counter() - started


def difference(policy: Policy, one: Micro, other: Micro) -> float:
    """The largest over the parameters of |a - b| / |b|."""
    pairs = zip(gradient(policy, one), gradient(policy, other), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
