"""The verb `rescore`: other weights, shaping or policies on the raw scores that a run has kept, step by step, offline.

    rollouts/step-*.jsonl --raw scores, statuses--> Composer --columns, weights, totals--> advantages of the method

Nothing is sampled or scored: what a component said then is what it says now. The policy learns through the steps as it
would have in the run, from the same scores; what the other weights would have made of the policy is not known here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.run_dir import write_atomically
from core.config import RewardsConfig, RunConfig
from core.errors import UserError, nearest
from core.loading import load_config, parse_config, read_yaml
from core.schema import Completion, Group, Mixture, Prompt, Score

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of a run, re-scored."""

    number: int  # updates behind it, as in the rollouts
    rows: list[Row]  # as they were
    totals: list[float]
    advantages: list[float]
    weights: dict[str, float]  # mean over the rows


def rescore(arguments: argparse.Namespace) -> int:
    """`alignlab rescore RUN [--config FILE] [--out FILE]`. Raises UserError."""
    run = Path(arguments.folder)
    config = load_config(_config_of(run))
    if not config.rewards.components:
        raise UserError(f"{run}: a run on demonstrations has no rewards that could be weighed anew")
    new = config if arguments.config is None else with_rewards(config, Path(arguments.config))
    steps = list(rescored(run, new))
    print("\n".join(table(steps)))
    if arguments.out is not None:
        lines = [json.dumps(row, ensure_ascii=False) for step in steps for row in _new_rows(step)]
        write_atomically(Path(arguments.out), "".join(line + "\n" for line in lines))
        print(f"\nevery completion with its new total and advantage: {arguments.out}")
    return 0


def _config_of(run: Path) -> Path:
    if not (run / "config.yaml").is_file() or not list((run / "rollouts").glob("step-*.jsonl")):
        raise UserError(f"{run}: no run with rollouts; name a folder below runs/ that holds config.yaml and rollouts/")
    return run / "config.yaml"


def with_rewards(config: RunConfig, file: Path) -> RunConfig:
    """The run's config with the rewards of `file`: that section alone, or a whole config. Raises UserError."""
    tree, lines = read_yaml(file)
    section = tree.get("rewards", tree)
    whole = json.loads(config.model_dump_json()) | {"rewards": section}
    moved = {("rewards", *key) if "rewards" not in tree else key: place for key, place in lines.items()}
    return parse_config(whole, str(file), moved)


