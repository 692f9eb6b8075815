"""What must hold for every row of the table, and for every registered part."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from algos.batch import Batch
from algos.docs import page
from algos.loss import advantages, loss
from algos.method import PIECES
from algos.metrics import METRICS, derived
from tests.algos.steps import GROUP, MASK, RUNNABLE, current, extras, parts_of, ready, run, step


def test_every_registered_part_is_in_one_of_them():
    tested = {pair for method in RUNNABLE.values() for pair in parts_of(method)}
    assert tested == {(piece, part) for piece in PIECES for part in PIECES[piece].registry}


rows = pytest.mark.parametrize("name", RUNNABLE)
RESAMPLED = {"oreal", "clip_cov"}  # they draw rows or tokens at random, so another order draws others


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def padded(batch: Batch, junk: float) -> Batch:
    """Two more columns and every masked cell filled with junk."""
    wide: dict[str, Tensor] = {"mask": torch.nn.functional.pad(batch.mask, (0, 2), value=False)}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.shape == MASK.shape and value.is_floating_point():
            wide[field.name] = torch.nn.functional.pad(value.masked_fill(~batch.mask, junk), (0, 2), value=junk)
    return replace(batch, **wide, versions=torch.nn.functional.pad(batch.versions, (0, 2)))


@rows
@pytest.mark.parametrize("junk", [torch.nan, -torch.inf, torch.inf])
def test_padding_and_masked_cells_change_nothing(name, junk):
    method = RUNNABLE[name]
    batch = step(method)
    logprobs = current(batch)
    output, gradient = run(method, batch, logprobs)
    wide = torch.nn.functional.pad(logprobs.masked_fill(~MASK, junk), (0, 2), value=junk)
    other, padded_gradient = run(method, padded(batch, junk), wide)
    close(other.loss, output.loss)
    close(padded_gradient[:, :6], gradient)
    assert (padded_gradient[:, 6:] == 0).all() and (gradient[~MASK] == 0).all()


@rows
def test_parts_of_any_split_add_up(name):
    method = RUNNABLE[name]
    batch = step(method)
    logprobs = current(batch)
    whole, gradient = run(method, batch, logprobs)
    prepared = ready(method, batch, logprobs)
    leaf = logprobs.clone().requires_grad_()
    metrics: dict[str, Tensor] = {}
    for index in (torch.tensor([4]), torch.tensor([0, 8, 2]), torch.tensor([7, 1, 3, 5, 6])):
        part = loss(method, prepared.rows(index), leaf[index], **extras(method, leaf[index]))
        part.loss.backward()
        for key, (total, _) in part.metrics.items():
            metrics[key] = metrics.get(key, 0) + total
    close(leaf.grad, gradient)
    for key, total in metrics.items():
        close(total, whole.metrics[key][0])


@rows
def test_the_order_of_rows_does_not_matter(name):
    if name in RESAMPLED:
        pytest.skip("draws at random")
    method = RUNNABLE[name]
    batch = step(method)
    logprobs = current(batch)
    output, gradient = run(method, batch, logprobs)
    order = torch.tensor([3, 7, 0, 8, 1, 5, 2, 6, 4])
    shuffled, shuffled_gradient = run(method, batch.rows(order), logprobs[order])
    close(shuffled.loss, output.loss)
    close(shuffled_gradient, gradient[order])


@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("far", [80.0, -80.0, 1000.0, -1000.0])
def test_extreme_ratios_stay_finite(name, far, dtype):
    method = RUNNABLE[name]
    batch = step(method, dtype=dtype)
    output, gradient = run(method, batch, (batch.old_logprobs + far * torch.where(MASK, 1, -1)).to(dtype))
    assert output.loss.isfinite() and gradient.isfinite().all()
    assert all(total.isfinite() and count.isfinite() for total, count in output.metrics.values())


@rows
def test_a_step_without_tokens_is_zero_and_still_on_the_graph(name):
    method = RUNNABLE[name]
    batch = step(method, mask=torch.zeros_like(MASK))
    output, gradient = run(method, batch, current(batch))
    assert output.loss == 0 and output.loss.grad_fn is not None and (gradient == 0).all()


@rows
def test_a_row_without_tokens_and_unscorable_rows_are_harmless(name):
    method = RUNNABLE[name]
    mask = MASK.clone()
    mask[3] = False
    rewards = torch.tensor([1.0, 0, torch.nan, 1, torch.nan, 1, 0, torch.nan, torch.nan]).double()
    batch = step(method, mask=mask, rewards=rewards)
    output, gradient = run(method, batch, current(batch))
    assert output.loss.isfinite() and gradient.isfinite().all() and (gradient[3] == 0).all()


@rows
def test_groups_of_one_stay_finite(name):
    method = RUNNABLE[name]
    batch = step(method, group=torch.arange(9))
    output, gradient = run(method, batch, current(batch))
    assert output.loss.isfinite() and gradient.isfinite().all()


def centred(name: str) -> bool:
    """The advantage compares with the group and nothing else moves it or adds a gradient."""
    method = RUNNABLE[name]
    part = method.advantage
    peers = part.name in ("passk", "bnpo", "drpo") or (
        part.name == "group" and part.option("baseline") in ("group_mean", "leave_one_out", "length_weighted")
    )
    extra = method.whiten or method.kl or method.shaping or method.entropy or method.surrogate.name in ("dro", "kl_cov")
    return bool(peers and not extra)


@pytest.mark.parametrize("name", [name for name in RUNNABLE if centred(name)])
@pytest.mark.parametrize("reward", [0.7, 0.0, 1.0])
def test_groups_of_equal_rewards_have_no_gradient_in_float32(name, reward):
    method = RUNNABLE[name]
    batch = step(method, dtype=torch.float32, rewards=torch.full((9,), reward))
    _, gradient = run(method, batch, current(batch))
    assert (gradient == 0).all()


def test_the_centred_rows_include_the_well_known_ones():
    assert {"dr_grpo", "gspo", "cispo", "sapo", "bnpo", "gmpo", "opo", "gpg"} <= set(filter(centred, RUNNABLE))


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo", "reinforce_pp", "gdpo", "bnpo", "topr", "copo", "ppo"])
def test_minibatches_of_a_step_use_its_statistics_and_their_own_denominators(name):
    method = RUNNABLE[name]
    batch = advantages(method, step(method))
    half = batch.rows(GROUP < 2)
    close(half.channels[0].advantages, batch.channels[0].advantages[GROUP < 2])


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_metric_is_documented(name):
    method = RUNNABLE[name]
    batch = step(method)
    output, _ = run(method, batch, current(batch))
    pairs = {**ready(method, batch, current(batch)).metrics, **output.metrics}
    said = derived({metric: (total / count).item() for metric, (total, count) in pairs.items()})
    assert {re.sub(r"lag_\d+$", "lag_<n>", metric) for metric in said} <= set(METRICS)


def test_the_page_of_methods_is_that_of_the_code(request):
    written = (request.config.rootpath / "docs" / "methods.md").read_text(encoding="utf-8")
    assert written == page(), "stale: run `python -m algos.docs docs/methods.md`"
