"""Weights of whole samples: by their loss, by their return, by a learnt rescaler, by the worst case.

All weights are detached unless a docstring says otherwise. Weighing by the loss is for likelihood losses
(demonstrations, supervised mix-ins): the value of a policy-gradient surrogate is no measure of fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from algos.batch import select
from algos.token_weights import token_weights

Strategy = Literal["linupper", "quadratic", "extremes", "upper", "uniform"]

_STRATEGIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linupper": lambda h, delta: (h + delta).clamp(max=delta),  # drops only the easy half
    "quadratic": lambda h, delta: 1 - h**2 / delta**2,  # favours middling losses
    "extremes": lambda h, delta: h.abs(),
    "upper": lambda h, delta: 0.5 * h + 0.5 * delta,
    "uniform": lambda h, delta: torch.zeros_like(h),
}


def loss_scores(losses: Tensor, *, strategy: Strategy = "linupper", delta: float = 1.0) -> Tensor:
    """Score f(h) of each sample's loss [n], with h the loss mapped linearly from [min, max] to [-delta, delta].

    h_i = delta (2 l_i - l_max - l_min) / max(l_max - l_min, 1e-6)
    """
    low, high = losses.detach().aminmax()
    h = delta * (2 * losses.detach() - high - low) / (high - low).clamp(min=1e-6)
    return _STRATEGIES[strategy](h, delta)


def loss_weights(
    losses: Tensor,
    step: int,
    *,
    strategy: Strategy = "linupper",
    delta: float = 1.0,
    temperature: float = 1.0,
    burn_in: int = 1000,
) -> Tensor:
    """Weights [n] with sum 1, softmax(f / temperature); uniform for the first `burn_in` steps. Objective: sum w_i l_i.

    "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025; run against the
    authors' code. `losses` [n]: mean token loss of each sample, gathered over all workers. The authors use temperature
    1 for small models (quadratic), 0.4 for larger ones (linupper, extremes).
    """
    if step < burn_in or strategy == "uniform":
        return torch.full_like(losses.detach(), 1 / len(losses))
    return (loss_scores(losses, strategy=strategy, delta=delta) / temperature).softmax(-1)


@token_weights
def by_loss(
    old_logprobs: Tensor,
    mask: Tensor,
    version: int,
    *,
    strategy: Strategy = "linupper",
    delta: float = 1.0,
    temperature: float = 1.0,
    burn_in: int = 1000,
) -> Tensor:
    """`loss_weights` of the step's n demonstrations times n, so that their mean is 1; losses before the step."""
    options: dict[str, Any] = {"strategy": strategy, "delta": delta, "temperature": temperature, "burn_in": burn_in}
    return _by_row_loss(old_logprobs, mask, lambda losses: loss_weights(losses, version, **options))


class TrajectoryWeights(NamedTuple):
    """Each [n]. `trajectory` sums to 1; `transition` is that of one transition, so length @ transition = 1."""

    score: Tensor
    trajectory: Tensor
    transition: Tensor


def trajectory_weights(
    returns: Tensor,
    lengths: Tensor,
    *,
    value: Tensor | None = None,
    temperature: float | None = 0.1,
    fraction: float | None = None,
) -> TrajectoryWeights:
    """Sampling probabilities of the trajectories of a mixed buffer: better ones more often.

    "Harnessing Mixed Offline Reinforcement Learning Datasets via Trajectory Weighting", arXiv 2306.13085; run against
    the authors' code. `returns`, `lengths` [n]; `value` [n] (see `initial_values`) turns returns into advantages.

        s_i = (u_i - min u) / (max u - min u);   P(trajectory i) ~ exp(s_i / temperature), drawn by transition or as a
        whole

    The release draws transitions, which favours long trajectories; draw whole trajectories to avoid it. `fraction` with
    `temperature` None is the baseline that keeps the best int(fraction n), at least 1. Equal returns: uniform.
    """
    lengths = lengths.to(returns.dtype)
    if temperature is None:
        best = returns.argsort(descending=True, stable=True)[: max(int((fraction or 0.0) * len(returns)), 1)]
        weight, score = torch.zeros_like(returns), torch.zeros_like(returns)
        weight[best] = 1.0
    else:
        u = returns if value is None else returns - value
        score = _unit_range(u)
        weight = ((score - score.max()) / temperature).exp()
    return TrajectoryWeights(score, weight / weight.sum(), weight / (lengths * weight).sum())


