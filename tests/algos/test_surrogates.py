"""A rule is its weight: dZ/dl = -A W(rho, sign A). W by hand, by autograd and by finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from algos.aggregation import Counts, aggregations
from algos.batch import Batch
from algos.loss import advantages, loss
from algos.methods import resolve
from algos.surrogates import surrogates
from tests.algos.steps import RUNNABLE, current, ready, run, step

RHO = (0.3, 0.75, 1.0, 1.25, 3.0)


def sapo_weight(rho: float, tau: float) -> float:
    p = 1 / (1 + math.exp(-tau * (rho - 1)))
    return 4 * p * (1 - p) * rho


# (surrogate spec, W for A > 0, W for A < 0) at the five ratios above.
WEIGHTS = {
    "reinforce": ("reinforce", [1] * 5, [1] * 5),
    "ratio": ("ratio", RHO, RHO),
    "ppo_clip": ({"ppo_clip": {"low": 0.2, "high": 0.3}}, [0.3, 0.75, 1, 1.25, 0], [0, 0, 1, 1.25, 3]),
    "dual": ({"ppo_clip": {"low": 0.2, "high": 0.3, "dual": 2}}, [0.3, 0.75, 1, 1.25, 0], [0, 0, 1, 1.25, 0]),
    "cispo": ({"cispo": {"low": 0.5, "high": 1}}, [0.5, 0.75, 1, 1.25, 2], [0.5, 0.75, 1, 1.25, 2]),
    "cispo_open": ({"cispo": {"low": None, "high": None}}, RHO, RHO),
    "topr": ("topr", [1] * 5, [0.3, 0.75, 1, 1, 1]),
    "sapo": ("sapo", [sapo_weight(r, 1.0) for r in RHO], [sapo_weight(r, 1.05) for r in RHO]),
    "vespo": (
        "vespo",
        [math.exp(3 + 2 * math.log(r) - 3 * r) for r in RHO],
        [math.exp(2 + 3 * math.log(r) - 2 * r) for r in RHO],
    ),
    # q = 0.2: p - q = -0.14, -0.05, 0, 0.05, 0.4 against 0.1 on both sides.
    "dppo_tv": ({"dppo_tv": {"low": 0.1, "high": 0.1, "cap": 1.2}}, [0.3, 0.75, 1, 1.2, 0], [0, 0.75, 1, 1.2, 1.2]),
    # D = 0.112, 0.009, 0, 0.007, 0.335.
    "dppo_kl": ({"dppo_kl": {"low": 0.05, "high": 0.05}}, [0.3, 0.75, 1, 1.25, 0], [0, 0.75, 1, 1.25, 3]),
    # Gradient of delta^2 / 2 is delta: W = 1 - delta / A with beta 1 and A = +-1.
    "dro": ({"dro": {"beta": 1.0}}, [1 - math.log(r) for r in RHO], [1 + math.log(r) for r in RHO]),
    "sign_split": ("sign_split", [1] * 5, [1] * 5),
    "log_clip": ({"log_clip": {"low": 0.4, "high": 0.4}}, [0.3, 0.75, 1, 1.25, 0], [0, 0.75, 1, 1.25, 3]),
}


def gradient(spec, sign: float, rho: float) -> torch.Tensor:
    """dZ/dl of one token that moved from probability 0.2 by the ratio rho, with advantage `sign`."""
    method = resolve({"advantage": "given", "surrogate": spec, "aggregation": "token_sum"})
    old = torch.full((1, 1), math.log(0.2), dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    mask, zero = one.bool(), torch.zeros(1, dtype=torch.float64)

    batch = Batch(mask=mask, group=zero.long(), rewards=zero, old_logprobs=old, given_advantages=sign * one)
    return run(method, batch, old + math.log(rho))[1]


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_gradient_is_minus_advantage_times_weight(name):
    spec, up, down = WEIGHTS[name]
    for sign, weights in ((1.0, up), (-1.0, down)):
        for rho, weight in zip(RHO, weights, strict=True):
            assert gradient(spec, sign, rho).item() == pytest.approx(-sign * weight, abs=1e-9), (sign, rho)


def test_every_rule_has_its_weight_tested():
    named = {spec if isinstance(spec, str) else next(iter(spec)) for spec, _, _ in WEIGHTS.values()}
    here = {name for name, rule in surrogates.items() if rule.__module__ == "algos.surrogates"}
    assert named == here - {"nft"}  # below, and in the vectors


DIFFERENTIABLE = ["grpo", "gspo", "luspo", "gmpo", "sapo", "rloo", "bnpo", "dro", "reinforce", "sft", "copo"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autograd_agrees_with_finite_differences(name):
    method = RUNNABLE[name]
    batch = step(method)
    logprobs = current(batch, spread=0.1)
    prepared = ready(method, batch, logprobs)
    _, exact = run(method, batch, logprobs)
    h = 1e-6
    for cell in [(0, 0), (3, 2), (6, 3)]:
        shift = torch.zeros_like(logprobs)
        shift[cell] = h
        up, down = (loss(method, prepared, logprobs + s * shift).loss for s in (1, -1))
        assert exact[cell].item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-5, abs=1e-8)


ON_POLICY = ["ratio", "ppo_clip", "sapo", "cispo", "topr", "vespo", "dppo_tv", "dppo_kl", "sign_split", "dro"]


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "prompt_mean"])
@pytest.mark.parametrize("name", ON_POLICY)
def test_at_ratio_one_every_rule_is_reinforce(name, mode):
    gradients = []
    for rule in (name, "reinforce"):
        method = resolve({"surrogate": rule, "aggregation": mode})
        batch = step(method)
        gradients.append(run(method, batch, batch.old_logprobs)[1])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "gmpo"])
def test_at_ratio_one_sequence_rules_are_reinforce_too(name):
    method, plain = RUNNABLE[name], resolve({"surrogate": "reinforce", "aggregation": "seq-mean-token-mean"})
    batch = step(method)
    output, gradient = run(method, batch, batch.old_logprobs)
    torch.testing.assert_close(gradient, run(plain, batch, batch.old_logprobs)[1])
    assert output.metrics["policy/clip_high"][0] == output.metrics["policy/clip_low"][0] == 0


def test_a_missing_old_policy_says_that_nothing_has_moved():
    method = RUNNABLE["dapo"]
    batch = step(method)
    known = run(method, batch, batch.old_logprobs)[1]
    output, unknown = run(method, step(method, old_logprobs=None), batch.old_logprobs)
    torch.testing.assert_close(unknown, known)
    # The mismatch with the rollout engine is reported by whoever knows the old policy first.
    early = advantages(method, batch).metrics["policy/mismatch_kl"]
    torch.testing.assert_close(output.metrics["policy/mismatch_kl"], early)


def test_gspo_token_is_gspo_when_the_advantage_is_constant_along_a_row():
    method = RUNNABLE["gspo"]
    batch = step(method)
    logprobs = current(batch, spread=0.002)
    for a, b in zip(run(method, batch, logprobs), run(RUNNABLE["gspo_token"], batch, logprobs), strict=True):
        torch.testing.assert_close(getattr(a, "loss", a), getattr(b, "loss", b))


@pytest.mark.parametrize("weight, scale", [(1, "none"), (2, "population")])
def test_nft_on_policy_is_a_group_centred_gradient(weight, scale):
    """prompt_weight 1: R - mean. prompt_weight 2: divided by the population std (ddof 0)."""
    nft = resolve({"row": "nft", "filter": "none", "surrogate": {"nft": {"prompt_weight": weight}}})
    group = {"scale": "none"} if scale == "none" else {"scale": "group_std", "ddof": 0, "eps": 0.0}
    plain = resolve(
        {
            "advantage": {"group": group},
            "surrogate": "reinforce",
            "aggregation": {"token_sum_constant": {"length_constant": 1000.0}},
        }
    )
    batch = step(nft)
    torch.testing.assert_close(run(nft, batch, batch.old_logprobs)[1], run(plain, batch, batch.old_logprobs)[1])


def test_aggregations_weigh_tokens_as_their_names_say():
    """Rows of 2 and 4 tokens, one prompt: weights of one token of each row."""

    counts = Counts.of(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(), torch.tensor([0, 0]))
    expected = {
        "token_mean": [1 / 6, 1 / 6],
        "token_sum": [1, 1],
        "seq_mean_token_mean": [1 / 4, 1 / 8],
        "seq_mean_token_sum": [1 / 2, 1 / 2],
        "prompt_mean": [1 / 6, 1 / 6],
    }
    for mode, weights in expected.items():
        assert aggregations[mode](counts).tolist() == pytest.approx(weights)
    assert aggregations["seq_mean_token_sum_norm"](counts, length_constant=8.0).tolist() == [1 / 16, 1 / 16]
    assert aggregations["token_sum_constant"](counts, length_constant=8.0).tolist() == [1 / 8, 1 / 8]
