"""Prefix-RFT: one row of each group continues the beginning of a demonstration.

"Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling", arXiv 2507.01679. Schedules and advantages
were run against the authors' code. The prefix shortens over the run: training starts near supervised and ends near
plain RL.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from algos.batch import select
from algos.masked import largest, per_token


def prefix_schedule(
    step: int,
    *,
    shape: Literal["constant", "linear", "cosine"] = "cosine",
    start: float = 0.95,
    end: float = 0.05,
    steps: int = 1000,
    warmup: int = 0,
    delay: int = 0,
    delay_value: float = 0.0,
) -> float:
    """A bound of the prefix share at a training step: from `start` to `end` in `steps`, after a linear warm-up from 0.

    `warmup` comes in addition to `steps`; `delay` first holds `delay_value` for that many steps.
    """
    if step < delay:
        return delay_value
    step -= delay
    if step < warmup:
        return start * step / warmup
    done = step - warmup
    if shape == "constant":
        return start
    if done >= steps:
        return end
    if shape == "linear":
        return start + (end - start) * done / steps
    return end + 0.5 * (1 + math.cos(math.pi * done / steps)) * (start - end)


def prefix_length(demonstration: int, draw: float, *, low: float, high: float, min_prefix: int = 1) -> int:
    """Tokens of a demonstration of that many tokens to place before the policy's own, from a draw of Beta(1, 1).

    k = int((low + (high - low) draw) * demonstration), at least `min_prefix`, at most demonstration - 1.
    """
    return max(min(max(int((low + (high - low) * draw) * demonstration), min_prefix), demonstration - 1), 0)


def prefix_advantages(
    scores: Tensor,
    group: Tensor,
    prefix_id: Tensor,
    prefix_len: Tensor,
    mask: Tensor,
    *,
    divide_std: bool = False,
    continuation_baseline: Literal["none", "plain"] = "none",
    code_compat: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Advantages [B, T] of plain rows (prefix_id 0) and of hybrid rows, which begin with `prefix_len` given tokens.

        plain:          R - mean of the prompt's plain rows continuation:   R (a family of one has baseline 0, scale 1),
        or R - mean_plain with `continuation_baseline` "plain" (ours) prefix:         (R - mean_plain) / rows that share
        the prefix

    so a prefix is reinforced when it does better than the policy alone. `scores`, `group`, `prefix_id`, `prefix_len`
    [B]. A family is the rows of one prompt and prefix; `divide_std` divides by its deviation (n - 1) + eps.
    `code_compat` centres the family before subtracting mean_plain, as released: with several rows per prefix that
    ignores the rewards.
    """
    family, plain = torch.zeros_like(scores), torch.zeros_like(scores)
    shared = torch.ones_like(scores)
    for index in group.unique():
        rows = group == index
        unaided = scores[rows & (prefix_id == 0)]
        plain[rows] = unaided.mean() if len(unaided) else 0.0
        for prefix in prefix_id[rows].unique():
            members = rows & (prefix_id == prefix)
            family[members] = _centred(scores[members], divide_std, eps)
            shared[members] = members.sum().to(scores.dtype)
    hybrid = prefix_id != 0
    on_prefix = ((family if code_compat else scores) - plain) / shared
    after = family if continuation_baseline == "none" else torch.where(hybrid, scores - plain, family)
    in_prefix = (torch.arange(mask.shape[1], device=mask.device) < prefix_len.unsqueeze(1)) & hybrid.unsqueeze(1)
    return torch.where(in_prefix & mask, per_token(on_prefix, mask), per_token(after, mask))


def _centred(scores: Tensor, divide_std: bool, eps: float) -> Tensor:
    alone = len(scores) == 1
    centred = scores if alone else scores - scores.mean()
    if not divide_std:
        return centred
    return centred / ((scores.new_tensor(1.0) if alone else scores.std()) + eps)


def keep_uncertain_prefix(
    advantages: Tensor, entropy: Tensor, prefix_mask: Tensor, *, drop_ratio: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Set the advantage [B, T] of the int(n drop_ratio) prefix tokens of lowest entropy to 0.

    Returns (advantage, dropped [B, T] bool); n counts the prefix tokens in hand; ties go to the lower index.
    """
    count = int(int(prefix_mask.sum()) * drop_ratio)
    dropped = largest(-entropy, prefix_mask, count)
    return advantages.masked_fill(dropped, 0.0), dropped


def reshape_prefix(advantages: Tensor, prefix_mask: Tensor, *, shape: Literal["relu", "silu"] = "relu") -> Tensor:
    """Other reshaping of prefix tokens' advantages in the release: ReLU (never push a demonstration down) or SiLU."""
    a = select(prefix_mask, advantages)
    return torch.where(prefix_mask, a.relu() if shape == "relu" else torch.nn.functional.silu(a), advantages)


def drop_prefix_tokens(advantages: Tensor, prefix_mask: Tensor, draw: Tensor, *, drop_ratio: float) -> Tensor:
    """Set the advantage of prefix tokens to 0 where the uniform `draw` [B, T] is below `drop_ratio`, a share."""
    return advantages.masked_fill(prefix_mask & (draw < drop_ratio), 0.0)
