"""The trust-region rules: per-token loss Z [B, T] from a ratio, an advantage and the current log-probability.

In every case dZ/dl = -A W(rho, sign A) per unit of d log rho / dl, so a rule is its weight function W. Two families:
`ratio`, `ppo_clip`, `sapo`, `log_clip`, `nft` differentiate rho; the others detach W: Z = -sg(W) A l, whose *value*
means nothing. A = 0 gives Z = 0 everywhere. Inputs hold 0 at masked cells and exponents are clamped by then.

A rule that bounds has a companion in `bounds`, which says where the lower and the upper bound act, for the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from core.registry import Registry

surrogates = Registry("surrogate")
bounds: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
"""Surrogate -> cells [B, T] where its lower and where its upper bound acts; same options as the surrogate."""


def clip(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """x kept in [low, high]; none is no bound."""
    if low is not None:
        x = x.clamp(min=low)
    return x if high is None else x.clamp(max=high)


def _below(low: float | None) -> float | None:
    return None if low is None else 1 - low


def _above(high: float | None) -> float | None:
    return None if high is None else 1 + high


@surrogates
def ratio_(ratio: Tensor, advantages: Tensor) -> Tensor:
    """Z = -rho A. W = rho."""
    return -ratio * advantages


@surrogates
def ppo_clip(
    ratio: Tensor,
    advantages: Tensor,
    *,
    low: float | None = 0.2,
    high: float | None = 0.2,
    dual: float | None = None,
) -> Tensor:
    """Z = -min(rho A, clip(rho, 1-low, 1+high) A); where A < 0 and dual is set: at most -dual A.

    W = rho where unclipped, else 0. dual > 1 + high; the upper bound of a "two-sided" clip is the same number.
    Source: PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; two-sided, arXiv 2505.07291; clip-higher, DAPO.
    """
    loss = -torch.minimum(ratio * advantages, clip(ratio, _below(low), _above(high)) * advantages)
    if dual is None:
        return loss
    cap = -dual * advantages
    return torch.where((advantages < 0) & (loss > cap), cap, loss)


def ppo_clip_bounds(
    ratio: Tensor, advantages: Tensor, low: float | None, high: float | None, dual: float | None
) -> tuple[Tensor, Tensor]:
    """Where A < 0 and rho < 1 - low; where A > 0 and rho > 1 + high, or A < 0 and rho > dual."""
    lower = (advantages < 0) & _less(ratio, _below(low))
    return lower, ((advantages > 0) & _more(ratio, _above(high))) | ((advantages < 0) & _more(ratio, dual))


bounds["ppo_clip"] = ppo_clip_bounds


@surrogates
def sapo(ratio: Tensor, advantages: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """Z = -(4 / tau) sigmoid(tau (rho - 1)) A, tau = tau_pos where A > 0, else tau_neg.

    W = 4 p (1 - p) rho with p = sigmoid(tau (rho - 1)): 1 at rho = 1, fading on both sides; a larger tau is tighter.
    Source: "Soft Adaptive Policy Optimization", arXiv 2511.20347.
    """
    tau = _choose(advantages > 0, tau_pos, tau_neg, ratio)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages


@surrogates
def log_clip(delta: Tensor, advantages: Tensor, mask: Tensor, *, low: float = 0.4, high: float = 0.4) -> Tensor:
    """Z = -A exp(mean_t dhat): geometric mean of token ratios, each clipped in log space before the mean (GMPO).

    dhat = min(delta, high) where A > 0, max(delta, -low) where A <= 0. It has its own ratio: `ratio` is not read.
    W = rho_i / L_i on tokens that were not replaced, 0 on the others. Source: arXiv 2507.20673.
    """
    replaced = torch.where(advantages > 0, delta.clamp(max=high), delta.clamp(min=-low))
    mean = replaced.mul(mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return -advantages * mean.clamp(-20, 20).exp()


def log_clip_bounds(delta: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where a token's log-ratio was replaced."""
    return (advantages < 0) & (delta < -low), (advantages > 0) & (delta > high)


bounds["log_clip"] = log_clip_bounds


@surrogates
def nft(
    delta: Tensor,
    advantages: Tensor,
    pass_rate: Tensor,
    *,
    prompt_weight: Literal[0, 1, 2] = 1,
    neg_weight: float = 1.0,
    neg_floor: float = 1.0,
) -> Tensor:
    """Likelihood of right rows (A = +1) and of an implicit negative policy on wrong rows (A = -1); r the pass rate.

    d = min(delta, 10), rho = exp d. Right: Z = -omega d. Wrong: Z = -omega neg_weight log y, y the value
    max(x, neg_floor) with the gradient of x = (1 - r rho) / (1 - r). r is clamped to [0.02, 0.98].
    omega by prompt_weight: 0: 1; 1: 1 - r; 2: sqrt((1 - r) / r). Source: arXiv 2505.18116.
    """
    rate = pass_rate[:, None].clamp(0.02, 0.98).to(delta.dtype)
    omega = (torch.ones_like(rate), 1 - rate, ((1 - rate) / rate).sqrt())[prompt_weight]
    moved = delta.clamp(max=10)
    implicit = (1 - rate * moved.clamp(min=-20).exp()) / (1 - rate)
    floored = implicit + (implicit.clamp(min=neg_floor) - implicit).detach()
    wrong = -omega * neg_weight * floored.log()
    return torch.where(advantages > 0, -omega * moved, torch.where(advantages < 0, wrong, torch.zeros_like(delta)))


