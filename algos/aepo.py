"""AEPO: hold the entropy at a target by reinforcing correct samples drawn hotter or colder.

"Arbitrary Entropy Policy Optimization: Entropy Is Controllable in Reinforcement Fine-tuning", arXiv 2510.08141. Read
from the authors' code. Sampling hotter and reinforcing what is correct raises the entropy; sampling colder lowers it.
Per step: estimate the entropy, choose the temperature, sample a second batch of the first quarter of the prompts at it,
and put its good rows, with advantage 1, in place of ordinary ones. Those rows never get a sampler correction: their
`old_logprobs` are recomputed at temperature 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from algos.advantages import advantages as estimators
from algos.advantages import group as group_advantage
from algos.batch import select
from algos.masked import masked_mean, per_token


def entropy_estimate(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Entropy in nats from the sampled tokens alone: minus the masked mean of their log-probs [B, T], a scalar."""
    return -masked_mean(logprobs.detach(), mask)


class EntropyAverage:
    """Exponential average of the entropy estimate, 0 before the first one (so the first step samples hot).

    `momentum` 0 is the release; 0.9 is our recommendation, because single estimates are noisy.
    """

    def __init__(self, *, momentum: float = 0.0) -> None:
        self.momentum = momentum
        self.value = 0.0
        self.seen = False

    def update(self, estimate: float) -> float:
        """Take in this step's estimate and return the average; the first estimate starts it."""
        self.value = self.momentum * self.value + (1 - self.momentum) * estimate if self.seen else estimate
        self.seen = True
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.seen = state["value"], state["seen"]


def sampling_temperature(
    entropy: float, *, entropy_target: float = 0.5, t_high: float = 1.2, t_low: float = 0.8
) -> float:
    """Temperature of the regularisation batch: `t_high` at or below the target entropy, else `t_low`."""
    return t_high if entropy <= entropy_target else t_low


class MixedBatch(NamedTuple):
    """Which rows train. The batch is the regularisation rows `selected`, then the ordinary rows `kept`, in order."""

    selected: Tensor  # [n] rows of the regularisation batch
    kept: Tensor  # [B - n] rows of the ordinary batch
    advantages: Tensor  # [B]: 1 for the selected rows, then the ordinary advantages
    weight: Tensor  # [B] row weight: alpha for the selected rows, 1 for the others


def good_rows(regularisation_advantage: Tensor, *, adv_threshold: float = 0.05) -> Tensor:
    """Rows of the regularisation batch whose advantage [m] exceeds the threshold, in order."""
    return (regularisation_advantage > adv_threshold).nonzero().flatten()


def mixed_batch(
    entropy: float,
    regularisation_advantage: Tensor,
    advantages: Tensor,
    *,
    entropy_target: float = 0.5,
    adv_threshold: float = 0.05,
    reg_samples: int = 60,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> MixedBatch:
    """Put good rows of the regularisation batch [m] in place of ordinary rows [B]; the size stays B.

    Good rows have an advantage above `adv_threshold`; at most `reg_samples` of them are taken, half as many while the
    entropy is above its target. With a `generator` the replaced rows are drawn at random (ours), else they are the
    first n, as released. `alpha` weighs the taken rows (ours; 1 is the release). No good row: the ordinary batch (the
    release fails).
    """
    good = good_rows(regularisation_advantage, adv_threshold=adv_threshold)
    count = min(reg_samples, len(good))
    count = min(count // 2 if entropy > entropy_target else count, len(advantages))
    order = torch.arange(len(advantages)) if generator is None else torch.randperm(len(advantages), generator=generator)
    kept = order[count:].sort().values.to(advantages.device)
    ones = advantages.new_ones(count)
    return MixedBatch(
        selected=good[:count],
        kept=kept,
        advantages=torch.cat([ones, advantages[kept]]),
        weight=torch.cat([ones * alpha, torch.ones_like(advantages[kept])]),
    )


def mixing_share(
    entropy: float, score: Tensor, *, entropy_target: float = 0.5, score_threshold: float = 0.05, alpha_cap: float = 0.1
) -> Tensor:
    """The share alpha of the mixed-advantage form, a scalar: a0 / (1 + a0), a0 = min(|target - h|, cap) / f.

    f is the share of rows whose `score` [B] exceeds `score_threshold`; none: alpha = 0 (ours; the release divides by
    zero).
    """
    good = (score > score_threshold).to(score.dtype).sum() / max(len(score), 1)
    a0 = min(abs(entropy_target - entropy), alpha_cap) / good
    return torch.where(good > 0, a0 / (1 + a0), torch.zeros_like(good))


def mixed_advantage(
    alpha: Tensor | float,
    score: Tensor,
    advantages: Tensor,
    tempered_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    score_threshold: float = 0.05,
) -> Tensor:
    """Mixed-advantage form, without extra rollouts: A' = (1 - alpha) A + alpha good exp(lp_T - lp_1), [B, T], detached.

    `tempered_logprobs`, `old_logprobs` [B, T]: the old policy's log-probs of the ordinary tokens at temperatures T and
    1; `score`, `advantages` [B]; good_i = 1 where the score exceeds `score_threshold`.
    """
    good = per_token((score > score_threshold).to(old_logprobs.dtype), mask)
    tempered = select(mask, tempered_logprobs - old_logprobs).exp()
    return select(mask, (1 - alpha) * per_token(advantages, mask) + alpha * good * tempered).detach()


@estimators
def aepo(
    rewards: Tensor,
    group: Tensor,
    lengths: Tensor,
    tempered_logprobs: Tensor,
    old_logprobs: Tensor,
    entropy_average: float,
    entropy_target: float,
    mask: Tensor,
    *,
    alpha_cap: float = 0.1,
    score_threshold: float = 0.05,
    eps: float = 1e-6,
) -> Tensor:
    """A' = (1 - alpha) A + alpha good exp(l_T - l): A that of GRPO, good where R > score_threshold.

    alpha is `mixing_share`. Good rows are reinforced as if they had been drawn at `tempering` times the temperature:
    hotter where the entropy is below its target. Source: AEPO, arXiv 2510.08141.
    """
    score, old = rewards.nan_to_num(), old_logprobs.double()
    alpha = mixing_share(
        entropy_average,
        score[~torch.isnan(rewards)],
        entropy_target=entropy_target,
        score_threshold=score_threshold,
        alpha_cap=alpha_cap,
    )
    plain = group_advantage(rewards, group, lengths, eps=eps).nan_to_num()
    return mixed_advantage(alpha, score, plain, tempered_logprobs.double(), old, mask, score_threshold=score_threshold)
