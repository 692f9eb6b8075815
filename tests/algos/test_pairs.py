"""Losses on pairs as rows: the vectors' gradients through the composed objective, and what makes no pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algos.batch import Batch
from algos.loss import advantages, late, loss
from algos.methods import resolve
from algos.metrics import derived

FOLDER = Path(__file__).parents[1] / "vectors" / "reweighting"
NAMES = ("dpo", "ipo", "simpo", "redi")


def cases() -> list[Any]:
    found = []
    for name in NAMES:
        for case in json.loads((FOLDER / f"{name}.json").read_text())["cases"]:
            found.append(pytest.param(name, case, id=case["id"]))
    return found


def rows(inputs: dict[str, Any], kind: str, width: int) -> Tensor:
    """[2n, T] log-probs whose sums are the vectors' (the whole sum on the first token); rejected rows come first."""
    sums = torch.tensor([inputs[f"{kind}_l"], inputs[f"{kind}_w"]], dtype=torch.float64).flatten()
    return torch.nn.functional.pad(sums[:, None], (0, width - 1))


def lengths(inputs: dict[str, Any]) -> list[int]:
    count = len(inputs["logp_w"])
    return [*inputs.get("len_l", [1] * count), *inputs.get("len_w", [1] * count)]


def step(inputs: dict[str, Any]) -> tuple[Batch, Tensor]:
    count, long = len(inputs["logp_w"]), max(lengths(inputs))
    mask = torch.arange(long) < torch.tensor(lengths(inputs))[:, None]
    batch = Batch(
        mask=mask,
        group=torch.arange(count).repeat(2),
        rewards=torch.tensor([0.0, 1.0]).repeat_interleave(count),
        truncated=torch.zeros(2 * count).bool(),
        ref_logprobs=rows(inputs, "ref", long) if "ref_w" in inputs else None,
    )
    return batch, rows(inputs, "logp", long)


@pytest.mark.parametrize(("name", "case"), cases())
def test_the_composed_gradient_is_that_of_the_vectors(name: str, case: dict[str, Any]) -> None:
    options = {k: v for k, v in case["params"].items() if k != "kind"}
    if name in ("dpo", "ipo"):
        options["length_average"] = bool(options.pop("length_average", False))
    method = resolve({"row": name, "advantage": {name: options}})
    batch, logprobs = step(case["inputs"])
    logprobs.requires_grad_()
    loss(method, late(method, advantages(method, batch), logprobs), logprobs).loss.backward()
    count = len(case["inputs"]["logp_w"])
    for side, part in (("l", slice(0, count)), ("w", slice(count, None))):
        wanted = torch.tensor(case["expected"]["grad"][f"logp_{side}"], dtype=torch.float64)
        assert torch.allclose(logprobs.grad[part, 0], wanted, rtol=1e-9, atol=1e-12)
        valid = batch.mask[part]
        # Every token of a row has the gradient of the sum.
        assert torch.allclose(logprobs.grad[part][valid], wanted[:, None].expand(valid.shape)[valid], rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_ties_lone_rows_and_empty_sides_are_no_pairs(name: str) -> None:
    """Pairs: (0, 1) is one, (2, 3) ties, 4 is alone, 5 of (5, 6) has no tokens."""
    mask = torch.ones(7, 2).bool()
    mask[5] = False
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    base = -torch.rand(7, 2, generator=torch.Generator().manual_seed(0)).double()
    batch = Batch(mask=mask, group=torch.tensor([0, 0, 1, 1, 2, 3, 3]), rewards=rewards, ref_logprobs=base)
    method = resolve(name)
    logprobs = (base + 0.1).requires_grad_()
    ready = late(method, advantages(method, batch), logprobs)
    loss(method, ready, logprobs).loss.backward()
    assert (logprobs.grad[2:] == 0).all() and (logprobs.grad[1] < 0).all() and (logprobs.grad[0] > 0).all()
    said = derived({key: (total / count).item() for key, (total, count) in ready.metrics.items() if "pref" in key})
    assert set(said) == {f"preference/{key}" for key in ("margin", "accuracy", "chosen", "rejected")}
    assert said["preference/margin"] == pytest.approx(said["preference/chosen"] - said["preference/rejected"])