@surrogates
def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Z = -A l. W = 1. Source: REINFORCE (Williams, 1992)."""
    return -advantages * logprobs


@surrogates
def cispo(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    *,
    low: float | None = None,
    high: float | None = 4.0,
) -> Tensor:
    """Z = -sg(clip(rho, 1-low, 1+high)) A l: every token keeps a gradient, only its weight is bounded.

    low and high are offsets from 1 (an absolute cap of 5 is high = 4). Source: MiniMax-M1, arXiv 2506.13585.
    """
    return -clip(ratio.detach(), _below(low), _above(high)) * advantages * logprobs


def cispo_bounds(ratio: Tensor, advantages: Tensor, low: float | None, high: float | None) -> tuple[Tensor, Tensor]:
    """Where the weight is capped, whatever the sign of A."""
    return (advantages != 0) & _less(ratio, _below(low)), (advantages != 0) & _more(ratio, _above(high))


bounds["cispo"] = cispo_bounds


@surrogates
def topr(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    *,
    pos: tuple[float | None, float | None] = (1.0, 1.0),
    neg: tuple[float | None, float | None] = (0.0, 1.0),
) -> Tensor:
    """Z = -sg(W) A l, W = clip(rho, *pos) where A >= 0, clip(rho, *neg) where A < 0.

    By default positives are plain likelihood and negatives fade once the policy has become unlikely to produce them.
    Source: "Tapered Off-Policy REINFORCE", arXiv 2503.14286.
    """
    rho = ratio.detach()
    return -torch.where(advantages >= 0, clip(rho, *pos), clip(rho, *neg)) * advantages * logprobs


@surrogates
def vespo(
    delta: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    correction_weight: Tensor,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """Z = -sg(exp(lam + k x - lam exp x)) A l, x the log ratio of the completion, (k, lam) by the sign of A.

    x = clip(sum_t clip(delta, -20, 20), log 1e-8, 20). Logs of off-policy correction weights are added to the sum
    instead of multiplying Z. W is 1 at ratio 1, peaks at k / lam and fades at both ends. Source: arXiv 2602.10693.
    """
    floor = math.log(1e-8)
    mismatch = correction_weight.to(delta.dtype).log().clamp(floor, 20)
    if mismatch.shape[1] == mask.shape[1]:  # one weight per token; else one per row, which counts once
        mismatch = mismatch.mul(mask).sum(1, keepdim=True)
    x = (delta.detach().clamp(-20, 20).sum(1, keepdim=True) + mismatch).clamp(floor, 20)
    k = _choose(advantages >= 0, k_pos, k_neg, x)
    lam = _choose(advantages >= 0, lambda_pos, lambda_neg, x)
    weight = torch.nan_to_num((lam + k * x - lam * x.exp()).exp(), nan=0.0, posinf=0.0)
    return -weight * advantages * logprobs


@surrogates
def dppo_tv(
    ratio: Tensor,
    logprobs: Tensor,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> Tensor:
    """Z = -sg(min(rho, cap)) A l, or 0 where the probability p of the sampled token has moved too far from q.

    Dropped: A > 0 and p - q > high, or A <= 0 and q - p > low. Rare tokens may move by a large factor, frequent ones
    may not. Source: DPPO, arXiv 2602.04879.
    """
    lower, upper = dppo_tv_bounds(logprobs, anchor_logprobs, advantages, low, high)
    weight = ratio.detach().clamp(max=cap)
    return -torch.where(lower | upper, torch.zeros_like(weight), weight) * advantages * logprobs


def dppo_tv_bounds(
    logprobs: Tensor, anchor_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Where the total variation test fails."""
    moved = logprobs.detach().clamp(max=0).exp() - anchor_logprobs.clamp(max=0).exp()
    return (advantages <= 0) & (-moved > low), (advantages > 0) & (moved > high)


bounds["dppo_tv"] = dppo_tv_bounds


@surrogates
def dppo_kl(
    ratio: Tensor,
    logprobs: Tensor,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> Tensor:
    """As dppo_tv with the binary KL D = q log(q/p) + (1-q) log((1-q)/(1-p)) as the test.

    Dropped: A > 0, p > q and D > high, or A <= 0, p < q and D > low. Source: DPPO, arXiv 2602.04879.
    """
    lower, upper = dppo_kl_bounds(logprobs, anchor_logprobs, advantages, low, high)
    weight = ratio.detach().clamp(max=cap)
    return -torch.where(lower | upper, torch.zeros_like(weight), weight) * advantages * logprobs


def dppo_kl_bounds(
    logprobs: Tensor, anchor_logprobs: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Where the binary KL test fails."""
    log_p, log_q = logprobs.detach().clamp(max=0), anchor_logprobs.clamp(max=0)
    p, q = log_p.exp(), log_q.exp()
    distance = q * (log_q - log_p) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return (advantages <= 0) & (distance > low) & (p < q), (advantages > 0) & (distance > high) & (p > q)


bounds["dppo_kl"] = dppo_kl_bounds


@surrogates
def dro(delta: Tensor, logprobs: Tensor, advantages: Tensor, *, beta: float = 0.5) -> Tensor:
    """Z = -A l + (beta / 2) delta^2: a quadratic pull to the anchor instead of a clip.

    Source: "Offline Regularised RL for LLM Alignment", arXiv 2405.19107; verl.
    """
    return -advantages * logprobs + beta / 2 * delta**2


@surrogates
def sign_split(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Z = -A l where A > 0; -A exp(l - sg l) elsewhere: likelihood on right rows, a ratio of value 1 on wrong ones.

    W = 1. Source: OREAL, arXiv 2502.06781.
    """
    return torch.where(advantages > 0, -advantages * logprobs, -advantages * (logprobs - logprobs.detach()).exp())


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers per cell, in the precision of `like` (two bare numbers would be float32)."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def _less(x: Tensor, bound: float | None) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool) if bound is None else x < bound


def _more(x: Tensor, bound: float | None) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool) if bound is None else x > bound
