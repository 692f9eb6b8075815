"""Evaluate a policy on benchmarks, with the actors that sample and the checker that rewards.

problems -> GroupRequests -> actors -> math_answer -> per-problem JSONL + summary
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from alignlab import benchmarks
from alignlab.benchmarks import Benchmark
from alignlab.cluster import cluster
from alignlab.plan import Plan, absolute, check_folder, load_benchmarks, load_tokenizer, shown
from alignlab.prompts import PromptStream, Row
from alignlab.results import Evaluation, problem_rows, summarise
from alignlab.run_dir import RunDir, write_atomically
from core.config import DataConfig, RewardsConfig, RunConfig
from core.errors import UserError, nearest
from core.loading import load_config, override, parse_config
from core.schema import Group, GroupRequest, Sampling, sample_seed

Score = Callable[[Group], Awaitable[Group]]


class Actors(Protocol):
    """What evaluation needs of an actor pool."""

    def run(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Group]: ...


PROMPT_TOKENS = 2048  # problems of the known benchmarks are shorter, in any tokenizer


def grader(run: RunConfig) -> RewardsConfig:
    """The checker that rewards a run's answers grades them too, with the same idea of where an answer is."""
    theirs = [part for name, part in run.rewards.components.items() if part.get("fn", name) == "math_answer"]
    extract = {key: value for part in theirs for key, value in part.items() if key == "extract"}
    kept = {name: getattr(run.rewards, name) for name in ("workers", "timeout", "memory_gib", "max_failed")}
    return RewardsConfig(components={"math_answer": extract}, **kept)


@dataclass(frozen=True)
class Job:
    """One benchmark to be evaluated: its problems, how they are asked, how answers are drawn."""

    name: str
    rows: Sequence[Row]
    data: DataConfig
    sampling: Sampling
    samples: int
    seed: int
    grader: Mapping[str, Any]  # options of math_answer


def job(
    name: str, benchmark: Benchmark, rows: Sequence[Row], run: RunConfig, base: DataConfig | None, max_tokens: int
) -> Job:
    """`run.eval` says how much and how; `base` lends the template of the training data, none means the benchmark's."""
    settings = run.eval
    data = DataConfig(
        path=benchmark.file,
        shuffle=False,
        max_prompt_tokens=run.data.max_prompt_tokens,
        template=benchmark.template if base is None else base.template,
        system=None if base is None else base.system,
        chat_template=(base or run.data).chat_template,
    )
    sampling = Sampling(max_tokens, settings.temperature, stop=tuple(run.rollout.stop))
    options = grader(run).components["math_answer"]
    return Job(name, rows, data, sampling, settings.samples, run.seed, options)


