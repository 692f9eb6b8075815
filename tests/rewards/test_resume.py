"""Killed between any two steps and resumed: weights, multipliers, archives, simplex go on to the same bits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from core.config import RewardsConfig
from core.schema import Completion, Group, Mixture, Prompt, Score
from rewards.composer import Composer
from tests.rewards.test_policies import NAMES, SPECS

SEARCH = {
    "gold": "heldout/accuracy",
    "highest": {"brief": 1.0, "polite": 1.0},
    "patience": 0.1,
    "band": 0.3,
    "tol_f": 0.0,
}
PROJECTED: dict[str, Any] = SPECS["projected"]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"weighting": spec} for name, spec in SPECS.items()},
    "proportional": {"weighting": {**PROJECTED, "proportional": 3.0, "smoothing": 0.5}},
    "threshold search": {"weighting": {**PROJECTED, "measure": "validation"}, "threshold_search": SEARCH},
    "gold": {"weighting": {"policy": "static"}, "gold": "gold"},
}
STEPS = 8


def config(case: dict[str, Any]) -> RewardsConfig:
    shapes: dict[str, list[Any]] = {"right": [], "brief": ["minmax"], "polite": ["meanstd", {"sigmoid": {"k": 2.0}}]}
    components: dict[str, Any] = {name: {"fn": "boxed", "shape": shapes[name]} for name in NAMES}
    if "gold" in case:
        components["gold"] = {"fn": "boxed"}
    return RewardsConfig(components=components, **case)


def groups_of(step: int, names: list[str]) -> list[Group]:
    """Two groups of four; one score is missing in each."""
    rng = np.random.default_rng(step)
    made = []
    for number in range(2):
        completions = tuple(Completion((1,) * int(rng.integers(3, 30)), (), (), "", "stop") for _ in range(4))
        said = {name: tuple(Score("ok", float(v)) for v in rng.random(4)) for name in names}
        said["right"] = (Score("timeout"), *said["right"][1:])
        made.append(Group(f"{step}-{number}", Prompt(number, "", (1,)), completions, components=said))
    return made


def one_step(composer: Composer, step: int) -> tuple[list[Group], Mixture, dict[str, float]]:
    rng = np.random.default_rng([step, 1])
    groups = asyncio.run(composer.columns(groups_of(step, list(composer.components)), step, scored=True))
    gradients = rng.normal(size=(len(NAMES), 5))
    weighed, mixture = composer.weigh(groups, (gradients @ gradients.T).tolist(), 1e-5)
    means = {**dict(zip(NAMES, rng.random(3).tolist(), strict=True)), "heldout/accuracy": float(rng.random())}
    return weighed, mixture, composer.learn(rng.random(8).tolist(), means if step % 2 else None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_composer_resumed_after_any_step_goes_on_to_the_same_bits(case: dict[str, Any]) -> None:
    settings = config(case)
    straight = Composer(settings, steps=STEPS)
    straight.begin(dict.fromkeys([*NAMES, "heldout/accuracy"], 0.3))
    expected, states = [], []
    for step in range(STEPS):
        states.append(json.dumps(straight.state_dict(), allow_nan=False))
        expected.append(one_step(straight, step))
    for cut in range(1, STEPS):
        resumed = Composer(settings, steps=STEPS)
        resumed.load_state_dict(json.loads(states[cut]))
        assert json.dumps(resumed.state_dict(), allow_nan=False) == states[cut]
        for step in range(cut, STEPS):
            # repr: missing columns are NaN, which equals nothing
            assert repr(one_step(resumed, step)) == repr(expected[step])
    learnt = {json.dumps(json.loads(state)["policy"]) for state in states}
    assert len(learnt) > 1 or learnt <= {"{}", '{"inner": {}}'}, "a state that never moves shows nothing"
