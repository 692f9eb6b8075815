"""What benches share: the limit of a ratio, whose turn it is, a side in a process of its own, lengths without luck."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benches import samples
from benches.apart import Apart, Turn
from benches.harness import Ratio, alternate, main
from benches.tokens import fit


def test_a_limit_is_for_the_median() -> None:
    values = [0.5, 3.1, 9.0]  # the median is 3.1, the mean 4.2
    assert Ratio("x", values, at_least=3).holds and not Ratio("x", values, at_least=4).holds
    assert Ratio("x", values, at_most=3.1).holds and not Ratio("x", values, at_most=3).holds
    assert Ratio("x", values).holds and Ratio("x", values).limit() == "-"
    assert Ratio("x", values, at_least=1, at_most=2).limit() == ">= 1 <= 2"


def test_who_begins_changes_and_warm_rounds_do_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], int]:
        return lambda: order.append(name) or len(order)

    # Warm: b a; then a b, b a. Each returns its place in the order: a is 3rd and 6th, b is 4th and 5th.
    assert alternate(2, side("a"), side("b")) == [(3, 4), (6, 5)]
    assert "".join(order) == "baabba"


def test_a_bench_writes_its_rows_and_says_whether_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(rounds: int, size: int) -> list[Ratio]:
        return [Ratio("big", [float(size)] * rounds, at_least=3, facts={"size": size})]

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "rows"), *words])
        return main("A bench.", measure, rounds=2, size=2)

    assert run() == 1 and "MISS big: 2 (2-2), limit >= 3; size 2" in capsys.readouterr().out
    assert run("--size", "4", "--rounds", "1") == 0
    (row,) = json.loads((tmp_path / "rows").read_text())
    assert row["values"] == [4.0] and row["median"] == 4 and row["holds"] and row["limit"] == ">= 3"
    with pytest.raises(SystemExit):
        run("--rounds", "0")


def fill(turn: Turn, rest: float) -> None:
    """Holds as many MiB as the turn is about, after a rest that does not count."""
    while True:
        mib = turn.begin()
        time.sleep(rest)
        turn.restart()
        held = bytearray(mib * 2**20)
        turn.end(mib=len(held) // 2**20)
        del held


def leave(turn: Turn) -> None:
    """Ends instead of taking its turn."""
    turn.begin()
    raise SystemExit(7)


def test_a_side_has_its_own_clock_and_each_turn_its_own_peak() -> None:
    with Apart(fill, 0.3) as side:
        small, large, again = side(1), side(300), side(1)
    assert large.facts == {"mib": 300} and large.seconds < 0.3 + 5
    # 300 MiB are 0.29 GiB; the next turn's peak does not remember them.
    assert 0.25 < large.peak_gib - small.peak_gib < 0.35
    assert abs(again.peak_gib - small.peak_gib) < 0.05 and again.resident_gib <= again.peak_gib


def test_a_side_that_ends_or_is_silent_is_said() -> None:
    with Apart(leave) as side, pytest.raises(RuntimeError, match="leave ended with 7"):
        side()
    with Apart(fill, 60.0, patience=0.5) as side, pytest.raises(RuntimeError, match=r"fill was silent for 0\.5 s"):
        side(1)


def test_lengths_are_the_quantiles_of_a_log_normal() -> None:
    # exp(N(ln 64 - 0.32, 0.8)): median 64 / e^0.32 = 46.5, an eighth below 46.5 / e^(0.8 x 1.15) = 18.5.
    assert samples.log_normal(3, 64, 256)[1] == 46 and samples.log_normal(4, 64, 256)[0] == 19
    many = samples.log_normal(1000, 64, 10_000)
    assert abs(sum(many) / 1000 - 64) < 0.5 and max(samples.log_normal(1000, 64, 256)) == 256


def test_groups_have_what_was_asked_for() -> None:
    given = samples.groups(prompts=3, size=4, prompt_tokens=5, mean=16, vocabulary=50)
    rows = [completion for group in given for completion in group.completions]
    assert sorted(len(c.token_ids) for c in rows) == samples.log_normal(12, 16, 64)
    assert samples.trained(given) == sum(samples.log_normal(12, 16, 64))
    assert all(len(g.prompt.token_ids) == 5 and g.totals == (0.0, 1.0, 0.0, 1.0) for g in given)
    assert {v for g in samples.at_version(given, 7) for c in g.completions for v in c.versions} == {7}


def test_the_line_through_points() -> None:
    # Through (1, 3), (2, 5), (3, 7) goes 1 + 2 x exactly; (0, 0), (1, 1), (2, 0) have no trend: R^2 is 0.
    assert fit([1, 2, 3], [3, 5, 7]) == pytest.approx((2.0, 1.0, 1.0))
    assert fit([0, 1, 2], [0, 1, 0]) == pytest.approx((0.0, 1 / 3, 0.0))
