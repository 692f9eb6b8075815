"""Learning from demonstrations beside rollouts: ReLIFT, LUFFY, ExPO, SuperHF. (Prefix-RFT: prefix.py.)

Tokens that the policy did not sample get no sampler correction; their `old_logprobs` are recomputed by the learner.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from algos.batch import select
from algos.masked import masked_mean, per_token
from algos.surrogates import ppo_clip


class FailureBuffer:
    """ReLIFT: prompts whose rollouts all failed wait here for a supervised step on their demonstrations.

    "Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions", arXiv
    2506.07527; read from the authors' code. New failures stand before old ones. Ours: `cap` (None: 10 sft_size; the
    oldest fall out), `unique` (one entry per prompt, the newest), and prompts without a demonstration are skipped.
    """

    def __init__(self, *, sft_size: int = 128, cap: int | None = None, unique: bool = False) -> None:
        self.sft_size, self.unique = sft_size, unique
        self.cap = 10 * sft_size if cap is None else cap
        self.waiting: list[Hashable] = []

    def update(
        self,
        prompts: Sequence[Hashable],
        rewards: Sequence[Sequence[float]],
        has_demonstration: Sequence[bool] | None = None,
    ) -> tuple[list[Hashable], list[Hashable]]:
        """Take in one step: prompt ids [P], rewards [P][G]. Returns (added, prompts of this step's supervised pass).

        The pass is empty until `sft_size` prompts wait. A missing reward (NaN) is not a failure.
        """
        usable = [True] * len(prompts) if has_demonstration is None else has_demonstration
        added = [
            prompt
            for prompt, row, ready in zip(prompts, rewards, usable, strict=True)
            if ready and all(reward == 0 for reward in row)
        ]
        old = [p for p in self.waiting if p not in set(added)] if self.unique else self.waiting
        self.waiting = (added + old)[: self.cap]
        if len(self.waiting) < self.sft_size:
            return added, []
        due, self.waiting = self.waiting[: self.sft_size], self.waiting[self.sft_size :]
        return added, due

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": list(self.waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = list(state["waiting"])


def relift_sft_loss(logprobs: Tensor, entropy: Tensor, mask: Tensor, *, entropy_coef: float = 0.001) -> Tensor:
    """ReLIFT's supervised loss, masked_mean(-lp) - entropy_coef masked_mean(H), a scalar. It has its own optimizer."""
    return -masked_mean(logprobs, mask) - entropy_coef * masked_mean(entropy, mask)


def luffy_advantages(
    rewards: Tensor,
    group: Tensor,
    off_policy: Tensor,
    *,
    baseline: Literal["joint", "on_policy"] = "joint",
    divide_std: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """LUFFY's advantages [B]: R minus the group's mean, the demonstration included ("joint") or not ("on_policy").

    `rewards`, `group` [B]; `off_policy` [B] bool marks demonstrations. With `divide_std`: / (std (n - 1) + eps), where
    a std of zero counts as 1. Statistics over a single row are mean 0, std 1.
    """
    advantages = torch.zeros_like(rewards)
    for index in group.unique():
        rows = group == index
        counted = rewards[rows if baseline == "joint" else rows & ~off_policy]
        mean, std = rewards.new_tensor(0.0), rewards.new_tensor(1.0)
        if len(counted) > 1:
            mean, std = counted.mean(), counted.std()
        scale = torch.where(std == 0, torch.ones_like(std), std) + eps if divide_std else 1.0
        advantages[rows] = (rewards[rows] - mean) / scale
    return advantages


def luffy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    off_mask: Tensor,
    *,
    shaping: bool = True,
    gamma: float = 0.1,
    clip_low: float | None = None,
    clip_high: float | None = None,
    clip_upper: float = 1.0,
    teacher_logprobs: Tensor | None = None,
    teacher_low: float | None = None,
    teacher_high: float | None = None,
) -> Tensor:
    """LUFFY's per-token loss [B, T], 0 at masked cells: policy shaping for demonstration tokens, PPO for the others.

        off_mask:   p = exp(lp);  -A p / (p + gamma)      never clipped; the teacher's probability is taken as 1
        others:     -A r, or clipped to [1 - clip_low, max(clip_upper, 1 + clip_high)]

    "Learning to Reason under Off-Policy Guidance", arXiv 2504.14945; run against the authors' code (whose script
    removes the clip). The slope gamma p / (p + gamma)^2 gives unlikely demonstration tokens a much larger push than p
    alone. `shaping` false: -A p. `teacher_logprobs` [B, T], where known: the ratio p / (p_teacher + 1e-6), within the
    optional bounds. Aggregate by token mean, or by sum / padded length as the release does.
    """
    lp, a = select(mask, logprobs), per_token(advantages.detach(), mask)
    high = None if clip_high is None else max(clip_upper, 1 + clip_high) - 1
    on_policy = ppo_clip((lp - select(mask, old_logprobs).detach()).exp(), a, low=clip_low, high=high)
    p = lp.exp()
    if teacher_logprobs is not None:
        ratio = p / (select(mask, teacher_logprobs).detach().exp() + 1e-6)
        bounded = teacher_low is not None or teacher_high is not None
        off_policy = -a * (ratio.clamp(teacher_low, teacher_high) if bounded else ratio)
    else:
        off_policy = -a * (p / (p + gamma) if shaping else p)
    return select(mask, torch.where(off_mask, off_policy, on_policy))


def expo_coefficient(step: int, *, coef_start: float = 0.1, coef_end: float = 0.0, anneal_steps: int = 0) -> float:
    """Strength of ExPO's supervised term at `step`: linear from start to end over `anneal_steps`; 0 steps: constant."""
    if anneal_steps <= 0:
        return coef_start
    return coef_start + (coef_end - coef_start) * min(step / anneal_steps, 1.0)


class ExpoLoss(NamedTuple):
    used: Tensor  # [P] bool: prompts whose rollouts all failed
    sft_loss: Tensor  # scalar, 0 if no prompt is used
    loss: Tensor  # scalar


def expo_mix(
    pg_loss: Tensor,
    rewards: Tensor,
    explanation_logprobs: Sequence[Tensor],
    *,
    coefficient: float = 0.1,
    fail_threshold: float = 0.0,
) -> ExpoLoss:
    """ExPO: policy-gradient loss + coefficient * mean over failed prompts of the mean NLL of a self-explanation.

    "ExPO: Unlocking Hard Reasoning with Self-Explanation-Guided Reinforcement Learning", arXiv 2507.02834;
    reconstructed. The explanation is sampled from the policy given question and answer (temperature 0.7, kept if the
    verifier accepts it and it does not quote the hint), and scored given the question alone. `rewards` [P, G];
    `explanation_logprobs`: per prompt the log-probs of its tokens [T_p].
    """
    used = (rewards <= fail_threshold).all(-1)
    terms = [-lp.mean() for lp, failed in zip(explanation_logprobs, used.tolist(), strict=True) if failed]
    sft_loss = torch.stack(terms).mean() if terms else torch.zeros_like(pg_loss)
    return ExpoLoss(used, sft_loss, pg_loss + coefficient * sft_loss)


def superhf_filter(reward: Tensor, length: Tensor, *, top_k: int = 1, length_penalty: float = 0.0) -> list[list[int]]:
    """SuperHF: the best completions of each prompt, best first, [P] lists of at most top_k indices.

    "SuperHF: Supervised Iterative Learning from Human Feedback", arXiv 2310.16763; read from the authors' code.
    `reward`, `length` (characters) [P, K]. Ranks by reward - length_penalty * length; empty completions are dropped;
    ties by index.
    """
    score = (reward - length_penalty * length).masked_fill(length <= 0, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True).tolist()
    return [[k for k in row if length[p, k] > 0][:top_k] for p, row in enumerate(order)]


class SuperhfLoss(NamedTuple):
    ce: Tensor  # scalar
    kl: Tensor  # [N]
    loss: Tensor  # scalar


def superhf_loss(
    labels: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kl_coef: float = 0.23,
    inverse_loss: float = 0.0,
    ignore: int = -100,
) -> SuperhfLoss:
    """SuperHF's supervised loss with a KL prior: CE + kl_coef * sum_i max(0, KL_i).

        CE = token mean over all labels;   KL_i = mean over labels of sum_v p0 (ln p0 - ln p),  p0 the initial model

    `labels` [N, T] (`ignore` = no label, aligned with the predictions), `logprobs` and `ref_logprobs` [N, T, V]. The KL
    is summed over examples, so its strength grows with the minibatch. `inverse_loss` C adds C / loss (off).
    """
    mask = labels != ignore
    lp = select(mask.unsqueeze(-1), logprobs)
    ref = select(mask.unsqueeze(-1), ref_logprobs).detach()
    ce = -masked_mean(lp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1), mask)
    per_cell = select(mask, (ref.exp() * (ref - lp)).sum(-1))
    kl = per_cell.sum(-1) / mask.sum(-1).clamp(min=1)
    loss = ce + kl_coef * kl.clamp(min=0).sum()
    return SuperhfLoss(ce, kl, loss + inverse_loss / loss if inverse_loss else loss)
