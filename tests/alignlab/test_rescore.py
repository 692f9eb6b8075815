"""Other rewards on a finished run: the same config gives the same numbers, another one what a person works out."""

import argparse
import asyncio
import json
import math

import pytest

from algos.loss import advantages
from algos.methods import resolve
from alignlab.metrics import rollout_rows
from alignlab.rescore import groups_of, rescore, rescored, with_rewards
from core.errors import UserError
from core.loading import dump_config, parse_config
from core.schema import Completion, Group, Prompt, Score
from learner.collate import collate
from learner.mixture import mixed
from rewards.composer import Composer

ENTRIES = {"right": {"fn": "boxed"}, "tokens": {"per": 10}, "form": {"fn": "boxed", "weight": 0.5, "shape": ["minmax"]}}
HELD = {"policy": "lagrange", "kind": "projected", "thresholds": {"tokens": 0.3}, "senses": {"tokens": "<="}, "lr": 1.0}


def config_of(tmp_path, weighting):
    tree = {"name": "r", "steps": 3, "model": {"path": "m"}, "data": {"path": "d"}, "output_dir": str(tmp_path)}
    rewards = {"components": ENTRIES, "weighting": weighting or {"policy": "static"}}
    return parse_config({**tree, "method": {"row": "grpo", "kl": "none"}, "rewards": rewards}, "test")


def groups(step):
    """Two groups of three; lengths 2, 4, 6, and one score is missing."""
    made = []
    for number in range(2):
        completions = tuple(Completion((1,) * n, (-1.0,) * n, (0,) * n, "x" * n, "stop") for n in (2, 4, 6))
        said = {
            "right": (Score("ok", 1.0), Score("ok", float(number)), Score("timeout", detail="took longer than 1 s")),
            "tokens": tuple(Score("ok", len(c.token_ids) / 10) for c in completions),
            "form": tuple(Score("ok", float(i + step)) for i in range(3)),
        }
        made.append(Group(f"{step}-{number}", Prompt(number, "Q?", (1,)), completions, components=said))
    return made


def made_run(tmp_path, weighting):
    """The files of a run of three steps, as the loop writes them."""
    config = config_of(tmp_path, weighting)
    folder = tmp_path / "r"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/b/accuracy": 0.5}\n')
    composer, method = Composer(config.rewards, steps=3), resolve(config.method)
    for step in range(3):
        weighed, mixture = composer.weigh(asyncio.run(composer.columns(groups(step), step, scored=True)))
        found = advantages(*mixed(method, collate(weighed, apart=mixture.apart)[0], mixture))
        rows = iter(found.channels[0].advantages[:, 0].tolist())
        lines = rollout_rows(step + 1, weighed, [[next(rows) for _ in g.completions] for g in weighed])
        composer.learn()
        path = folder / "rollouts" / f"step-{step + 1:06d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, config


@pytest.mark.parametrize("weighting", [{}, HELD], ids=["fixed", "constrained"])
def test_the_config_of_the_run_gives_its_numbers_again(tmp_path, weighting):
    folder, config = made_run(tmp_path, weighting)
    steps = list(rescored(folder, config))
    assert [step.number for step in steps] == [1, 2, 3]
    for step in steps:
        assert step.totals == [math.nan if row["total"] is None else row["total"] for row in step.rows]
        assert step.advantages == pytest.approx([row["advantage"] for row in step.rows], abs=1e-12)
    assert steps[0].weights["tokens"] == (0 if weighting else 1)
    assert steps[1].weights["tokens"] == (pytest.approx(-0.1) if weighting else 1)  # 0.4 against at most 0.3


def test_other_weights_make_other_totals_and_turn_the_order(tmp_path, capsys):
    folder, _ = made_run(tmp_path, {})
    new = "rewards:\n  components:\n    right: {fn: boxed}\n    tokens: {per: 10, weight: -10}\n"
    (tmp_path / "new.yaml").write_text(new)
    out = tmp_path / "out.jsonl"
    assert rescore(argparse.Namespace(folder=str(folder), config=str(tmp_path / "new.yaml"), out=str(out))) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["total"] for row in rows[:3]] == pytest.approx([1 - 2, 0 - 4, -6])
    assert [row["old_total"] for row in rows[:3]] == pytest.approx([1.2, 0.4 + 0.25, 0.6 + 0.5])
    assert rows[0]["advantage"] > 0 > rows[2]["advantage"]
    printed = capsys.readouterr().out
    assert "advantages agree" in printed and printed.splitlines()[-3].strip().startswith("all")


def test_what_the_run_has_not_scored_is_refused(tmp_path):
    folder, config = made_run(tmp_path, {})
    file = tmp_path / "new.yaml"
    file.write_text("components:\n  rigth: {fn: boxed}\n")
    with pytest.raises(UserError, match=r"rewards\.components\.rigth: .*holds no scores of it.*did you mean 'right'"):
        list(rescored(folder, with_rewards(config, file)))
    file.write_text("components:\n  right: {fn: boxed}\nwheighting: {}\n")
    with pytest.raises(UserError, match=r"new\.yaml:3: unknown option 'rewards.wheighting'; did you mean 'weighting'"):
        with_rewards(config, file)
    file.write_text("components:\n  right: {fn: boxed}\nweighting: {policy: gradient}\n")
    with pytest.raises(UserError, match="looks at gradients"):
        list(rescored(folder, with_rewards(config, file)))
    with pytest.raises(UserError, match="no run with rollouts"):
        rescore(argparse.Namespace(folder=str(tmp_path), config=None, out=None))


def test_statuses_survive_the_file(tmp_path):
    folder, _ = made_run(tmp_path, {})
    rows = [json.loads(line) for line in (folder / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert groups_of(rows)[0].components == groups(0)[0].components
