"""The report says what the files say: numbers of a made-up run, worked out by hand."""

import argparse
import json
import re

import pytest
import yaml

from alignlab.markup import tag
from alignlab.plots import Line, Path, line_plot, path_plot, round_range, smoothed, thinned
from alignlab.report import render, report, write_report
from alignlab.report_headline import benchmarks, gain
from alignlab.report_rewards import proxy_and_gold
from alignlab.report_rollouts import chosen, ends, tint, widest
from alignlab.report_weighting import fixed_weights, moments_of, pareto, sense_of
from alignlab.run_files import read_run
from core.errors import UserError

STEPS = 10
CONFIG = {
    "name": "made-up",
    "steps": 10,
    "method": {"row": "grpo", "kl": "none"},
    "model": {"path": "tiny"},
    "data": {"path": "d.jsonl"},
    "rollout": {"prompts": 4, "group_size": 2, "max_tokens": 512},
    "rewards": {
        "components": {"right": {}, "tokens": {"per": 24}},
        "weighting": {
            "policy": "lagrange",
            "kind": "projected",
            "thresholds": {"tokens": 1.0},
            "senses": {"tokens": "<="},
        },
        "gold": "judge",
    },
    "learner": {"optimizer": {"lr": 0.5}},
}


def metrics(step):
    """Step 1 .. 10: right rises from 0.1 to 1, gold falls from step 6 on, tokens are 0.9 and from step 6 on 1.1."""
    return {
        "step": step,
        "time": 1000.0 + step,
        "reward/total": step / 10,
        "reward/right": step / 10,
        "reward/right_failed": 0.25 if step == 3 else 0.0,
        "reward/right_abstained": 0.0,
        "reward/tokens": 0.9 if step <= 5 else 1.1,
        "reward/tokens_failed": 0.0,
        "policy/entropy": None,
        "policy/kl_ref": 0.01 * step,
        "time/step": 2.0,
        "time/train": 1.5,
        "weighting/weight/right": 1.0,
        "weighting/weight/tokens": -0.1 * step,
        "weighting/multiplier/tokens": 0.1 * step,
        "weighting/measured/tokens": 0.9 if step <= 5 else 1.1,
        "weighting/threshold/tokens": 1.0,
        "overoptimization/proxy": step / 10,
        "overoptimization/gold": step / 10 if step <= 5 else 1 - step / 10,
        "overoptimization/alarm": float(step >= 7),
        "diagnostics/correlation/right/tokens": -0.5,
        "diagnostics/say/right": 0.75,
        "diagnostics/say/tokens": 0.25,
    }


