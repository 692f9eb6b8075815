"""Learning rates, AdamW, Muon, decay and clipping, with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.learner_config import OptimizerConfig
from learner.optim import Muon, Optimizer, orthogonal, schedule


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    # 10 steps, 2 of warm-up: then p = 0, 1/8, ... 7/8
    assert [schedule("constant", s, 10, 2) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert [schedule("linear", s, 10, 2) for s in (1, 2, 6, 10)] == [1.0, 1.0, 0.5, 0.0]
    assert [round(schedule("cosine", s, 10, 2), 6) for s in (2, 4, 6, 10, 99)] == [1.0, 0.853553, 0.5, 0.0, 0.0]
    assert schedule("cosine", 0, 0, 0) == 1.0  # a run of no steps divides by nothing


def parameters(**values: list) -> list[tuple[str, nn.Parameter]]:
    return [(n, nn.Parameter(torch.tensor(v))) for n, v in values.items()]


def test_adamw_moves_by_the_learning_rate_and_decays_matrices_only() -> None:
    named = parameters(matrix=[[1.0, 1.0]], norm=[1.0])
    optimiser = Optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5, max_grad_norm=None), named, set())
    for _, p in named:
        p.grad = torch.full_like(p, 3.0)
    optimiser.step(0.5)
    # First step of Adam: m / sqrt(v) = sign(g), so 0.1 * 0.5 down; the matrix is first decayed to 1 - 0.05 * 0.5.
    assert named[0][1].flatten().tolist() == pytest.approx([0.925, 0.925])
    assert named[1][1].item() == pytest.approx(0.95)


def test_the_gradient_is_clipped_to_the_global_norm() -> None:
    named = parameters(a=[[3.0]], b=[4.0])
    optimiser = Optimizer(OptimizerConfig(max_grad_norm=1.0), named, set())
    for _, p in named:
        p.grad = p.detach().clone()
    assert optimiser.clip().item() == pytest.approx(5.0)
    assert [p.grad.item() for _, p in named] == pytest.approx([0.6, 0.8])


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    named = parameters(embed=[[1.0, 2.0]], block=[[1.0, 2.0], [3.0, 4.0]], norm=[1.0])
    optimiser = Optimizer(OptimizerConfig(name="muon"), named, {"block", "norm"})
    assert {n for n, _ in optimiser.state()} == {
        "block/momentum_buffer",
        *(f"{p}/{k}" for p in ("embed", "norm") for k in ("step", "exp_avg", "exp_avg_sq")),
    }


def test_muon_makes_the_update_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((8, 8), (4, 16), (16, 4)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
        assert singular.min() > 0.6 and singular.max() < 1.3


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_muon_is_torch_muon_bit_for_bit(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    mine, torchs = Muon([ours], lr=0.1, weight_decay=0.01), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01)
    mine.state[ours] = {"momentum_buffer": torch.zeros(shape)}
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    assert torch.equal(ours, theirs)
