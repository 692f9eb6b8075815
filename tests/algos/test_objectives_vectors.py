"""Every case of every file of the objectives vectors, through the public parts.

`pytest tests/algos --vectors DIR` runs DIR/objectives instead of the cases in the repository. Each case runs in float64
at its own tolerance, in float32 at 1e-4, and with NaN and with -inf in its masked cells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.algos.objective_cases import Case, adapters, numbers

OURS = Path(__file__).parents[1] / "vectors"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector_file" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--vectors", default=None)
        files = sorted((Path(chosen or OURS) / "objectives").glob("*.json"))
        metafunc.parametrize("vector_file", files, ids=[file.stem for file in files])


def test_all_cases_of_the_file_pass(vector_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = json.loads(vector_file.read_text())["cases"]
    unknown = {case["kind"] for case in cases} - set(adapters)
    assert not unknown, f"{vector_file.name}: unknown kinds {unknown}"
    wrong = {case["name"]: found for case in cases if (found := mistakes(case))}
    with capsys.disabled():
        print(f"\n{vector_file.stem}: {len(cases) - len(wrong)}/{len(cases)} cases", end="")
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_files_of_the_repository_are_all_there() -> None:
    assert len(list((OURS / "objectives").glob("*.json"))) == 39


def mistakes(case: dict[str, Any]) -> list[str]:
    """What differs from the expected outputs, in any of the four runs."""
    found = []
    for name, dtype, junk, tolerance in (
        ("float64", torch.float64, None, case["tolerance"]),
        ("float32", torch.float32, None, 1e-4),
        ("masked cells NaN", torch.float64, torch.nan, case["tolerance"]),
        ("masked cells -inf", torch.float64, -torch.inf, case["tolerance"]),
    ):
        run = Case(case, dtype, junk)
        got = adapters[case["kind"]](run)
        found += [f"{name}: {line}" for line in differences(run, got, case["expected"], tolerance)]
    return found


def differences(run: Case, got: dict[str, Any], want: dict[str, Any], tolerance: float) -> list[str]:
    found = []
    for name, expected in want.items():
        if name not in got:
            found.append(f"{name}: missing")
        elif name == "channels":
            for index, (ours, theirs) in enumerate(zip(got[name], expected, strict=True)):
                found += [f"channel {index} {line}" for line in differences(run, ours, theirs, tolerance)]
        else:
            a = torch.as_tensor(got[name]).detach().double()
            b = torch.tensor(numbers(expected), dtype=torch.float64)
            if run.has("mask") and b.shape == run.mask.shape and not name.startswith("grad"):
                a, b = a[run.mask], b[run.mask]
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                found.append(f"{name}: largest difference {(a - b).abs().max():.3g}")
    return found
