"""How far the policy has moved from an anchor: levels of the importance ratio rho.

delta_it = logprobs - anchor, anchor in {old, rollout}, 0 at masked cells. A level returns log rho [B, T] with gradient;
its exponent is clamped to [-20, 20], which changes no sensible value and leaves gradient 0 beyond.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from core.registry import Registry

ratios = Registry("ratio")

LIMIT = 20.0
Anchor = Literal["old", "rollout"]


@ratios
def token(delta: Tensor, mask: Tensor, *, anchor: Anchor = "old") -> Tensor:
    """log rho_it = delta_it."""
    return delta.clamp(-LIMIT, LIMIT)


@ratios
def seq_mean(delta: Tensor, mask: Tensor, *, anchor: Anchor = "old") -> Tensor:
    """log rho_i = (1/L_i) sum_t delta_it, the geometric mean of token ratios. Source: GSPO, arXiv 2507.18071."""
    return _mean(delta, mask).clamp(-LIMIT, LIMIT).expand_as(delta)


@ratios
def seq_sum(delta: Tensor, mask: Tensor, *, anchor: Anchor = "old") -> Tensor:
    """log rho_i = sum_t delta_it, the likelihood ratio of the completion."""
    return delta.sum(1, keepdim=True).clamp(-LIMIT, LIMIT).expand_as(delta)


@ratios
def seq_mean_token(delta: Tensor, mask: Tensor, *, anchor: Anchor = "old") -> Tensor:
    """Value of seq_mean, gradient through token t only: delta_it - sg(delta_it) + sg(mean delta) (GSPO-token)."""
    return (delta - delta.detach() + _mean(delta, mask).detach()).clamp(-LIMIT, LIMIT)


def _mean(delta: Tensor, mask: Tensor) -> Tensor:
    return delta.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
