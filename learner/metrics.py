"""The learner's metrics: what each means, and how parts of them become one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from algos.metrics import derived
from learner.meter import Spent

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
    "learner/flops": (
        "operations that the step's passes need, of all ranks: a multiplication and an addition are two; what is "
        "computed twice to save memory counts once; absent for models whose operations are not known",
        "as learner/tokens",
        "",
    ),
    "learner/flops_per_second": ("learner/flops by the seconds of the whole step", "steady", "see learner/mfu"),
    "learner/mfu": (
        "learner/flops_per_second by what matrix products alone reach on as many devices of this kind, at model.dtype",
        "above 0.3",
        "raise learner.token_budget; see which of time/learner_* is long; `profile: true` shows the operators",
    ),
    "time/learner": (
        "seconds of the whole step on the slowest rank; the four below are its parts",
        "steady",
        "see learner/tokens_per_second",
    ),
    "time/learner_collate": (
        "seconds of collating, of the advantages, and of all that is in no other part",
        "far below time/learner",
        "many short completions: fewer, longer groups cost less",
    ),
    "time/learner_passes": (
        "seconds of passes without gradient: old and reference log-probs, critics",
        "below half of time/learner",
        "a step with one update needs no pass for old log-probs; leave the KL term out if it is not needed",
    ),
    "time/learner_gradients": ("seconds of forward and backward passes", "most of time/learner", "add learner ranks"),
    "time/learner_optimizer": ("seconds of clipping and of the optimiser", "far below time/learner", ""),
}


class Totals:
    """Sums and counts under names. Parts of a metric add up over micro-batches, updates and ranks."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[Tensor | float, Tensor | float]] = {}

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


@dataclass(frozen=True)
class Report:
    """What one rank says of a step: sums and counts by name, what it was spent on, its highest memory in GiB, and the
    operations a second that its device can do."""

    pairs: dict[str, tuple[float, float]]
    spent: Spent
    memory: float
    peak: float


def over_ranks(ranks: Sequence[Report], whole: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> dict[str, float]:
    """The metrics of a step. `whole`: pairs that are of all ranks."""
    merged, step_level = Totals(), Totals()
    for report in ranks:
        merged.add(report.pairs)
    step_level.add(whole)
    sums = merged.numbers()
    tokens = sums.get("learner/tokens", (0.0, 0.0))[0]
    return {
        **derived({**step_level.means(), **merged.means()}),
        # Every rank counts every update, so these are sums over the updates and not over the ranks.
        **{n: sums.get(n, (0.0, 0.0))[0] / len(ranks) for n in ("optim/skipped", "optim/empty")},
        "learner/tokens": tokens,
        "learner/tokens_per_second": tokens / max(report.spent.seconds for report in ranks),
        "learner/micro_batches": max(report.pairs.get("learner/tokens", (0.0, 0.0))[1] for report in ranks),
        "learner/peak_memory_gib": max(report.memory for report in ranks),
        **spending([report.spent for report in ranks], sum(report.peak for report in ranks)),
    }


def spending(ranks: Sequence[Spent], peak: float) -> dict[str, float]:
    """Seconds by phase, of the slowest rank so that they sum to its time; operations of all ranks, where known.

    peak: operations a second that all their devices together can do.
    """
    slowest = max(ranks, key=lambda spent: spent.seconds)
    times = {f"time/learner_{phase}": seconds for phase, seconds in slowest.phases.items()}
    found = {"time/learner": slowest.seconds, **times}
    operations = [spent.operations for spent in ranks if spent.operations is not None]
    if len(operations) < len(ranks):
        return found
    rate = sum(operations) / slowest.seconds
    work = {"learner/flops": sum(operations), "learner/flops_per_second": rate}
    return {**found, **work, "learner/mfu": rate / peak}