def rescored(run: Path, config: RunConfig) -> Iterator[Step]:
    """The steps of a run under the rewards of `config`. Raises UserError for a component that has no scores there."""
    from algos.methods import resolve
    from rewards.composer import Composer

    composer = Composer(config.rewards, steps=config.steps)
    if "gram" in composer.needs:
        raise UserError(
            "rewards.weighting: this policy looks at gradients, which only a run has; rescore cannot use it"
        )
    method = resolve(config.method, context={"max_tokens": config.rollout.max_tokens})
    evaluations = dict(_evaluations(run))
    composer.begin(evaluations.get(0, {}))
    for path in sorted((run / "rollouts").glob("step-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        number = int(path.stem.removeprefix("step-"))
        if lacking := {"references", "kl", "source"} - rows[0].keys():
            raise UserError(f"{path}: an older version wrote it, without {', '.join(sorted(lacking))}; run it again")
        groups = groups_of(rows)
        _check(config.rewards, composer, groups, path)
        columns = asyncio.run(composer.columns(groups, number - 1, scored=True))
        weighed, mixture = composer.weigh(columns)
        kl = [row["kl"] for row in rows]
        advantages = _advantages(method, weighed, mixture, None if None in kl else kl)
        composer.learn(None if None in kl else kl, evaluations.get(number))
        totals = [t for group in weighed for t in group.totals]
        mean = {name: float(np.mean([w for g in weighed for w in g.weights[name]])) for name in weighed[0].weights}
        yield Step(number, rows, totals, advantages, mean)


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The groups of a rollouts file, as far as rewards look at them: no token has a number here."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return [_group(name, own) for name, own in groups.items()]


def _group(name: str, rows: Sequence[Row]) -> Group:
    first = rows[0]
    blank = [(0,) * row["tokens"] for row in rows]
    completions = [
        Completion(ids, (), (), row["completion"], row["finish_reason"]) for ids, row in zip(blank, rows, strict=True)
    ]
    components = {c: tuple(_score(row, c) for row in rows) for c in first["components"]}
    references = {c: tuple(math.nan if v is None else v for v in own) for c, own in first["references"].items()}
    columns = {} if first["source"] is None else {"source": first["source"]}
    prompt = Prompt(first["ordinal"], first["prompt"], (0,), columns)
    return Group(name, prompt, tuple(completions), components=components, references=references)


def _score(row: Row, component: str) -> Score:
    if component not in row["missing"]:
        return Score("ok", row["components"][component])
    status, _, detail = row["missing"][component].partition(": ")
    return Score(status, detail=detail)


def _check(config: RewardsConfig, composer: Any, groups: Sequence[Group], path: Path) -> None:
    """Refuse a component of which the run has kept no score."""
    there = {name.partition("/")[0] for group in groups for name in group.components}
    for name, component in composer.components.items():
        if component.reward is not None and name not in there:
            raise UserError(
                f"rewards.components.{name}: {path} holds no scores of it, and rescore does not score; "
                f"{nearest(name, there)}"
            )


def _advantages(method: Any, groups: Sequence[Group], mixture: Mixture, kl: Sequence[float] | None) -> list[float]:
    """The mean advantage of every completion, by the method's own estimator; NaN where the method needs more."""
    import torch

    from algos.loss import advantages
    from learner.collate import collate
    from learner.mixture import mixed

    batch, _ = collate(groups, apart=mixture.apart or "components" in method.needs)
    if kl is not None:  # spread over the tokens, of which only the sum is read
        share = torch.tensor(kl, dtype=torch.float64)[:, None] / batch.lengths.clamp(min=1)[:, None]
        share = share.expand(batch.mask.shape)
        batch = replace(batch, rollout_logprobs=share, ref_logprobs=torch.zeros_like(share))
    try:
        channels = advantages(*mixed(method, batch, mixture)).channels
    except ValueError:  # it reads what only a run has: values, greedy completions ...
        return [math.nan] * len(batch.group)
    weighted = sum(channel.weight[:, None] * channel.advantages for channel in channels)
    counts = batch.mask.sum(1)
    return (torch.where(batch.mask, weighted, 0.0).sum(1) / counts).where(counts > 0, math.nan).tolist()


def _evaluations(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Step -> what policies looked at in the evaluation after it, as far as metrics.jsonl holds it."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        means: dict[str, list[float]] = {}
        for name, value in row.items():
            benchmark, _, what = name.removeprefix("eval/").partition("/")
            if name.startswith("eval/") and value is not None and what == "accuracy":
                means[f"{benchmark}/accuracy"] = [value]
            elif name.startswith("eval/") and value is not None and what.startswith("reward/"):
                means.setdefault(what.removeprefix("reward/"), []).append(value)
        if means:
            yield row["step"], {name: float(np.mean(values)) for name, values in means.items()}


def table(steps: Sequence[Step]) -> list[str]:
    """What has changed, in at most twenty of the steps and over all."""
    shown = steps[:: max(1, len(steps) // 20)]
    lines = [f"{'step':>6} {'total was':>10} {'is':>8} {'advantages agree':>17} {'signs turn':>11}  weights"]
    lines += [_line(str(step.number), [step], step.weights) for step in shown]
    return [*lines, _line("all", steps, {})]


def _line(name: str, steps: Sequence[Step], weights: Mapping[str, float]) -> str:
    old, new = (np.array(v, dtype=np.float64) for v in zip(*(p for s in steps for p in _totals(s)), strict=True))
    was, now = (np.array(v, dtype=np.float64) for v in zip(*(p for s in steps for p in _pairs(s)), strict=True))
    both = np.isfinite(was) & np.isfinite(now)
    spread = both.sum() > 1 and was[both].std() > 0 and now[both].std() > 0
    agree = f"{np.corrcoef(was[both], now[both])[0, 1]:.3f}" if spread else "-"
    turn = f"{np.mean(was[both] * now[both] < 0):.1%}" if both.any() else "-"
    kept = "  ".join(f"{n} {w:.3g}" for n, w in weights.items())
    return f"{name:>6} {np.nanmean(old):>10.3f} {np.nanmean(new):>8.3f} {agree:>17} {turn:>11}  {kept}".rstrip()


def _totals(step: Step) -> list[tuple[float, float]]:
    return [(_number(row["total"]), total) for row, total in zip(step.rows, step.totals, strict=True)]


def _pairs(step: Step) -> list[tuple[float, float]]:
    return [(_number(row["advantage"]), new) for row, new in zip(step.rows, step.advantages, strict=True)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _new_rows(step: Step) -> Iterator[Row]:
    for row, total, advantage in zip(step.rows, step.totals, step.advantages, strict=True):
        new = {"total": total, "advantage": advantage}
        kept = {name: value if math.isfinite(value) else None for name, value in new.items()}
        yield {**{k: row[k] for k in ("step", "group", "sample")}, **kept, "old_total": row["total"]}
