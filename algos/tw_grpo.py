"""TW-GRPO: weigh the positions at which the completions of a group disagree.

"Reinforcing Video Reasoning with Focused Thinking", arXiv 2505.24718. The weights were run against the authors' code.
The divergence needs the full log-softmax, V numbers per token: compute it in chunks over T and keep only [P, T].
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from algos.batch import select
from algos.groups import Groups
from algos.token_weights import token_weights


def group_divergence(logprobs: Tensor, mask: Tensor, *, present_only: bool = False) -> Tensor:
    """How far the next-token distributions of a group are apart at each position, D [P, T].

        q~ = q where valid, else the uniform -ln V;   qbar = mean_g q~;   x = clip(qbar - q~, -11, 11)
        D[p, t] = mean_g sum_v (exp(x) - x - 1)

    `logprobs` [P, G, T, V] log-softmax, `mask` [P, G, T]. Positions stand alone, so T may be any chunk of the columns.
    It is a sum over the vocabulary that is not weighted by probability, hence not a KL divergence. As released, a row
    that has ended counts as uniform, so columns that few rows reach get a large D; `present_only` (ours) leaves such
    rows out.
    """
    valid = mask.unsqueeze(-1)
    q = torch.where(valid, logprobs, torch.full_like(logprobs, -math.log(logprobs.shape[-1])))
    if present_only:
        rows = mask.sum(1).clamp(min=1)  # [P, T]
        centre = torch.where(valid, q, torch.zeros_like(q)).sum(1) / rows.unsqueeze(-1)
    else:
        centre = q.mean(1)
    x = (centre.unsqueeze(1) - q).clamp(-11.0, 11.0)
    pointwise = (x.exp() - x - 1).sum(-1)  # [P, G, T]
    return (pointwise * mask).sum(1) / rows if present_only else pointwise.mean(1)


def divergence_weights(divergence: Tensor, *, alpha: float = 1.7, detach: bool = True) -> Tensor:
    """Position weights w = 1 + (alpha - 1) n in [1, alpha], [P, T], shared by the rows of a group.

    n = (D - min D) / (max D - min D + 1e-8), the extremes over all columns of the group, padding included. Detached
    (ours); `detach` false lets gradient run through w, as released. The authors run 1.7 (their class default is 1.4).
    """
    d = divergence.detach() if detach else divergence
    return _stretched(d, d.amin(-1, keepdim=True), d.amax(-1, keepdim=True), alpha)


def _stretched(d: Tensor, low: Tensor, high: Tensor, alpha: float) -> Tensor:
    return 1 + (alpha - 1) * (d - low) / (high - low + 1e-8)


@token_weights
def tw_grpo(divergence: Tensor, group: Tensor, mask: Tensor, *, alpha: float = 1.7) -> Tensor:
    """1 + (alpha - 1) (D - min D) / (max D - min D + 1e-8), [B, T], the extremes over the positions of the group.

    D is that of the policy before the step. Source: TW-GRPO, arXiv 2505.24718 (there over all padded columns).
    """
    spread = divergence.double()
    rows = Groups.of(group, torch.where(mask.any(1), 0.0, torch.nan))
    low = rows.spread(rows.smallest(spread.masked_fill(~mask, torch.inf).amin(1)))[:, None]
    high = rows.spread(rows.largest(spread.masked_fill(~mask, -torch.inf).amax(1)))[:, None]
    return select(mask, _stretched(spread, low, high, alpha))


def multi_choice_soft_reward(answer: Collection[str], truth: Collection[str]) -> float:
    """Credit for some right choices Y of Z and no wrong one: |Y| / |Z| if Y is a non-empty subset of Z, else 0."""
    chosen, right = set(answer), set(truth)
    return len(chosen) / len(right) if chosen and chosen <= right else 0.0
