"""Evaluate a policy on benchmarks, with the actors that sample and the checker that rewards.

problems -> GroupRequests -> actors -> math_answer -> per-problem JSONL + summary
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from alignlab import benchmarks
from alignlab.benchmarks import Benchmark
from alignlab.cluster import cluster
from alignlab.plan import Plan, check_folder, load_tokenizer
from alignlab.prompts import PromptStream, Row
from alignlab.results import Evaluation, problem_rows, summarise
from alignlab.run_dir import RunDir, write_atomically
from core.config import DataConfig, RewardsConfig, RunConfig
from core.errors import UserError
from core.loading import load_config, override, parse_config
from core.schema import Group, GroupRequest, Sampling, sample_seed


class Actors(Protocol):
    """What evaluation needs of an actor pool."""

    def run(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Group]: ...


GRADER = RewardsConfig(components={"math_answer": {}})


@dataclass(frozen=True)
class Job:
    """One benchmark to be evaluated: its problems, how they are asked, how answers are drawn."""

    name: str
    rows: Sequence[Row]
    data: DataConfig
    sampling: Sampling
    samples: int
    seed: int


def job(name: str, benchmark: Benchmark, rows: Sequence[Row], run: RunConfig, base: DataConfig | None) -> Job:
    """`run.eval` says how much and how; `base` lends the template of the training data, none means the benchmark's."""
    settings = run.eval
    data = DataConfig(
        path=benchmark.file,
        shuffle=False,
        max_prompt_tokens=run.data.max_prompt_tokens,
        template=benchmark.template if base is None else base.template,
        system=None if base is None else base.system,
        chat_template=True if base is None else base.chat_template,
    )
    sampling = Sampling(settings.max_tokens or run.rollout.max_tokens, settings.temperature)
    return Job(name, rows, data, sampling, settings.samples, run.seed)


async def evaluate(
    job: Job, tokenizer: Any, actors: Actors, grade: Callable[[Group], Any], folder: Path, about: Mapping[str, Any]
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
    result = summarise(job.name, groups, job.samples, time.monotonic() - started)
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
        "left_out_too_long": stream.too_long,
        "result": {name: getattr(result, name) for name in Evaluation.__dataclass_fields__},
    }
    write_atomically(folder / f"{job.name}.summary.json", json.dumps(summary, indent=2) + "\n")
    return result


class Evaluator:
    """The evaluations of a training run: the same problems and seeds each time, on the actors that are there."""

    def __init__(self, plan: Plan, tokenizer: Any) -> None:
        config = plan.config
        self._tokenizer, self._model = tokenizer, config.model.path
        self._jobs = [job(name, b, rows, config, config.data) for name, (b, rows) in plan.benchmarks.items()]

    async def run(self, actors: Actors, folder: Path, version: int) -> dict[str, float]:
        """Evaluate all benchmarks of the config; prints a line each, returns eval/* metrics."""
        from rewards.composer import Composer

        if not self._jobs:
            return {}
        metrics: dict[str, float] = {}
        started, grader = time.monotonic(), Composer(GRADER)
        try:
            for each in self._jobs:
                about = {"model": self._model, "version": version}
                result = await evaluate(each, self._tokenizer, actors, grader.score, folder, about)
                print(f"eval after {version} steps: {result.line()}")
                metrics |= result.metrics()
        finally:
            await grader.close()
        return metrics | {"time/eval": time.monotonic() - started}


# ---------------------------------------------------------------- the verb `eval`
def evaluate_model(arguments: argparse.Namespace) -> int:
    """`alignlab eval MODEL --benchmarks ...`. Raises UserError."""
    config, base, folder = _resolve(arguments)
    jobs = []
    for name in config.eval.benchmarks:
        benchmark = benchmarks.find(name)
        rows = benchmarks.problems(benchmark, config.eval.data, config.eval.limit)
        longest = config.model_copy(
            update={"rollout": config.rollout.model_copy(update={"max_tokens": benchmark.max_tokens})}
        )
        jobs.append(job(Path(name).stem, benchmark, rows, config if base else longest, base))
    tokenizer = load_tokenizer(config.model)
    width = max(j.sampling.max_tokens for j in jobs)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"max_tokens": width})})
    with cluster(config):
        asyncio.run(_evaluate_all(config, jobs, tokenizer, folder))
    print(f"per-problem rows and summaries: {folder}")
    return 0


async def _evaluate_all(config: RunConfig, jobs: Sequence[Job], tokenizer: Any, folder: Path) -> None:
    from actors.pool import ActorPool
    from rewards.composer import Composer

    pool, grader = ActorPool(config, folder / "logs"), Composer(GRADER)
    try:
        await pool.start()
        for each in jobs:
            result = await evaluate(each, tokenizer, pool, grader.score, folder, {"model": config.model.path})
            print(result.line(), flush=True)
    finally:
        await grader.close()
        await pool.close()


def _resolve(arguments: argparse.Namespace) -> tuple[RunConfig, DataConfig | None, Path]:
    """(config of the actors and the evaluation, the run's data section if MODEL is a run, folder for the results)."""
    model, base, tree, out = Path(arguments.model), None, {}, Path("evals") / Path(arguments.model).name
    run = next((p for p in (model, *model.parents) if (p / "config.yaml").exists()), None)
    if run is not None:
        trained = load_config(run / "config.yaml")
        checkpoint = _checkpoint(run, model)
        base, model, out = trained.data, checkpoint.model, run / "evals" / f"eval-step-{checkpoint.step:06d}"
        tree = json.loads(trained.model_dump_json(include={"rollout", "actors", "cluster", "data"}))
        dtype = trained.model.dtype
    else:
        check_folder("MODEL", arguments.model)
        dtype, tree = "float32", {"data": {"path": "-", "max_prompt_tokens": 2048}, "rollout": {}}
    if arguments.template is not None:
        base = (base or DataConfig(path="-")).model_copy(update={"template": arguments.template})
    samples, temperature = arguments.samples, arguments.temperature
    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    if samples > 1 and temperature == 0:
        raise UserError(
            f"--samples {samples}: at temperature 0 all samples are equal; use --temperature 1, or one sample"
        )
    tree |= {
        "name": "eval",
        "steps": 1,
        "seed": arguments.seed,
        "model": {"path": str(model) if run else arguments.model, "dtype": dtype},
        "eval": {
            "benchmarks": [name for name in arguments.benchmarks.split(",") if name],
            "data": arguments.data,
            "limit": arguments.limit,
            "samples": samples,
            "temperature": temperature,
            "max_tokens": arguments.max_tokens,
        },
    }
    config = parse_config(override(tree, arguments.overrides), "command line")
    return config, base, Path(arguments.out) if arguments.out else out


def _checkpoint(run: Path, model: Path) -> Any:
    """The checkpoint that `model` names, or the run's newest. Raises UserError."""
    found = RunDir(run).checkpoints()
    if not found:
        raise UserError(f"{run}: no checkpoint yet; the run saves at its end and every checkpoint.every steps")
    named = [c for c in found if c.path.resolve() in (model.resolve(), *model.resolve().parents)]
    return (named or found)[-1]
