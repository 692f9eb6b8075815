"""The command that runs all benches: what it writes, keeps and says; the page that shows it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benches import all as bench

PAGE = bench.ROOT / "docs" / "speed.md"
QUICK = """
import sys
from benches.harness import Ratio, main
def measure(rounds):
    print("measuring")
    if {fails!r}:
        sys.exit({fails!r})
    return [Ratio("a / b", [{value}] * rounds, at_least=2, facts={{"tokens/s": 12.34567}})]
sys.exit(main("A bench.", measure, rounds=3))
"""


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with three quick benches: one that holds, one that misses, one that lacks something."""
    folder = tmp_path / "benches"
    folder.mkdir()
    (folder / "harness.py").write_text((bench.ROOT / "benches" / "harness.py").read_text())
    for name, value, fails in (("fast", 4, ""), ("slow", 1, ""), ("poor", 4, "model is missing: `make it` makes it")):
        (folder / f"{name}.py").write_text(QUICK.format(value=value, fails=fails))
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "BENCHES", ("fast", "slow", "poor"))
    return tmp_path


def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "out" / "bench.json").read_text())


def test_every_bench_becomes_rows_or_says_what_it_lacks(quick: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--out", str(quick / "out"), "--only", "poor,fast"]) == 1
    out, results = capfd.readouterr().out, report(quick)["results"]
    assert out.index("== fast") < out.index("measuring") < out.index("== poor") and "FAILED poor" in out
    assert results["poor"]["failure"] == "model is missing: `make it` makes it" and results["poor"]["rows"] == []
    assert results["fast"]["rows"][0]["values"] == [4, 4, 4] and not results["fast"]["failure"]
    table = (quick / "out" / "bench.md").read_text()
    assert "| fast | a / b | 4 (4-4) | >= 2 | yes | tokens/s 12.35 |" in table
    assert "| poor | - | - | - | failed | model is missing: `make it` makes it |" in table


def test_one_bench_again_leaves_the_others_and_decides_the_exit_code(quick: Path) -> None:
    out = str(quick / "out")
    assert bench.main(["--out", out, "--only", "slow"]) == 1  # 1 is below its limit of 2
    assert bench.main(["--out", out, "--only", "fast", "--rounds", "1"]) == 0
    results = report(quick)["results"]
    assert results["fast"]["rows"][0]["values"] == [4] and results["slow"]["rows"][0]["holds"] is False


def test_results_of_other_versions_are_not_kept(quick: Path) -> None:
    (quick / "out").mkdir()
    old = {"machine": bench.machine(), "versions": {"torch": "1.0"}, "results": {"slow": {"rows": []}}}
    (quick / "out" / "bench.json").write_text(json.dumps(old))
    assert bench.main(["--out", str(quick / "out"), "--only", "fast"]) == 0
    assert set(report(quick)["results"]) == {"fast"}


def test_a_bench_that_hangs_is_ended(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (quick / "benches" / "fast.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(bench, "SECONDS", 0.5)
    found = bench.run("fast", None, quick)
    assert "not done after 0.5 s" in found["failure"] and found["seconds"] < 20


def test_an_unknown_bench_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--only", "rollouts"])
    assert ended.value.code == 2 and "rollouts: there are rollout, handoff" in capsys.readouterr().err


def test_the_table_of_a_run_goes_into_a_page_and_only_there(quick: Path) -> None:
    page = quick / "page.md"
    page.write_text(f"before\n{bench.START}\nstale\n{bench.END}\nafter\n")
    with pytest.raises(SystemExit):  # nothing has been run
        bench.main(["--out", str(quick / "out"), "--doc", str(page)])
    bench.main(["--out", str(quick / "out"), "--only", "fast"])
    for _ in range(2):  # the second time it replaces what the first has written
        assert bench.main(["--out", str(quick / "out"), "--doc", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert text.count("| fast | a / b |") == 1
    with pytest.raises(SystemExit, match="no place for the table"):
        bench.filled("a page without", "table")


def test_every_bench_exists_and_the_page_explains_it() -> None:
    page = PAGE.read_text()
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert explained == list(bench.BENCHES)
    for name in bench.BENCHES:
        assert importlib.util.find_spec(f"benches.{name}"), name
    for name in re.findall(r"python -m benches\.([a-z_]+)", page):
        assert importlib.util.find_spec(f"benches.{name}"), name


def test_the_page_shows_rows_of_known_benches() -> None:
    table = PAGE.read_text().partition(bench.START)[2].partition(bench.END)[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert not rows or rows[0] == ["| bench", "ratio", "median (min-max)", "limit", "holds", "facts |"]
    for first, *_, holds, _ in rows[1:]:
        assert first.removeprefix("| ") in bench.BENCHES and holds in ("yes", "**no**", "failed", "")