async def evaluate(
    job: Job, tokenizer: Any, actors: Actors, grade: Score, folder: Path, about: Mapping[str, Any]
) -> Evaluation:
    """Sample every problem, grade it, write `folder`/<name>.jsonl and <name>.summary.json.

    `grade` is `Composer.score` of the component math_answer; `about` (model, version) is kept in the summary, so that
    a number can be traced to its weights.
    """
    stream = PromptStream(job.data, tokenizer, job.seed, job.rows)
    requests = [
        GroupRequest(
            id=f"eval/{job.name}/{ordinal}",
            prompt=stream[ordinal],
            seeds=tuple(sample_seed(job.seed, ordinal, sample) for sample in range(job.samples)),
            sampling=job.sampling,
        )
        for ordinal in range(len(stream))
    ]
    started = time.monotonic()
    groups = [await grade(group) async for group in actors.run(requests)]
    groups.sort(key=lambda group: group.prompt.ordinal)
    result = summarise(job.name, groups, job.samples, time.monotonic() - started, stream.too_long)
    rows = [row for group in groups for row in problem_rows(group)]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{job.name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    summary = {
        "benchmark": job.name,
        **about,
        "template": job.data.template,
        "sampling": {name: getattr(job.sampling, name) for name in Sampling.__slots__},
        "samples": job.samples,
        "seed": job.seed,
        "grader": {"math_answer": job.grader},
        "result": result.plain(),
    }
    write_atomically(folder / f"{job.name}.summary.json", json.dumps(summary, indent=2) + "\n")
    return result


class Evaluator:
    """The evaluations of a training run: the same problems and seeds each time, on the actors that are there."""

    def __init__(self, plan: Plan, tokenizer: Any) -> None:
        config = plan.config
        self._tokenizer, self._model, self._grader = tokenizer, config.model.path, grader(config)
        longest = config.eval.max_tokens or config.rollout.max_tokens
        self._jobs = [job(name, b, rows, config, config.data, longest) for name, (b, rows) in plan.benchmarks.items()]

    async def run(
        self, actors: Actors, folder: Path, version: int, score: Score | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Evaluate all benchmarks of the config; prints a line each. Returns eval/* metrics, and what policies look at.

        score: the run's rewards, by which completions are scored too. The second result holds the means of all columns
        (each benchmark counts once), and benchmark/accuracy.
        """
        from rewards.composer import Composer

        if not self._jobs:
            return {}, {}
        metrics: dict[str, float] = {}
        means: dict[str, float] = {}
        scored: dict[str, list[Group]] = {}
        started, composer = time.monotonic(), Composer(self._grader)
        try:
            for each in self._jobs:
                grade = _graded(composer.score, score, scored.setdefault(each.name, []))
                about = {"model": self._model, "version": version}
                result = await evaluate(each, self._tokenizer, actors, grade, folder, about)
                print(f"eval after {version} steps: {result.line()}")
                metrics |= result.metrics()
                metrics |= {f"eval/{each.name}/reward/{n}": m for n, m in column_means(scored[each.name]).items()}
                if math.isfinite(result.accuracy):
                    means[f"{each.name}/accuracy"] = result.accuracy
        finally:
            await composer.close()
        means |= mean_by_name([column_means(groups) for groups in scored.values()])
        return metrics | {"time/eval": time.monotonic() - started}, means


def _graded(grade: Score, score: Score | None, scored: list[Group]) -> Score:
    async def both(group: Group) -> Group:
        if score is not None:
            scored.append(await score(group))
        return await grade(group)

    return both


def mean_by_name(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over the tables that have it."""
    names = dict.fromkeys(name for table in tables for name in table)
    found = {name: [table[name] for table in tables if name in table] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def column_means(groups: Sequence[Group]) -> dict[str, float]:
    """Mean of each column over the completions that have it."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for group in groups for name in group.columns):
        values = [v for group in groups for v in group.columns.get(name, ()) if math.isfinite(v)]
        if values:
            found[name] = math.fsum(values) / len(values)
    return found


# ---------------------------------------------------------------- the verb `eval`
def evaluate_model(arguments: argparse.Namespace) -> int:
    """`alignlab eval MODEL --benchmarks ...`. Raises UserError."""
    config, base, folder = _resolve(arguments)
    chosen = load_benchmarks(config)
    lengths = {name: config.eval.max_tokens or benchmark.max_tokens for name, (benchmark, _) in chosen.items()}
    tokenizer = load_tokenizer(config.model)
    config = _with_room(config, max(lengths.values()))
    jobs = [job(name, b, rows, config, base, lengths[name]) for name, (b, rows) in chosen.items()]
    for each in jobs:  # mistakes in templates and columns come before the engines start
        PromptStream(each.data, tokenizer, each.seed, each.rows)
    with cluster(config):
        asyncio.run(_evaluate_all(config, jobs, tokenizer, folder))
    print(f"per-problem rows and summaries: {shown(folder)}")
    return 0


def _with_room(config: RunConfig, max_tokens: int) -> RunConfig:
    """The config of engines that hold prompts of `PROMPT_TOKENS`, as far as the model's positions go."""
    from transformers import AutoConfig

    known = AutoConfig.from_pretrained(config.model.path, revision=config.model.revision)
    positions = getattr(known, "max_position_embeddings", None) or PROMPT_TOKENS + max_tokens
    prompts = min(max(PROMPT_TOKENS, config.data.max_prompt_tokens), positions - max_tokens)
    if prompts <= 0:
        raise UserError(
            f"--max-tokens: answers of {max_tokens} tokens leave no room for a prompt; the model has {positions} "
            "positions"
        )
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"max_prompt_tokens": prompts}),
            "eval": config.eval.model_copy(update={"max_tokens": max_tokens}),
        }
    )


async def _evaluate_all(config: RunConfig, jobs: Sequence[Job], tokenizer: Any, folder: Path) -> None:
    from actors.pool import ActorPool
    from rewards.composer import Composer

    pool, composer = ActorPool(config, folder / "logs"), Composer(grader(config))
    try:
        await pool.start()
        for each in jobs:
            result = await evaluate(each, tokenizer, pool, composer.score, folder, {"model": config.model.path})
            print(result.line(), flush=True)
    finally:
        await composer.close()
        await pool.close()


def _resolve(arguments: argparse.Namespace) -> tuple[RunConfig, DataConfig | None, Path]:
    """(config of the actors and the evaluation, the run's data section if MODEL is a run, folder for the results)."""
    names = [name for name in arguments.benchmarks.split(",") if name]
    if not names:
        raise UserError("--benchmarks: names none; " + nearest("", benchmarks.benchmarks))
    model, base, out = Path(arguments.model).expanduser(), None, Path("evals") / Path(arguments.model).name
    run = _run_of(model)
    if run is not None:
        trained = load_config(run / "config.yaml")
        checkpoint = _checkpoint(run, model)
        base, model, out = trained.data, checkpoint.model, run / "evals" / f"eval-step-{checkpoint.step:06d}"
        tree = json.loads(trained.model_dump_json(include={"rollout", "actors", "cluster", "data", "rewards"}))
        dtype, longest = trained.model.dtype, arguments.max_tokens or trained.rollout.max_tokens
    else:
        check_folder("MODEL", arguments.model)
        dtype, longest, tree = "float32", arguments.max_tokens, {"data": {"path": "-"}}
    if arguments.template is not None:
        base = (base or DataConfig(path="-")).model_copy(update={"template": arguments.template})
    tree |= {
        "name": "eval",
        "steps": 1,
        "seed": arguments.seed,
        "model": {"path": str(model) if run else arguments.model, "dtype": dtype},
        "eval": {
            "benchmarks": names,
            "data": arguments.data,
            "limit": arguments.limit,
            "samples": arguments.samples,
            "temperature": _temperature(arguments.samples, arguments.temperature),
            "max_tokens": longest,
        },
    }
    config = absolute(parse_config(override(tree, arguments.overrides), "command line"))
    return config, base, Path(arguments.out) if arguments.out else out


def _temperature(samples: int, temperature: float | None) -> float:
    if samples > 1 and temperature == 0:
        raise UserError(
            f"--samples {samples}: at temperature 0 all samples are equal; use --temperature 1, or one sample"
        )
    return temperature if temperature is not None else 0.0 if samples == 1 else 1.0


def _run_of(model: Path) -> Path | None:
    """The run that `model` is, or is a checkpoint of."""
    places = [model, *(p.parent for p in (model, *model.parents) if p.name == "checkpoints")]
    return next((place for place in places if (place / "config.yaml").exists()), None)


def _checkpoint(run: Path, model: Path) -> Any:
    """The checkpoint that `model` names; the newest if it names the run. Raises UserError."""
    found = RunDir(run).checkpoints()
    if not found:
        raise UserError(f"{run}: no checkpoint yet; the run saves at its end and every checkpoint.every steps")
    if model.resolve() in (run.resolve(), (run / "checkpoints").resolve()):
        return found[-1]
    named = [c for c in found if c.path.resolve() in (model.resolve(), *model.resolve().parents)]
    if not named:
        there = ", ".join(f"step-{c.step:06d}" for c in found)
        raise UserError(f"MODEL: there is no checkpoint {model}; {run / 'checkpoints'} holds {there}")
    return named[0]
