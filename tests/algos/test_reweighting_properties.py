"""Each reweighting method with its strength at zero is the plain method, and its state survives a checkpoint."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from algos import compression, covariance, data_edits, demonstrations, entropy_control, grpo_guard, merging, preference
from algos import sample_weights as weights
from algos.aepo import EntropyAverage, mixed_batch
from algos.batch import select
from algos.masked import largest, masked_mean
from algos.prefix import prefix_advantages
from algos.steer import entropy_change, steer_weights
from algos.step_credit import awm_loss, awm_weights
from algos.surrogates import ppo_clip
from algos.tw_grpo import divergence_weights, group_divergence
from core.errors import UserError

B, T = 4, 6
MASK = torch.arange(T) < torch.tensor([6, 4, 1, 5]).unsqueeze(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LP, OLD, H, A = -random(B, T).abs(), -random(B, T, seed=1).abs(), random(B, T, seed=2).abs(), random(B, seed=3)
ONES = MASK.double()


def test_token_weights_that_are_switched_off_are_one() -> None:
    change = entropy_change(LP, OLD, H, A, MASK)
    assert torch.equal(steer_weights(change, MASK, w_min=1.0), ONES)
    assert torch.equal(divergence_weights(random(2, T).abs(), alpha=1.0), torch.ones(2, T, dtype=torch.float64))
    assert torch.equal(covariance.clip_cov_weights(torch.zeros(B, T).bool(), MASK).double(), ONES)
    assert not entropy_control.tea_coefficient(LP, A, MASK, alpha=0.0).any()
    assert torch.equal(entropy_control.entropy_top(H, MASK, ratio=1.0), MASK)
    assert torch.equal(entropy_control.entropy_sft_tokens(-LP, H, MASK, token_ratio=1.0), MASK)


def test_guard_without_drift_and_gradient_weight_is_plain_ppo() -> None:
    bucket = grpo_guard.position_buckets(MASK)
    guard = grpo_guard.guard_statistics(OLD, OLD, bucket, gradient_reweight=False)
    assert torch.equal(grpo_guard.guarded_log_ratio(LP, OLD, guard), select(MASK, LP - OLD))
    assert torch.equal(guard.of_tokens(guard.delta), ONES)


def test_guard_centres_each_bucket_and_equalises_its_spread() -> None:
    lp, old, mask = random(64, 32) * torch.arange(1, 33), torch.zeros(64, 32).double(), torch.ones(64, 32).bool()
    bucket = grpo_guard.position_buckets(mask, buckets=4)
    assert bucket[0].tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    z = grpo_guard.guarded_log_ratio(lp, old, grpo_guard.guard_statistics(lp, old, bucket, buckets=4))
    spreads = [z[bucket == b].std(correction=0).item() for b in range(4)]
    assert [z[bucket == b].mean().item() for b in range(4)] == pytest.approx([0.0] * 4, abs=1e-9)
    assert spreads == pytest.approx([lp.std(correction=0).item()] * 4)


def test_kl_cov_without_coefficient_is_the_unclipped_policy_gradient() -> None:
    advantage = A.unsqueeze(1).expand(B, T)
    loss = covariance.kl_cov((LP - OLD).exp(), LP - OLD, advantage, MASK, kl_coef=0.0)
    assert torch.allclose(loss, -advantage * (LP - OLD).exp())


def test_the_clip_cov_draw_repeats_from_its_seed_and_zeroes_candidates_only() -> None:
    candidates = MASK & (H > 0.3)
    draw = [
        covariance.clip_cov_weights(candidates, MASK, fraction=0.2, generator=torch.Generator().manual_seed(s))
        for s in (1, 1)
    ]
    assert torch.equal(draw[0], draw[1])
    zeroed = MASK & (draw[0] == 0)
    assert int(zeroed.sum()) == 3 and not (zeroed & ~candidates).any()  # int(0.2 * 16 tokens)


def test_disagreement_is_zero_where_a_group_agrees() -> None:
    q = random(1, 1, 3, 5).log_softmax(-1).expand(1, 4, 3, 5)
    assert group_divergence(q, torch.ones(1, 4, 3).bool()).tolist() == [[0.0, 0.0, 0.0]]
    # One row has ended: as released it counts as uniform and disagrees; present_only leaves it out.
    ended = torch.ones(1, 4, 3).bool()
    ended[0, 0, 2] = False
    assert group_divergence(q, ended)[0, 2] > 0 and group_divergence(q, ended, present_only=True)[0, 2] == 0


def test_awm_on_policy_is_the_advantage_weighted_likelihood() -> None:
    lp = LP.clone().requires_grad_()
    a = awm_weights(A, MASK)
    masked_mean(awm_loss(lp, a, MASK), MASK).backward()
    assert torch.allclose(lp.grad, -a / MASK.sum())
    assert torch.allclose(a[0, 0], A[0].clamp(-5, 5) / 5)


def test_sample_weights_of_infinite_temperature_are_uniform() -> None:
    losses = random(5).abs()
    for strategy in ("linupper", "quadratic", "extremes", "upper"):
        assert torch.allclose(
            weights.loss_weights(losses, 2000, strategy=strategy, temperature=1e9), torch.full((5,), 0.2).double()
        )
    assert torch.allclose(weights.kl_dro_weights(losses, lambda_=1e9), torch.full((5,), 0.2).double())
    assert weights.kl_dro_objective(losses, lambda_=1e6).item() == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_kl_dro_weights_are_the_best_on_the_simplex() -> None:
    losses = random(5)
    best = weights.kl_dro_primal(losses, weights.kl_dro_weights(losses))
    assert best == pytest.approx(weights.kl_dro_objective(losses))
    for seed in range(5):
        assert weights.kl_dro_primal(losses, random(5, seed=seed + 9).softmax(0)) < best


def test_initial_values_fit_a_line() -> None:
    states = torch.tensor([[0.0], [1.0], [2.0]])
    assert weights.initial_values(states, torch.tensor([1.0, 3.0, 5.0])).tolist() == pytest.approx([1.0, 3.0, 5.0])


def test_a_rescaler_learns_to_distrust_a_wrong_label() -> None:
    torch.manual_seed(0)
    rescaler = weights.Rescaler(1, hidden=4).double()
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    target, flags = (
        torch.tensor([1.0, -9.0]).double(),
        torch.tensor([[0.0], [1.0]]).double(),
    )  # the second label is wrong
    step = weights.meta_rescale(
        rescaler,
        lambda moved: (moved[0] - target) ** 2,
        lambda moved: (moved[0] - torch.ones(2).double()) ** 2,
        [theta],
        flags,
        flags,
        inner_lr=0.1,
        weighted_outer=False,
    )
    before = step.inner_weight.detach()
    gradients = torch.autograd.grad(step.objective, list(rescaler.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(rescaler.parameters(), gradients, strict=True):
            parameter -= 0.5 * gradient
    after = rescaler(flags).detach()
    assert after[1] - after[0] < before[1] - before[0]


def test_pair_losses_reduce_to_dpo() -> None:
    margin = random(6)
    h = random(6, seed=4)
    for form in ("target_margin", "coefficient"):
        assert torch.equal(preference.madpo_weights(h, form=form, c_min=1.0, c_max=1.0).weight, torch.ones(6).double())
    rule = preference.BetaDPO(a=0.0, filter=0.0)
    rule.update(margin)
    assert rule.draw(rule.sample_weight(margin)).tolist() == list(range(6))
    assert rule.batch_beta(margin, torch.arange(6)) == 0.1
    assert torch.equal(preference.redi(LP[0], OLD[0], alpha=0.0), -LP[0])
    assert preference.dpo(torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_a_beta_dpo_draw_has_its_size_even_when_few_weights_are_positive() -> None:
    rule = preference.BetaDPO(filter=0.5)
    assert rule.draw(torch.tensor([0.0, 0.0, 0.7, 0.0])).tolist() == [0, 2]
    drawn = rule.draw(torch.rand(8) + 0.1, generator=torch.Generator().manual_seed(0)).tolist()
    assert len(set(drawn)) == 4


def test_an_orthogonal_pair_of_gradients_is_not_entangled() -> None:
    found = preference.gradient_entanglement(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert (found.dot, found.chosen_falls, found.rejected_rises) == (0.0, False, False)
    # dot = 3 > |gw|^2 = 1: raising the margin lowers the chosen completion, unless its side weighs 4 times as much.
    gw, gl = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])
    assert preference.gradient_entanglement(gw, gl).chosen_falls
    assert not preference.gradient_entanglement(gw, gl, chosen_weight=4.0).chosen_falls


def test_luffy_without_demonstrations_is_ppo_and_prefix_rft_without_hybrid_rows_is_group_relative() -> None:
    off = torch.zeros(B, T).bool()
    loss = demonstrations.luffy_loss(LP, OLD, A, MASK, off, clip_low=0.2, clip_high=0.2)
    ratio = select(MASK, LP - OLD).exp()
    assert torch.equal(loss, select(MASK, ppo_clip(ratio, A.unsqueeze(1))))
    scores, group, none = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), torch.zeros(4).long()
    assert prefix_advantages(scores, group, none, none, MASK)[:, 0].tolist() == [0.5, -0.5, 0.0, 0.0]


def test_superhf_without_kl_is_cross_entropy() -> None:
    q = random(1, 2, 3).log_softmax(-1)
    found = demonstrations.superhf_loss(
        torch.tensor([[2, -100]]), q, random(1, 2, 3, seed=1).log_softmax(-1), kl_coef=0.0
    )
    assert found.loss == -q[0, 0, 2]


def test_aepo_without_good_rows_is_the_ordinary_batch() -> None:
    batch = mixed_batch(0.3, torch.zeros(3), torch.tensor([1.0, -1.0]))
    assert (batch.selected.tolist(), batch.kept.tolist(), batch.advantages.tolist()) == ([], [0, 1], [1.0, -1.0])
    drawn = mixed_batch(0.3, torch.ones(2), torch.zeros(6), alpha=0.5, generator=torch.Generator().manual_seed(0))
    assert len(drawn.kept) == 4 and drawn.weight.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]


def test_merging_keeps_types_ties_and_new_rows_and_refuses_strangers() -> None:
    embed = torch.tensor([[1.0], [2.0]]).bfloat16()
    base = {"model.embed_tokens.weight": embed, "lm_head.weight": embed, "steps": torch.tensor(3)}
    tuned = {name: torch.tensor([[3.0], [4.0], [9.0]]).bfloat16() for name in list(base)[:2]} | {
        "steps": torch.tensor(7)
    }
    merged = merging.bai_merge(base, [tuned], alpha=0.5)
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    assert merged["lm_head.weight"].tolist() == [[2.0], [3.0], [9.0]] and merged["steps"].item() == 7
    one = merging.bai_merge({"a": torch.zeros(2)}, [{"a": torch.ones(2)}], alpha=0.0)
    assert one["a"].tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match="relatives"):
        merging.bai_merge({"a": torch.zeros(2)}, [{"b": torch.zeros(2)}])
    with pytest.raises(UserError, match="sum to 1"):
        merging.bai_merge({"a": torch.zeros(2)}, [{"a": torch.zeros(2)}], weights=[0.7])


def test_the_failure_buffer_skips_prompts_without_demonstration_and_missing_rewards() -> None:
    buffer = demonstrations.FailureBuffer(sft_size=2, unique=True, cap=3)
    assert buffer.update(["a", "b", "c"], [[0, 0], [0, math.nan], [0, 0]], [True, True, False]) == (["a"], [])
    assert buffer.update(["a"], [[0, 0]]) == (["a"], []) and buffer.waiting == ["a"]
    assert buffer.update(list("wxyz"), [[0, 0]] * 4)[1] == ["w", "x"] and buffer.waiting == ["y"]


def test_thinking_splits_at_cue_words_and_keeps_its_text() -> None:
    text = "Add 2 and 3. Wait, check. But Butter stays."
    assert compression.split_steps(text) == ["Add 2 and 3. ", "Wait, check. ", "But Butter stays."]


def test_a_fenced_block_needs_its_closing_line() -> None:
    assert data_edits.has_code("```py\nx\n```") and data_edits.has_code("```\nx\n```")
    assert not data_edits.has_code("```python\nx```") and not data_edits.has_code("```bash\nx\n```")


def test_ties_go_to_the_lower_index() -> None:
    assert largest(torch.zeros(2, 3), torch.ones(2, 3).bool(), 2).tolist() == [[True, True, False], [False] * 3]


STATEFUL: dict[str, tuple[Any, Any]] = {
    "entropy coefficient": (entropy_control.EntropyCoefficient, lambda c, i: c.update([0.1, 0.3][i % 2])),
    "log entropy coefficient": (entropy_control.LogEntropyCoefficient, lambda c, i: c.update(0.1 * i)),
    "entropy average": (lambda: EntropyAverage(momentum=0.9), lambda c, i: c.update(0.1 * i)),
    "beta-DPO": (preference.BetaDPO, lambda c, i: (c.update(random(4, seed=i)), c.mean, c.std)),
    "KL-DRO": (weights.KlDroNormaliser, lambda c, i: c.weights(random(4, seed=i)).tolist()),
    "failures": (lambda: demonstrations.FailureBuffer(sft_size=3), lambda c, i: c.update([i, -i], [[0], [0]])),
    "lengths": (
        lambda: compression.LengthHistory(window=2),
        lambda c, i: (c.add([("gsm8k", "easy", float(i))]), c.lengths("gsm8k", "easy")),
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_reloaded_between_any_two_steps_continues_the_same(name: str) -> None:
    make, advance = STATEFUL[name]
    whole = make()
    expected = [advance(whole, i) for i in range(5)]
    current = make()
    for i in range(5):
        saved, current = copy.deepcopy(current.state_dict()), make()
        current.load_state_dict(saved)
        assert advance(current, i) == expected[i]
