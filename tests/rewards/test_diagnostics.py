"""Diagnostics by hand: degenerate columns, who decides the order, alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rewards.diagnostics import decisions, diagnostics, effective_weights, gao_fit, overoptimization, pearson, spearman

GROUP = np.array([0, 0, 1, 1, 1])


def test_a_constant_column_and_an_empty_one_have_no_correlation() -> None:
    table = np.array([[0.1, 1, np.nan], [0.1, 2, np.nan], [0.1, 3, np.nan], [0.1, 4, np.nan], [0.1, 5, np.nan]])
    found = diagnostics(table, GROUP, low=np.zeros(3), high=np.full(3, 5.0))
    assert (
        np.isnan(found.pearson[0, 1]) and found.pearson[1, 1] == pytest.approx(1) and np.isnan(found.pearson[2]).all()
    )
    assert found.std.tolist()[0] == 0 and found.zero_std_groups[:2].tolist() == [1, 0]
    assert math.isnan(found.zero_std_groups[2]) and math.isnan(found.saturated_high[2])
    assert found.missing.tolist() == [0, 0, 1] and found.saturated_high[1] == pytest.approx(0.2)


def test_ranks_share_ties() -> None:
    x = np.array([1.0, 2.0, 2.0, 9.0])
    # ranks 1, 2.5, 2.5, 4 against 4, 3, 2, 1: -4.5 / sqrt(4.5 * 5)
    assert spearman(x, np.array([4.0, 3.0, 2.0, 1.0])) == pytest.approx(-4.5 / math.sqrt(22.5))
    assert math.isnan(pearson(np.array([1.0, 2.0]), np.array([1.0, 2.0])))


def test_the_effective_weight_is_the_weight_of_the_spread() -> None:
    table = np.array([[0.0, 0.0], [1.0, 10.0], [0.0, 0.0], [1.0, 10.0], [0.5, 5.0]])
    assert effective_weights(table, GROUP, np.array([1.0, -0.1])) == pytest.approx([0.5, 0.5])
    assert np.isnan(effective_weights(np.ones((5, 2)), GROUP, np.ones(2))).all()


def test_who_decides_the_order() -> None:
    # Group 0: the primary decides. Group 1: it ties throughout, the secondary decides two of three pairs.
    table = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    found = decisions(table, GROUP, np.array([1.0, 0.5]))
    assert found == pytest.approx((0.5, 0.0, 0.5))
    # 1 against 0.95: taking a tenth off the first weight turns the order round.
    close = decisions(np.array([[1.0, 0.0], [0.0, 0.95]]), np.zeros(2, int), np.ones(2))
    assert close == (0, 1, 0)
    none = decisions(np.full((2, 2), np.nan), np.zeros(2, int), np.ones(2))
    assert none.ties == 1 and math.isnan(none.flips)


def test_the_alarm_needs_a_drop_while_the_proxy_is_higher() -> None:
    proxy, gold = np.array([1.0, 2.0, 1.5, 3.0]), np.array([0.5, 0.9, 0.2, 0.3])
    assert overoptimization(proxy, gold) == (1, 2.0, 0.9, 3)
    assert overoptimization(proxy, gold, margin=0.65).alarm_index is None
    assert overoptimization(np.array([1.0, 2.0]), np.array([0.5, 0.5])).peak_index == 0
    with pytest.raises(ValueError, match="no gold"):
        overoptimization(np.ones(2), np.full(2, np.nan))


@pytest.mark.parametrize(("kind", "peak"), [("bon", 2.5), ("rl", math.exp(4))])
def test_the_scaling_law_is_recovered_from_its_own_points(kind: str, peak: float) -> None:
    d = np.linspace(0, 4, 20)
    falling = d if kind == "bon" else np.log(np.maximum(d, 1e-300))
    found = gao_fit(d, d * (1.0 - 0.2 * falling), kind=kind)  # type: ignore[arg-type]
    assert found == pytest.approx((1.0, 0.2, peak))
