"""SPAM and Stable-SPAM as optimizers: what they reduce to, what they clip, and that a checkpoint continues exactly.

Their numbers against the authors' code are in tests/algos/test_reweighting_vectors.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from core.learner_config import OptimizerConfig
from learner.optim import Optimizer
from learner.spam import Spam, StableSpam

OPTIMIZERS: dict[str, Any] = {
    "spam": lambda p: Spam(p, lr=0.01, theta=2.0, interval=4, warmup=3, grace=1, weight_decay=0.1),
    "stable": lambda p: StableSpam(p, lr=0.01, interval=4, total_steps=20, weight_decay=0.1),
    "stable as released": lambda p: StableSpam(p, lr=0.01, interval=4, code_compat=True),
    "stable without norm": lambda p: StableSpam(p, lr=0.01, interval=4, norm=False),
}


def gradients(steps: int, size: int = 4) -> torch.Tensor:
    noise = torch.randn(steps, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise[steps // 2] *= 100  # one spike
    return noise


def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: torch.Tensor) -> None:
    for g in grads:
        p.grad = g.clone()
        optimizer.step()


def zeros(size: int = 4) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=torch.float64))


def test_spam_without_clipping_and_resets_is_adam() -> None:
    ours, theirs, grads = zeros(), zeros(), gradients(12)
    run(Spam([ours], lr=0.01, theta=0.0, interval=0, eps=1e-12), ours, grads)
    # SPAM adds eps to sqrt(v) before the bias correction, Adam after it; with eps this small the two agree.
    run(torch.optim.Adam([theirs], lr=0.01, eps=1e-12), theirs, grads)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_stable_spam_is_adam_on_gradients_of_a_smoothed_norm() -> None:
    # gamma1 = gamma2 = 0 and gamma3 = 0: no memory, so the cap is max|g| and the norm target is nu / (nu + eps).
    ours, theirs, grads = zeros(), zeros(), gradients(12)
    run(StableSpam([ours], lr=0.01, gammas=(0.0, 0.0, 0.0), interval=0), ours, grads)
    run(torch.optim.Adam([theirs], lr=0.01), theirs, grads / grads.norm(dim=1, keepdim=True))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


def test_spam_clips_a_spike_to_theta_times_the_second_moment() -> None:
    # After one call with g = 1: v = 0.001. theta = 10: entries above sqrt(0.01) = 0.1 become 0.1.
    p = zeros(2)
    optimizer = Spam([p], lr=0.01, theta=10.0, interval=0, grace=2, betas=(0.0, 0.999))
    run(optimizer, p, torch.tensor([[1.0, 1.0], [50.0, -0.05]], dtype=torch.float64))
    assert optimizer.state[p]["m"].tolist() == pytest.approx([0.1, -0.05])
    assert optimizer.metrics() == {"optim/spam_scale": 1.0, "optim/spam_clipped": 1.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("cut", [3, 4, 6])
def test_a_reloaded_optimizer_continues_exactly(name: str, cut: int) -> None:
    grads, p, q = gradients(10), zeros(), zeros()
    whole = OPTIMIZERS[name]([p])
    run(whole, p, grads)

    first = OPTIMIZERS[name]([q])
    run(first, q, grads[:cut])
    second = OPTIMIZERS[name]([q])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, q, grads[cut:])
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_keep_their_own_settings_and_a_parameter_without_gradient_stays(name: str) -> None:
    slow, fast, still = zeros(), zeros(), zeros()
    optimizer = OPTIMIZERS[name]([{"params": [slow, still], "lr": 0.0}, {"params": [fast]}])
    for g in gradients(3):
        slow.grad, fast.grad = g.clone(), g.clone()
        optimizer.step()
    assert torch.equal(slow, zeros()) and torch.equal(still, zeros()) and not torch.equal(fast, zeros())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scheduler_and_low_precision_parameters_work(name: str) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = OPTIMIZERS[name]([p])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for g in gradients(6):
        p.grad = g.to(torch.bfloat16)
        optimizer.step()
        scheduler.step()
    assert p.isfinite().all() and p.abs().max() > 0


@pytest.mark.parametrize(("name", "kind"), [("spam", Spam), ("stable_spam", StableSpam)])
def test_the_config_chooses_them_and_their_state_is_the_checkpoints(name: str, kind: type) -> None:
    config = OptimizerConfig(name=name, lr=0.01, spikes={"interval": 7, "norm": True})
    optimizer = Optimizer(config, [("matrix", nn.Parameter(torch.ones(2, 2))), ("bias", zeros())], set())
    assert isinstance(optimizer.adam, kind) and {g["interval"] for g in optimizer.adam.param_groups} == {7}
    trackers = ("maximum", "norm", "norm2") if name == "stable_spam" else ()
    expected = {f"{p}/{entry}" for p in ("matrix", "bias") for entry in ("step", "m", "v", *trackers)}
    assert {entry for entry, _ in optimizer.state()} == expected
