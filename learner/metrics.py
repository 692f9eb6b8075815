"""The learner's metrics: what each means, and how parts of them become one number."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

METRICS: dict[str, tuple[str, str, str]] = {
    # name: (meaning, healthy range, what to do outside it)
    "policy/loss": (
        "loss of an update, mean over the step's updates",
        "near 0 on-policy; its size means little, its trend less",
        "look at rewards and policy/entropy instead; NaN: see optim/skipped",
    ),
    "policy/entropy": (
        "mean entropy of the next-token distribution at the rollout temperature, nats",
        "falls slowly; 0.1 to 2 for language models",
        "collapsing: raise clip high, lower the learning rate, or add an entropy or KL term",
    ),
    "optim/grad_norm": (
        "global norm of the gradient before clipping, mean over the step's updates",
        "steady within a factor of ten",
        "growing: lower learner.optimizer.lr; zero: no group has both good and bad completions",
    ),
    "optim/lr": ("AdamW's learning rate in this step", "as configured", "check schedule and warmup_steps"),
    "optim/skipped": (
        "updates left out because loss or gradient was not finite",
        "0",
        "the batch lies in skipped/step-N of the run's folder; lower the learning rate or use dtype float32",
    ),
    "optim/empty": (
        "updates left out because no token of the minibatch was to be trained",
        "0",
        "all groups were filtered or unscorable: easier or harder prompts, more completions, check the rewards",
    ),
    "learner/tokens": ("tokens read in update passes, prompts included, all ranks", "any", ""),
    "learner/tokens_per_second": (
        "learner/tokens by the seconds of the whole step",
        "steady",
        "falling: longer completions, or another process on the same cores",
    ),
    "learner/micro_batches": (
        "forward and backward passes of each rank",
        "a few per update",
        "many: raise learner.token_budget if memory allows",
    ),
    "learner/peak_memory_gib": (
        "highest memory of any rank (GPU: allocated in this step; CPU: resident since the start), GiB",
        "below 0.9 of the device",
        "lower learner.token_budget or logprob_chunk; set activation_checkpointing",
    ),
    "time/learner_before": (
        "seconds of collating, of passes without gradient (old, reference) and of the advantages",
        "below half of time/learner",
        "a step with one update needs no pass for old log-probs",
    ),
    "time/learner_updates": ("seconds of forward, backward and optimiser passes", "most of time/learner", ""),
    "time/learner": ("seconds of the whole step on the slowest rank", "steady", "see learner/tokens_per_second"),
}


class Totals:
    """Sums and counts under names. Parts of a metric add up over micro-batches, updates and ranks."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Add (sum, count) pairs."""
        for name, (total, count) in metrics.items():
            old_total, old_count = self.pairs.get(name, (0.0, 0.0))
            # Tensors stay tensors here: turning each into a number would make a GPU wait each time.
            self.pairs[name] = (old_total + total, old_count + count)

    def numbers(self) -> dict[str, tuple[float, float]]:
        """The pairs as plain numbers."""
        return {name: (float(total), float(count)) for name, (total, count) in self.pairs.items()}

    def means(self) -> dict[str, float]:
        """sum / count by name; NaN where nothing was counted: missing is not zero."""
        return {n: total / count if count else math.nan for n, (total, count) in self.numbers().items()}
