"""Credit for single steps of a response, and the simplest way to use an advantage: as a likelihood weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from algos.batch import select
from algos.masked import per_token
from algos.surrogates import ppo_clip, surrogates


def step_advantages(q: Tensor) -> Tensor:
    """Advantage of each step of one response, a_k = Q_k - Q_{k-1}, [K] from q [K + 1].

    "RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning by Eight-Fold", arXiv 2406.14532;
    reconstructed from the abstract. Q_k is the success rate of n (8) completions sampled from the initial policy after
    the first k steps; Q_0 is that of the bare prompt, and Q_K is the verifier's 0 or 1.
    """
    return q[1:] - q[:-1]


def find_pit(
    advantages: Tensor, correct: bool, *, pit: Literal["first", "lowest"] = "first", drop: float = 0.25
) -> int | None:
    """The step (from 0) at which an incorrect response goes wrong; None for a correct one.

    "first" (ours): the first step with a_k <= -drop, else the lowest a_k; "lowest": the lowest a_k. The earliest on
    ties. For per-step DPO: prompt + the steps before the pit, rejected = the pit on, chosen = a continuation that
    succeeded.
    """
    if correct or len(advantages) == 0:
        return None
    steep = (advantages <= -drop).nonzero().flatten()
    if pit == "first" and len(steep):
        return int(steep[0])
    return int((advantages == advantages.min()).nonzero()[0])


def spread_over_tokens(advantages: Tensor, step_tokens: Tensor) -> Tensor:
    """Every token of step k gets a_k: [sum of step_tokens] from advantages and token counts [K]."""
    return advantages.repeat_interleave(step_tokens)


def step_sft_weights(advantages: Tensor, *, temperature: float | None = None) -> Tensor:
    """Weights of advantage-weighted supervised training [K]: exp(a / temperature), or 1 where a > 0 for None."""
    if temperature is None:
        return (advantages > 0).to(advantages.dtype)
    return (advantages / temperature).exp()


def awm_weights(
    advantages: Tensor, mask: Tensor, *, adv_clip: float = 5.0, adv_max: float = 1.0, floor: float | None = None
) -> Tensor:
    """Advantage weighted matching: a_i = clip(A_i, -adv_clip, adv_clip) / adv_clip * adv_max, per token [B, T].

    "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models", arXiv 2509.25050. The
    language-model analogue is ours: for text the pretraining loss and the RL log-likelihood coincide, so the idea is an
    advantage-weighted likelihood. `floor` bounds negative weights from below; without it keep to one epoch, because
    pushing down is unbounded. `advantages` [B] or [B, T].
    """
    weight = advantages.detach().clamp(-adv_clip, adv_clip) / adv_clip * adv_max
    return per_token(weight if floor is None else weight.clamp(min=floor), mask)


def awm_loss(
    logprobs: Tensor, weight: Tensor, mask: Tensor, *, old_logprobs: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """Per-token loss -a exp(lp - c) [B, T], to be averaged over tokens; 0 at masked cells.

    c = the detached `logprobs` (pure on-policy: value -a, gradient -a grad lp), or `old_logprobs` where given, then
    with the PPO clip if `clip` is a number.
    """
    lp = select(mask, logprobs)
    anchor = lp.detach() if old_logprobs is None else select(mask, old_logprobs).detach()
    ratio = torch.exp(lp - anchor)
    return select(mask, ppo_clip(ratio, weight, low=clip, high=clip))


@surrogates
def awm(
    logprobs: Tensor, advantages: Tensor, *, adv_clip: float = 5.0, adv_max: float = 1.0, floor: float | None = None
) -> Tensor:
    """Z = -a exp(l - sg(l)), a = clip(A, -adv_clip, adv_clip) / adv_clip * adv_max: no ratio, no clip, one update.

    Source: Advantage Weighted Matching, arXiv 2509.25050; the language-model form is ours (`awm_weights`, `awm_loss`).
    """
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    return awm_loss(logprobs, awm_weights(advantages, mask, adv_clip=adv_clip, adv_max=adv_max, floor=floor), mask)
