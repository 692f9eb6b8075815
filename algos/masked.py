"""Small operations on masked rectangles [B, T], shared by the reweighting methods.

Masked cells may hold anything, NaN and infinities included. `visible` replaces them by zero *before* any arithmetic,
so that neither a value nor a gradient can leak out of them (0 * NaN is NaN; a selected-away NaN is nothing).
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` is true, 0 elsewhere; same shape."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def per_token(values: Tensor, mask: Tensor) -> Tensor:
    """One value per row [B] or per token [B, T], as [B, T] with 0 at masked cells."""
    return visible((values if values.dim() == mask.dim() else values.unsqueeze(-1)).expand(mask.shape), mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """sum(values * mask) / sum(mask) over the whole tensor, a scalar; 0 if nothing is valid."""
    return visible(values, mask).sum() / mask.sum().clamp(min=1)


def largest(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest valid values (all of them if there are fewer); ties go to the lower index."""
    order = values.detach().masked_fill(~mask.bool(), -torch.inf).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    chosen[order[:count]] = True
    return chosen.view(mask.shape) & mask.bool()


def clipped_loss(
    advantage: Tensor, ratio: Tensor, *, low: float | None = 0.2, high: float | None = 0.2, dual: float | None = None
) -> Tensor:
    """Per-token PPO loss max(-A r, -A clip(r, 1 - low, 1 + high)), same shape as `ratio`; None is no bound.

    With `dual` c > 1, and for A < 0 only, the loss is at most -A c.
    """
    bounded = (
        ratio
        if low is None and high is None
        else ratio.clamp(None if low is None else 1 - low, None if high is None else 1 + high)
    )
    loss = torch.maximum(-advantage * ratio, -advantage * bounded)
    if dual is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)
