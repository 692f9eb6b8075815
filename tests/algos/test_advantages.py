"""Advantages, corrections and KL: numbers worked out by hand, and the identities that tie methods together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from algos.batch import Batch
from algos.coupled import optimal_value
from algos.filters import one_pos_one_neg
from algos.loss import advantages, loss
from algos.methods import resolve
from algos.metrics import derived, mismatch
from core.errors import UserError
from tests.algos.steps import GROUP, MASK, REWARDS, RUNNABLE, current, ready, run, step


def per_row(name_or_spec, rewards: Tensor = REWARDS, group: Tensor = GROUP, **fields) -> Tensor:
    """One advantage per row, from rows of one token each."""
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    method = resolve({"advantage": name_or_spec})
    return advantages(method, Batch(mask=mask, group=group, rewards=rewards, **fields)).channels[0].advantages[:, 0]


def group_of(*rewards: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.int64)


def test_grpo_divides_by_the_sample_std():
    # mean 1/2, std = sqrt(4 * 1/4 / 3) = 0.5773503
    assert per_row({"group": {"eps": 0.0}}, *group_of(1, 0, 0, 1)).tolist() == pytest.approx(
        [0.8660254, -0.8660254, -0.8660254, 0.8660254]
    )


def test_ngrpo_pushes_an_all_wrong_group_down():
    # Seven zeros and one imagined 1: mean 0.125, std 0.35355.
    got = per_row({"group": {"baseline": "virtual_max", "scale": "virtual_std", "eps": 0.0}}, *group_of(*[0] * 7))
    assert got.tolist() == pytest.approx([-0.3535534] * 7)


def test_maxrl_weighs_hard_prompts_by_one_over_the_pass_rate():
    assert per_row({"group": {"scale": "group_mean", "eps": 0.0}}, *group_of(1, 0, 0, 0)).tolist() == [3, -1, -1, -1]


def test_passk_trains_the_best_row_only_and_ties_give_nothing():
    assert per_row({"passk": {"scale": "none"}}, *group_of(0.2, 0.9, 0.5)).tolist() == pytest.approx([0, 0.4, 0])
    assert per_row({"passk": {"scale": "none"}}, *group_of(0.9, 0.9, 0.5)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "spec", ["group", {"group": {"scale": "none"}}, {"group": {"baseline": "leave_one_out"}}, "passk"]
)
def test_centred_advantages_ignore_a_shift_of_the_rewards(spec):
    torch.testing.assert_close(per_row(spec, REWARDS + 3.5), per_row(spec))


def test_group_std_ignores_the_scale_of_the_rewards():
    spec = {"group": {"eps": 0.0}}
    torch.testing.assert_close(per_row(spec, 7 * REWARDS), per_row(spec))


@pytest.mark.parametrize(
    "spec", ["group", {"group": {"scale": "none"}}, {"group": {"baseline": "leave_one_out"}}, "bnpo"]
)
def test_centred_advantages_sum_to_zero_in_every_group(spec):
    sums = torch.zeros(3).double().index_add(0, GROUP, per_row(spec))
    torch.testing.assert_close(sums, torch.zeros(3).double())


def test_rloo_is_dr_grpo_times_n_over_n_minus_one():
    loo = per_row({"group": {"baseline": "leave_one_out", "scale": "none"}})
    torch.testing.assert_close(loo, 3 / 2 * per_row({"group": {"scale": "none"}}))


def test_unscorable_rows_change_nothing_for_the_others():
    more, group = torch.cat([REWARDS, torch.tensor([torch.nan])]), torch.cat([GROUP, torch.tensor([1])])
    for spec in ["group", "bnpo", "passk", {"group": {"baseline": "batch_mean", "scale": "batch_std"}}]:
        got = per_row(spec, more, group)
        torch.testing.assert_close(got[:-1], per_row(spec))
        assert got[-1] == 0


def test_whitening_does_not_see_unscorable_rows():
    method = resolve("reinforce_pp_baseline")
    rewards = REWARDS.clone()
    rewards[2] = torch.nan
    batch = advantages(method, step(method, rewards=rewards))
    white = batch.channels[0].advantages[MASK & (torch.arange(9) != 2)[:, None]]
    assert white.mean().item() == pytest.approx(0) and white.var().item() == pytest.approx(1, rel=1e-6)
    assert (batch.channels[0].advantages[2] == 0).all()


@pytest.mark.parametrize(
    ("name", "factor", "says"),
    [
        ("nft", 2, r"nft is defined for rewards of 0 and 1 only, got values in \[0, 2\]"),
        ("drpo", 2, "drpo is defined for rewards of 0 and 1 only"),
        ("ngrpo", 2, r"baseline virtual_max takes rewards in \[-inf, 1\], got values in \[0, 2\]"),
        ("bnpo", -1, r"bnpo takes rewards in \[0, 1\], got values in \[-1, -?0\]"),
        ("maxrl", -1, r"scale group_mean takes rewards in \[0, inf\]"),
    ],
)
def test_rewards_outside_a_methods_domain_are_refused_with_the_reason(name, factor, says):
    method = RUNNABLE[name]
    batch = step(method, rewards=factor * REWARDS)
    with pytest.raises(UserError, match=says):
        ready(method, batch, current(batch))


def test_missing_components_are_left_out_and_components_weigh_as_told():
    method = RUNNABLE["gdpo"]
    rewards = torch.stack([REWARDS, 1 - REWARDS], dim=1)
    both = advantages(method, replace(step(method), rewards=rewards))
    torch.testing.assert_close(both.channels[0].advantages, torch.zeros(9, 6).double())  # opposite, so they cancel
    weights = torch.tensor([1.0, 0.0]).double()
    first = advantages(method, replace(step(method), rewards=rewards, reward_weights=weights))
    alone = advantages(method, replace(step(method), rewards=rewards[:, :1]))
    torch.testing.assert_close(first.channels[0].advantages, alone.channels[0].advantages)


def test_totals_of_components_are_their_weighted_sum_where_any_is_known():
    rewards = torch.tensor([[1.0, 2.0], [torch.nan, 2.0], [torch.nan, torch.nan]])
    batch = Batch(mask=MASK[:3], group=GROUP[:3], rewards=rewards, reward_weights=torch.tensor([1.0, 0.5]))
    assert batch.totals.tolist()[:2] == [2.0, 1.0] and batch.totals[2].isnan()


def test_filtered_groups_leave_every_denominator():
    rewards = torch.where(GROUP == 1, 1.0, REWARDS)  # group 1 is solved
    dapo = resolve({"row": "dapo", "shaping": "none"})
    batch = step(dapo, rewards=rewards)
    logprobs = current(batch)
    filtered, _ = run(dapo, batch, logprobs)
    others = GROUP != 1
    alone, _ = run(dapo, batch.rows(others), logprobs[others])
    torch.testing.assert_close(filtered.loss, alone.loss)
    assert advantages(dapo, batch).metrics["policy/filtered"][0] == 3


def test_dropping_truncated_rows_keeps_them_in_the_statistics():
    method = resolve({"row": "dr_grpo", "modifiers": ["drop_truncated"]}, context={"max_tokens": 8})
    batch = advantages(method, step(method))
    plain = advantages(RUNNABLE["dr_grpo"], step(method))
    torch.testing.assert_close(batch.channels[0].advantages, plain.channels[0].advantages)
    assert not batch.loss_mask[6].any() and batch.loss_mask[[0, 1, 2, 3, 4, 5, 7, 8]].equal(
        MASK[[0, 1, 2, 3, 4, 5, 7, 8]]
    )


def test_one_right_and_one_wrong_row_of_each_mixed_group():
    keep = one_pos_one_neg(REWARDS, GROUP, 3)
    for g in range(3):
        assert REWARDS[keep & (g == GROUP)].sort().values.tolist() == [0, 1]
    assert not one_pos_one_neg(torch.ones(9).double(), GROUP, 3).any()


def test_without_mismatch_every_correction_is_one_and_nothing_is_rejected():
    for spec in (
        {"row": "dapo", "modifiers": ["tis", "geometric_rejection", "m2po"]},
        {"row": "dapo", "modifiers": ["icepop"]},
        {"row": "dapo", "modifiers": ["mis"]},
    ):
        method, plain = resolve(spec, context={"max_tokens": 8}), RUNNABLE["dapo"]
        batch = step(method)
        batch = replace(batch, rollout_logprobs=batch.old_logprobs)
        logprobs = current(batch)
        torch.testing.assert_close(run(method, batch, logprobs)[1], run(plain, batch, logprobs)[1])
        assert advantages(method, batch).metrics["policy/ess"][0] == MASK.sum()


def test_rejection_shrinks_the_step_or_leaves_the_counts():
    spec = {"reject": [{"k1": {"level": "token", "low": 0.95, "high": 1.05}}], "surrogate": "reinforce"}
    outputs = {}
    for denominator in ("original", "kept"):
        method = resolve({**spec, "denominator": denominator})
        batch = step(method)
        outputs[denominator] = run(method, batch, current(batch))[0].loss
        share = advantages(method, batch).metrics["policy/rejected"]
        kept = 1 - (share[0] / share[1])
    assert 0.2 < kept < 0.8
    torch.testing.assert_close(outputs["original"], kept * outputs["kept"])


def test_kl_ratio_gradient_is_the_importance_weighted_log_ratio():
    method = resolve({"advantage": "given", "kl": {"coef": 1.0, "estimator": "k3", "gradient": "ratio"}})
    batch = step(method, given_advantages=torch.zeros(9, 6).double())
    logprobs = current(batch)
    _, gradient = run(method, batch, logprobs)
    want = (logprobs - batch.old_logprobs).exp() * (logprobs - batch.ref_logprobs) / MASK.sum()
    torch.testing.assert_close(gradient, torch.where(MASK, want, 0.0))


def test_corrections_do_not_weigh_the_kl_term():
    spec = {"advantage": "given", "kl": {"coef": 1.0}, "modifiers": ["tis"]}
    method, plain = resolve(spec), resolve({**spec, "modifiers": []})
    batch = step(method, given_advantages=torch.zeros(9, 6).double())
    torch.testing.assert_close(run(method, batch, current(batch))[1], run(plain, batch, current(batch))[1])


def test_vtrace_on_policy_is_the_return_minus_the_value():
    method = RUNNABLE["vtrace"]
    batch = step(method, bootstrap=torch.zeros(9).double())
    batch = replace(batch, rollout_logprobs=batch.old_logprobs)
    got = ready(method, batch, batch.old_logprobs).channels[0].advantages
    torch.testing.assert_close(got, torch.where(MASK, REWARDS[:, None] - batch.values, 0.0))


def test_gvpo_has_the_gradient_of_its_squared_regression():
    method, beta = RUNNABLE["gvpo"], 0.1
    batch = step(method)
    logprobs = current(batch).requires_grad_()
    moved = beta * torch.where(MASK, logprobs - batch.old_logprobs, 0.0).sum(1)
    value = 0.0
    for g in range(3):
        rows = g == GROUP
        error = moved[rows] - moved[rows].mean().detach() - (REWARDS[rows] - REWARDS[rows].mean())
        value = value + (error**2).sum() / (2 * (3 - 1)) / 3
    (want,) = torch.autograd.grad(value, logprobs)
    torch.testing.assert_close(run(method, batch, logprobs.detach())[1], want)


def test_a_star_po_has_the_gradient_of_its_squared_regression():
    method, beta = RUNNABLE["a_star_po"], 1e-3
    batch = step(method)
    logprobs = current(batch).requires_grad_()
    moved = beta * torch.where(MASK, logprobs - batch.ref_logprobs, 0.0).sum(1)
    (want,) = torch.autograd.grad(((moved - (REWARDS - batch.baselines)) ** 2).mean(), logprobs)
    torch.testing.assert_close(run(method, batch, logprobs.detach())[1], want)


def test_flow_rl_has_the_gradient_of_its_squared_balance():
    method = RUNNABLE["flow_rl"]
    batch = step(method)
    logprobs, log_z = current(batch).requires_grad_(), batch.values[:, 0].clone().requires_grad_()
    advantage = ready(resolve({"surrogate": "reinforce"}), batch, logprobs.detach()).channels[0].advantages[:, 0]
    length = MASK.sum(1)
    mean, anchor = (torch.where(MASK, x, 0.0).sum(1) / length for x in (logprobs, batch.ref_logprobs))
    balance = log_z + mean - 15 * advantage - anchor
    weight = torch.where(MASK, logprobs - batch.old_logprobs, 0.0).sum(1).exp().clamp(max=10).detach()
    wanted, wanted_z = torch.autograd.grad((weight * balance**2).mean(), (logprobs, log_z))
    torch.testing.assert_close(run(method, batch, logprobs.detach())[1], wanted)
    # The critic is pulled where the balance would be 0, at the first token alone, by half the squared error.
    prepared = ready(method, batch, logprobs.detach())
    values = batch.values.clone().requires_grad_()
    loss(method, prepared, logprobs.detach(), values=values).loss.backward()
    torch.testing.assert_close(values.grad[:, 0] * MASK.sum() * 2 * weight / 9, wanted_z)
    assert (values.grad[:, 1:] == 0).all()


def test_optimal_value_lies_between_mean_and_maximum():
    # 0.5 log((e^2 + 1) / 2) = 0.5 * 1.43378
    assert optimal_value(torch.tensor([[1.0, 0.0]]).double()).item() == pytest.approx(
        0.5 * math.log((math.e**2 + 1) / 2)
    )


def test_disco_is_drpo_without_preference_for_short_answers():
    drpo = resolve({"row": "drpo", "advantage": {"drpo": {"length_lambda": 1e9, "max_length": 8.0}}})
    batch = step(drpo)
    logprobs = current(batch)
    torch.testing.assert_close(run(drpo, batch, logprobs)[1], run(RUNNABLE["disco"], batch, logprobs)[1])


def test_copo_with_the_local_channel_alone_is_grpo():
    copo = resolve({"row": "copo", "advantage": {"copo": {"gamma": 1e6, "rho": -1.0, "blend": "soft"}}})
    grpo = resolve({"row": "grpo", "kl": "none", "surrogate": {"ppo_clip": {"dual": 3.0}}})
    batch = step(copo)
    logprobs = current(batch)
    torch.testing.assert_close(run(copo, batch, logprobs)[1], run(grpo, batch, logprobs)[1])


def test_the_entropy_bonus_lowers_the_loss_by_its_mean():
    method = resolve({"row": "dapo", "entropy": {"coef": 0.5}, "shaping": "none"})
    batch = step(method)
    logprobs = current(batch)
    prepared = ready(method, batch, logprobs)
    entropy = torch.full((9, 6), 2.0, dtype=torch.float64, requires_grad=True)
    with_bonus = loss(method, prepared, logprobs, entropy=entropy).loss
    controlled = loss(method, replace(prepared, entropy_coef=0.0), logprobs, entropy=entropy).loss
    assert (controlled - with_bonus).item() == pytest.approx(0.5 * 2.0)
    with_bonus.backward()
    torch.testing.assert_close(entropy.grad, torch.where(MASK, -0.5 / MASK.sum(), 0.0).double())


def test_the_value_loss_pulls_values_to_the_returns():
    method = resolve({"row": "ppo", "shaping": "none", "advantage": {"gae": {"lam": 1.0}}})
    batch = step(method)
    prepared = ready(method, batch, batch.old_logprobs)
    torch.testing.assert_close(
        prepared.returns, torch.where(MASK, REWARDS[:, None].expand(9, 6), 0.0)
    )  # gamma = lam = 1
    values = batch.values.clone().requires_grad_()
    loss(method, prepared, batch.old_logprobs, values=values).loss.backward()
    want = torch.where(MASK, batch.values - REWARDS[:, None], 0.0) / MASK.sum()
    torch.testing.assert_close(values.grad, want)


COMPARED = [("remax", "greedy_rewards"), ("spo", "baselines"), ("a_star_po", "baselines")]


@pytest.mark.parametrize(("name", "field"), COMPARED)
def test_what_a_completion_is_compared_with_may_be_missing(name, field):
    """Its row gets no gradient, the others exactly the one they have without it."""
    method = RUNNABLE[name]
    if method.whiten:
        method = replace(method, whiten=None)
    method = replace(method, memory=())
    batch = step(method)
    logprobs = current(batch)
    whole = run(method, batch, logprobs)[1]
    missing = getattr(batch, field).clone()
    missing[3] = torch.nan
    part = run(method, replace(batch, **{field: missing}), logprobs)[1]
    others = torch.arange(9) != 3
    torch.testing.assert_close(part[others], whole[others])
    assert (part[3] == 0).all()


def test_mismatch_is_told_once_and_only_while_the_weights_are_the_old_ones():
    method = RUNNABLE["bypass_ppo"]  # it needs no old policy
    batch = replace(step(method), old_logprobs=None)
    base = current(step(method))
    fresh, moved = (run(method, replace(batch, moved=m), base)[0].metrics for m in (False, True))
    assert {"policy/mismatch_kl", "policy/kl_old"} <= set(fresh)
    assert not {"policy/mismatch_kl", "policy/kl_old"} & set(moved)
    told = resolve({"row": "dapo", "shaping": "none", "modifiers": ["tis"]})
    assert "policy/mismatch_kl" in ready(told, step(told), base).metrics
    assert "policy/mismatch_kl" not in run(told, step(told), base)[0].metrics


def test_effective_samples_and_mismatch_are_told_by_lag():
    """Two tokens at lag 0 with ratio 1, two at lag 3 with ratios 1 and 3: (2 / 2)^2 and (4 / 2)^2 / (10 / 2) = 0.8."""
    rollout = torch.full((2, 2), -2.0).double()
    old = rollout + torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    pairs = mismatch(old, rollout, torch.ones(2, 2).bool(), lag=torch.tensor([[0, 0], [3, 3]]))
    found = derived({name: (total / count).item() for name, (total, count) in pairs.items()})
    assert found["policy/ess_raw_lag_0"] == pytest.approx(1.0) and found["policy/mismatch_kl_lag_0"] == 0.0
    assert found["policy/ess_raw_lag_3"] == pytest.approx(0.8)
    assert found["policy/ess_raw"] == pytest.approx((6 / 4) ** 2 / (12 / 4))
    assert found["policy/mismatch_kl_lag_3"] == pytest.approx((3 - 1 - math.log(3)) / 2)
    assert not any("moment" in name for name in found)
    onpolicy = mismatch(old, rollout, torch.ones(2, 2).bool(), lag=torch.zeros(2, 2).long())
    assert not any("lag" in name for name in onpolicy)
