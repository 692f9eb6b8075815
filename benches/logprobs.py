"""Log-probs and entropies by chunks against the form that holds all logits: peak memory and time, with gradients.

    python -m benches.logprobs [--rounds 5] [--json FILE]

T = 16384 tokens, hidden 576, vocabulary 49152 (SmolLM2's head), float32, one thread. The full form is what autograd
makes of `logits.log_softmax(-1)`, its gather and its entropy, with only log-probs trained on, as in most methods. Each
run has a process of its own: its peak memory less what it had before, and its seconds. Seven minutes, and 10 GiB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
from torch import Tensor

from benches.harness import Ratio, alternate, main
from learner.logprobs import Head, token_logprobs

T, HIDDEN, VOCABULARY, CHUNK = 16384, 576, 49152, 1024


def measure(rounds: int) -> list[Ratio]:
    """Ours over the full form's."""
    runs: dict[str, list[tuple[float, float]]] = {"chunks": [], "full": []}

    def run(form: str) -> float:
        words = [sys.executable, "-m", "benches.logprobs", form]
        runs[form].append(tuple(map(float, subprocess.check_output(words, text=True).split())))  # type: ignore[arg-type]
        return runs[form][-1][1]

    times = alternate(rounds, lambda: run("chunks"), lambda: run("full"), warm=0)
    peaks = [ours / full for (ours, _), (full, _) in zip(runs["chunks"], runs["full"], strict=True)]
    facts = {"GiB in chunks": runs["chunks"][0][0], "GiB in full": runs["full"][0][0]}
    return [
        Ratio("log-probs and entropy: peak memory", peaks, at_most=0.1, facts=facts),
        Ratio("log-probs and entropy: time", [a / b for a, b in times], at_most=1.0, facts={"seconds": times[0][0]}),
    ]


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] from all logits at once."""
    logprobs = (hidden @ weight.T).log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def one(form: str) -> None:
    """Print GiB and seconds of one forward and backward pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    with torch.no_grad():
        weight *= 0.05
    targets = torch.randint(VOCABULARY, (T,))
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # the matrix library starts
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if form == "full":
        logprobs, _ = full(hidden, weight, targets)
    else:
        logprobs, _ = token_logprobs(hidden, weight, None, targets, Head(), CHUNK)
    logprobs.mean().backward()
    seconds = time.perf_counter() - started
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, seconds)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in ("full", "chunks"):
        one(sys.argv[1])
    else:
        sys.exit(main(__doc__, measure))
