"""Every case of every file of the reweighting vectors, through the public functions.

`pytest tests/algos/test_reweighting_vectors.py --vectors DIR` runs DIR/reweighting instead of the cases in the
repository. Each case runs in float64 at its own tolerance, in float32 at 1e-4, and with NaN in its masked cells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.algos import demonstration_cases  # noqa: F401  (registers its adapters)
from tests.algos.reweighting_cases import Case, adapters

OURS = Path(__file__).parents[1] / "vectors"
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector_file" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--vectors", default=None)
        files = sorted((Path(chosen or OURS) / "reweighting").glob("*.json"))
        metafunc.parametrize("vector_file", files, ids=[file.stem for file in files])


def test_all_cases_of_the_file_pass(vector_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(vector_file.read_text())
    method = content["method"]
    assert method in adapters, f"{vector_file.name}: unknown method '{method}'"
    wrong = {case["id"]: found for case in content["cases"] if (found := mistakes(method, case))}
    with capsys.disabled():
        print(f"\n{vector_file.stem}: {len(content['cases']) - len(wrong)}/{len(content['cases'])} cases", end="")
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_files_of_the_repository_are_all_there() -> None:
    assert len(list((OURS / "reweighting").glob("*.json"))) == 49


def mistakes(method: str, case: dict[str, Any]) -> list[str]:
    """What differs from the expected outputs, in any of the three runs."""
    exact = dict(case["tol"], atol=1e-9) if method == "traac_evict" else case["tol"]
    found = []
    for name, dtype, junk, tolerance in (
        ("float64", torch.float64, None, exact),
        ("float32", torch.float32, None, FLOAT32),
        ("masked cells NaN", torch.float64, torch.nan, exact),
    ):
        run = Case(case, dtype, junk)
        got = adapters[method](run)
        unread = sorted(set(case["params"]) - run.read)
        found += [f"{name}: parameter '{p}' is not read" for p in unread]
        found += [f"{name}: {line}" for line in differences("", got, case["expected"], tolerance)]
    return found


def differences(where: str, got: Any, want: Any, tolerance: dict[str, float]) -> list[str]:
    """Lines that name each expected value that `got` misses; keys that are not expected are ignored."""
    if isinstance(got, Tensor):
        got = got.tolist()
    if isinstance(want, dict):
        missing = [f"{where}.{key} is missing" for key in want if key not in got]
        return missing + [
            line for k in want if k in got for line in differences(f"{where}.{k}", got[k], want[k], tolerance)
        ]
    if isinstance(want, list):
        if not isinstance(got, list | tuple) or len(got) != len(want):
            return [f"{where}: {got!r}, want {want!r}"]
        return [line for i, w in enumerate(want) for line in differences(f"{where}[{i}]", got[i], w, tolerance)]
    if isinstance(want, float):
        close = abs(got - want) <= tolerance["atol"] + tolerance["rtol"] * abs(want)
        return [] if close else [f"{where}: {got!r}, want {want!r}"]
    return (
        [] if got == want and isinstance(got, bool) == isinstance(want, bool) else [f"{where}: {got!r}, want {want!r}"]
    )
