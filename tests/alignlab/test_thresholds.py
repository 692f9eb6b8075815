"""Thresholds from earlier runs: the highest place of the gold score among the means that were seen."""

import argparse
import json

import pytest

from alignlab.thresholds import fit_thresholds
from core.errors import UserError


def run(tmp_path, name, proxies):
    """A run whose gold score is highest, 0.9, where the proxy is 0.6."""
    folder = tmp_path / name
    folder.mkdir()
    rows = []
    for step, proxy in enumerate(proxies, 1):
        gold = 0.9 - (proxy - 0.6) ** 2
        rows.append({"step": step, "reward/total": proxy, "reward/proxy": proxy, "weighting/weight/proxy": 1.0})
        rows.append({"step": step, "eval/b/accuracy": gold})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def options(runs, **given):
    return argparse.Namespace(**{"runs": runs, "gold": "eval/b/accuracy", "components": None, "degree": 2, **given})


def test_the_peak_of_gold_is_found(tmp_path, capsys):
    runs = [
        run(tmp_path, "a", [0.1] * 5 + [0.3] * 5 + [0.5] * 5),
        run(tmp_path, "b", [0.7] * 5 + [0.9] * 5 + [1.1] * 5),
    ]
    assert fit_thresholds(options(runs)) == 0
    # 21 places from 0.1 to 1.1, five hundredths apart.
    assert capsys.readouterr().out.splitlines() == [
        "# 6 points; the fit expects eval/b/accuracy 0.9 there",
        "thresholds: {proxy: 0.6}",
    ]


def test_mistakes_are_explained(tmp_path):
    runs = [run(tmp_path, "a", [0.1] * 5 + [0.3] * 5)]
    with pytest.raises(UserError, match=r"2 points do not determine 3 monomials.*more or longer runs"):
        fit_thresholds(options([runs[0]]))
    with pytest.raises(UserError, match="eval/b/acuracy: no run has this metric; did you mean 'eval/b/accuracy'"):
        fit_thresholds(options(runs, gold="eval/b/acuracy"))
    with pytest.raises(UserError, match="no run; name a folder"):
        fit_thresholds(options([str(tmp_path / "nowhere")]))
