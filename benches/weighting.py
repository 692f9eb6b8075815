"""Do weighting policies do their job in real runs? The quickstart's policy and task, real actors, several seeds.

    python benches/weighting.py OUT [--steps 80] [--seeds 5] [--jobs 2] [--model FOLDER] [--only constraint front]

constraint: accuracy, at most 24 tokens on average, at least 95 % boxed; constrained (`lagrange`, projected) against a
    grid of fixed weights of the same columns. A bound is broken by what the last ten steps' mean exceeds it by.
front: accuracy, brevity and form under fixed equal weights, hypervolume-guided and gradient-based ones: the volume that
    the means of five steps each dominate, from one reference point that is worse than all.
gold: a proxy that pays every calculation that is written down, next to right answers that are only watched: fixed
    weights against a ceiling on the proxy (`lagrange`, xi, with the KL as task).
OUT keeps the runs; a bench that was stopped goes on where it was. About a minute of two CPU cores a run. Exits
non-zero when a promise is broken. The warm-started policy is that of `make quickstart`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rewards.dynamic import front_report

ROOT = Path(__file__).resolve().parents[1]
CEILING, FLOOR, SLACK = 24, 0.95, 0.05
CONSTRAINED = {
    "policy": "lagrange", "kind": "projected", "thresholds": {"tokens": 1.0, "boxed": FLOOR},
    "senses": {"tokens": "<=", "boxed": ">="}, "lr": 0.15, "proportional": 30.0, "smoothing": 0.5,
}  # fmt: skip
COMPONENTS = {"math_answer": {}, "tokens": {"per": CEILING}, "boxed": {}}
# Weights of the length; the form has a third of the answer's.
GRID = (0.0, 0.25, 0.5, 1.0, 2.0)
FRONT = {"math_answer": {}, "brief": {"fn": "length", "target": 1, "alpha": 1 / 64}, "boxed": {}}
OBJECTIVES = ("math_answer", "brief", "boxed")
REFERENCE = (0.5, -0.5, 0.8)  # worse than every run: half right, 32 tokens, four of five boxed
POLICIES = {
    "fixed": {"policy": "static"},
    "hypervolume": {"policy": "hypervolume"},
    "gradient": {"policy": "gradient", "mu": 1e-3},  # a learning rate of 1e-4: steps of a tenth of the influence
}
CALCULATIONS = f"{ROOT / 'benches' / 'flawed.py'}:calculations"
GOLD = {"calculations": {"fn": CALCULATIONS}, "math_answer": {}}
Run = tuple[str, dict[str, Any], int]  # name, the rewards section and other changes, seed


def main() -> int:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; one leaves a core idle half of the time")
    parser.add_argument("--model", default="runs/quickstart-warmstart/checkpoints/step-000600/model")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    broken = []
    for part in options.only:
        runs, judge = PARTS[part]
        wanted = list(runs(options.seeds))
        with ThreadPoolExecutor(options.jobs) as pool:
            failed = [line for line in pool.map(lambda run: train(run, options), wanted) if line]
        print(f"\n## {part}\n", *failed, sep="\n")
        broken += failed or judge(options.out, wanted)
    print(*broken or ["every promise is kept"], sep="\n")
    return 1 if broken else 0


def constraint_runs(seeds: int) -> Iterator[Run]:
    """Constrained runs of every seed, and the grid for two of them."""
    for seed in range(seeds):
        yield "constrained", rewards(COMPONENTS, CONSTRAINED), seed
    for weight in GRID:
        fixed = {"policy": "static", "order": "normalize_then_sum", "whiten": False}
        fixed |= {"weights": {"math_answer": 1.0, "tokens": -weight, "boxed": 0.3}}
        for seed in range(min(seeds, 2)):
            yield f"fixed-{weight:g}", rewards(COMPONENTS, fixed), seed


def front_runs(seeds: int) -> Iterator[Run]:
    """Each policy with three seeds."""
    for name, policy in POLICIES.items():
        for seed in range(min(seeds, 3)):
            yield f"front-{name}", {**rewards(FRONT, policy), "eval.every": 5}, seed


def gold_runs(seeds: int) -> Iterator[Run]:
    """The flawed proxy alone, and held at a threshold."""
    held = {"policy": "lagrange", "kind": "xi", "thresholds": {"calculations": 0.6}, "lr": 0.5}
    for name, policy in {"fixed": {"policy": "static"}, "held": held}.items():
        for seed in range(min(seeds, 3)):
            alarm = {"gold": "math_answer", "alarm": {"window": 5, "margin": 0.05}}
            yield f"gold-{name}", rewards(GOLD, policy, **alarm), seed


def rewards(components: Mapping[str, Any], weighting: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The overrides that set the rewards."""
    return {"rewards": json.dumps({"components": components, "weighting": weighting, **more})}


