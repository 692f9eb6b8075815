"""YAML and overrides become a typed config, or one clear error."""

import json

import pytest
import yaml

from core.config import RunConfig
from core.errors import UserError
from core.loading import dump_config, load_config, parse_config
from core.section import Section

BASE = {"name": "t", "steps": 2, "model": {"path": "m"}, "data": {"path": "d.jsonl"}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def leaves(section=RunConfig, path=()):
    """Every option of the tree as (path, annotation)."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from leaves(kind, (*path, name))
        else:
            yield (*path, name), kind


def put(tree, path, value):
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = value
    return tree


def test_numbers_are_written_as_people_write_them(file):
    config = load_config(file, ["learner.optimizer.lr=1e-6", "learner.optimizer.eps=1.5E-8", "rollout.top_p=.9"])
    assert (config.learner.optimizer.lr, config.learner.optimizer.eps, config.rollout.top_p) == (1e-6, 1.5e-8, 0.9)


def test_the_resolved_file_is_runnable_again(file, tmp_path):
    config = load_config(file, ["rewards.components.length={weight: 0.5}", "learner.optimizer.betas=[0.9, 0.95]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(("path", "kind"), list(leaves()), ids=lambda x: ".".join(x) if isinstance(x, tuple) else "")
def test_every_option_refuses_a_wrong_spelling_and_a_wrong_type(path, kind):
    name = ".".join(path)
    with pytest.raises(UserError) as error:
        parse_config(put(BASE, (*path[:-1], path[-1] + "x"), 1), "run.yaml")
    assert f"unknown option '{name}x'; did you mean '{path[-1]}'" in str(error.value)
    with pytest.raises(UserError) as error:
        parse_config(put(BASE, path, [[1]]), "run.yaml")  # no option is a list of lists
    assert f"'{name}" in str(error.value) and str(error.value).startswith("run.yaml: ")


def test_every_option_says_what_it_means():
    for path, _ in leaves():
        section = RunConfig
        for key in path[:-1]:
            section = section.model_fields[key].annotation
        assert section.model_fields[path[-1]].description, path


def test_the_error_names_the_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: t\nsteps: 2\nmodel:\n  path: m\nlearner:\n  optimizer:\n    lr: fast\ndata: {path: d}\n")
    with pytest.raises(UserError, match=r"run.yaml:7: 'learner.optimizer.lr' is 'fast'.*Peak learning rate"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.optimizer.lr"], "an override is key=value"),
        (["steps.x=1"], "'steps' is 2, which has no options below it"),
        (["learner.minibatches=5"], "rollout.prompts 32 cannot be split into learner.minibatches 5"),
        (["actors.weight_transfer=nccl", "actors.device=cpu"], "nccl needs GPUs on both sides"),
        (["actors.max_model_len=64"], "is less than data.max_prompt_tokens + rollout.max_tokens = 1024"),
        (["actors.max_model_len=1024", "eval.max_tokens=600"], "data.max_prompt_tokens + eval.max_tokens = 1112"),
        (["learner.optimizer.lr=.inf"], "'learner.optimizer.lr' is inf: input should be a finite number"),
        (["learner.optimizer.betas=[.nan, 0.9]"], "should be a finite number"),
        (["name=../x"], "'name' is '../x'"),
        (["actors.count=yes"], "'actors.count' is 'yes'"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(file, overrides, message):
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: t\nname: u\n", "line 2: 'name' is written twice"),
        ("- a\n", "a config is a mapping"),
        ("name: [\n", "not valid YAML"),
        ("name: t\n", "option 'steps' is missing"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert message in str(error.value)


def test_a_text_on_the_command_line_is_taken_as_it_stands(file):
    config = load_config(file, ["data.template={prompt}", "name=7", "data.system=Q: [1]", "model.revision=1e5"])
    assert (config.data.template, config.name, config.data.system) == ("{prompt}", "7", "Q: [1]")
    assert config.model.revision == "1e5"
    assert load_config(file, ["data.template='{prompt}: 1'", "data.system=null"]).data.template == "{prompt}: 1"
    assert load_config(file, ["data.system=null"]).data.system is None
    assert load_config(file, ["data.completion_column=2024-01-01"]).data.completion_column == "2024-01-01"
    with pytest.raises(UserError, match=r"'data.template' is None"):
        load_config(file, ["data.template="])


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "program"
    path.write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(UserError, match=r"program: not a config: .* a config is UTF-8 text"):
        load_config(path)


def test_a_missing_file_names_a_near_one():
    with pytest.raises(UserError, match="cannot read the config"):
        load_config("configs/nothing-here.yaml")


def test_a_method_given_by_name_takes_overrides(file):
    load = load_config(file, ["method=dapo", "method.kl.coef=0.1"])
    assert load.method == {"row": "dapo", "kl": {"coef": 0.1}}
