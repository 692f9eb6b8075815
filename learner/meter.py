"""What a step of one rank is spent on: seconds by phase, and the operations that it needed.

meter = Meter(device)
meter.begin()
with meter("passes"):
    meter.count(hf, micro)                       # a pass without gradient
with meter("gradients"):
    meter.count(hf, micro, gradient=True)
spent = meter.end()                              # the four phases sum to spent.seconds
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from learner.collate import Micro
from learner.flops import Needs, needed
from learner.profiling import PHASES

REST = PHASES[0]


@dataclass(frozen=True)
class Spent:
    """Of one step: seconds by phase, and in sum; operations, None where those of a model are not known."""

    phases: dict[str, float]
    operations: float | None

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.phases.values())


@dataclass
class Meter:
    """Every second of a step belongs to one of PHASES: to the innermost that is entered, else to the first."""

    device: torch.device
    _needs: dict[PreTrainedModel, Needs | None] = field(default_factory=dict)
    _phases: dict[str, float] = field(default_factory=dict)
    _operations: Tensor | None = None
    _phase: str = REST
    _since: float = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._phases = dict.fromkeys(PHASES, 0.0)
        self._operations = torch.zeros((), dtype=torch.float64, device=self.device)
        self._phase, self._since = REST, self._now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """What is done in the block belongs to `phase`, in a profile too."""
        before = self._enter(phase)
        try:
            with record_function(phase):
                yield
        finally:
            self._enter(before)

    def count(self, hf: PreTrainedModel, micro: Micro, *, gradient: bool = False) -> None:
        """A pass of a model over a row, and back where there is a gradient."""
        if hf not in self._needs:
            self._needs[hf] = needed(hf)
        needs = self._needs[hf]
        if needs is None:
            self._operations = None
        elif self._operations is not None:
            self._operations += needs.forward(micro) + (needs.backward(micro) if gradient else 0.0)

    def end(self) -> Spent:
        """What the step was spent on."""
        self._enter(REST)
        return Spent(dict(self._phases), None if self._operations is None else self._operations.item())

    def _enter(self, phase: str) -> str:
        """The phase until now."""
        before, now = self._phase, self._now()
        self._phases[before] = self._phases.get(before, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return before

    def _now(self) -> float:
        if self.device.type == "cuda":  # what was asked for in a phase is to be done in it
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
