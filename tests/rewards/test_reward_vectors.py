"""Every case of every file of the reward vectors, through the public pieces.

`pytest tests/rewards --vectors DIR` runs DIR/rewards instead of the cases in the repository. Each case runs in float64
at its file's tolerance; each sequence again with its state saved, sent through JSON and loaded into a fresh part before
each of its steps, and then to the same bits.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rewards import rule_cases  # noqa: F401  (registers its adapters)
from tests.rewards.reward_cases import Case, adapters

OURS = Path(__file__).parents[1] / "vectors"
# Where null means none; elsewhere it is a missing number.
NONE = {"state", "alarm_index", "strict", "flexible", "last_number"}
NONE_OF = {("last_boxed", "value")}
# The inputs that hold one entry a step, by function: these are also checkpoint tests.
SEQUENCES = {
    **{"lagrange_sequence": "means", "dual_ascent_sequence": "means", "adaptive_kl_sequence": "kl"},
    **{"hv_meta_sequence": "evals", "gradient_weights_sequence": "grads", "recap_sequence": "losses"},
    **{"shape_sequence": "steps", "dga_sequence": "domain_grads", "tchebycheff_sequence": "batches"},
    **{"covariance_weights_sequence": "batches", "composite": "steps"},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector_file" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--vectors", default=None)
        files = sorted((Path(chosen or OURS) / "rewards").glob("*.json"))
        metafunc.parametrize("vector_file", files, ids=[file.stem for file in files])


def test_all_cases_of_the_file_pass(vector_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(vector_file.read_text())
    cases, tolerance = content["cases"], content["tolerance"]
    unknown = {case["fn"] for case in cases} - set(adapters)
    assert not unknown, f"{vector_file.name}: unknown functions {unknown}"
    wrong = {case["id"]: found for case in cases if (found := mistakes(case, tolerance))}
    with capsys.disabled():
        print(f"\n{vector_file.stem}: {len(cases) - len(wrong)}/{len(cases)} cases", end="")
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_files_of_the_repository_are_all_there() -> None:
    assert len(list((OURS / "rewards").glob("*.json"))) == 14


def mistakes(case: dict[str, Any], tolerance: dict[str, float]) -> list[str]:
    """What differs from the expected outputs, and from the uninterrupted run."""
    if case["fn"] == "gao_fit":
        tolerance = {**tolerance, "rel": 1e-7}
    whole = plain(adapters[case["fn"]](Case(case)))
    found = differences(case["fn"], "", whole, case["expected"], tolerance)
    for cut in cuts(case):
        again = plain(adapters[case["fn"]](Case(case, cut=cut)))
        if json.dumps(again) != json.dumps(whole):  # repr of floats: equal to the bit
            found.append(f"resumed before step {cut}: other numbers")
    return found


def cuts(case: dict[str, Any]) -> range:
    if case["fn"] == "nelder_mead":
        return range(len(case["expected"]["queried"]))
    return range(len(case["inputs"][SEQUENCES[case["fn"]]]) if case["fn"] in SEQUENCES else 0)


def plain(value: Any) -> Any:
    """Lists, dicts and Python scalars."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def differences(fn: str, key: str, got: Any, want: Any, tolerance: dict[str, float]) -> list[str]:
    """Lines that name each expected value that `got` misses; keys that are not expected are ignored."""
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return [f"{key}: {got!r}, want {want!r}"]
        missing = [f"{key}.{name} is missing" for name in want if name not in got]
        return missing + [
            line for name in want if name in got for line in differences(fn, name, got[name], want[name], tolerance)
        ]
    if isinstance(want, list):
        if not isinstance(got, list) or len(got) != len(want):
            return [f"{key}: {got!r}, want {want!r}"]
        return [line for g, w in zip(got, want, strict=True) for line in differences(fn, key, g, w, tolerance)]
    return [] if same(fn, key, got, want, tolerance) else [f"{key}: {got!r}, want {want!r}"]


def same(fn: str, key: str, got: Any, want: Any, tolerance: dict[str, float]) -> bool:
    if want is None and (key in NONE or (fn, key) in NONE_OF):
        return got is None
    if isinstance(want, str) and want.removeprefix("-") == "inf":
        return got == float(want)
    if want is None:
        return isinstance(got, float) and math.isnan(got)
    kinds = {type(got), type(want)}
    if kinds in ({float}, {float, int}):
        return bool(abs(got - want) <= tolerance["abs"] + tolerance["rel"] * abs(want))
    return len(kinds) == 1 and bool(got == want)
