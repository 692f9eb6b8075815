"""What a method remembers from step to step: running estimates of prompts, adaptive coefficients.

    @remembers("baselines")
    def beta_tracker(state, totals, prompts, *, decay: float = 0.875): return {"baselines": ...}, new_state

A memory is a pure function of its state and the step's batch; it returns the fields of the batch that it fills, and the
next state. A state is plain JSON, {} before the first step; the learner keeps and checkpoints it. A memory runs once
per step, before the advantages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from algos.aepo import EntropyAverage, entropy_estimate, sampling_temperature
from algos.baselines import require_range
from algos.batch import select
from algos.entropy_control import EntropyCoefficient, LogEntropyCoefficient
from algos.masked import masked_mean
from core.registry import Registry

State = dict[str, Any]
Memory = Callable[..., tuple[dict[str, Any], State]]

memories = Registry("memory")
fills: dict[str, tuple[str, ...]] = {}
"""Memory -> the fields of the batch that it fills."""


def remembers(*names: str) -> Callable[[Memory], Memory]:
    """Register a memory that fills these fields; works as a decorator."""

    def register(function: Memory) -> Memory:
        fills[function.__name__] = names
        return memories(function)

    return register


@remembers("baselines")
def beta_tracker(
    state: State, totals: Tensor, prompts: tuple[str, ...], *, decay: float = 0.875, initial: float = 0.5
) -> tuple[dict[str, Any], State]:
    """p = a / (a + b) per prompt, before the step; then a <- decay a + R, b <- decay b + 1 - R (mean R of its rows).

    Rewards lie in [0, 1]; a and b start at `initial`. Source: SPO, arXiv 2509.13232, with a constant decay.
    """
    require_range(totals, 0.0, 1.0, "memory beta_tracker")
    rewards: dict[str, list[float]] = {prompt: [] for prompt in prompts}
    for prompt, value in zip(prompts, totals.tolist(), strict=True):
        if value == value:
            rewards[prompt].append(value)
    counts = {prompt: state.get(prompt, [initial, initial]) for prompt in rewards}
    estimate = totals.new_tensor([counts[p][0] / sum(counts[p]) for p in prompts], dtype=torch.float64)
    seen = {prompt: sum(values) / len(values) for prompt, values in rewards.items() if values}
    learned = {p: [decay * counts[p][0] + r, decay * counts[p][1] + 1 - r] for p, r in seen.items()}
    return {"baselines": estimate}, {**state, **learned}


@remembers("entropy_coef")
def adaptive_entropy(
    state: State,
    entropy: Tensor,
    mask: Tensor,
    *,
    target: float = 0.2,
    delta: float = 1e-4,
    low: float = 0.0,
    high: float = 0.005,
    init: float = 0.0,
) -> tuple[dict[str, Any], State]:
    """c <- clip(c + delta if h < target else c - delta, low, high); the bonus is c while h < target, else 0.

    h: mean entropy of the policy before the step, nats. Source: Skywork-OR1, arXiv 2505.22312.
    """
    coefficient = EntropyCoefficient(target=target, delta=delta, low=low, high=high, init=init)
    if state:
        coefficient.load_state_dict(state)
    return {"entropy_coef": coefficient.update(masked_mean(entropy, mask).item())}, coefficient.state_dict()


@remembers("entropy_coef")
def log_entropy(
    state: State, entropy: Tensor, mask: Tensor, *, target: float = 0.2, lr: float = 1e-2, init_alpha: float = 0.001
) -> tuple[dict[str, Any], State]:
    """log_alpha <- log_alpha - lr (h - target) alpha; the bonus is alpha. Source: soft actor-critic, as in LUFFY."""
    coefficient = LogEntropyCoefficient(target=target, lr=lr, init_alpha=init_alpha)
    if state:
        coefficient.load_state_dict(state)
    return {"entropy_coef": coefficient.update(masked_mean(entropy, mask).item())}, coefficient.state_dict()


@remembers("adapted_kl_coef")
def adaptive_kl(
    state: State,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    init: float = 0.04,
    target: float = 0.1,
    horizon: float = 10_000.0,
) -> tuple[dict[str, Any], State]:
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), n completions; used from this step on.

    KL: mean over the tokens of log pi - log pi_ref of the policy before the step, nats; `target` likewise. Source:
    Ziegler et al., arXiv 1909.08593; as in PPO trainers.
    """
    value = masked_mean(select(mask, old_logprobs) - select(mask, ref_logprobs), mask).item()
    error = min(max(value / target - 1, -0.2), 0.2)
    beta = state.get("beta", init) * (1 + error * mask.any(1).sum().item() / horizon)
    return {"adapted_kl_coef": beta}, {"beta": beta}


@remembers("entropy_average", "entropy_target", "tempering")
def entropy_level(
    state: State,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    momentum: float = 0.9,
    entropy_target: float = 0.5,
    t_high: float = 1.2,
    t_low: float = 0.8,
) -> tuple[dict[str, Any], State]:
    """Running mean h of the sampled tokens' -log pi; tempering t_high where h <= entropy_target, else t_low.

    Source: AEPO, arXiv 2510.08141 (momentum 0 there); its first estimate is that of the first step here, not 0.
    """
    average = EntropyAverage(momentum=momentum)
    if state:
        average.load_state_dict(state)
    level = average.update(entropy_estimate(old_logprobs, mask).item())
    chosen = sampling_temperature(level, entropy_target=entropy_target, t_high=t_high, t_low=t_low)
    filled = {"entropy_average": level, "entropy_target": entropy_target, "tempering": chosen}
    return filled, average.state_dict()
