"""What methods remember: numbers by hand, states that travel through JSON, and what may not be combined."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from algos.batch import Batch
from algos.loss import advantages, normalise, remember
from algos.memory import fills, memories
from algos.methods import resolve
from core.errors import UserError
from tests.algos.steps import MASK, RUNNABLE, current, ready, run, step


def batch_of(prompts: list[str], rewards: list[float]) -> Batch:
    rows = len(prompts)
    return Batch(
        mask=torch.ones(rows, 2).bool(),
        group=torch.arange(rows),
        rewards=torch.tensor(rewards).double(),
        prompts=tuple(prompts),
        old_logprobs=torch.full((rows, 2), -0.7),
        ref_logprobs=torch.full((rows, 2), -0.9),
        entropy=torch.full((rows, 2), 0.1),
    )


def test_the_tracker_compares_with_what_it_knew_before_and_then_learns() -> None:
    method = resolve("spo")
    first, states = remember(method, batch_of(["a", "a", "b"], [1.0, 0.0, 1.0]), [{}])
    assert first.baselines.tolist() == [0.5, 0.5, 0.5]
    # a: 0.875 * 0.5 + the mean 0.5 on both sides; b: 0.875 * 0.5 + 1 and 0.875 * 0.5 + 0
    assert states == [{"a": [0.9375, 0.9375], "b": [1.4375, 0.4375]}]
    second, states = remember(method, batch_of(["b", "c", "a"], [0.0, float("nan"), 1.0]), states)
    assert second.baselines.tolist() == pytest.approx([1.4375 / 1.875, 0.5, 0.5])
    assert "c" not in states[0]  # an unscorable completion says nothing of its prompt
    assert states[0]["b"] == pytest.approx([0.875 * 1.4375, 0.875 * 0.4375 + 1])


def test_the_tracker_refuses_rewards_outside_its_range() -> None:
    with pytest.raises(UserError, match=r"memory beta_tracker takes rewards in \[0, 1\]"):
        remember(resolve("spo"), batch_of(["a"], [2.0]), [{}])


def test_the_entropy_bonus_grows_below_the_target_and_is_off_above() -> None:
    method = resolve({"row": "dapo", "modifiers": [{"adaptive_entropy": {"target": 0.2, "delta": 0.001}}]})
    low = batch_of(["a"], [1.0])
    once, states = remember(method, low, [{}])
    twice, states = remember(method, low, states)
    above, states = remember(method, replace(low, entropy=torch.full((1, 2), 0.3)), states)
    assert [b.entropy_coef for b in (once, twice, above)] == pytest.approx([0.001, 0.002, 0.0])
    assert states == [{"value": pytest.approx(0.001), "enabled": False}]


def test_the_kl_coefficient_follows_its_target() -> None:
    spec = {"row": "grpo", "modifiers": [{"adaptive_kl": {"init": 0.1, "target": 0.1, "horizon": 10.0}}]}
    method = resolve(spec)
    batch, states = remember(method, batch_of(["a", "b"], [1.0, 0.0]), [{}])
    # KL = -0.7 + 0.9 = 0.2, twice the target: the error is clipped to 0.2; n / horizon = 2 / 10.
    assert batch.adapted_kl_coef == pytest.approx(0.1 * 1.04) and states == [{"beta": batch.adapted_kl_coef}]
    fixed = resolve({"row": "grpo", "kl": {"coef": batch.adapted_kl_coef}})
    both = step(fixed)
    mine = normalise(method, advantages(method, replace(both, adapted_kl_coef=batch.adapted_kl_coef)))
    theirs = normalise(fixed, advantages(fixed, both))
    assert mine.kl_coef == theirs.kl_coef
    with pytest.raises(UserError, match="adapts the coefficient of a KL term that is none"):
        resolve({"row": "dapo", "modifiers": ["adaptive_kl"]})


def test_aepo_reinforces_right_rows_as_if_drawn_hotter_when_the_entropy_is_low() -> None:
    method = RUNNABLE["aepo"]
    batch = replace(step(method), old_logprobs=torch.full((9, 6), -0.3).double())
    prepared = ready(method, batch, batch.old_logprobs)
    assert prepared.entropy_average == pytest.approx(0.3) and prepared.tempering == 1.2
    # a0 = min(|0.5 - 0.3|, 0.1) / (5 / 9) = 0.18; alpha = 0.18 / 1.18
    alpha = 0.18 / 1.18
    plain = ready(resolve({"surrogate": "ppo_clip"}), batch, batch.old_logprobs).channels[0].advantages
    boost = (batch.tempered_logprobs - batch.old_logprobs).exp() * (batch.rewards > 0.05)[:, None]
    expected = torch.where(MASK, (1 - alpha) * plain + alpha * boost, 0.0)
    torch.testing.assert_close(prepared.channels[0].advantages, expected)


READERS = {
    "beta_tracker": {"advantage": "tracker"},
    "adaptive_entropy": {"entropy": "bonus"},
    "log_entropy": {"entropy": "bonus"},
    "entropy_level": {"advantage": "aepo"},
    "adaptive_kl": {"kl": {"coef": 0.04}},
}


@pytest.mark.parametrize("name", memories)
def test_a_state_survives_json_between_any_two_steps(name: str) -> None:
    method = resolve({"memory": [name], **READERS[name]})
    straight, reloaded = [{}], [{}]
    for i in range(4):
        batch = batch_of(["a", "b"], [float(i % 2), 1.0])
        batch = replace(batch, entropy=batch.entropy * (1 + i), old_logprobs=batch.old_logprobs * (1 + i))
        one, straight = remember(method, batch, straight)
        other, reloaded = remember(method, batch, json.loads(json.dumps(reloaded)))
        for field in fills[name]:
            mine, theirs = getattr(one, field), getattr(other, field)
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert straight == reloaded


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"row": "dapo", "memory": ["adaptive_entropy"]}, "the coefficient of an entropy term that is none"),
        ({"entropy": "bonus", "memory": ["adaptive_entropy", "log_entropy"]}, "two memories fill entropy_coef"),
        ({"row": "aepo", "memory": "none"}, "aepo and memory entropy_level go together"),
        ({"row": "grpo", "value": "squared"}, "group has no targets; use gae or vtrace"),
        ({"row": "grpo", "credit": "outcome"}, "a token reward model that nothing reads"),
        ({"row": "grpo", "token_weight": ["by_loss"]}, "says something of demonstrations only"),
        ({"row": "aepo", "whiten": "sequence"}, "needs one advantage per row, aepo gives one per token"),
        ({"row": "sft", "modifiers": ["tis"]}, "data demonstrations has no rollout"),
        ({"row": "redi", "modifiers": ["geometric_rejection"]}, "data preferences has no rollout"),
        ({"row": "sft", "filter": "mixed"}, "no rewards that filter mixed could judge"),
        ({"row": "sft", "advantage": "group"}, "demonstrations have no rewards, which advantage group reads"),
        ({"row": "dpo", "data": "rollouts"}, "advantage dpo does not go with data rollouts"),
        ({"row": "dpo", "aggregation": "token_mean"}, "under surrogate reinforce and aggregation seq_mean_token_sum"),
        ({"row": "gvpo", "surrogate": "ppo_clip"}, "under surrogate reinforce and aggregation seq_mean_token_sum"),
        ({"row": "drpo", "aggregation": "token_mean"}, "under surrogate reinforce and aggregation seq_mean_token_mean"),
    ],
)
def test_what_cannot_be_combined_is_refused(spec: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve(spec)


def test_an_adaptive_bonus_is_the_bonus_of_its_coefficient() -> None:
    adaptive = resolve({"row": "dapo", "shaping": "none", "modifiers": [{"adaptive_entropy": {"target": 9.0}}]})
    fixed = resolve({"row": "dapo", "shaping": "none", "entropy": {"coef": 1e-4}})
    batch = step(adaptive)
    mine, theirs = (run(method, batch, current(batch))[0].loss for method in (adaptive, fixed))
    torch.testing.assert_close(mine, theirs)