def group_trajectory_weights(
    returns: Tensor, group: Tensor, *, temperature: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Language-model form (ours), V the mean return of the row's group: (value, score, probability), each [n].

    Draws rows from a buffer that mixes old rollouts and demonstrations. `returns`, `group` [n].
    """
    groups, index = group.unique(return_inverse=True)
    sums = returns.new_zeros(len(groups)).index_add_(0, index, returns)
    counts = returns.new_zeros(len(groups)).index_add_(0, index, torch.ones_like(returns))
    value = (sums / counts)[index]
    weights = trajectory_weights(returns, torch.ones_like(returns), value=value, temperature=temperature)
    return value, weights.score, weights.trajectory


def initial_values(states: Tensor, returns: Tensor) -> Tensor:
    """Linear regression (with intercept) of the returns [n] on the initial states [n, d]: the fitted values [n]."""
    design = torch.cat([states, torch.ones_like(states[:, :1])], dim=1)
    return design @ torch.linalg.lstsq(design, returns.unsqueeze(1)).solution.squeeze(1)


def _unit_range(u: Tensor) -> Tensor:
    low, high = u.aminmax()
    return torch.zeros_like(u) if low == high else (u - low) / (high - low)


class Rescaler(nn.Module):
    """Loss weight in (0, 1) from features [n, d] that the trained model itself provides: a two-layer network -> [n].

    Features (ours): loss, its running rank in the epoch, mean and deviation over 2-4 dropout passes, entropy, margin.
    """

    def __init__(self, features: int, *, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(-1)


class MetaStep(NamedTuple):
    inner_weight: Tensor  # [n] weights of the training batch
    theta: list[Tensor]  # the model's parameters after the inner step, still in the graph
    objective: Tensor  # scalar J; its gradient with respect to the rescaler's parameters is the meta gradient


def meta_rescale(
    weigh: Callable[[Tensor], Tensor],
    losses: Callable[[Sequence[Tensor]], Tensor],
    fresh_losses: Callable[[Sequence[Tensor]], Tensor],
    theta: Sequence[Tensor],
    features: Tensor,
    fresh_features: Tensor,
    *,
    inner_lr: float,
    weighted_outer: bool = True,
    collapse_penalty: float = 0.0,
) -> MetaStep:
    """STORM: the meta objective of a loss rescaler `weigh` (omega), through one inner step of the model (theta).

        w_i = weigh(F_i);   theta' = theta - inner_lr grad mean_i w_i l_i(theta)
        J = mean_j v_j l_j(theta') + collapse_penalty (mean v - 0.5)^2,   v_j = weigh(F_j) of a fresh batch

    "Learning from Noisy Labels via Self-Taught On-the-Fly Meta Loss Rescaling", arXiv 2412.12955; reconstructed from
    the abstract, no code is public. Differentiate J with respect to the rescaler, update it, and train the model with
    the new weights detached and normalised to mean 1. J is smallest at v = 0, hence the penalty (ours);
    `weighted_outer` false (v = 1) removes that path altogether. `theta`: leaves that require gradient, best the last
    layer or an adapter only.
    """
    weight = weigh(features)
    inner = (weight * losses(theta)).mean()
    gradients = torch.autograd.grad(inner, list(theta), create_graph=True)
    moved = [parameter - inner_lr * gradient for parameter, gradient in zip(theta, gradients, strict=True)]
    outer = fresh_losses(moved)
    if not weighted_outer:
        return MetaStep(weight, moved, outer.mean())
    fresh = weigh(fresh_features)
    return MetaStep(weight, moved, (fresh * outer).mean() + collapse_penalty * (fresh.mean() - 0.5) ** 2)


def kl_dro_weights(losses: Tensor, *, lambda_: float = 1.0) -> Tensor:
    """Worst-case weights under a KL ball, w = softmax(l / lambda) [n]: large losses count more.

    "Doubly Robust Instance-Reweighted Adversarial Training", arXiv 2308.00311; reconstructed, the closed form is
    standard: the maximiser of sum w_i l_i - lambda sum w_i ln(n w_i). Give the mean loss of each data source instead of
    each sample for group-DRO. Wrong labels get the largest weights: not for noisy data.
    """
    return (losses.detach() / lambda_).softmax(-1)


@token_weights
def by_worst_case(old_logprobs: Tensor, mask: Tensor, *, lambda_: float = 1.0) -> Tensor:
    """`kl_dro_weights` of the step's n demonstrations times n, so that their mean is 1; losses before the step."""
    return _by_row_loss(old_logprobs, mask, lambda losses: kl_dro_weights(losses, lambda_=lambda_))


def _by_row_loss(logprobs: Tensor, mask: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """`weigh` of the mean token losses of the n rows with tokens, times n, on their tokens; [B, T]."""
    rows = mask.any(1)
    factors = torch.zeros(len(rows), dtype=torch.float64, device=mask.device)
    if rows.any():
        losses = -select(mask, logprobs).double().sum(1) / mask.sum(1).clamp(min=1)
        factors[rows] = weigh(losses[rows]) * rows.sum()
    return factors[:, None].expand(mask.shape)


def kl_dro_objective(losses: Tensor, *, lambda_: float = 1.0) -> Tensor:
    """The maximum itself, lambda ln mean exp(l / lambda), a scalar; its gradient is sum w_i grad l_i, w detached."""
    count = torch.tensor(len(losses), dtype=losses.dtype, device=losses.device)
    return lambda_ * ((losses / lambda_).logsumexp(-1) - count.log())


def kl_dro_primal(losses: Tensor, weight: Tensor, *, lambda_: float = 1.0) -> Tensor:
    """sum w_i l_i - lambda sum w_i ln(n w_i) for any weights on the simplex, a scalar; at most `kl_dro_objective`."""
    return (weight * losses).sum() - lambda_ * torch.xlogy(weight, len(losses) * weight).sum()


class KlDroNormaliser:
    """Running normaliser of KL-DRO weights for minibatches, whose own normaliser would be biased.

        u <- (1 - gamma) u + gamma mean_batch e,   e = exp(min(l - shift, exp_cap lambda) / lambda);   w = e / (u n)

    The first batch sets u. The weights of one minibatch need not sum to 1. Shift and cap (ours) keep e finite.
    """

    def __init__(self, *, lambda_: float = 1.0, gamma: float = 0.1, shift: float = 0.0, exp_cap: float = 20.0) -> None:
        self.lambda_, self.gamma, self.shift, self.exp_cap = lambda_, gamma, shift, exp_cap
        self.u: float | None = None

    def weights(self, losses: Tensor) -> Tensor:
        """Take in a minibatch of losses [n] and return its weights [n]."""
        e = ((losses.detach() - self.shift).clamp(max=self.exp_cap * self.lambda_) / self.lambda_).exp()
        mean = float(e.mean())
        self.u = mean if self.u is None else (1 - self.gamma) * self.u + self.gamma * mean
        return e / (self.u * len(losses))

    def state_dict(self) -> dict[str, Any]:
        return {"u": self.u}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.u = state["u"]
