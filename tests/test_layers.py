"""Who may import whom, what a process loads, and how large things may get."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("core", "actors", "rewards", "algos", "learner", "alignlab")
MAY_IMPORT = {
    "core": set(),
    "algos": {"core"},
    "rewards": {"core"},
    "actors": {"core"},
    "learner": {"core", "algos"},
    "alignlab": {"core", "algos", "rewards", "actors", "learner"},
}
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in tree.body
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_architecture(path):
    own = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name, _ in imports(path)} & set(FOLDERS) - {own}
    assert ours <= MAY_IMPORT[own]
    if own in ("core", "rewards", "alignlab"):
        heavy = {name.split(".")[0] for name, top in imports(path) if top} & {"torch", "vllm", "ray", "transformers"}
        assert not heavy, "imported where it is used, not at the top"
    if own == "algos":
        outside = {name.split(".")[0] for name, _ in imports(path)} & {"vllm", "ray", "transformers", "numpy"}
        assert not outside
    if not path.name.startswith("vllm"):
        assert not any(name.split(".")[0] == "vllm" for name, top in imports(path) if top)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_a_screen_and_public_ones_are_documented(path):
    text = path.read_text()
    assert text.count("\n") <= 450
    # A method that fills an interface of ours, or torch's, is documented there.
    documented = {"forward", "backward"} | {
        node.name
        for file in path.parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{node.name}: {size} lines"
            if size > 8 and not node.name.startswith("_"):
                assert ast.get_docstring(node) or node.name in documented, f"{node.name} has no docstring"


TABLE = ("algos/methods.py", "algos/reweighting.py", "algos/modifiers.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_outside_the_table_knows_a_method_by_its_name(path):
    """Parts and words that happen to be called like a row may be named, but nothing decides by comparing with one."""
    from algos.methods import MODIFIERS, ROWS

    names = (ROWS.keys() | MODIFIERS.keys()) - {"reinforce"}
    if str(path.relative_to(ROOT)) in TABLE:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.match_case):
            compared = {c.value for c in ast.walk(getattr(node, "pattern", node)) if isinstance(c, ast.Constant)}
            assert not compared & names, f"{path.name}:{getattr(node, 'lineno', '')} compares with {compared & names}"


def test_help_is_instant_and_loads_nothing_heavy():
    code = "import sys, alignlab.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    started = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    seconds = time.monotonic() - started
    loaded = set(ast.literal_eval(out.splitlines()[-1]))
    assert not loaded & {"torch", "vllm", "ray", "transformers", "numpy", "pydantic", "yaml"}
    assert seconds < 5  # 0.05 s on a free core; the modules above are what matters
