"""Losses on pairs of a chosen and a rejected completion, as rows: late advantages with the gradient of the loss.

A group holds two rows, the chosen one with the higher reward. The gradient of a pair's loss with respect to the two
sums of log-probabilities, g, is that of REINFORCE with A = -(V / P) g, V rows and P groups, under the sequence-mean
token-sum aggregation. The value of the loss is not the pair's; `preference/*` says how the pairs stand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from algos import preference
from algos.advantages import advantages
from algos.batch import Metrics, select
from algos.groups import Groups
from algos.metrics import mean_over
from algos.statistics import prepares

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""(sums of the chosen rows, of the rejected rows), beyond the reference where there is one, [P] each -> loss [P]."""


@advantages
def dpo(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_average: bool = False,
) -> Tensor:
    """Gradient of -(1 - s) log sigmoid(beta z) - s log sigmoid(-beta z), z = (lw - ll) - (rw - rl), mean over groups.

    lw, ll: sums of log-probabilities of chosen and rejected (means with length_average); rw, rl those of the reference.
    Source: DPO, arXiv 2305.18290.
    """

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference.dpo(chosen - rejected, beta=beta, label_smoothing=label_smoothing)

    return _advantage(loss, logprobs, ref_logprobs, rewards, group, mask, length_average)


@advantages
def ipo(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.1,
    length_average: bool = False,
) -> Tensor:
    """Gradient of (z - 1 / (2 beta))^2, z as in `dpo`, mean over groups. Source: IPO, arXiv 2310.12036."""

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference.ipo(chosen - rejected, beta=beta)

    return _advantage(loss, logprobs, ref_logprobs, rewards, group, mask, length_average)


@advantages
def simpo(
    logprobs: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    hinge: bool = False,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """Gradient of -log sigmoid(beta (lw/|yw| - ll/|yl| - gamma_beta_ratio)), mean over groups; no reference.

    hinge: max(0, 1 - beta (...)) instead; sft_weight adds -sft_weight lw/|yw|. Source: SimPO, arXiv 2405.14734.
    """

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference.simpo(
            chosen,
            rejected,
            beta=beta,
            gamma_beta_ratio=gamma_beta_ratio,
            hinge=hinge,
            label_smoothing=label_smoothing,
            sft_weight=sft_weight,
        )

    return _advantage(loss, logprobs, None, rewards, group, mask, length_average=True)


@advantages
def redi(
    logprobs: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    alpha: float = 0.8,
    chosen_coef: float = 1.0,
    gamma: float = 0.0,
) -> Tensor:
    """Gradient of -chosen_coef lw/|yw| + alpha ll/|yl| for a right and a wrong trace, mean over groups; no reference.

    gamma multiplies the second term by exp(gamma ll/|yl|). Source: REDI, arXiv 2505.24850.
    """

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference.redi(chosen, rejected, alpha=alpha, chosen_coef=chosen_coef, gamma=gamma)

    return _advantage(loss, logprobs, None, rewards, group, mask, length_average=True)


def _advantage(
    loss: PairLoss,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    length_average: bool,
) -> Tensor:
    """A [B] = -(V / P) d (sum of the pair losses) / d (sum of the row's log-probs); 0 for a row without a partner."""
    scores = _scores(logprobs, ref_logprobs, mask, length_average)
    chosen, rejected = _sides(rewards, group, mask)
    out = torch.zeros_like(scores)
    if not len(chosen):
        return out
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf[chosen], leaf[rejected]).sum(), leaf)
    per_sum = mask.sum(1).clamp(min=1) if length_average else 1
    return -gradient / per_sum * (mask.any(1).sum() / len(group.unique()))


def _scores(logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, length_average: bool) -> Tensor:
    """Sums [B] of log-probabilities, beyond the reference's; means over tokens with length_average."""
    sums = select(mask, logprobs).double().sum(1)
    if ref_logprobs is not None:
        sums = sums - select(mask, ref_logprobs).double().sum(1)
    return sums / mask.sum(1).clamp(min=1) if length_average else sums


def _sides(rewards: Tensor, group: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the chosen and of the rejected completion of each whole pair, [pairs] each, by increasing group id.

    A pair that ties, lacks a side or has a side without tokens is none.
    """
    groups = Groups.of(group, torch.where(mask.any(1), rewards, torch.nan))
    best, worst = groups.spread(groups.largest(rewards)), groups.spread(groups.smallest(rewards))
    whole = groups.member & groups.spread(groups.size == 2) & (best > worst)
    order = group.argsort(stable=True)
    return order[(whole & (rewards == best))[order]], order[(whole & (rewards == worst))[order]]


@prepares(dpo)
@prepares(ipo)
def margin_beyond_reference(
    logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, group: Tensor, mask: Tensor, metrics: Metrics
) -> dict[str, Metrics]:
    """What to watch: a growing margin can hide a falling chosen completion."""
    return {"metrics": {**metrics, **_watched(_scores(logprobs, ref_logprobs, mask, False), rewards, group, mask)}}


@prepares(simpo)
@prepares(redi)
def margin_per_token(
    logprobs: Tensor, rewards: Tensor, group: Tensor, mask: Tensor, metrics: Metrics
) -> dict[str, Metrics]:
    """The same of means over tokens, without a reference."""
    return {"metrics": {**metrics, **_watched(_scores(logprobs, None, mask, True), rewards, group, mask)}}


def _watched(scores: Tensor, rewards: Tensor, group: Tensor, mask: Tensor) -> Metrics:
    chosen, rejected = _sides(rewards, group, mask)
    margin, every = scores[chosen] - scores[rejected], torch.ones(len(chosen), dtype=torch.bool, device=scores.device)
    return {
        "preference/margin": mean_over(margin, every),
        "preference/accuracy": mean_over((margin > 0).double(), every),
        "preference/chosen": mean_over(scores[chosen], every),
        "preference/rejected": mean_over(scores[rejected], every),
    }
