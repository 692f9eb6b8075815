"""Docs say what the code does: generated pages are up to date, every command parses, every example runs."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from alignlab import docs
from alignlab.cli import _parser
from core.loading import parse_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MINIMAL = {"name": "t", "steps": 1, "model": {"path": "m"}, "data": {"path": "d.jsonl"}}


def blocks(kind):
    """(page, text) of every fenced block of a kind."""
    for page in PAGES:
        for text in re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield pytest.param(page, text, id=f"{page.name}: {text.splitlines()[0][:40]}")


def test_generated_pages_are_up_to_date():
    assert (ROOT / "docs" / "configuration.md").read_text() == docs.configuration()
    assert (ROOT / "docs" / "metrics.md").read_text() == docs.metrics()


def test_every_option_that_an_advice_names_exists():
    from core.config import RunConfig
    from core.loading import section_at

    named = re.findall(rf"\b(?:{'|'.join(RunConfig.model_fields)})(?:\.[a-z_]+)+", docs.metrics())
    wrong = []
    for option in set(named):
        *parents, last = option.split(".")
        section = section_at(tuple(parents))
        if section is not None and last not in section.model_fields:
            wrong.append(option)
    assert not wrong and "learner.critic.lr" in named


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_every_command_is_one_that_exists(page, text):
    makefile = (ROOT / "Makefile").read_text()
    for line in filter(None, text.splitlines()):
        program, *words = itertools.dropwhile(re.compile(r"[A-Z_]+=").match, shlex.split(line))
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), line
        elif program == "alignlab":
            arguments, rest = _parser().parse_known_args(words)
            assert all("=" in word and not word.startswith("-") for word in rest), line
            config = arguments.config if arguments.verb in ("train", "check") else None
            assert config is None or (ROOT / config).exists(), line
        else:
            assert program == "ray" and words[0] in ("start", "job"), line


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_every_yaml_block_is_accepted(page, text):
    parse_config({**MINIMAL, **yaml.safe_load(text)}, page.name)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[)#]", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_a_surrogate_and_a_method_are_added_as_the_page_says():
    from algos import methods, surrogates
    from algos.batch import Batch
    from algos.loss import advantages, loss, normalise

    page = (ROOT / "docs" / "extending.md").read_text()
    part, row = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert "one file, nine lines" in " ".join(page.split()).lower() and len(part.splitlines()) <= 9
    assert len(row.splitlines()) <= 7
    try:
        exec(part, vars(surrogates))
        exec(row, vars(methods))
        method = methods.resolve("gated_rloo")
        mask = torch.ones(2, 3).bool()
        old = torch.full((2, 3), -1.0)
        batch = Batch(mask=mask, group=torch.zeros(2).long(), rewards=torch.tensor([1.0, 0.0]), old_logprobs=old)
        logprobs = old.clone().requires_grad_()
        loss(method, normalise(method, advantages(method, batch)), logprobs).loss.backward()
        # Leave-one-out: A = +1 and -1; at ratio 1 each of the 6 tokens has gradient -A / 6.
        assert torch.allclose(logprobs.grad, torch.tensor([[-1.0], [1.0]]).expand(2, 3) / 6)
    finally:
        surrogates.surrogates.pop("tanh_gate", None)
        vars(surrogates).pop("tanh_gate", None)
        methods.ROWS.pop("gated_rloo", None)


def test_the_readme_reward_is_a_reward(tmp_path, monkeypatch):
    from core.config import RewardsConfig
    from rewards.composer import check_components
    from rewards.reward import load_function

    (text,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(text)
    check_components(RewardsConfig(components={"terse": {"fn": "my_rewards.py:terse", "weight": 2}}))
    terse = load_function("my_rewards.py:terse", "test")
    assert terse("The answer is \\boxed{4}.") == 1.0 and terse("2 + 2 = 4. \\boxed{4}") == 0.0
