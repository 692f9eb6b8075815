"""What is kept elsewhere comes back the same: gradients and updates to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from core.config import ModelConfig
from core.learner_config import OptimizerConfig
from learner import offload
from learner.collate import Micro, collate
from learner.model import load_policy
from learner.optim import Optimizer
from learner.ranks import Ranks
from tests.learner import samples

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_go_and_parameters_stay(tiny: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 64)
    sent: list[torch.Tensor] = []
    send = offload._sender(CPU)
    monkeypatch.setattr(offload, "_sender", lambda where: lambda t: sent.append(t) or send(t))
    _, sequences = collate(samples.groups(prompts=2))
    micro, gradients = Micro.of(sequences, list(range(8)), CPU), []
    path = str(tiny)
    for where in (None, CPU):
        policy = load_policy(
            ModelConfig(path=path), path, Ranks(), temperature=1.0, chunk=64, checkpointing=checkpointing
        )
        with offload.saved_elsewhere(where):
            logprobs, _ = policy(micro)
        assert bool(sent) == (where is not None)
        logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.equal(*gradients)
    moved = [t for t in sent if not isinstance(send(t), torch.Tensor)]
    owners = [t if t._base is None else t._base for t in moved]
    assert moved and not any(isinstance(t, nn.Parameter) for t in owners)


def test_moments_are_at_hand_in_a_step_and_in_a_checkpoint_and_away_otherwise() -> None:
    torch.manual_seed(0)
    here, meta = nn.Linear(3, 2), torch.device("meta")
    optimiser = torch.optim.AdamW(here.parameters())
    here(torch.ones(3)).sum().backward()
    optimiser.step()
    with offload.at_hand(optimiser, CPU, None):
        pass
    assert optimiser.state[here.weight]["exp_avg"].device == CPU  # it never leaves
    with offload.at_hand(optimiser, CPU, meta):
        assert optimiser.state[here.weight]["exp_avg"].device == CPU
    state = optimiser.state[here.weight]
    assert state["exp_avg"].device == state["exp_avg_sq"].device == meta
    assert state["step"].device == CPU  # a single number


def test_an_optimizer_that_offloads_updates_the_same() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(3, 2)
    moved = copy.deepcopy(plain)
    for model, away in ((plain, None), (moved, CPU)):
        optimizer = Optimizer(OptimizerConfig(lr=0.1), model.named_parameters(), set(), away=away)
        for _ in range(3):
            model(torch.ones(3)).square().sum().backward()
            optimizer.step(1.0)
            optimizer.clear()
        assert {name for name, _ in optimizer.state()} >= {"weight/exp_avg", "bias/step"}
    assert torch.equal(plain.weight, moved.weight)