def evaluation(folder, step, shares):
    """An evaluation of three problems, two samples each; `shares` of right ones."""
    folder = folder / "evals" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    rows = [{"problem": p, "correct": sample < 2 * share} for p, share in enumerate(shares) for sample in range(2)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mean = sum(shares) / len(shares)
    result = {"accuracy": mean, "low": mean - 0.1, "high": mean + 0.1, "problems": 3}
    summary = {"samples": 2, "sampling": {"temperature": 1.0, "max_tokens": 64}, "result": result}
    (folder / "sums.summary.json").write_text(json.dumps(summary))


def rollout(group, sample, total, completion):
    return {
        "step": 1, "group": group, "sample": sample, "prompt": "1 < 2?", "completion": completion, "total": total,
        "components": {"right": total}, "missing": {}, "advantage": None if total is None else total - 0.5,
        "tokens": 3, "finish_reason": "stop",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A whole run's folder."""
    path = tmp_path / "made-up"
    (path / "rollouts").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    machine = {"time": "1970-01-01T00:15:00+0000", "command": ["alignlab", "train"], "versions": {"torch": "9.9"}}
    (path / "environment.json").write_text(json.dumps(machine))  # 900 s; the last row is of 1010 s
    (path / "metrics.jsonl").write_text("".join(json.dumps(metrics(step)) + "\n" for step in range(1, STEPS + 1)))
    rows = [rollout("a", 0, 1.0, "<script>alert(1)</script>"), rollout("a", 1, 0.0, "no"), rollout("b", 0, None, "?")]
    for step in (1, 5, 10):
        (path / "rollouts" / f"step-{step:06d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    warning = {"step": 7, "name": "overoptimization", "text": "gold is 0.1 below its peak", "advice": "stop"}
    (path / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    evaluation(path, 0, [0, 0, 0.5])
    evaluation(path, 10, [1, 0.5, 0.5])
    return path


def text_of(page):
    """What a reader sees, without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


# ---------------------------------------------------------------- the page
def test_the_headline_has_the_runs_numbers(folder):
    told = text_of(render([read_run(folder)]))
    assert "steps 10 of 10" in told and "method grpo (kl: none)" in told and "model tiny" in told
    assert "4 prompts × 2 completions" in told
    assert "total reward 0.1 → 1" in told
    assert "1 min 50 s (steps 20.0 s)" in told  # 1010 s - 900 s; 10 steps of 2 s
    assert "0.167 [0.067, 0.267] after step 0" in told and "0.667 [0.567, 0.767] after step 10" in told


def test_the_gain_is_paired_by_problem(folder):
    run = read_run(folder)
    middle, low, high = gain(*run.evaluations)
    # Changes 1, 0.5, 0: mean 0.5, standard deviation 0.5, error 0.5 / sqrt(3) = 0.2887, times 1.96 = 0.5658.
    assert (round(middle, 3), round(low, 3), round(high, 3)) == (0.5, -0.066, 1.066)
    assert "+0.500 [-0.066, +1.066]" in text_of(benchmarks([run]))


def test_every_section_of_a_whole_run_is_there(folder):
    page = render([read_run(folder)])
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", page)
    assert titles == [
        "Benchmarks", "Warnings", "Reward", "Policy and time", "Weights, constraints and multipliers", "Pareto plot",
        "Over-optimisation", "Agreement of the components", "Scores that failed", "Rollouts",
        "Options that differ from their defaults", "Environment",
    ]  # fmt: skip
    told = text_of(page)
    assert "asked ≤ 1, broken in 50% of the steps" in told  # above 1 in steps 6 to 10
    assert "alarm after step 7" in told and "gold is 0.1 below its peak" in told
    assert "−0.50" in told  # the correlation
    assert "right 2.5% (25.0%)" in told  # failed in one of ten steps, there a quarter
    assert "learner.optimizer.lr 0.5 1e-06" in told and "rewards.components.tokens.per 24 –" in told
    assert "rollout.max_tokens" not in told  # written, but the default
    assert "versions.torch 9.9" in told


def test_a_page_is_one_file_and_runs_no_script(folder):
    page = render([read_run(folder)])
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "http" not in page and "src=" not in page


def test_several_runs_share_pictures(folder, tmp_path):
    other = tmp_path / "elsewhere" / "made-up"
    other.parent.mkdir()
    folder.rename(tmp_path / "first")
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps(metrics(1)) + "\n" + json.dumps(metrics(2)) + "\n")
    (other / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "steps": 20}))
    write_report([tmp_path / "first", other], tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    told = text_of(page)
    assert "<h1>first and made-up</h1>" in page and "method grpo (kl: none)" in told
    assert "first 10 of 10" in told and "made-up 2 of 20" in told  # what differs has a row a run
    (total,) = re.findall(r"<figure><figcaption><div><b>total</b>.*?</figure>", page, re.DOTALL)
    assert len(re.findall("<polyline", total)) == 2 and "#0072b2" in total and "#d55e00" in total


# ---------------------------------------------------------------- what is missing
def test_what_is_missing_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/total": 0.5}\n{"step": 2, "reward/total": 0.7}\n')
    page = render([read_run(tmp_path)])
    assert re.findall(r"<h2[^>]*>([^<]+)</h2>", page) == ["Reward"]


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "warnings.jsonl", "metrics.jsonl"])
def test_any_one_file_may_be_missing_or_broken(folder, name):
    (folder / name).write_text("{ this is neither JSON nor: YAML: [\n")
    assert f"{name}" in text_of(render([read_run(folder)]))  # it is told
    (folder / name).unlink()
    assert name not in text_of(render([read_run(folder)]))


def test_a_last_line_that_was_cut_off_is_no_mistake_but_another_is_told(folder):
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"step": 11, "reward/to')
    run = read_run(folder)
    assert run.steps == 10 and not run.notes
    (folder / "metrics.jsonl").write_text('{"step": 0, "rew\n' + whole)
    assert read_run(folder).notes == ["metrics.jsonl: 1 of 11 lines are not readable and left out"]


def test_a_missing_value_is_no_point(folder):
    run = read_run(folder)
    assert "policy/entropy" not in run.metrics
    assert run.metrics["reward/right"][0] == (1.0, 0.1) and len(run.metrics["reward/right"]) == 10


def test_a_run_that_has_not_begun_gives_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: r\nsteps: 3\n")
    (tmp_path / "metrics.jsonl").write_text("")
    assert "steps 0 of 3" in text_of(render([read_run(tmp_path)]))


def test_the_verb_says_where_the_page_is_and_what_is_no_run(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(argparse.Namespace(runs=["made-up"], out=None)) == 0
    assert capsys.readouterr().out == "report: made-up/report.html\n"
    assert "made-up" in (folder / "report.html").read_text()
    with pytest.raises(UserError, match=r"RUN: made-down holds no run .*did you mean 'made-up'"):
        report(argparse.Namespace(runs=["made-down"], out=None))


# ---------------------------------------------------------------- plots
def test_a_curve_ends_where_its_numbers_say():
    """The frame is 380 x 220 with margins 56 left, 14 right, 8 above, 34 below: x 56 to 366, y 186 up to 8."""
    picture = line_plot([Line([(0, 0.0), (5, 0.5), (10, 1.0)])])
    assert re.findall(r'<polyline points="([^"]+)"', picture) == ["56.0,186.0 211.0,97.0 366.0,8.0"]


def test_a_long_curve_is_thin_raw_and_thick_smoothed():
    points = [(float(step), float(step % 2)) for step in range(60)]
    assert smoothed(points)[0] == (0.0, 1 / 3)  # 0, 1, 0: two neighbours of five are before the start
    assert smoothed(points)[30] == (30.0, 0.4)  # 0, 1, 0, 1, 0
    assert line_plot([Line(points)]).count("<polyline") == 2


def test_a_very_long_curve_keeps_its_ends_and_its_peaks():
    points = [(float(step), 0.0) for step in range(10000)]
    points[4321] = (4321.0, 9.0)
    thin = thinned(points)
    assert len(thin) <= 802 and thin[0] == (0.0, 0.0) and thin[-1] == (9999.0, 0.0) and (4321.0, 9.0) in thin


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0], [1e-14, 3e-14], [0.1, 1e6], [-1.6e-8, 1.4e-9]])
def test_a_range_holds_its_values(values):
    for zero in (False, True):
        low, high = round_range(values, zero=zero)
        room = 1e-9 * (high - low)
        assert low < high and low - room <= min(values) and max(values) <= high + room
        assert not zero or low <= 0 <= high


def test_a_path_marks_its_front():
    path = Path([(0.0, 0.0), (1.0, 1.0)], ["start", "end"], front=[1])
    picture = path_plot([path], x_label="a", y_label="b")
    assert picture.count('class="front"') == 1 and "<title>end: 1, 1</title>" in picture


def test_text_is_escaped_unless_it_is_markup():
    assert tag("p", "<b>", tag("i", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;</i></p>'


# ---------------------------------------------------------------- pieces
def test_the_sense_of_a_constraint_is_the_configs(folder):
    run = read_run(folder)
    assert sense_of(run, "tokens") == "<=" and sense_of(run, "right") == ">="  # the default of projected


def test_weights_that_never_change_are_a_line_of_text(folder):
    run = read_run(folder)
    assert fixed_weights(run) == ""  # that of tokens falls
    rows = [{"step": s, "weighting/weight/right": 1.0, "weighting/weight/tokens": -0.0} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fixed_weights(read_run(folder)) == "made-up: fixed weights, right 1, tokens 0."


def test_a_component_that_one_run_holds_below_a_bound_is_better_when_it_is_less(folder, tmp_path):
    free = tmp_path / "free"
    free.mkdir()
    rows = [{"step": s, "reward/right": s / 4, "reward/tokens": s / 4, "reward/tokens_failed": 0.0} for s in (1, 2)]
    (free / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "better: left and up" in pareto([read_run(free), read_run(folder)])  # right against tokens


def test_a_pareto_path_is_of_evaluations_where_they_score_components(folder):
    rows = [{"step": s, "eval/sums/reward/right": s / 10, "eval/sums/reward/tokens": 1.0} for s in (0, 10)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    moments = moments_of(read_run(folder), ["right", "tokens"])
    assert moments.means == {"right": [0.0, 1.0], "tokens": [1.0, 1.0]}
    assert moments.names == ["sums after step 0", "sums after step 10"]


def test_proxy_and_gold_are_what_the_alarm_compared(folder):
    proxy, gold, name = proxy_and_gold(read_run(folder))
    assert name == "judge" and proxy[-1] == (10.0, 1.0) and gold[4] == (5.0, 0.5) and gold[-1] == (10.0, 0.0)


def test_ten_rollouts_are_of_five_groups(tmp_path):
    files = [tmp_path / f"step-{i}.jsonl" for i in range(1, 8)]
    assert [(path.stem, count) for path, count in chosen(files)] == [("step-1", 2), ("step-4", 1), ("step-7", 2)]
    assert chosen(files[:1]) == [(files[0], 5)] and chosen([]) == []


def test_the_widest_group_gives_its_best_and_its_worst():
    rows = [rollout("a", i, total, "") for i, total in enumerate([0.5, 0.5])]
    rows += [rollout("b", i, total, "") for i, total in enumerate([0.2, None, 0.9])] + [rollout("c", 0, None, "")]
    groups = widest(rows, 3)
    assert [group[0]["group"] for group in groups] == ["b", "a", "c"]
    assert [[row["total"] for row in ends(group)] for group in groups] == [[0.9, 0.2], [0.5], [None]]


def test_a_background_tells_the_advantage():
    assert tint(1.0, 2.0) == "background:rgba(0,114,178,0.14)"
    assert tint(-2.0, 2.0) == "background:rgba(213,94,0,0.24)"
    assert tint(None, 2.0) == tint(0.0, 2.0) == "background:#f6f6f6"
