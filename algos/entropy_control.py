"""Rules that look at the entropy: which tokens train, and how strongly the entropy itself is rewarded.

Entropy-SFT and TEA-RL (Light-IF), the 80/20 mask, and two adaptive entropy coefficients. `entropy` is that of the full
softmax at each position, in nats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from algos.batch import select
from algos.corrections import rejections
from algos.entropy import entropy_terms
from algos.masked import largest, masked_mean, per_token
from algos.statistics import prepares


@rejections
def entropy_top(entropy: Tensor, mask: Tensor, *, ratio: float = 0.2) -> Tensor:
    """The valid tokens of highest entropy, [B, T] bool: a loss mask (80/20 rule).

    "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning",
    arXiv 2506.01939; run against the authors' code. Keeps k = max(1, int(N ratio + 0.9999)) of the N tokens in hand.
    The authors then average over the k kept tokens, which makes the gradient per kept token 1/ratio times larger.
    """
    return largest(entropy, mask, max(1, int(int(mask.sum()) * ratio + 0.9999)))


def entropy_sft_scores(ce: Tensor, entropy: Tensor, *, entropy_coef: float = 0.8) -> Tensor:
    """How much a label token still has to teach: s = ce - coef H, detached, same shape."""
    return ce.detach() - entropy_coef * entropy.detach()


def entropy_sft_tokens(
    ce: Tensor, entropy: Tensor, mask: Tensor, *, token_ratio: float = 0.8, entropy_coef: float = 0.8
) -> Tensor:
    """Entropy-SFT: train on the k = max(int(token_ratio N), 1) label tokens with the largest score; bool, as `mask`.

    "Light-IF: Endowing LLMs with Generalizable Reasoning via Preview and Self-Checking for Complex Instruction
    Following", arXiv 2508.03178; same reference as the authors' code. Tokens with a low loss relative to their entropy
    are already learnt and left alone, which preserves entropy. `ce` cross-entropy and `entropy`, any shape; no
    gradient.
    """
    score = entropy_sft_scores(ce, entropy, entropy_coef=entropy_coef)
    return largest(score, mask, max(int(token_ratio * int(mask.sum())), 1))


@rejections
def entropy_sft(
    old_logprobs: Tensor, entropy: Tensor, mask: Tensor, *, token_ratio: float = 0.8, entropy_coef: float = 0.8
) -> Tensor:
    """`entropy_sft_tokens` of demonstrations, with ce = -l of the policy before the step."""
    ce = -select(mask, old_logprobs)
    return entropy_sft_tokens(ce, select(mask, entropy), mask, token_ratio=token_ratio, entropy_coef=entropy_coef)


def entropy_sft_loss(ce: Tensor, kept: Tensor, *, token_ratio: float = 0.8, num_items: int | None = None) -> Tensor:
    """Mean cross-entropy of the kept tokens, a scalar.

    With gradient accumulation over `num_items` label tokens: sum / max(int(num_items token_ratio), 1).
    """
    count = int(kept.sum()) if num_items is None else int(num_items * token_ratio)
    return select(kept, ce).sum() / max(count, 1)


def tea_coefficient(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    alpha: float = 10.0,
    coef_max: float = 5.0,
    grad_through_coef: bool = False,
) -> Tensor:
    """TEA-RL's entropy coefficient per token, c [B, T]; 0 at masked cells and in rows without a valid token.

        cov = (A - mean A) (lp - mean lp);   c = clip(alpha softmax_over_the_row(cov), 0, coef_max)

    Light-IF, arXiv 2508.03178; run against the authors' function (whether their runs reached it is unknown). Tokens
    with high advantage and high probability, where entropy is about to fall, get the bonus. The row softmax makes c sum
    to at most alpha per row, so long rows get little per token. c is detached (ours); `grad_through_coef` lets it carry
    gradient as released, with the means held fixed.
    """
    lp = select(mask, logprobs if grad_through_coef else logprobs.detach())
    a = per_token(advantages.detach(), mask)
    cov = (a - masked_mean(a, mask)) * (lp - masked_mean(lp, mask).detach())
    # A row without valid tokens would be a softmax over -inf only: let it see zeros, and hide them after.
    empty = ~mask.any(-1, keepdim=True)
    share = select(mask, cov).masked_fill(~mask & ~empty, -torch.inf).softmax(-1)
    return select(mask, (alpha * share).clamp(0.0, coef_max))


def tea_loss(entropy: Tensor, coefficient: Tensor, mask: Tensor) -> Tensor:
    """TEA-RL's extra term, minus the token mean of H c, a scalar; `entropy` [B, T] carries gradient."""
    return -masked_mean(select(mask, entropy) * coefficient, mask)


@entropy_terms
def tea_rl(
    entropy: Tensor, entropy_weight: Tensor, *, coef: float = 1.0, alpha: float = 10.0, coef_max: float = 5.0
) -> Tensor:
    """Entropy bonus weighted by `tea_coefficient` of the minibatch, detached; coef is ours.

    Source: TEA-RL (Light-IF), arXiv 2508.03178.
    """
    return entropy * entropy_weight.to(entropy.dtype)


@prepares(tea_rl)
def entropy_weight_of_batch(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, *, alpha: float = 10.0, coef_max: float = 5.0
) -> dict[str, Tensor]:
    """TEA-RL's coefficients."""
    return {"entropy_weight": tea_coefficient(logprobs, advantages, mask, alpha=alpha, coef_max=coef_max)}


class EntropyCoefficient:
    """Adaptive entropy coefficient: climbs while the entropy is below its target, falls otherwise.

    "Skywork Open Reasoner 1 Technical Report", arXiv 2505.22312; run against the authors' controller.

        c <- clip(c + delta if h < target else c - delta, low, high);   the loss gets -c mean(H) only while h < target
    """

    def __init__(
        self, *, target: float = 0.2, delta: float = 1e-4, low: float = 0.0, high: float = 0.005, init: float = 0.0
    ) -> None:
        self.target, self.delta, self.low, self.high = target, delta, low, high
        self.value = init
        self.enabled = False

    def update(self, entropy: float) -> float:
        """Take in the rollout policy's entropy of this step (nats); returns the coefficient to apply, 0 when off."""
        self.enabled = entropy < self.target
        self.value = min(max(self.value + (self.delta if self.enabled else -self.delta), self.low), self.high)
        return self.applied

    @property
    def applied(self) -> float:
        return self.value if self.enabled else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "enabled": self.enabled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.enabled = state["value"], state["enabled"]


class LogEntropyCoefficient:
    """Entropy coefficient as in soft actor-critic, in the form offered by LUFFY (arXiv 2504.14945), by plain descent.

        log_alpha <- log_alpha - lr (h - target) exp(log_alpha);   the loss gets -exp(log_alpha) mean(H)

    LUFFY moves log_alpha with Adam; plain descent needs no further state.
    """

    def __init__(self, *, target: float = 0.2, lr: float = 1e-2, init_alpha: float = 0.001) -> None:
        self.target, self.lr = target, lr
        self.log_alpha = math.log(init_alpha)

    def update(self, entropy: float) -> float:
        """Take in the entropy of this step (nats); returns the coefficient to apply."""
        self.log_alpha -= self.lr * (entropy - self.target) * math.exp(self.log_alpha)
        return self.applied

    @property
    def applied(self) -> float:
        return math.exp(self.log_alpha)

    def state_dict(self) -> dict[str, Any]:
        return {"log_alpha": self.log_alpha}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_alpha = state["log_alpha"]
