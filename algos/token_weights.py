"""Detached factors on the per-token loss, [B, T]; they never change a denominator. All weights of a method multiply.

A weight that reads `logprobs` is computed late, from the detached current log-probabilities of the minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algos.batch import select
from core.registry import Registry

token_weights = Registry("token weight")
credit_losses = Registry("token reward model loss")


@token_weights
def given(given_weights: Tensor) -> Tensor:
    """Weights computed elsewhere."""
    return given_weights


@token_weights
def top_entropy(entropy: Tensor, mask: Tensor, *, fraction: float = 0.2) -> Tensor:
    """1 for the `fraction` of valid tokens of the step with the highest entropy, else 0.

    Threshold: the (1 - fraction) quantile, linear between order statistics; ties stay. Source: "Beyond the 80/20
    Rule", arXiv 2506.01939.
    """
    valid = entropy[mask].double().sort().values
    if not len(valid):
        return torch.zeros_like(entropy)
    # By hand: torch.quantile refuses more than 2^24 values.
    place = (1 - fraction) * (len(valid) - 1)
    low = int(place)
    high = min(low + 1, len(valid) - 1)
    threshold = valid[low] + (valid[high] - valid[low]) * (place - low)
    return (select(mask, entropy.double()) >= threshold).to(torch.float64)


@token_weights
def opsm(
    advantages: Tensor, logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, *, delta: float = 0.5
) -> Tensor:
    """Whole rows 0 where A < 0 and mean_t (behaviour - current log-probability) > delta, else 1.

    Removes the push-down on wrong completions that the current policy would no longer produce. Token advantages count
    by their row mean. Source: DeepSeek-V3.2, arXiv 2512.02556.
    """
    length = mask.sum(1).clamp(min=1)
    drift = (select(mask, behaviour_logprobs) - select(mask, logprobs)).sum(1) / length
    negative = select(mask, advantages).sum(1) < 0
    return (~(negative & (drift > delta))).to(torch.float64)[:, None].expand(mask.shape)


@token_weights
def oreal(token_scores: Tensor, mask: Tensor, positive: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Credit by a token reward model: clip((p - h) / (1 - h), 0, 1) in right rows, with 1 - p for p in wrong ones.

    p_t = sigmoid of the mean score of the first t valid tokens, h the threshold. Source: OREAL, arXiv 2502.06781.
    """
    scores = select(mask, token_scores).double()
    mean = scores.cumsum(1) / mask.cumsum(1).clamp(min=1)
    share = torch.sigmoid(torch.where(positive[:, None], mean, -mean))
    return ((share - threshold) / (1 - threshold)).clamp(0, 1)


@credit_losses
def outcome(token_scores: Tensor, outcomes: Tensor, mask: Tensor) -> Tensor:
    """Per row BCE(sigmoid(mean_t score), outcome), [B]; scores are logits [B, T], outcomes 0 or 1 [B]; the loss is the
    mean over the scored rows with tokens in the loss.

    Only the token reward model has a gradient from it. Source: OREAL, arXiv 2502.06781.
    """
    mean = select(mask, token_scores).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.binary_cross_entropy_with_logits(mean, outcomes.to(mean.dtype), reduction="none")
