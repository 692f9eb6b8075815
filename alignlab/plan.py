"""A config made ready to run: everything that can be wrong is found here, before anything slow starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab import benchmarks
from alignlab.benchmarks import Benchmark
from alignlab.prompts import Row
from core.config import ModelConfig, RunConfig
from core.errors import UserError, nearest
from core.schema import Group, Sampling


@dataclass(frozen=True)
class Plan:
    """A checked run. `benchmarks` maps a benchmark's name to its row and its problems, loaded."""

    config: RunConfig
    method: Any  # algos.methods.Method
    benchmarks: Mapping[str, tuple[Benchmark, list[Row]]]

    @property
    def demonstrations(self) -> bool:
        """The method learns from given completions: no actors sample, no rewards score."""
        return "demonstrations" in self.method.needs

    @property
    def group_size(self) -> int:
        """G; a demonstration is a group of one."""
        return 1 if self.demonstrations else self.config.rollout.group_size

    @property
    def sampling(self) -> Sampling:
        """How training completions are drawn."""
        r = self.config.rollout
        return Sampling(r.max_tokens, r.temperature, r.top_p, r.top_k, r.min_p, tuple(r.stop))

    def drop(self, group: Group) -> str | None:
        """Why the method wants this scored group replaced by the next prompt; none keeps it."""
        if self.method.filter is None:
            return None
        import torch

        from algos.batch import Batch

        totals = torch.tensor(group.totals, dtype=torch.float64)
        batch = Batch(mask=torch.ones(len(totals), 1).bool(), group=torch.zeros(len(totals)).long(), rewards=totals)
        return None if self.method.filter(batch, rewards=totals).any() else f"filter {self.method.filter.name}"


def make_plan(config: RunConfig) -> Plan:
    """Check what the config names: method, parts, rewards, files, benchmarks. Raises UserError."""
    from algos.methods import resolve

    method = resolve(config.method, where="method", context={"max_tokens": config.rollout.max_tokens})
    _check_rewards(config, "demonstrations" in method.needs)
    if ("baselines" in method.needs) != (config.data.baseline_column is not None):
        raise UserError(
            f"data.baseline_column: method {method.name} reads a number per prompt from it; name the column"
            if config.data.baseline_column is None
            else f"data.baseline_column: method {method.name} does not read it; leave it out"
        )
    check_folder("model.path", config.model.path)
    if config.model.reference is not None:
        check_folder("model.reference", config.model.reference)
    if config.data.path.endswith(".jsonl") and not Path(config.data.path).expanduser().exists():
        raise UserError(f"data.path: there is no file {config.data.path}; name a JSONL file or a hub dataset")
    return Plan(config, method, load_benchmarks(config))  # last: a hub may be slow


def load_benchmarks(config: RunConfig) -> dict[str, tuple[Benchmark, list[Row]]]:
    """The benchmarks that the config names, with their problems. Raises UserError."""
    found = {}
    for name in config.eval.benchmarks:
        benchmark = benchmarks.find(name)
        found[Path(name).stem] = (benchmark, benchmarks.problems(benchmark, config.eval.data, config.eval.limit))
    return found


