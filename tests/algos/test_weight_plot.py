"""The picture of the weight functions: W by hand, every row once, the file that of the code."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from algos.methods import ROWS, resolve
from algos.weight_plot import svg, weight

# (spec, rho, W for A > 0, W for A < 0)
CASES = [
    ({"ppo_clip": {"low": 0.2, "high": 0.2}}, 1.5, 0, 1.5),
    ({"ppo_clip": {"low": 0.2, "high": 0.2}}, 0.5, 0.5, 0),
    ({"ppo_clip": {"low": 0.2, "high": 0.2, "dual": 3}}, 4, 0, 0),
    ({"cispo": {"low": None, "high": 4}}, 8, 5, 5),
    ("reinforce", 8, 1, 1),
    ("sapo", 1, 1, 1),
    ("topr", 0.5, 1, 0.5),
    ("topr", 2, 1, 1),
    ("dppo_tv", 1.9, 0, 1.9),  # from 1/4 by 0.225
    ("kl_cov", 2, 1, 3),  # one token is the token of highest covariance
]


@pytest.mark.parametrize("surrogate, rho, up, down", CASES)
def test_weights_by_hand(surrogate, rho, up, down):
    method = resolve({"surrogate": surrogate})
    assert weight(method, rho, 1.0) == pytest.approx(up)
    assert weight(method, rho, -1.0) == pytest.approx(down)


def test_the_weight_is_that_of_the_rule_alone():
    """Ratio level and anchor, aggregation, KL, penalties, critic, corrections and token weights do not change it."""
    for name in ("grpo", "ppo", "reinforce_pp_baseline", "decoupled_ppo", "bypass_ppo", "tw_grpo", "grpo_guard"):
        method = resolve(name)
        assert [weight(method, rho, 1.0) for rho in (0.5, 1.1, 1.5)] == pytest.approx([0.5, 1.1, 0]), name
    for name in ("gspo", "gspo_token"):
        assert weight(resolve(name), 1.0003, 1.0) == pytest.approx(1.0003)
        assert weight(resolve(name), 1.0005, 1.0) == 0
    # Rate 1/2: right rows have the weight 1 - r, wrong ones that of the implicit negative policy, rho r / (2 (1 - r)).
    assert [weight(resolve("nft"), 0.5, sign) for sign in (1.0, -1.0)] == pytest.approx([0.5, 0.5 * 0.5 / 1.5])


@pytest.fixture(scope="module")
def picture():
    return svg()


def test_every_row_is_in_the_picture_once(picture):
    texts = ElementTree.fromstring(picture).iterfind(".//{*}text[@class='rows']")
    named = [name for text in texts for name in "".join(text.itertext()).replace(",", " ").split()]
    assert sorted(named) == sorted(ROWS)


def test_the_picture_is_that_of_the_code(picture, request):
    written = (request.config.rootpath / "docs" / "weights.svg").read_text(encoding="utf-8")
    assert written == picture, "stale: run `python -m algos.docs docs/methods.md`"
