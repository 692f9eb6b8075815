"""Losses on pairs of a chosen and a rejected completion, and what to watch while using them.

n pairs. `chosen`, `rejected` [n] are sums over completion tokens of the policy's log-probs (with gradient),
`ref_chosen`, `ref_rejected` [n] the same for the reference (without). Every loss takes a margin and returns one value
per pair [n]; the training loss is its mean. Log both sides apart: a growing margin can hide a falling chosen completion
(`gradient_entanglement`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def length_average(logprob_sum: Tensor, length: Tensor) -> Tensor:
    """Mean log-prob per token [n] from sums and lengths [n]; a length counts as at least 1."""
    return logprob_sum / length.clamp(min=1)


def preference_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """z = (lw - ll) - (rw - rl) [n], the policy's margin beyond the reference's.

    Average all four by length first for the length-averaged variants; beta must then be 10 to 50 times larger.
    """
    return (chosen - rejected) - (ref_chosen - ref_rejected).detach()


def dpo(margin: Tensor, *, beta: float | Tensor = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1 - s) log sigmoid(beta z) - s log sigmoid(-beta z), per pair [n].

    "Direct Preference Optimization", arXiv 2305.18290; run against the authors' code. `margin` from
    `preference_margin`.
    """
    scaled = beta * margin
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def ipo(margin: Tensor, *, beta: float = 0.1) -> Tensor:
    """IPO: (z - 1 / (2 beta))^2, per pair [n].

    "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036; run against the
    code of the DPO authors, which uses sums of log-probs. TRL averages over tokens: give it averaged log-probs for that
    form.
    """
    return (margin - 1 / (2 * beta)) ** 2


