"""Trains a reward model on pairs of answers: the one that was chosen shall score higher than the one that was rejected.

The model comes with a function `read(rows) -> scores [N]`, so this file knows neither text nor padding. Left out: ranks
(one process trains), resuming (a training takes minutes; it starts again from its seed).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.optim.lr_scheduler import LambdaLR

from core.budget import by_budget
from core.errors import UserError

Encoded = Mapping[str, Sequence[int]]
"""input_ids, and what else the model reads of a text; no padding."""
Read = Callable[[Sequence[Encoded]], Tensor]
"""Scores [N] float32 of encoded texts, differentiable."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, encoded with it. `margin`: how much better the chosen one is, where that is known."""

    chosen: Encoded
    rejected: Encoded
    margin: float = 0.0

    @property
    def tokens(self) -> int:
        """Of the longer of the two."""
        return max(len(self.chosen["input_ids"]), len(self.rejected["input_ids"]))


@dataclass(frozen=True)
class Recipe:
    """How to train. batch: pairs a step. batch_tokens: padded tokens a pass, which costs memory and changes nothing."""

    seed: int = 0
    epochs: int = 2
    batch: int = 16
    batch_tokens: int = 16384
    lr: float = 1e-4
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient
    centre: float = 0.0
    freeze_encoder: bool = False


@dataclass(frozen=True)
class Progress:
    """Means since the last report: loss, and the share of pairs that were ranked right before they were trained on."""

    step: int
    steps: int
    loss: float
    accuracy: float
    seconds: float


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centre: float = 0.0) -> Tensor:
    """mean of -log sigmoid(chosen - rejected - margin) + centre (chosen + rejected)^2, a scalar.

    chosen, rejected [N]: scores. The margin is Llama 2's (arXiv 2307.09288), the second term keeps scores near 0, which
    Bradley-Terry leaves open (Eisenstein et al., arXiv 2312.09244; there 0.01). Both as in TRL's RewardTrainer.
    """
    return (centre * (chosen + rejected) ** 2 - logsigmoid(chosen - rejected - margin)).mean()


def ranked_right(gaps: Sequence[float]) -> list[float]:
    """1 where the gap chosen - rejected is positive, 0 where it is negative, a half at a tie."""
    return [0.5 if gap == 0 else float(gap > 0) for gap in gaps]


def freeze_encoder(model: Any) -> None:
    """Leave only the head, and a pooler before it, to be trained; the encoder's dropout is off."""
    body = model.base_model
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith("pooler."))
    body.eval()


def gaps(model: Any, read: Read, pairs: Sequence[Pair], batch_tokens: int) -> list[float]:
    """chosen - rejected of each pair, by the model as it is, without dropout."""
    model.eval()
    found = [math.nan] * len(pairs)
    with torch.inference_mode():
        for part in by_budget([2 * pair.tokens for pair in pairs], batch_tokens):
            chosen, rejected = _scores(read, [pairs[i] for i in part])
            for index, gap in zip(part, (chosen - rejected).tolist(), strict=True):
                found[index] = gap
    return found


def fit(
    model: Any, read: Read, pairs: Sequence[Pair], recipe: Recipe, report: Callable[[Progress], None]
) -> list[Progress]:
    """Train `model` in place; the same numbers for the same seed on one thread. Returns what it reported.

    AdamW, warm-up, then linearly to 0. Raises UserError when the loss is no number any more.
    """
    torch.manual_seed(recipe.seed)  # dropout
    model.train()
    if recipe.freeze_encoder:
        freeze_encoder(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = recipe.epochs * math.ceil(len(pairs) / recipe.batch)
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    warm = max(1, round(recipe.warmup * steps))
    schedule = LambdaLR(optimizer, lambda done: min((done + 1) / warm, (steps - done) / max(1, steps - warm)))
    told: list[Progress] = []
    since: list[tuple[float, float]] = []
    started = time.monotonic()
    for step, batch in enumerate(_batches(pairs, recipe), 1):
        since.append(_backward(read, batch, recipe))
        if not math.isfinite(since[-1][0]):
            raise UserError(f"--lr {recipe.lr}: the loss is {since[-1][0]} at step {step}; lower it")
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in (1, 5, steps) or step % max(1, steps // 10) == 0:
            loss, accuracy = (sum(column) / len(since) for column in zip(*since, strict=True))
            told.append(Progress(step, steps, loss, accuracy, time.monotonic() - started))
            report(told[-1])
            since = []
    return told


def _batches(pairs: Sequence[Pair], recipe: Recipe) -> Iterator[list[Pair]]:
    """The pairs in a new order each epoch."""
    order = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.epochs):
        shuffled = torch.randperm(len(pairs), generator=order).tolist()
        for start in range(0, len(pairs), recipe.batch):
            yield [pairs[i] for i in shuffled[start : start + recipe.batch]]


def _backward(read: Read, batch: Sequence[Pair], recipe: Recipe) -> tuple[float, float]:
    """Add the gradient of the batch's loss to the parameters; (loss, share ranked right)."""
    loss, right = 0.0, 0.0
    for part in by_budget([2 * pair.tokens for pair in batch], recipe.batch_tokens):
        own = [batch[i] for i in part]
        chosen, rejected = _scores(read, own)
        margins = chosen.new_tensor([pair.margin for pair in own])
        share = pair_loss(chosen, rejected, margins, recipe.centre) * (len(own) / len(batch))
        share.backward()
        loss += share.item()
        right += sum(ranked_right((chosen - rejected).tolist()))
    return loss, right / len(batch)


def _scores(read: Read, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores [N] of the chosen and of the rejected answers, in one pass."""
    chosen, rejected = read([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]).chunk(2)
    return chosen, rejected
