"""Constrained weighting beyond its vectors: where the KL goes, what options mean, how multipliers move."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from rewards.constrained import AdaptiveKl, Lagrange, Multipliers, constraint_columns, mix_constrained
from rewards.mixing import StepBatch, compose
from tests.rewards.test_policies import NAMES, step_of

THETA = {"right": 0.5, "brief": 0.6, "polite": 0.7}


def learnt(**options: Any) -> Lagrange:
    policy = Lagrange(NAMES, **options)
    for step in range(4):
        policy.update(step_of(step))
    return policy


@pytest.mark.parametrize("kind", ["mu", "xi", "all"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("by_std", [True, False])
def test_the_mix_of_the_policy_is_the_mix_of_the_paper(kind: Any, rescale: bool, by_std: bool) -> None:
    policy, batch = learnt(kind=kind, thresholds=THETA, rescale=rescale, by_std=by_std), step_of(9)
    weights = np.array([policy.multipliers.weights()[name] for name in NAMES])
    columns = constraint_columns(batch.scores, batch.kl, batch.group, by_std=by_std)  # type: ignore[arg-type]
    expected = mix_constrained(*columns, weights, kind, rescale=rescale)
    np.testing.assert_allclose(compose(batch, policy.weigh(batch))[0], expected, atol=1e-12)


def test_a_kl_budget_makes_the_kl_one_more_constraint() -> None:
    policy = Lagrange(
        NAMES, kind="mu", thresholds={"brief": 0.9}, kl_budget=0.4, task_weights={"right": 2, "polite": 1}
    )
    mix = policy.weigh(step_of(0))
    # Two constraints at weight 1/2: N - sum w = 1, halved by the rescaling; the KL's own weight is 1/4.
    assert mix.weights.tolist() == [1.0, 0.25, 0.5] and mix.task == 0.25
    batch = replace(step_of(0), kl=np.full(20, 3.0))
    policy.update(batch)
    # v_KL = -3 is below -0.4, so the KL's multiplier rises: more weight on small KL.
    assert policy.multipliers.weights()["-kl"] > 0.5 and policy.needs == {"kl"}


def test_the_kl_may_stay_in_the_loss() -> None:
    policy = Lagrange(NAMES, kind="mu", thresholds=THETA, kl_coef=0.3)
    mix = policy.weigh(replace(step_of(0), kl=None))
    # Three constraints at 1/2: the task's share is 1.5 of 3.
    assert mix.task == 0 and mix.kl_coef == pytest.approx(0.15) and policy.needs == frozenset()
    steered = Lagrange(NAMES, kind="all", thresholds=THETA, kl_coef=0.2, kl_target=0.1)
    steered.update(replace(step_of(0), kl=np.full(20, 5.0)))
    assert steered.weigh(step_of(1)).kl_coef == pytest.approx(0.2 * 1.02)


def test_the_projected_dual_adds_what_is_violated_to_the_task() -> None:
    options: dict[str, Any] = {"kind": "projected", "thresholds": {"brief": 2.0, "polite": -1.0}, "lr": 0.1}
    policy = Lagrange(NAMES, senses={"polite": "<="}, **options)
    assert policy.weigh(step_of(0)).weights.tolist() == [1, 0, 0]
    flat = replace(step_of(0), scores=np.tile([1.0, 1.0, 1.0], (20, 1)))
    policy.update(flat)
    # brief is 1 below its threshold, polite 2 above: it is pushed down.
    assert policy.weigh(flat).weights == pytest.approx([1, 0.1, -0.2])


def test_multipliers_go_down_to_0_and_up_to_the_cap() -> None:
    dual = Multipliers(["a"], "projected", lr=1.0, cap=1.5)
    for mean, weight in ((-9.0, 1.5), (0.25, 1.25), (math.nan, 1.25), (9.0, 0.0)):
        dual.update({"a": mean}, {"a": 0.0})
        assert dual.weights()["a"] == weight


def test_a_missing_mean_leaves_the_momentum_to_act() -> None:
    multipliers = Multipliers(["a"], "xi", lr=1.0, momentum=0.5, max_grad_norm=None)
    multipliers.update({"a": 0.0}, {"a": 1.0})  # g = -1
    multipliers.update({}, {"a": 1.0})  # buffer -0.5
    assert multipliers.raw.tolist() == [1.5]


def test_a_multiplier_that_is_not_finite_is_an_error() -> None:
    multipliers = Multipliers(["a"], "xi", lr=math.inf)
    with pytest.raises(FloatingPointError, match="not finite"):
        multipliers.update({"a": 0.0}, {"a": 1.0})


def test_multipliers_may_learn_from_validation_only_and_from_raw_scores() -> None:
    policy = Lagrange(NAMES, thresholds=THETA, measure="validation")
    policy.update(replace(step_of(0), validation=None))
    assert not policy.multipliers.raw.any() and policy.needs == {"kl", "validation"}
    policy.update(replace(step_of(0), validation={"right": 1.0, "brief": 0.0, "polite": 0.7}))
    assert np.sign(policy.multipliers.raw).tolist() == [-1, 1, 0]
    raw = Lagrange(NAMES, thresholds=THETA, measure="raw")
    raw.update(replace(step_of(0), raw=np.zeros((20, 3)), scores=np.ones((20, 3))))
    assert (raw.multipliers.raw > 0).all()


def test_thresholds_are_set_by_name() -> None:
    policy = Lagrange(NAMES, thresholds=THETA)
    policy.set_thresholds({"brief": 0.1})
    assert policy.thresholds == {**THETA, "brief": 0.1}
    with pytest.raises(UserError, match="no objective fluent"):
        policy.set_thresholds({"fluent": 0.1})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"thresholds": {"right": 0.5}}, "brief, polite has none"),
        ({"thresholds": {}, "kind": "projected"}, "none is given"),
        ({"thresholds": THETA, "kl_target": 0.5}, "kl_coef, which is not given"),
        ({"thresholds": THETA, "kind": "all", "kl_budget": 0.5}, "kl_budget"),
        ({"thresholds": THETA, "kl_budget": 0.5, "kl_coef": 0.1}, "constraint already"),
        ({"thresholds": THETA, "senses": {"right": "<="}}, "only 'projected'"),
        ({"thresholds": THETA, "task_weights": {"right": 1.0}}, "task_weights"),
        ({"thresholds": {**THETA, "fluent": 1.0}}, "no objective fluent"),
        ({"thresholds": THETA, "init": {"fluent": 1.0}}, "no objective fluent"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Lagrange(NAMES, **options)


def test_the_kl_controller_moves_two_per_cent_at_most() -> None:
    controller = AdaptiveKl(init=0.2, target=0.5)
    assert controller.update(9.0) == pytest.approx(0.204) and controller.update(math.nan) == pytest.approx(0.204)
    assert AdaptiveKl(init=0.2).update(9.0) == 0.2


def test_the_sequence_kl_pays_short_completions_and_the_mean_kl_does_not() -> None:
    batch = StepBatch(
        names=("a",),
        **{"raw": np.ones((2, 1)), "scores": np.ones((2, 1)), "group": np.zeros(2, int)},
        **{"lengths": np.array([10, 20]), "kl": np.array([1.0, 2.0])},
    )
    for kl_mean, wins in ((False, True), (True, False)):
        policy = Lagrange(("a",), kind="mu", thresholds={"a": 0.5}, kl_mean=kl_mean)
        assert (compose(batch, policy.weigh(batch))[0][0] > 0) == wins