def train(run: Run, options: argparse.Namespace) -> str:
    """One run to its end, unless it is there already; what went wrong, or nothing."""
    _, changes, seed = run
    home = folder(run, options.out)
    if (home / "evals" / f"step-{options.steps:06d}").exists():
        return ""
    given = {
        "name": home.name, "output_dir": options.out, "model.path": options.model, "seed": seed,
        "steps": options.steps, "eval.every": 0, "checkpoint.every": 0, "checkpoint.keep": 1, **changes,
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("alignlab")), "train", "configs/quickstart.yaml"]
    command += [f"{key}={value}" for key, value in given.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{home.name}: {done.stderr.strip()[-300:]}"


def folder(run: Run, out: Path) -> Path:
    """Where a run is kept."""
    return out / f"{run[0]}-{run[2]}"


def steps_of(home: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps."""
    rows = map(json.loads, (home / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "reward/total" in row]


def accuracy(home: Path) -> float:
    """Of the last evaluation."""
    last = sorted((home / "evals").glob("step-*"))[-1]
    return json.loads((last / "heldout.summary.json").read_text())["result"]["accuracy"]


def constraint_table(out: Path, runs: Sequence[Run]) -> list[str]:
    """Prints the runs; returns the promises that are broken."""
    print("| run | accuracy | tokens | boxed | broken by | weight of tokens |\n| --- | --- | --- | --- | --- | --- |")
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        home = folder(run, out)
        last = steps_of(home)[-10:]
        length, boxed, weight = (
            fmean(row[name] for row in last)
            for name in ("completion/length_mean", "reward/boxed", "weighting/weight/tokens")
        )
        excess = max(length / CEILING - 1, 1 - boxed / FLOOR, 0.0)
        found.setdefault(run[0], []).append((accuracy(home), excess))
        print(f"| {home.name} | {accuracy(home):.3f} | {length:.1f} | {boxed:.3f} | {excess:.1%} | {weight:.2f} |")
    held = found.pop("constrained")
    fair = {n: fmean(a for a, _ in rows) for n, rows in found.items() if all(e <= SLACK for _, e in rows)}
    best = max(fair.values(), default=0.0)
    mean = fmean(a for a, _ in held)
    print(
        f"\nconstrained: accuracy {mean:.3f}; best fixed weights that keep the bounds: {best:.3f} ({fair or 'none do'})"
    )
    broken = [f"constrained: bound broken by {e:.1%}" for _, e in held if e > SLACK]
    return broken + ([f"constrained: accuracy {mean:.3f} is below {best:.3f}"] if mean < best else [])


def front_table(out: Path, runs: Sequence[Run]) -> list[str]:
    """Prints the dominated volumes; a comparison, no promise."""
    print(f"reference {REFERENCE} of {', '.join(OBJECTIVES)}\n")
    print(
        "| policy | volumes (each seed) | mean | mean over the front | last weights |\n| --- | --- | --- | --- | --- |"
    )
    for name in dict.fromkeys(run[0] for run in runs):
        homes = [folder(run, out) for run in runs if run[0] == name]
        reports = [front_report(means(home), np.array(REFERENCE)) for home in homes]
        volumes = [volume for _, volume, _ in reports]
        front = np.mean([middle for *_, middle in reports], axis=0)
        weights = np.mean([[steps_of(h)[-1][f"weighting/weight/{o}"] for o in OBJECTIVES] for h in homes], axis=0)
        each = " ".join(f"{v:.4f}" for v in volumes)
        print(f"| {name} | {each} | {fmean(volumes):.4f} | {np.round(front, 3)} | {np.round(weights, 2)} |")
    return []


def means(home: Path) -> np.ndarray:
    """Means of the objectives over five steps each, [n, K]."""
    table = np.array([[row[f"reward/{name}"] for name in OBJECTIVES] for row in steps_of(home)])
    return table[: len(table) // 5 * 5].reshape(-1, 5, len(OBJECTIVES)).mean(axis=1)


def gold_table(out: Path, runs: Sequence[Run]) -> list[str]:
    """Prints proxy and gold at the peak of gold and at the end; returns the promises that are broken."""
    print("| run | gold: peak | gold: end | proxy: at the peak | proxy: end | alarm at step |")
    print("| --- | --- | --- | --- | --- | --- |")
    broken = []
    for run in runs:
        home = folder(run, out)
        rows = steps_of(home)
        gold, proxy = (trailing([row[f"reward/{n}"] for row in rows]) for n in ("math_answer", "calculations"))
        peak = max(range(4, len(gold)), key=gold.__getitem__)
        alarm = next((row["step"] for row in rows if row.get("overoptimization/alarm")), None)
        print(f"| {home.name} | {gold[peak]:.3f} | {gold[-1]:.3f} | {proxy[peak]:.3f} | {proxy[-1]:.3f} | {alarm} |")
        if run[0] == "gold-fixed" and (alarm is None or gold[-1] > 0.95 * gold[peak] or proxy[-1] <= proxy[peak]):
            broken.append(f"{home.name}: over-optimisation was not reproduced, or not noticed")
        if run[0] == "gold-held" and gold[-1] < 0.95 * gold[peak]:
            broken.append(f"{home.name}: gold ended at {gold[-1] / gold[peak]:.1%} of its peak")
    return broken


def trailing(values: Sequence[float], window: int = 5) -> list[float]:
    """Means of the last `window` values at each place."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


PARTS = {
    "constraint": (constraint_runs, constraint_table),
    "front": (front_runs, front_table),
    "gold": (gold_runs, gold_table),
}

if __name__ == "__main__":
    sys.exit(main())
