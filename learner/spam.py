"""SPAM and Stable-SPAM: Adam for training with gradient spikes.

Both are ordinary `torch.optim.Optimizer`s: per-parameter tensors in `state`, counters in the parameter groups, so
`state_dict` holds everything. Elementwise apart from Stable-SPAM's maximum and norm of each tensor, which are taken
over all shards of a sharded parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def _whole(value: Tensor) -> Tensor:
    """A reduction over a sharded tensor, combined over its shards; other tensors as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]


class Spam(torch.optim.Optimizer):
    """SPAM: spike-aware Adam with momentum reset.

    "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", arXiv 2501.06842; run against the authors'
    code. Call n = 1, 2, ...; s calls since the last reset (past the warm-up at the start).

        reset:  if n mod interval == 0: m = v = 0, s = 0      (the bias correction keeps counting n, as released)
        scale:  q = 1 - 0.99 * 0.5 (1 + cos(pi s / (warmup + 1))) while s < warmup, else 1
        clip:   where g^2 > theta v: g = sign(g) sqrt(theta v), once n and n mod interval are at least grace
        m, v as in Adam;   p -= lr sqrt(1 - b2^n) / (1 - b1^n) q m / (sqrt(v) + eps);   p -= lr weight_decay p

    `theta` 0 turns clipping off, `interval` 0 the resets (ours): both off is Adam. With small learning rates and fresh
    data in every minibatch use an interval of 200 to 500 (ours). A parameter that has no gradient in some calls keeps
    its moments.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        theta: float = 5000.0,
        interval: int = 500,
        warmup: int = 150,
        grace: int = 20,
    ) -> None:
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        own = dict(
            theta=theta, interval=interval, warmup=warmup, grace=grace, calls=0, since_reset=warmup + 1, scale=1.0
        )
        super().__init__(params, {**settings, **own})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["calls"] += 1
            reset = group["interval"] > 0 and group["calls"] % group["interval"] == 0
            group["since_reset"] = 0 if reset else group["since_reset"]
            group["scale"] = self._scale(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, reset)
            group["since_reset"] += 1
        return loss

    @staticmethod
    def _scale(group: dict[str, Any]) -> float:
        since, warmup = group["since_reset"], group["warmup"]
        return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / (warmup + 1))) if since < warmup else 1.0

    @staticmethod
    def _clips(group: dict[str, Any]) -> bool:
        calls, interval, grace = group["calls"], group["interval"], group["grace"]
        settled = interval <= 0 or calls % interval >= grace  # v is not informative right after a reset
        return bool(group["theta"] > 0 and calls >= grace and settled)

    def _update(self, parameter: Tensor, group: dict[str, Any], reset: bool) -> None:
        state = self.state[parameter]
        fresh = not state or reset  # v is zero: clipping would erase the gradient, now and for ever
        if fresh:
            state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        gradient, (beta1, beta2), n = parameter.grad, group["betas"], group["calls"]
        assert gradient is not None
        if self._clips(group) and not fresh:
            bound = group["theta"] * state["v"]
            spiked = gradient**2 > bound
            gradient = torch.where(spiked, gradient.sign() * bound.sqrt(), gradient)
            state["clipped"] = spiked.sum()
        else:
            state["clipped"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
        state["m"].lerp_(gradient, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate = group["lr"] * math.sqrt(1 - beta2**n) / (1 - beta1**n) * group["scale"]
        parameter.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-rate)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def metrics(self) -> dict[str, float]:
        """What to log after a step: the warm-up scale, and how many gradient entries were clipped."""
        clipped = sum(float(_whole(state["clipped"])) for state in self.state.values() if "clipped" in state)
        return {"optim/spam_scale": self.param_groups[0]["scale"], "optim/spam_clipped": clipped}


class StableSpam(torch.optim.Optimizer):
    """Stable-SPAM: adaptive spike clipping and gradient normalisation per tensor, then Adam with resets.

    "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", arXiv 2502.17055; the compatible form was run
    against the authors' code. Trackers a, b, c per tensor start at 0; n calls; t counts calls since the moments, u
    since the trackers began.

        p *= 1 - lr weight_decay
        AdaClip:  a = g3 a + (1 - g3) max|g|;  cap = a / (1 - g3^u);  where |g| > cap: g = g / max|g| * cap
        AdaGN:    b = q1 b + (1 - q1) nu;  c = g2 c + (1 - g2) nu^2, nu = ||g||, q1 = g1 sc
                  g = g / nu * [b / (1 - q1^u)] / (sqrt(c / (1 - g2^u)) + eps)
        reset:    if n mod interval == 0: m = v = 0, t = 1;   then Adam with b1 sc

    sc = 1, or with `total_steps` N falls by cosine from 1 to `scale_min`. `code_compat` reproduces the release: the
    call that resets still uses the old moments (with t = 1) before dropping them, and u is t, so a reset inflates the
    cap about 500 times and disables AdaClip for a while. For RL prefer `norm` false (ours): AdaGN makes the size of an
    update independent of the gradient's, so a batch with tiny advantages moves as far as any other.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gammas: tuple[float, float, float] = (0.7, 0.9, 0.999),
        interval: int = 1000,
        total_steps: int | None = None,
        scale_min: float = 0.5,
        norm: bool = True,
        code_compat: bool = False,
    ) -> None:
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, gammas=gammas, interval=interval)
        own = dict(total_steps=total_steps, scale_min=scale_min, norm=norm, code_compat=code_compat)
        super().__init__(params, {**settings, **own, "calls": 0, "moment_calls": 0, "tracker_calls": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["calls"] += 1
            group["moment_calls"] += 1
            group["tracker_calls"] += 1
            reset = group["interval"] > 0 and group["calls"] % group["interval"] == 0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, reset)
            if reset:
                group["moment_calls"] = 1
                group["tracker_calls"] = 1 if group["code_compat"] else group["tracker_calls"]
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], reset: bool) -> None:
        state = self.state[parameter]
        if not state:
            state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            for tracker in ("maximum", "norm", "norm2"):
                state[tracker] = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        scale = self._momentum_scale(group)
        assert parameter.grad is not None
        gradient = self._adaclip(parameter.grad, state, group)
        if group["norm"]:
            gradient = self._adagn(gradient, state, group, scale)
        if reset and not group["code_compat"]:
            state["m"].zero_(), state["v"].zero_()
        self._adam(parameter, gradient, state, group, scale, calls=1 if reset else group["moment_calls"])
        if reset and group["code_compat"]:
            state["m"].zero_(), state["v"].zero_()

    @staticmethod
    def _momentum_scale(group: dict[str, Any]) -> float:
        total, low = group["total_steps"], group["scale_min"]
        if total is None:
            return 1.0
        return float(low + (1 - low) * 0.5 * (1 + math.cos(math.pi * group["calls"] / (total + 1))))

    @staticmethod
    def _adaclip(gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        gamma3 = group["gammas"][2]
        size = _whole(gradient.abs().max())
        state["maximum"].mul_(gamma3).add_(size, alpha=1 - gamma3)
        cap = state["cap"] = state["maximum"] / (1 - gamma3 ** group["tracker_calls"])
        return torch.where(gradient.abs() > cap, gradient / size * cap, gradient)

    @staticmethod
    def _adagn(gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], scale: float) -> Tensor:
        gamma1, gamma2, u = group["gammas"][0] * scale, group["gammas"][1], group["tracker_calls"]
        norm = _whole((gradient**2).sum()).sqrt()
        state["norm"].mul_(gamma1).add_(norm, alpha=1 - gamma1)
        state["norm2"].mul_(gamma2).add_(norm**2, alpha=1 - gamma2)
        spread = (state["norm2"] / (1 - gamma2**u)).sqrt() + group["eps"]
        target = state["target"] = state["norm"] / (1 - gamma1**u) / spread
        return torch.where(norm > 0, gradient / norm * target, gradient)

    @staticmethod
    def _adam(
        parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], scale: float, calls: int
    ) -> None:
        beta1, beta2 = group["betas"][0] * scale, group["betas"][1]
        state["m"].lerp_(gradient, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = state["v"].sqrt().div_(math.sqrt(1 - beta2**calls)).add_(group["eps"])
        parameter.addcdiv_(state["m"], spread, value=-group["lr"] / (1 - beta1**calls))
