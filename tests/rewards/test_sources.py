"""Source mixers: checkpoints, floors, missing signals, and agreement with torch's optimiser."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import UserError
from rewards.sources import Dga, DreamPrm, ScaleBio, mixers

NAMES = ("gsm", "math", "code")


def signal(step: int) -> dict[str, float]:
    return dict(zip(NAMES, np.random.default_rng(step).normal(size=3).tolist(), strict=True))


@pytest.mark.parametrize("name", sorted(mixers))
@pytest.mark.parametrize("cut", range(5))
def test_a_resumed_mixer_goes_on_to_the_same_bits(name: str, cut: int) -> None:
    one, two = mixers[name](NAMES), mixers[name](NAMES)
    for step in range(5):
        if step == cut:
            state = json.loads(json.dumps(two.state_dict(), allow_nan=False))
            two = mixers[name](NAMES)
            two.load_state_dict(state)
        assert one.update(signal(step)) == two.update(signal(step)) and one.probabilities == two.probabilities
    assert sum(one.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(mixers))
def test_probabilities_belong_to_names(name: str) -> None:
    one, two = mixers[name](NAMES), mixers[name](NAMES[::-1])
    for step in range(3):
        one.update(signal(step)), two.update(signal(step))
    assert two.probabilities == pytest.approx(one.probabilities)
    with pytest.raises(UserError, match="allow new ones"):
        mixers[name]((*NAMES, "new")).load_state_dict(one.state_dict())
    more = mixers[name]((*NAMES, "new"))
    more.load_state_dict(one.state_dict(), allow_new_objectives=True)
    assert sum(more.probabilities.values()) == pytest.approx(1)


def test_a_missing_alignment_skips_the_update_and_the_floor_holds() -> None:
    mixer = Dga(NAMES, floor=0.1, beta=1.0)
    mixer.update({"gsm": 1.0, "math": 2.0})
    assert set(mixer.probabilities.values()) == {1 / 3}
    for _ in range(50):
        mixer.update({"gsm": 50.0, "math": 0.0, "code": -50.0})
    assert mixer.probabilities == pytest.approx({"gsm": 0.8, "math": 0.1, "code": 0.1})
    rare = Dga(NAMES, every=2)
    rare.update(signal(0))
    assert set(rare.probabilities.values()) == {1 / 3}


def test_scalebio_steps_as_torch_does() -> None:
    mixer = ScaleBio(NAMES, weight_decay=0.0)
    q = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        gaps = signal(step)
        optimizer.zero_grad()
        (100.0 * q.softmax(0) @ torch.tensor(list(gaps.values()), dtype=torch.float64)).backward()
        optimizer.step()
        mixer.update(gaps)
    assert list(mixer.q.values()) == pytest.approx(q.tolist(), rel=1e-9)


def test_a_source_without_losses_has_no_gradient() -> None:
    mixer = ScaleBio(NAMES, adam=False)
    mixer.update({"gsm": 1.0, "math": -1.0, "code": math.nan})
    # alpha p (D - mean over those there) = 100 / 3 * +-1
    assert list(mixer.q.values()) == pytest.approx([-1 / 3, 1 / 3, 0])


def test_dreamprm_weights_have_mean_1_and_stay_positive() -> None:
    mixer = DreamPrm(NAMES, lr=1.0)
    assert list(mixer.weights.values()) == [1, 1, 1]
    slopes: dict[str, Any] = {"gsm": 40.0, "math": -40.0}
    mixer.update(slopes)
    assert mixer.q["code"] == 0 and min(mixer.weights.values()) > 0
    assert sum(mixer.weights.values()) == pytest.approx(3)
