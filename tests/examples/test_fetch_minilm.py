"""What `examples/minilm/fetch.py` copies out of the installed package, and what it says where that is not whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from core.errors import UserError

FILE = Path(__file__).parents[2] / "examples" / "minilm" / "fetch.py"


@pytest.fixture
def fetch():
    spec = importlib.util.spec_from_file_location("fetch_minilm", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(fetch, tmp_path, monkeypatch):
    """A package that would raise if it were imported, with a model's files."""
    folder = tmp_path / "site" / "a_model"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError")
    for name in (*fetch.FILES, "README.md"):
        (folder / "model" / name).write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_the_files_of_a_model_are_copied_and_no_others(fetch, package, tmp_path) -> None:
    fetch.fetch(fetch.find_model("a_model"), tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {n: n for n in fetch.FILES}


def test_a_package_that_is_missing_or_not_whole_is_named(fetch, package) -> None:
    with pytest.raises(UserError, match="'no_such_model' is not installed; `make minilm`"):
        fetch.find_model("no_such_model")
    (package / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer\.json"):
        fetch.find_model("a_model")
