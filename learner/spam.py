"""SPAM and Stable-SPAM: Adam for training with gradient spikes.

Both are ordinary `torch.optim.Optimizer`s. All that a checkpoint needs stands in `state`, from the start on: moments,
trackers, and the count of calls, from which the place within an interval follows. They are elementwise apart from
Stable-SPAM's maximum and norm of each tensor, which are taken over all shards of a sharded parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def _whole(value: Tensor) -> Tensor:
    """A reduction over a sharded tensor, combined over its shards; other tensors as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class _Spiky(torch.optim.Optimizer):
    """What the two share: state from the start on, one count of calls for all parameters, the walk over them."""

    trackers: tuple[str, ...] = ()  # names of scalars per parameter, beside the moments m and v

    def __init__(self, params: Iterable[Any], settings: dict[str, Any]) -> None:
        self.last: dict[Tensor, dict[str, Tensor]] = {}  # of the latest call, per parameter: for metrics, not state
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, and make the state of its parameters."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p] = {"step": torch.tensor(0.0), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            self.state[p] |= {name: torch.zeros((), dtype=p.dtype, device=p.device) for name in self.trackers}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1  # also without a gradient: the count is the optimizer's
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, state, group, int(state["step"]))
        return loss

    def _update(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], n: int) -> None:
        raise NotImplementedError


def _resets(group: dict[str, Any], n: int) -> bool:
    return group["interval"] > 0 and n % group["interval"] == 0


def _moments(state: dict[str, Tensor], gradient: Tensor, beta1: float, beta2: float) -> None:
    state["m"].lerp_(gradient, 1 - beta1)
    state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)


def _forget(state: dict[str, Tensor]) -> None:
    state["m"].zero_()
    state["v"].zero_()


