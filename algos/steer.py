"""STEER: damp the tokens whose update would change the policy's entropy most.

"Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective", arXiv 2510.10150. Read from the authors' code
and run against it. A token weight, used with dual-clip PPO (high 0.28, dual 10); the loss is divided by the number of
tokens, not by the sum of the weights.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from algos.batch import select
from algos.masked import per_token
from algos.token_weights import token_weights


def entropy_change(logprobs: Tensor, old_logprobs: Tensor, entropy: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Size of the entropy change that the update of each token predicts, |Omega| [B, T], detached, 0 at masked cells.

        x = clip(exp(lp), 1e-8, 1 - 1e-8);  po = clip(exp(old), 1e-8, 1)
        Omega = (A / po) * x (1 - x) * (ln x + H),  non-finite values -> 0

    `logprobs`, `old_logprobs`, `entropy` [B, T]; `advantages` [B] or [B, T].
    """
    x = select(mask, logprobs.detach()).exp().clamp(1e-8, 1 - 1e-8)
    old = select(mask, old_logprobs.detach()).exp().clamp(1e-8, 1.0)
    omega = per_token(advantages.detach(), mask) / old * x * (1 - x) * (x.log() + select(mask, entropy.detach()))
    return select(mask, omega.nan_to_num(0.0, 0.0, 0.0).abs())


def damping(change: Tensor, *, w_min: float = 0.8, omega_floor: float = 0.02) -> Tensor:
    """The rate k = -ln(w_min) / max(largest change, omega_floor) of the exponential form, a scalar.

    The floor keeps the weights near 1 when all changes are tiny.
    """
    return -math.log(w_min) / change.max().clamp(min=omega_floor)


def steer_weights(
    change: Tensor,
    mask: Tensor,
    *,
    mode: Literal["exp", "linear"] = "exp",
    w_min: float = 0.8,
    w_max: float = 1.2,
    omega_floor: float = 0.02,
) -> Tensor:
    """Token weights [B, T] from the entropy change m [B, T]; 0 at masked cells. No gradient.

        exp:     w = clip(exp(-k m), w_min, 1)                      the largest change gets w_min, no change gets 1
        linear:  w = w_max - (m - m_min) (w_max - w_min) / (m_max - m_min);   (w_min + w_max) / 2 if all are equal

    The extremes are those of the tokens in hand, so call it on a whole minibatch.
    """
    if not mask.any():
        return torch.zeros_like(change)
    if mode == "exp":
        weight = (-damping(change, w_min=w_min, omega_floor=omega_floor) * change).exp().clamp(w_min, 1.0)
        return select(mask, weight)
    smallest, largest = change[mask].aminmax()
    if smallest == largest:
        return select(mask, torch.full_like(change, (w_min + w_max) / 2))
    weight = w_max - (change - smallest) * (w_max - w_min) / (largest - smallest)
    return select(mask, weight.clamp(w_min, w_max))


@token_weights
def steer(
    logprobs: Tensor,
    old_logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    mode: Literal["exp", "linear"] = "exp",
    w_min: float = 0.8,
    w_max: float = 1.2,
    omega_floor: float = 0.02,
) -> Tensor:
    """Damp tokens whose update would change the entropy most: weights in [w_min, 1], or [w_min, w_max] if linear.

    Source: STEER, arXiv 2510.10150; `entropy_change` and `steer_weights` have the formulas. `entropy` is that of the
    old policy, as the release prefers.
    """
    change = entropy_change(logprobs, old_logprobs, entropy, advantages, mask)
    return steer_weights(change, mask, mode=mode, w_min=w_min, w_max=w_max, omega_floor=omega_floor)
