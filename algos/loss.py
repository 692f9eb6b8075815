"""The composed objective (signatures; being filled in)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from algos.batch import Batch, Metrics
from algos.methods import Method


@dataclass(frozen=True)
class LossOutput:
    """A part of the step's loss: parts of all rows of a minibatch add up to its loss."""

    loss: Tensor  # [] with gradient
    metrics: Metrics
    token_loss: Tensor  # [B, T] policy term after all weights
    policy: Tensor  # [] aggregated policy term
    token_kl: Tensor | None = None  # [B, T]
    kl: Tensor | None = None  # [] aggregated KL term, not multiplied by its coefficient


def advantages(method: Method, batch: Batch) -> Batch:
    """Once per step, on the whole step: filter, shaping, channels, correction, masks; metrics in `.metrics`."""
    raise NotImplementedError


def normalise(method: Method, minibatch: Batch) -> Batch:
    """Denominators of one optimiser step (a Batch made by `.rows`), before it is split into micro-batches."""
    raise NotImplementedError


def late(method: Method, minibatch: Batch, logprobs: Tensor) -> Batch:
    """Only if "late" in method.needs: what depends on current logprobs [B, T]; replaces the call of `normalise`."""
    raise NotImplementedError


def loss(
    method: Method, rows: Batch, logprobs: Tensor, entropy: Tensor | None = None, values: Tensor | None = None
) -> LossOutput:
    """The part of the minibatch's loss that comes from `rows`; logprobs, entropy, values [B, T] with gradient."""
    raise NotImplementedError
