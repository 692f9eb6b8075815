"""Late advantages: estimators that read the detached current log-probabilities of a whole minibatch.

DRPO, DisCO, GVPO, A*-PO and FlowRL weigh a row by current scores, of its group or its own, so they are not sums over
rows of a surrogate. Their gradient is still that of REINFORCE, -A_i d log pi, with an advantage computed after the
forward pass ("late"); the value of the loss is then not theirs, which is why `drpo_objective` exists for comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algos.advantages import advantages, require_binary
from algos.advantages import group as group_advantage
from algos.batch import select
from algos.critic import WithReturns
from algos.groups import Groups
from algos.parts import Length, tokens


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid tokens of each row, [B, T] -> [B]; 0 for a row without tokens."""
    return select(mask, values).sum(1) / mask.sum(1).clamp(min=1)


@advantages
def drpo(
    logprobs: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    tau: float = 10.0,
    length_lambda: float | None = 0.1,
    max_length: Length = "max_tokens",
) -> Tensor:
    """Contrast of right and wrong rows of a group on scores s_i = mean_t log pi; rewards are 0 or 1.

    A_i = V/P omega_i / sum_+ omega for right rows, -V/P softmax_-(s / tau)_i for wrong ones, 0 in groups without both;
    omega_i = exp((1 - L_i / max_length) / length_lambda), or 1 without length_lambda (DisCO). V rows with tokens, P
    groups: the factor V makes the sequence-mean token-mean aggregation give (1/P) sum_g.
    Source: DRPO, arXiv 2510.04474; DisCO, arXiv 2505.12366.
    """
    right, wrong, omega, scores = _drpo_terms(logprobs, rewards, group, mask, length_lambda, max_length)
    largest = wrong.spread(wrong.largest(scores))
    push = select(wrong.member, ((scores - largest) / tau).clamp(min=-700)).exp()
    share = torch.where(
        right.member,
        omega / right.spread(right.sum(omega)).clamp(min=torch.finfo(omega.dtype).tiny),
        -push / wrong.spread(wrong.sum(push)).clamp(min=torch.finfo(omega.dtype).tiny),
    )
    both = right.spread(right.present & wrong.present) & (right.member | wrong.member)
    return select(both, share) * (mask.any(1).sum() / right.count)


def drpo_objective(
    logprobs: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    tau: float = 10.0,
    length_lambda: float | None = 0.1,
    max_length: Length = "max_tokens",
) -> Tensor:
    """J = (1/P) sum_g [sum_+ omega s / sum_+ omega - tau log mean_- exp(s / tau)], differentiable, to be maximised."""
    right, wrong, omega, scores = _drpo_terms(logprobs, rewards, group, mask, length_lambda, max_length)
    both = right.present & wrong.present
    pull = right.sum(omega * scores) / torch.where(both, right.sum(omega), torch.ones_like(right.size))
    top = wrong.largest(scores.detach())
    spread = wrong.sum(((scores - wrong.spread(top)) / tau).exp())
    push = top + tau * (spread / wrong.size.clamp(min=1)).clamp(min=1e-300).log()
    return select(both, pull - push).sum() / right.count


@advantages
def gvpo(
    logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor, group: Tensor, mask: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Gradient of (1 / (2 (n-1))) sum_i (u_i - mean u - (R_i - mean R))^2, u_i = beta sum_t (log pi - log old).

    A_i = V/P beta / (n-1) ((R_i - mean R) - (u_i - mean u)): averaged over P groups, for the sequence-mean token-sum
    aggregation over V rows. n = 1: 0. Source: GVPO, arXiv 2504.19599.
    """
    groups = Groups.of(group, rewards)
    moved = beta * (select(mask, logprobs) - select(mask, old_logprobs)).sum(1).double()
    error = (rewards - groups.spread(groups.mean(rewards))) - (moved - groups.spread(groups.mean(moved)))
    factor = beta / groups.spread(groups.size - 1).clamp(min=1) * (mask.any(1).sum() / groups.count)
    return select(groups.spread(groups.size > 1), error * factor)


@advantages
def a_star(
    logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, baselines: Tensor, mask: Tensor, *, beta: float = 1e-3
) -> Tensor:
    """Gradient of (beta sum_t (log pi - log ref) - (R - V*))^2, V* = `baselines` from reference samples made before.

    A_i = 2 beta ((R_i - V*_i) - beta sum_t (log pi - log ref)). Source: A*-PO, arXiv 2505.20686.
    """
    moved = (select(mask, logprobs) - select(mask, ref_logprobs)).sum(1).double()
    return 2 * beta * ((rewards - baselines) - beta * moved)


@advantages
def flow_rl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    group: Tensor,
    lengths: Tensor,
    mask: Tensor,
    *,
    beta: float = 15.0,
    weight_cap: float = 10.0,
    eps: float = 1e-6,
) -> WithReturns:
    """Gradient of w (log Z(x) + mean_t l - beta a - mean_t f)^2: the policy samples in proportion to exp(beta a).

    a: the group-normalised reward; w = min(exp(sum_t (l - old)), weight_cap); log Z: the critic's value at the first
    token, which sees the prompt alone, and whose target is what would make the bracket 0. A_i = -2 w times the bracket,
    with log Z as it was before the step. Source: FlowRL, arXiv 2509.15207.
    """
    first = mask & (mask.cumsum(1) == 1)
    log_z = select(first, values).double().sum(1)
    wanted = beta * group_advantage(rewards, group, lengths, eps=eps) + row_mean(ref_logprobs, mask).double()
    error = log_z + row_mean(logprobs, mask).double() - wanted
    moved = (select(mask, logprobs) - select(mask, old_logprobs)).double().sum(1).clamp(-20, 20)
    target = torch.where(first, (log_z - error)[:, None], select(mask, values).double())
    return WithReturns(-2 * moved.exp().clamp(max=weight_cap) * error, target)


def optimal_value(rewards: Tensor, *, beta: float = 0.5) -> Tensor:
    """V* = beta log mean_j exp(R_j / beta) over reference samples, [P, N] -> [P] (A*-PO)."""
    return beta * (torch.logsumexp(rewards / beta, dim=1) - torch.log(rewards.new_tensor(rewards.shape[1])))


def _drpo_terms(
    logprobs: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    length_lambda: float | None,
    max_length: Length,
) -> tuple[Groups, Groups, Tensor, Tensor]:
    """Right rows, wrong rows, omega [B] and scores [B]. Rows without tokens count neither as right nor as wrong."""
    groups = Groups.of(group, require_binary(rewards, "drpo"))
    lengths = mask.sum(1)
    right = Groups(groups.index, groups.member & (rewards == 1) & (lengths > 0), groups.count)
    wrong = Groups(groups.index, groups.member & (rewards == 0) & (lengths > 0), groups.count)
    omega = torch.ones_like(rewards, dtype=torch.float64)
    if length_lambda is not None:
        omega = ((1 - lengths.double() / tokens(max_length)) / length_lambda).clamp(-700, 700).exp()
    return right, wrong, omega, row_mean(logprobs, mask).double()