def simpo(
    chosen_mean: Tensor,
    rejected_mean: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    hinge: bool = False,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """SimPO: -log sigmoid(beta (lw/|yw| - ll/|yl| - gamma_beta_ratio)), per pair [n]; no reference model.

    "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734; run against the authors'
    code. Arguments are length-averaged. `hinge`: max(0, 1 - beta (...)) instead. `sft_weight` adds -sft_weight *
    chosen_mean.
    """
    margin = chosen_mean - rejected_mean - gamma_beta_ratio
    loss = (1 - beta * margin).clamp(min=0) if hinge else dpo(margin, beta=beta, label_smoothing=label_smoothing)
    return loss - sft_weight * chosen_mean


def redi(
    chosen_mean: Tensor, rejected_mean: Tensor, *, alpha: float = 0.8, chosen_coef: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """REDI: -chosen_coef lw/|yw| + alpha ll/|yl|, per pair [n] of a correct and an incorrect teacher trace.

    "Harnessing Negative Signals: Reinforcement Distillation from Teacher Data for LLM Reasoning", arXiv 2505.24850; run
    against the authors' code. alpha 1 is symmetric and unstable, alpha 0 is plain supervised training. `gamma` (off)
    multiplies the negative term by exp(gamma ll/|yl|), with gradient as released. Stop if the chosen side falls.
    """
    negative = rejected_mean * (gamma * rejected_mean).exp() if gamma else rejected_mean
    return -chosen_coef * chosen_mean + alpha * negative


class BetaDPO:
    """beta-DPO: a beta per batch, and a draw that leaves out pairs with an unusual margin.

    "beta-DPO: Direct Preference Optimization with Dynamic beta", arXiv 2407.08639; run against the authors' code. Per
    batch, with the margins z [n] of all workers:

        m <- mu m + (1 - mu) mean z;   s <- mu s + (1 - mu) std z (n - 1)
        p_i = exp(-0.5 ((z_i - m) / s)^2);   draw k = int(n (1 - filter)) pairs without replacement by p
        beta_b = max(beta (1 + a (mean over the drawn z - m)), 1e-3)

    then train `dpo(z[drawn], beta=beta_b)`. m and s start at 0, so the first batches use a spread that is far too
    small. s is guarded by 1e-6 (ours).
    """

    def __init__(self, *, beta: float = 0.1, a: float = 0.6, momentum: float = 0.9, filter: float = 0.2) -> None:
        self.beta, self.a, self.momentum, self.filter = beta, a, momentum, filter
        self.mean = 0.0
        self.std = 0.0

    def update(self, margin: Tensor) -> None:
        """Take in the margins [n] of a batch."""
        z = margin.detach()
        spread = float(z.std()) if len(z) > 1 else 0.0
        self.mean = self.momentum * self.mean + (1 - self.momentum) * float(z.mean())
        self.std = self.momentum * self.std + (1 - self.momentum) * spread

    def sample_weight(self, margin: Tensor) -> Tensor:
        """p [n], in (0, 1]: 1 at the running mean."""
        return (-0.5 * ((margin.detach() - self.mean) / max(self.std, 1e-6)) ** 2).exp()

    def draw_size(self, count: int) -> int:
        """How many of `count` pairs to train, at least 1."""
        return max(int(count * (1 - self.filter)), 1)

    def draw(self, sample_weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Indices of the drawn pairs, ascending; the largest weights where too few are positive (ours)."""
        size = self.draw_size(len(sample_weight))
        if int((sample_weight > 0).sum()) < size:
            return sample_weight.argsort(descending=True, stable=True)[:size].sort().values
        return torch.multinomial(sample_weight, size, replacement=False, generator=generator).sort().values

    def batch_beta(self, margin: Tensor, drawn: Tensor) -> float:
        """beta of this batch, from the drawn margins; no gradient."""
        return max(self.beta * (1 + self.a * (float(margin.detach()[drawn].mean()) - self.mean)), 1e-3)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.std = state["mean"], state["std"]


class MarginWeight(NamedTuple):
    coef: Tensor  # [n] c(h)
    weight: Tensor  # [n] w(h), multiplies the DPO loss of the pair
    effective_margin: Tensor  # [n] the beta z at which the weighted loss is smallest, h + ln(w(h) / w(-h))


def madpo_weights(
    margin: Tensor,
    *,
    form: Literal["target_margin", "coefficient"] = "target_margin",
    c_min: float = 0.5,
    c_max: float = 2.0,
    slope: float = 2.0,
    tau: float = 1.5,
    w_min: float = 0.1,
    w_max: float = 5.0,
) -> MarginWeight:
    """MADPO: pair weights from a frozen reward model's margin h = r(yw) - r(yl) [n].

    "Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference Optimization", arXiv 2510.05342;
    reconstructed: the exact weight of the paper could not be read. Ours asks the optimum of the weighted loss to be
    c(h) h:

        c(h) = c_min + (c_max - c_min) / (1 + exp(slope (|h| - tau)))
        w(h) = clip(exp((c(h) - 1) h), w_min, w_max) for h > 0, else 1

    `form` "coefficient" is the simpler w(h) = c(max(h, 0)). Set tau near the median margin; divide margins on another
    scale by their standard deviation first.
    """
    h = margin.detach()

    def coefficient(h: Tensor) -> Tensor:
        return c_min + (c_max - c_min) * torch.sigmoid(-slope * (h.abs() - tau))

    def weigh(h: Tensor) -> Tensor:
        if form == "coefficient":
            return coefficient(h.clamp(min=0))
        return torch.where(h > 0, ((coefficient(h) - 1) * h).exp().clamp(w_min, w_max), torch.ones_like(h))

    return MarginWeight(coefficient(h), weigh(h), h + (weigh(h) / weigh(-h)).log())


class Entanglement(NamedTuple):
    dot: Tensor
    norm2_chosen: Tensor
    norm2_rejected: Tensor
    cosine: Tensor
    ratio_min: Tensor  # dot / the smaller squared norm; above 1 one side moves the wrong way
    chosen_falls: bool
    rejected_rises: bool
    chosen_change: Tensor  # first-order change of lw, per unit of step along chosen_weight gw - rejected_weight gl
    rejected_change: Tensor


def gradient_entanglement(
    chosen_gradient: Tensor, rejected_gradient: Tensor, *, chosen_weight: float = 1.0, rejected_weight: float = 1.0
) -> Entanglement:
    """A monitor, not a training change: does raising the margin of a pair lower the chosen completion's probability?

    "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement", arXiv 2410.13828; read from the
    authors' code (whose minimum takes the chosen norm twice; here it is the minimum). Gradients of lw and ll, flat [d],
    of all trainable parameters or of the last layer. The weights (dw, dl) are those a method gives to its two sides:

        chosen falls  iff dot / |gw|^2 > dw / dl;    rejected rises  iff dot / |gl|^2 > dl / dw;    never both
    """
    dot = chosen_gradient @ rejected_gradient
    norm2_w, norm2_l = chosen_gradient @ chosen_gradient, rejected_gradient @ rejected_gradient
    chosen_change = chosen_weight * norm2_w - rejected_weight * dot
    rejected_change = chosen_weight * dot - rejected_weight * norm2_l
    return Entanglement(
        dot=dot,
        norm2_chosen=norm2_w,
        norm2_rejected=norm2_l,
        cosine=dot / (norm2_w * norm2_l).sqrt(),
        ratio_min=dot / torch.minimum(norm2_w, norm2_l),
        chosen_falls=bool(chosen_change < 0),
        rejected_rises=bool(rejected_change > 0),
        chosen_change=chosen_change,
        rejected_change=rejected_change,
    )


def drift_pairs(records: Iterable[Mapping[str, Any]], *, label: str = "DSAT") -> list[dict[str, str]]:
    """DRIFT: pairs from answers that users complained about. Returns rows {prompt, chosen, rejected}.

    "DRIFT: Learning from Abundant User Dissatisfaction in Real-World Preference Learning" (2025); read from the
    authors' code. A record holds `label`, `history` (the prompt), `response` (complained about) and `samples`: answers
    of the *current* policy to history + response + feedback + an instruction to do better. New samples each iteration
    keep the margin alive. Train DPO (beta 0.1) + 0.001 NLL of the chosen. Empty samples and repeats of the response are
    dropped (ours).
    """
    return [
        {"prompt": record["history"], "chosen": sample, "rejected": record["response"]}
        for record in records
        if record["label"] == label
        for sample in record["samples"]
        if sample.strip() and sample.strip() != record["response"].strip()
    ]
