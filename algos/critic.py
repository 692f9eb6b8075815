"""Credit per token: returns, generalised advantages, V-trace, the optimal token baseline; and the value loss.

All recursions run over the valid tokens of a row in order. Masked positions are skipped: they neither break the
recursion nor consume a discount factor. After the last valid token the value is 0 (or `bootstrap`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from algos.advantages import advantages
from algos.batch import select
from algos.groups import Groups
from core.registry import Registry

value_losses = Registry("value loss")


def outcome_at_end(rewards: Tensor, mask: Tensor) -> Tensor:
    """Token rewards [B, T]: the outcome [B] on the last valid token of its row, 0 elsewhere."""
    position = mask.cumsum(1)
    last = mask & (position == position[:, -1:])
    return select(last, rewards[:, None].expand(mask.shape))


def returns_to_go(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_(next valid), [B, T]; 0 at masked positions."""
    rewards = select(mask, token_rewards)
    if gamma == 1:
        return select(mask, rewards.flip(1).cumsum(1).flip(1))
    running, out = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards)
    for t in reversed(range(mask.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] + gamma * running, running)
        out[:, t] = running
    return select(mask, out)


@advantages
def returns(token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """A_t = sum of the discounted token rewards from t on. Source: REINFORCE++, arXiv 2501.03262."""
    return returns_to_go(token_rewards, mask, gamma)


@advantages
def greedy_baseline(
    token_rewards: Tensor,
    rewards: Tensor,
    greedy_rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    kl_horizon: Literal["to_go", "one_step"] = "to_go",
) -> Tensor:
    """A_t = R - R(greedy completion) + KL part: the penalties from t on (to_go), or the token's own (one_step).

    to_go is the policy gradient of the penalised return; one_step is the authors' code.
    Source: ReMax, arXiv 2310.10505.
    """
    if kl_horizon == "to_go":
        return select(mask, returns_to_go(token_rewards, mask, gamma) - greedy_rewards[:, None])
    penalty = token_rewards - outcome_at_end(rewards, mask)
    return select(mask, (rewards - greedy_rewards)[:, None] + penalty)


class WithReturns(NamedTuple):
    """What an estimator with a critic gives: advantages and the targets of the value loss, both [B, T]."""

    advantages: Tensor
    returns: Tensor


@advantages
def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0) -> WithReturns:
    """Generalised advantages: delta_t = r_t + gamma V_(t+1) - V_t; A_t = delta_t + gamma lam A_(t+1).

    The critic's targets are A + V. A truncated row is not bootstrapped. Source: arXiv 1506.02438.
    """
    rewards, values = select(mask, token_rewards), select(mask, values).to(token_rewards.dtype)
    zero = torch.zeros_like(rewards[:, 0])
    advantage, next_value, out = zero, zero, torch.zeros_like(rewards)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        out[:, t] = advantage
    return WithReturns(select(mask, out), select(mask, out + values))


@advantages
def otb(
    token_rewards: Tensor,
    old_logprobs: Tensor,
    sum_pi_sq: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    eps: float = 1e-8,
    handle_zero_tail: bool = True,
) -> Tensor:
    """Optimal token baseline: A_ik = G_ik - sum_j G_jk w_jk / (sum_j w_jk + eps) over rows that have a k-th token.

    w_ik = sum over s <= k of (1 - 2 pi_is + sum_v pi_isv^2), the squared norm of the score at the logits. A k-th token
    without peers has baseline 0 (handle_zero_tail). Source: verl's optimal_token_baseline.
    """
    scored = ~torch.isnan(select(mask, token_rewards)).any(1)  # an unscorable row is no peer
    mask = mask & scored[:, None]
    go = returns_to_go(token_rewards, mask, gamma)
    energy = select(mask, 1 - 2 * select(mask, old_logprobs).double().exp() + select(mask, sum_pi_sq)).cumsum(1)
    groups = Groups.of(group, torch.zeros_like(go[:, 0]))
    # One cell per (group, k): k counts valid tokens only.
    cell = groups.index[:, None] * mask.shape[1] + (mask.cumsum(1) - 1).clamp(min=0)
    cells = groups.count * mask.shape[1]
    zeros = torch.zeros(cells, dtype=go.dtype, device=go.device)
    weighted = zeros.index_add(0, cell[mask], (go * energy)[mask])
    weight = zeros.index_add(0, cell[mask], energy[mask].to(go.dtype))
    peers = zeros.index_add(0, cell[mask], torch.ones_like(go)[mask])
    lonely = (peers[cell] <= 1) & (handle_zero_tail | groups.spread(groups.size == 1)[:, None])
    baseline = torch.where(lonely, torch.zeros_like(go), (weighted / (weight + eps))[cell])
    return select(mask, go - baseline)


def vtrace_targets(
    log_ratio: Tensor,
    token_rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Value targets v and policy advantages, both [B, T], from log_ratio = log pi - log mu [B, T], detached.

    v_t = V_t + delta_t + gamma c_t (v_(t+1) - V_(t+1)),  delta_t = min(rho, rho_bar) (r_t + gamma V_(t+1) - V_t),
    A_t = min(rho_t, pg_rho_bar) (r_t + gamma v_(t+1) - V_t),  c_t = lam min(rho, c_bar).
    Raises ValueError if c_bar > rho_bar. Source: IMPALA, arXiv 1802.01561.
    """
    if c_bar > rho_bar:
        raise ValueError(f"vtrace: c_bar {c_bar} must not exceed rho_bar {rho_bar}")
    rewards, values = select(mask, token_rewards), select(mask, values).to(token_rewards.dtype)
    rho = select(mask, log_ratio).detach().to(rewards.dtype).clamp(-20, 20).exp()
    next_value = next_target = bootstrap.to(rewards.dtype)
    targets, advantage = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for t in reversed(range(mask.shape[1])):
        r, v, ratio, valid = rewards[:, t], values[:, t], rho[:, t], mask[:, t]
        delta = ratio.clamp(max=rho_bar) * (r + gamma * next_value - v)
        target = v + delta + gamma * lam * ratio.clamp(max=c_bar) * (next_target - next_value)
        advantage[:, t] = ratio.clamp(max=pg_rho_bar) * (r + gamma * next_target - v)
        targets[:, t] = target
        next_target, next_value = torch.where(valid, target, next_target), torch.where(valid, v, next_value)
    return select(mask, targets), select(mask, advantage)


@advantages
def vtrace(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    token_rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float = 1.0,
) -> WithReturns:
    """V-trace advantages and targets from the current log-probabilities; see `vtrace_targets`."""
    log_ratio = select(mask, logprobs) - select(mask, behaviour_logprobs)
    bounds = {"rho_bar": rho_bar, "c_bar": c_bar, "pg_rho_bar": pg_rho_bar}
    targets, advantage = vtrace_targets(
        log_ratio, token_rewards, values, bootstrap, mask, gamma=gamma, lam=lam, **bounds
    )
    return WithReturns(advantage, targets)


@value_losses
def squared(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.5, coef: float = 1.0
) -> Tensor:
    """Per-token value loss 0.5 max((v - ret)^2, (clip(v, v_old - c, v_old + c) - ret)^2), [B, T]; no clip: the first.

    Only v has a gradient; it is 0 where the clipped error is the larger. `coef` is applied by the composition.
    Source: PPO, arXiv 1707.06347; verl, OpenRLHF.
    """
    error = (values - returns) ** 2
    if clip is not None:
        near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        clipped = (near - returns) ** 2
        error = torch.where(clipped > error, clipped, error)
    return 0.5 * error