class Spam(_Spiky):
    """SPAM: spike-aware Adam with momentum reset.

    "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", arXiv 2501.06842; run against the authors'
    code. Call n = 1, 2, ...; s calls since the last reset (past the warm-up before the first).

        reset:  if n mod interval == 0: m = v = 0, s = 0      (the bias correction keeps counting n, as released)
        scale:  q = 1 - 0.99 * 0.5 (1 + cos(pi s / (warmup + 1))) while s < warmup, else 1
        clip:   where g^2 > theta v: g = sign(g) sqrt(theta v), once n and n mod interval are at least grace
        m, v as in Adam;   p -= lr sqrt(1 - b2^n) / (1 - b1^n) q m / (sqrt(v) + eps);   p -= lr weight_decay p

    `theta` 0 turns clipping off, `interval` 0 the resets (ours): both off is Adam. With small learning rates and fresh
    data in every minibatch use an interval of 200 to 500 (ours). An entry whose v is still zero is
    not clipped (ours): the release erases its gradient, now and for ever.
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
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, adam | dict(theta=theta, interval=interval, warmup=warmup, grace=grace))

    def _update(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], n: int) -> None:
        beta1, beta2 = group["betas"]
        if _resets(group, n):
            _forget(state)
        elif self._clips(group, n):
            bound = group["theta"] * state["v"]
            spiked = (gradient**2 > bound) & (state["v"] > 0)
            gradient = torch.where(spiked, gradient.sign() * bound.sqrt(), gradient)
            self.last[p] = {"clipped": spiked.sum()}
        _moments(state, gradient, beta1, beta2)
        rate = group["lr"] * math.sqrt(1 - beta2**n) / (1 - beta1**n) * self.scale(group, n)
        p.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-rate)
        p.mul_(1 - group["lr"] * group["weight_decay"])

    @staticmethod
    def scale(group: dict[str, Any], n: int) -> float:
        """The factor q of call n: from 0.01 to 1 in the `warmup` calls after a reset."""
        interval, warmup = group["interval"], group["warmup"]
        since = n % interval if 0 < interval <= n else warmup
        return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / (warmup + 1))) if since < warmup else 1.0

    @staticmethod
    def _clips(group: dict[str, Any], n: int) -> bool:
        interval, grace = group["interval"], group["grace"]
        settled = interval <= 0 or n % interval >= grace  # v is not informative right after a reset
        return bool(group["theta"] > 0 and n >= grace and settled)

    def metrics(self) -> dict[str, float]:
        """What to log after a step: the warm-up scale, and how many gradient entries were clipped."""
        group = self.param_groups[0]
        calls = int(self.state[group["params"][0]]["step"])
        clipped = sum(float(_whole(seen["clipped"])) for seen in self.last.values())
        return {"optim/spam_scale": self.scale(group, calls), "optim/spam_clipped": clipped}


class StableSpam(_Spiky):
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

    trackers = ("maximum", "norm", "norm2")

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
        adam = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, interval=interval)
        own = dict(gammas=gammas, total_steps=total_steps, scale_min=scale_min, norm=norm, code_compat=code_compat)
        super().__init__(params, adam | own)

    def _update(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], n: int) -> None:
        interval, reset, scale = group["interval"], _resets(group, n), self._momentum_scale(group, n)
        seen = self.last[p] = {}
        p.mul_(1 - group["lr"] * group["weight_decay"])
        shared_count = group["code_compat"] and 0 < interval < n  # there the trackers restart counting at a reset
        u = (n - 1) % interval + 2 if shared_count else n
        gradient = self._adaclip(gradient, state, seen, group, u)
        if group["norm"]:
            gradient = self._adagn(gradient, state, seen, group, u, scale)
        if reset and not group["code_compat"]:
            _forget(state)
        beta1, beta2 = group["betas"][0] * scale, group["betas"][1]
        t = n % interval + 1 if 0 < interval <= n else n
        _moments(state, gradient, beta1, beta2)
        spread = state["v"].sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
        p.addcdiv_(state["m"], spread, value=-group["lr"] / (1 - beta1**t))
        if reset and group["code_compat"]:
            _forget(state)

    @staticmethod
    def _momentum_scale(group: dict[str, Any], n: int) -> float:
        total, low = group["total_steps"], group["scale_min"]
        if total is None:
            return 1.0
        return float(low + (1 - low) * 0.5 * (1 + math.cos(math.pi * n / (total + 1))))

    @staticmethod
    def _adaclip(
        gradient: Tensor, state: dict[str, Tensor], seen: dict[str, Tensor], group: dict[str, Any], u: int
    ) -> Tensor:
        gamma3 = group["gammas"][2]
        size = _whole(gradient.abs().max())
        state["maximum"].mul_(gamma3).add_(size, alpha=1 - gamma3)
        cap = seen["cap"] = state["maximum"] / (1 - gamma3**u)
        return torch.where(gradient.abs() > cap, gradient / size * cap, gradient)

    @staticmethod
    def _adagn(
        gradient: Tensor, state: dict[str, Tensor], seen: dict[str, Tensor], group: dict[str, Any], u: int, scale: float
    ) -> Tensor:
        gamma1, gamma2 = group["gammas"][0] * scale, group["gammas"][1]
        norm = _whole((gradient**2).sum()).sqrt()
        state["norm"].mul_(gamma1).add_(norm, alpha=1 - gamma1)
        state["norm2"].mul_(gamma2).add_(norm**2, alpha=1 - gamma2)
        spread = (state["norm2"] / (1 - gamma2**u)).sqrt() + group["eps"]
        target = seen["target"] = state["norm"] / (1 - gamma1**u) / spread
        return torch.where(norm > 0, gradient / norm * target, gradient)

    def metrics(self) -> dict[str, float]:
        """What to log after a step: the largest spike cap and the mean norm target over the parameters."""
        caps = [float(seen["cap"]) for seen in self.last.values()]
        targets = [float(seen["target"]) for seen in self.last.values() if "target" in seen]
        found = {"optim/spike_cap": max(caps, default=0.0)}
        return found | ({"optim/norm_target": sum(targets) / len(targets)} if targets else {})