def check_folder(option: str, path: str) -> None:
    """A model's path that looks like a folder must be one. Raises UserError; a hub name is left to the hub."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path.split("/")[0]).is_dir()
    folder = Path(path).expanduser()
    if (folder / "config.json").exists() or (not looks_local and not folder.exists()):
        return
    if folder.is_dir():
        raise UserError(f"{option}: {path} holds no config.json; name a Hugging Face model folder or a hub name")
    near = sorted(str(p.parent) for p in Path("build").glob("**/config.json"))
    hint = nearest(path, near) if near else "`make quickstart` and `make smollm2` make folders below build/"
    raise UserError(f"{option}: there is no folder {path}; {hint}")


def _check_rewards(config: RunConfig, demonstrations: bool) -> None:
    from rewards.composer import check_components

    if demonstrations:
        if config.data.completion_column is None:
            raise UserError(
                "method: it learns from demonstrations, so data.completion_column must name their column "
                "(for instance data.completion_column=completion)"
            )
        if config.rewards.components:
            raise UserError(
                "rewards.components: a method that learns from demonstrations has no rewards; leave them out"
            )
        return
    if config.data.completion_column is not None:
        raise UserError(
            "data.completion_column: this method samples its completions; leave the column out, or use method: sft"
        )
    if not config.rewards.components:
        raise UserError(
            "rewards.components: a run needs at least one, for instance rewards.components.math_answer={weight: 1.0}; "
            "`alignlab ls rewards` lists them"
        )
    check_components(config.rewards)


def describe(plan: Plan) -> str:
    """The plan as people read it: arithmetic, pools, what is trained on how much."""
    c, r = plan.config, plan.config.rollout
    rows = r.prompts * plan.group_size
    updates = c.learner.minibatches * c.learner.epochs
    lines = [
        f"run       {c.name} in {Path(c.output_dir) / c.name}, {c.steps} steps, seed {c.seed}",
        f"policy    {c.model.path} ({c.model.dtype})",
        f"method    {plan.method.name}: {', '.join(f'{k} {v}' for k, v in plan.method.pieces().items())}",
        f"step      {r.prompts} prompts x {plan.group_size} completions = {rows} completions, at most "
        f"{rows * r.max_tokens} completion tokens; {updates} update{'s' * (updates > 1)} of "
        f"{r.prompts // c.learner.minibatches * plan.group_size} completions",
        f"whole run {c.steps * rows} completions from {c.steps * r.prompts} prompts",
        f"learner   {c.learner.ranks} rank(s) on {c.learner.device}, {c.learner.token_budget} tokens a micro-batch, "
        f"{c.learner.optimizer.name} at {c.learner.optimizer.lr:g}",
    ]
    if plan.demonstrations:
        lines.append(f"data      demonstrations in column '{c.data.completion_column}' of {c.data.path}; no actors")
    else:
        overlap = "on-policy" if r.max_staleness == 0 else f"up to {r.max_staleness} updates behind"
        weights = ", ".join(f"{name} x {part.get('weight', 1.0):g}" for name, part in c.rewards.components.items())
        lines += [
            f"actors    {c.actors.count} on {c.actors.device}, tensor parallel {c.actors.tensor_parallel}, {overlap}",
            f"rewards   {weights}",
        ]
    lines.append(f"pools     {pools(plan)}")
    for name, (benchmark, rows_) in plan.benchmarks.items():
        lines.append(f"eval      {name}: {len(rows_)} problems x {c.eval.samples} ({benchmark.about})")
    return "\n".join(lines)


def pools(plan: Plan) -> str:
    """What the two pools ask for, against what this machine has."""
    import torch

    c, gpus = plan.config, torch.cuda.device_count()
    actors = 0 if plan.demonstrations else c.actors.count
    parts = []
    for name, count, device, each, threads in (
        ("actors", actors, c.actors.device, c.actors.tensor_parallel, c.actors.threads),
        ("learner", c.learner.ranks, c.learner.device, 1, c.learner.threads),
    ):
        on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        parts.append(f"{name} {count * each} GPU" if on_gpu else f"{name} {count * threads} CPU")
    have = f"this machine has {os.cpu_count()} CPU and {gpus} GPU"
    if c.cluster.address is not None:
        have = f"the cluster at {c.cluster.address} must have them"
    return f"{', '.join(parts)}; {have}"


def load_tokenizer(model: ModelConfig) -> Any:
    """The policy's tokenizer. Raises UserError when there is none, or no chat format in it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(Path(model.path).expanduser(), revision=model.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {model.path} has no tokenizer that loads: {str(error).splitlines()[0]}") from None
