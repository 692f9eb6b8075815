"""One rank of the learner: groups in, one step of the method, new weights out.

    learner = Learner(config, methods.resolve(config.method))
    result = learner.step(groups, version=0)          # result.metrics, result.advantages
    learner.export(lambda tensors: dict(tensors))     # full tensors by Hugging Face name
    learner.save(folder); learner.load(folder)

It runs alone in a process (tests, the quickstart's warm start) or as one of N ranks under `learner.pool`. It knows no
method by name: `method.needs` says which passes to make, `algos` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from core.config import RunConfig
from core.schema import Group
from learner.ranks import Ranks

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepResult:
    """What a step tells the driver. Every rank returns the same.

    metrics: name -> number; METRICS says what each of the learner's own means.
    advantages: per group, per completion: the mean advantage over its trained tokens; NaN where nothing was trained.
    """

    metrics: dict[str, float]
    advantages: list[list[float]]


class Learner:
    """Policy, optimiser and step counter of one rank."""

    def __init__(self, config: RunConfig, method: Any, *, ranks: Ranks | None = None, skipped: Path | None = None):
        """Load the policy (and the reference if `method.needs` it). `ranks` None is one rank without a process group.

        skipped: folder below which the batch of an update with a non-finite loss or gradient is written
        (`step-N/`); None keeps no record. Raises UserError when the model cannot be loaded.
        """
        raise NotImplementedError

    @property
    def steps_done(self) -> int:
        """Steps behind the present weights, those of the loaded checkpoint included."""
        raise NotImplementedError

    def step(self, groups: Sequence[Group], version: int) -> StepResult:
        """One step of the method on `groups` (the same list on every rank). `version`: the weights' present version.

        Groups of demonstrations have no rollout_logprobs, versions or totals.
        """
        raise NotImplementedError

    def export(self, visit: Callable[[Iterator[tuple[str, Tensor]]], Result]) -> Result | None:
        """Full float32 tensors by Hugging Face name, gathered one at a time; tied weights once.

        Every rank calls it; rank 0 calls `visit(iterator)` and returns what it returns, the others return None.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the trainer's state to `folder`/trainer and a Hugging Face model to `folder`/model, and fsync both.

        `folder` exists and is the caller's to rename. Every rank calls it.
        """
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, bit-equal. Every rank calls it. Raises UserError when it does not fit."""
        raise NotImplementedError
