"""What holds for every weighting policy: one objective, missing rows, checkpoints, names instead of positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from rewards.mixing import Mix, StepBatch, compose
from rewards.policies import Policy, build, weightings

NAMES = ("right", "brief", "polite")
SPECS: dict[str, Any] = {
    "static": {"policy": "static", "weights": {"right": 2.0, "brief": 0.5}},
    "static normalised first": {"policy": "static", "order": "normalize_then_sum"},
    **{
        f"lagrange {kind}": {"policy": "lagrange", "kind": kind, "thresholds": dict.fromkeys(NAMES, 0.6)}
        for kind in ("mu", "xi", "all")
    },
    "projected": {"policy": "lagrange", "kind": "projected", "thresholds": {"brief": 0.9, "polite": 0.9}, "cap": 5.0},
    "kl budget": {
        **{"policy": "lagrange", "thresholds": {"brief": 0.9}, "kl_budget": 0.4},
        "task_weights": {"right": 1.0, "polite": 0.5},
    },
    "kl in the loss": {
        **{"policy": "lagrange", "kind": "mu", "thresholds": dict.fromkeys(NAMES, 0.6)},
        **{"kl_coef": 0.2, "kl_target": 0.5},
    },
    "hypervolume": {"policy": "hypervolume", "inner": {"policy": "static", "weights": {"right": 2.0}}},
    "gradient": {"policy": "gradient", "every": 2, "min_weight": 0.05},
    "recap": {"policy": "recap", "window": 2},
    "trust": {"policy": "trust", "outcome": "right", "thinking": "polite"},
    "trust in recap": {
        **{"policy": "trust", "outcome": "right", "thinking": "polite"},
        "inner": {"policy": "recap", "window": 2},
    },
    "cv": {"policy": "cv"},
    "softmin": {"policy": "softmin", "sharpness": 3.0},
    "tchebycheff": {"policy": "tchebycheff"},
    "covariance": {"policy": "covariance", "targets": dict.fromkeys(NAMES, 0.8)},
}
every_policy = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def step_of(step: int, names: tuple[str, ...] = NAMES) -> StepBatch:
    """A step of 4 groups of 5: one row has no score at all, one score is missing, rows of a group are not adjacent."""
    rng = np.random.default_rng(step)
    scores = rng.random((20, len(names)))
    scores[:, 0] = (scores[:, 0] > 0.5).astype(float)
    scores[3, :], scores[4, -1] = np.nan, np.nan
    gradients = rng.normal(size=(len(names), 6)) * 0.4
    return StepBatch(
        names=names,
        **{"raw": scores, "scores": scores, "group": np.arange(20) % 4, "lengths": rng.integers(5, 50, 20)},
        **{"kl": rng.random(20), "gram": gradients @ gradients.T, "lr": 1e-5, "step": step, "total_steps": 10},
        validation=dict(zip(names, rng.random(len(names)) + step / 10, strict=True)),
    )


def taken(policy: Policy, batch: StepBatch) -> Mix:
    """One optimiser step of a policy, in order."""
    if policy.update_first:
        policy.update(batch)
    mix = policy.weigh(batch)
    if not policy.update_first:
        policy.update(batch)
    return mix


def by_name(mix: Mix, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, np.broadcast_to(mix.weights, (20, len(names))).T.tolist(), strict=True))


def test_every_registered_policy_is_here() -> None:
    assert {spec["policy"] for spec in SPECS.values()} == set(weightings)


@every_policy
def test_an_unscorable_row_has_no_advantage_and_the_others_have_one(spec: Mapping[str, Any]) -> None:
    policy = build(spec, NAMES)
    for step in range(6):
        batch = step_of(step)
        advantages, metrics = compose(batch, taken(policy, batch))
        assert np.isfinite(advantages).all() and advantages[3] == 0 and np.count_nonzero(advantages) >= 18
        assert metrics["mix/unscorable"] == 1 / 20


@every_policy
def test_a_step_without_any_score_teaches_nothing(spec: Mapping[str, Any]) -> None:
    policy, nothing = build(spec, NAMES), np.full((20, 3), np.nan)
    for step in range(3):
        batch = replace(step_of(step), raw=nothing, scores=nothing)
        assert not compose(batch, taken(policy, batch))[0].any()


@every_policy
def test_weighing_changes_nothing(spec: Mapping[str, Any]) -> None:
    policy = build(spec, NAMES)
    taken(policy, step_of(0))
    before = json.dumps(policy.state_dict())
    first, second = policy.weigh(step_of(1)), policy.weigh(step_of(1))
    assert json.dumps(policy.state_dict()) == before and np.array_equal(first.weights, second.weights)


@every_policy
@pytest.mark.parametrize("cut", range(7))
def test_a_resumed_policy_goes_on_to_the_same_bits(spec: Mapping[str, Any], cut: int) -> None:
    policy, other = build(spec, NAMES), build(spec, NAMES)
    for step in range(7):
        if step == cut:
            state = json.loads(json.dumps(other.state_dict(), allow_nan=False))
            other = build(spec, NAMES)
            other.load_state_dict(state)
        batch = step_of(step)
        one, two = taken(policy, batch), taken(other, batch)
        assert np.array_equal(one.weights, two.weights)
        assert (one.task, one.scale, one.kl_coef) == (two.task, two.scale, two.kl_coef)


@every_policy
def test_weights_belong_to_names_not_to_positions(spec: Mapping[str, Any]) -> None:
    order = [2, 0, 1]
    names = tuple(NAMES[k] for k in order)
    policy, other = build(spec, NAMES), build(spec, names)
    for step in range(6):
        batch = step_of(step)
        turned = replace(batch, names=names, raw=batch.raw[:, order], scores=batch.scores[:, order])
        turned = replace(turned, gram=batch.gram[np.ix_(order, order)])  # type: ignore[index]
        if step == 3:  # a checkpoint of the other order fits
            other = build(spec, names)
            other.load_state_dict(policy.state_dict())
        one, two = taken(policy, batch), taken(other, turned)
        found, expected = by_name(two, names), by_name(one, NAMES)
        for name in NAMES:
            assert found[name] == pytest.approx(expected[name], rel=1e-12), name
        np.testing.assert_allclose(compose(batch, one)[0], compose(turned, two)[0], atol=1e-12)


@every_policy
def test_the_order_of_rows_does_not_matter(spec: Mapping[str, Any]) -> None:
    turned = np.random.default_rng(1).permutation(20)
    policy, other = build(spec, NAMES), build(spec, NAMES)
    for step in range(5):
        batch = step_of(step)
        rows = {name: getattr(batch, name)[turned] for name in ("raw", "scores", "group", "lengths", "kl")}
        one, two = taken(policy, batch), taken(other, replace(batch, **rows))
        expected = compose(batch, one)[0][turned]
        np.testing.assert_allclose(compose(replace(batch, **rows), two)[0], expected, atol=1e-9)


ONE = {
    name: {**spec, "thresholds": {"right": 0.6}} if "thresholds" in spec else spec
    for name, spec in SPECS.items()
    if name not in ("lagrange mu", "lagrange xi", "lagrange all", "kl budget", "projected") and "trust" not in name
} | {
    "static": {"policy": "static", "weights": {"right": 2.0}},
    "hypervolume": {"policy": "hypervolume"},
    "covariance": {"policy": "covariance", "targets": {"right": 0.8}},
}


@pytest.mark.parametrize("spec", ONE.values(), ids=ONE)
def test_one_objective_is_grpo_up_to_a_factor(spec: Mapping[str, Any]) -> None:
    policy = build(spec, ("right",))
    for step in range(5):
        batch = step_of(step, ("right",))
        plain, _ = compose(batch, Mix(weights=np.ones(1)), eps=1e-12)
        advantages, _ = compose(batch, taken(policy, batch), eps=1e-12)
        factor = advantages @ plain / (plain @ plain)
        assert factor > 0
        np.testing.assert_allclose(advantages, factor * plain, atol=1e-6)


@every_policy
def test_other_objectives_are_refused(spec: Mapping[str, Any]) -> None:
    policy = build(spec, NAMES)
    taken(policy, step_of(0))
    with pytest.raises(UserError, match="made for the objectives"):
        taken(policy, replace(step_of(1), names=("right", "brief", "new")))
    state = policy.state_dict()
    more = build(spec, (*NAMES, "new")) if "thresholds" not in spec else None
    if more is not None and policy.state_dict() not in ({}, {"inner": {}}):
        with pytest.raises(UserError, match="allow new ones"):
            more.load_state_dict(state)
        more.load_state_dict(state, allow_new_objectives=True)
        assert np.isfinite(taken(more, step_of(1, (*NAMES, "new"))).weights).all()


def test_specs_are_checked_where_they_are_written() -> None:
    for spec, problem in (
        ({"policy": "lagrang", "thresholds": {}}, "did you mean 'lagrange'"),
        ({"policy": "recap", "windows": 3}, "recap.*did you mean 'window'|did you mean 'window'"),
        ({"policy": "recap", "window": "3"}, "weighting.window"),
        ({"policy": "static", "weights": {"fluent": 1.0}}, "no objective fluent"),
        ({"weights": {}}, "weighting.policy"),
        ({"policy": "gradient", "min_weight": 0.5}, "exceeds 1"),
        ({"policy": "hypervolume", "reference": {"right": 0.0}}, "a value for each"),
        ({"policy": "hypervolume", "inner": {"policy": "gradient"}}, "learns after use"),
        ({"policy": "trust", "outcome": "right", "thinking": "thought"}, "no objective thought"),
    ):
        with pytest.raises(UserError, match=problem):
            build(spec, NAMES)
