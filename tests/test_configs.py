"""Every config of the project loads, and every key of every config, misspelt or ill-typed, is refused."""

import json
from pathlib import Path

import pytest

from alignlab.plan import make_plan
from core.errors import UserError
from core.loading import load_config, parse_config, read_yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def keys(tree, path=()):
    """Every key of a plain tree, as a path."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys(value, (*path, key))


def mutated(tree, path, name=None, value=None):
    """The tree with the key at `path` renamed to `name`, or its value replaced."""
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in path[:-1]:
        at = at[key]
    if name is not None:
        at[name] = at.pop(path[-1])
    else:
        at[path[-1]] = value
    return tree


def plan(tree):
    return make_plan(parse_config(tree, "mutated.yaml"))


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """The files, hub datasets and GPUs that configs name, so that only the mutation is wrong."""
    monkeypatch.chdir(tmp_path)
    row = {"question": "1+1?", "problem": "1+1?", "answer": "2", "completion": "2"}
    monkeypatch.setattr("alignlab.prompts._read_hub", lambda *a: [row])
    monkeypatch.setattr("alignlab.cluster.here", lambda: {"CPU": 2, "GPU": 2})
    for config in CONFIGS:
        tree, _ = read_yaml(config)
        for folder in (tree["model"]["path"],):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "config.json").write_text("{}")
        paths = [tree["data"]["path"], *tree.get("eval", {}).get("benchmarks", [])]
        for name in (p for p in paths if p.endswith(".jsonl")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("alignlab.benchmarks.problems", lambda *a: [row])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_loads_and_its_plan_is_sound(path):
    assert make_plan(load_config(path)).config.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_key_misspelt_is_refused_with_the_nearest(path):
    tree, _ = read_yaml(path)
    for key in keys(tree):
        if key[:2] == ("rewards", "components") and len(key) == 3 and "fn" not in tree["rewards"]["components"][key[2]]:
            wrong = key[2][:-1]
        elif key[:2] == ("rewards", "components") and len(key) == 3:
            continue  # a label of the user's own
        else:
            wrong = key[-1] + "q"
        with pytest.raises(UserError) as error:
            plan(mutated(tree, key, name=wrong))
        message = str(error.value)
        assert wrong in message, (key, message)
        assert f"did you mean '{key[-1]}'" in message, (key, message)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_value_of_a_wrong_type_is_refused(path):
    tree, _ = read_yaml(path)
    for key in keys(tree):
        with pytest.raises(UserError) as error:
            plan(mutated(tree, key, value=[[1]]))
        assert key[-1] in str(error.value), (key, str(error.value))
