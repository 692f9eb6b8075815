"""Small operations on masked rectangles [B, T], shared by the reweighting methods.

Masked cells may hold anything, NaN and infinities included: select first (`algos.batch.select`), then compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algos.batch import select


def per_token(values: Tensor, mask: Tensor) -> Tensor:
    """One value per row [B] or per token [B, T], as [B, T] with 0 at masked cells."""
    return select(mask, (values if values.dim() == mask.dim() else values.unsqueeze(-1)).expand(mask.shape))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """sum(values * mask) / sum(mask) over the whole tensor, a scalar; 0 if nothing is valid."""
    return select(mask, values).sum() / mask.sum().clamp(min=1)


def largest(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest valid values (all of them if there are fewer); ties go to the lower index."""
    order = values.detach().masked_fill(~mask, -torch.inf).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    chosen[order[:count]] = True
    return chosen.view(mask.shape) & mask
