"""Optimisers and the course of the learning rate.

`adamw`: AdamW on everything. `muon`: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) on the
matrices inside the blocks, AdamW on embeddings, head, norms and biases. `spam`, `stable_spam`: kin of AdamW with guards
against gradient spikes, in spam.py. Weight decay is decoupled and on matrices only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from core.learner_config import OptimizerConfig
from learner import offload
from learner.spam import Spam, StableSpam


def schedule(kind: str, step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate in step `step` (from 0) of `steps`.

    Warm-up: (step + 1) / warmup, so the first step already learns. After it, with p from 0 to 1 over what is left of
    the run: 1 (constant), 1 - p (linear), (1 + cos(pi p)) / 2 (cosine). Steps beyond the last have that of p = 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    p = min(1.0, (step - warmup) / max(1, steps - warmup))
    return {"constant": 1.0, "linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2}[kind]


class Optimizer:
    """One or two torch optimisers over named parameters, moved as one."""

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Iterable[tuple[str, nn.Parameter]],
        blocks: set[str],
        away: torch.device | None = None,
    ) -> None:
        """`blocks`: names of the parameters that lie inside the model's blocks.

        `away`: where moments lie between steps; None is where the parameters are.
        """
        self.config, self._away = config, away
        self.names: dict[Tensor, str] = {p: name for name, p in parameters if p.requires_grad}
        by_muon = [p for p, n in self.names.items() if config.name == "muon" and p.ndim == 2 and n in blocks]
        by_adamw = [p for p in self.names if not any(p is q for q in by_muon)]
        groups = [
            {"params": [p for p in by_adamw if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in by_adamw if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = _adam(config, [g for g in groups if g["params"]])
        self.muon = Muon(by_muon, lr=config.muon_lr, weight_decay=config.weight_decay) if by_muon else None
        self._make_state()

    def step(self, factor: float) -> None:
        """Apply the gradients at `factor` times the peak learning rates."""
        for optimiser, peak in ((self.adam, self.config.lr), (self.muon, self.config.muon_lr)):
            if optimiser is not None:
                for group in optimiser.param_groups:
                    group["lr"] = peak * factor
                with offload.at_hand(optimiser, self._device, self._away):
                    optimiser.step()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.names)).device

    def clear(self) -> None:
        """Forget the gradients."""
        for p in self.names:
            p.grad = None

    def clip(self) -> Tensor:
        """Global norm of the gradients over all parameters and ranks, before they are clipped to `max_grad_norm`."""
        gradients = [p.grad for p in self.names if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self.names), self.config.max_grad_norm, norm)
        return norm

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """(name of the parameter / name of the entry, tensor): moments and step counts, the live tensors.

        Until the next step they are where the parameters are.
        """
        for optimiser in filter(None, (self.adam, self.muon)):
            if self._away is not None:
                offload.move(optimiser, self._device)
            for p, entries in optimiser.state.items():
                for key, tensor in entries.items():
                    yield f"{self.names[p]}/{key}", tensor

    def _make_state(self) -> None:
        """Make now what torch makes at the first step, so that a checkpoint has a place to be read into."""
        plain = self.adam.param_groups if isinstance(self.adam, torch.optim.AdamW) else ()  # the others made theirs
        for p in (p for group in plain for p in group["params"]):
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.adam.state[p] = {"step": torch.tensor(0.0), **moments}
        if self.muon is not None:
            for p in self.muon.param_groups[0]["params"]:
                self.muon.state[p] = {"momentum_buffer": torch.zeros_like(p)}


def _adam(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The configured kin of Adam; what `muon` leaves is AdamW's."""
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    spikes = config.spikes
    if config.name == "spam":
        reset: dict[str, Any] = {"interval": spikes.interval, "warmup": spikes.warmup, "grace": spikes.grace}
        return Spam(groups, **common, **reset, theta=spikes.theta)
    if config.name == "stable_spam":
        return StableSpam(groups, **common, interval=spikes.interval, gammas=spikes.gammas, norm=spikes.norm)
    return torch.optim.AdamW(groups, **common, foreach=True)


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix instead of the gradient (Jordan et al. 2024).

        B <- m B + (1 - m) g      U = (1 - m) g + m B      W <- (1 - lr decay) W - lr sqrt(max(1, rows / cols)) NS(U)

    The same numbers as torch.optim.Muon, which on sharded matrices communicates in each of its fifteen products (0.1 s
    per matrix over two gloo ranks). Here a shard is gathered once, each rank orthogonalises the whole matrix and keeps
    its own part; the momentum stays sharded.
    """

    def __init__(self, params: list[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of the matrices that have a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - momentum)
                update = orthogonal(_whole(p.grad.lerp(buffer, momentum)))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(_part(update, p).to(p.dtype), alpha=-lr * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz: U S V^T -> about U V^T (singular values within 0.7 .. 1.2), in bfloat16; [m, n] -> [m, n].

    X <- a X + (b A + c A^2) X with A = X X^T; the coefficients are Jordan's, chosen for the steepest start.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every rank has, placed as `like` is: a slice without communication."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = DTensor.from_local(whole, like.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=like.placements)
