"""A config made ready to run: everything that can be wrong is found here, before anything slow starts."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab import benchmarks
from alignlab.benchmarks import Benchmark
from alignlab.cluster import check_compiler, check_room, describe_pools, here, pins_cores, pools
from alignlab.prompts import Row, check_rows, check_template, is_file, load_rows
from alignlab.reward_checks import check_reward_data, check_rewards
from alignlab.sources import check_sources
from core.config import ModelConfig, RunConfig
from core.errors import UserError, first_line, nearest
from core.schema import Group, Sampling

MODELS = ("model.path", "model.reference", "learner.critic.path", "learner.token_reward_model.path")
"""Options that name a model: a folder, or a hub name."""


@dataclass(frozen=True)
class Plan:
    """A checked run. `benchmarks` maps a benchmark's name to its row and its problems, loaded; `rows` are the data's.

    The paths of `config` are absolute.
    """

    config: RunConfig
    method: Any  # algos.methods.Method
    benchmarks: Mapping[str, tuple[Benchmark, list[Row]]]
    rows: Sequence[Row] = ()

    @property
    def demonstrations(self) -> bool:
        """The method learns from given completions: no actors sample, no rewards score."""
        return "demonstrations" in self.method.needs

    @property
    def group_size(self) -> int:
        """G; a demonstration is a group of one, a pair is one of two."""
        if not self.demonstrations:
            return self.config.rollout.group_size
        return 2 if "preferences" in self.method.needs else 1

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

        by = self.config.rewards.accuracy
        judged = group.totals if by is None else [score.value for score in group.components[by]]
        totals = torch.tensor(judged, dtype=torch.float64)
        batch = Batch(mask=torch.ones(len(totals), 1).bool(), group=torch.zeros(len(totals)).long(), rewards=totals)
        return None if self.method.filter(batch, rewards=totals).any() else f"filter {self.method.filter.name}"


def make_plan(config: RunConfig) -> Plan:
    """Check what the config names, cheapest first: models, files, method, rewards, room; a hub's data come last.

    Raises UserError.
    """
    check_template(config.data.template)
    for option in MODELS:
        if (path := _get(config, option)) is not None:
            check_folder(option, path)
    check_lengths(config)
    # Files are read before the method is resolved, because its parts load torch.
    loaded = _load(config) if _files_only(config) else None
    method = _resolve(config)
    rows, problems = loaded or _load(config)
    check_reward_data(config, rows, problems)
    pinned = pins_cores(config, sampling="demonstrations" not in method.needs)
    return Plan(_put(absolute(config), "cluster.pin_cores", pinned), method, problems, rows)


def _files_only(config: RunConfig) -> bool:
    """Nothing is to be loaded from a hub."""
    named = config.eval.benchmarks if config.eval.data is None else []
    return all(is_file(path) for path in (config.data.path, *named))


def _load(config: RunConfig) -> tuple[list[Row], dict[str, tuple[Benchmark, list[Row]]]]:
    """The data's rows and the benchmarks' problems, checked."""
    problems = load_benchmarks(config)
    asked = {"prompt_column": "question", "completion_column": None, "rejected_column": None, "baseline_column": None}
    for name, (_, rows) in problems.items():
        # The problems are put in the words of the training data, whose template may name more columns.
        check_rows(rows, config.data.model_copy(update={**asked, "path": f"benchmark {name}"}))
    rows = load_rows(config.data)
    if config.data.sources is not None:
        check_sources(config.data, rows)
    return rows, problems


def load_benchmarks(config: RunConfig) -> dict[str, tuple[Benchmark, list[Row]]]:
    """The benchmarks that the config names, with their problems. Raises UserError."""
    found: dict[str, tuple[Benchmark, list[Row]]] = {}
    for name in config.eval.benchmarks:
        benchmark, stem = benchmarks.find(name), Path(name).stem
        if stem in found:
            raise UserError(f"eval.benchmarks: two are called '{stem}', as their results would be; rename one's file")
        found[stem] = (benchmark, benchmarks.problems(benchmark, config.eval.data, config.eval.limit))
    return found


# What a method may need of the data beside the prompt: need, option, what the column holds.
COLUMNS = (
    ("baselines", "data.baseline_column", "a number per prompt"),
    ("preferences", "data.rejected_column", "the completion that was not chosen"),
)


def _resolve(config: RunConfig) -> Any:
    """The method, when everything else in the config goes with it. Raises UserError."""
    from algos.methods import resolve

    method = resolve(config.method, where="method", context={"max_tokens": config.rollout.max_tokens})
    sampling = "demonstrations" not in method.needs
    check_rewards(config, method)
    if config.eval.benchmarks and not sampling:
        raise UserError(
            f"eval.benchmarks: method {method.name} learns from demonstrations, so the run has no actors that could "
            "answer; leave them out, and evaluate afterwards: alignlab eval "
            f"{Path(config.output_dir) / config.name} --benchmarks {','.join(config.eval.benchmarks)}"
        )
    for need, option, what in COLUMNS:
        named = _get(config, option) is not None
        if (need in method.needs) != named:
            wrong = "does not read it; leave it out" if named else f"reads {what} from it; name the column"
            raise UserError(f"{option}: method {method.name} {wrong}")
    check_room(config, sampling=sampling)
    check_compiler(config)
    return method


# ---------------------------------------------------------------- models
def check_folder(option: str, path: str) -> None:
    """Refuse a model's path that is neither a Hugging Face folder nor a name that the hub knows. Raises UserError."""
    folder = Path(path).expanduser()
    if (folder / "config.json").exists():
        return
    if folder.is_dir():
        raise UserError(f"{option}: {path} holds no config.json; name a Hugging Face model folder or a hub name")
    local = path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    why = "" if local else _not_on_the_hub(path)
    if why is not None:
        near = sorted(str(p.parent) for p in Path("build").glob("**/config.json"))
        hint = nearest(path, near) if near else "`make quickstart` and `make smollm2` make folders below build/"
        raise UserError(f"{option}: there is no folder {path}{why}; {hint}")


def _not_on_the_hub(name: str) -> str | None:
    """Why the hub will not provide this model; none where it may.

    The hub is asked once and briefly, for transformers would try for a minute before it says the same.
    """
    from huggingface_hub import HfApi, constants

    if (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        return None
    if constants.HF_HUB_OFFLINE:
        return ", and HF_HUB_OFFLINE forbids to ask the hub for it"
    try:
        HfApi().model_info(name, timeout=5)
    except Exception as error:  # of the hub, the network, the name
        return f", and the hub does not provide it: {first_line(error)}"
    return None


def check_lengths(config: RunConfig) -> None:
    """Refuse prompts and completions for which a model whose folder is here has no positions. Raises UserError."""
    file = Path(config.model.path).expanduser() / "config.json"
    if not file.exists():
        return  # on the hub: its engine will say so
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
        positions = float(model.get("max_position_embeddings") or math.inf)
        rope = model.get("rope_parameters") or model.get("rope_scaling")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model.path: {file} is not the config of a model: {first_line(error)}") from None
    wanted = config.actors.max_model_len or config.longest
    if wanted > positions and "'factor'" not in str(rope):  # a stretched rope reaches further
        what = "actors.max_model_len" if config.actors.max_model_len else config.sum_of_longest().partition(" = ")[0]
        raise UserError(f"{what} = {wanted}, but {config.model.path} has {positions:.0f} positions; lower it")


def load_tokenizer(model: ModelConfig) -> Any:
    """The policy's tokenizer. Raises UserError when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(Path(model.path).expanduser(), revision=model.revision)
    except Exception as error:  # of transformers, tokenizers, or whatever reads a tokenizer's files
        raise UserError(
            f"model.path: {model.path} has no tokenizer that loads: {first_line(error)}; a model folder holds "
            "tokenizer.json and tokenizer_config.json beside config.json"
        ) from None


# ---------------------------------------------------------------- paths
def absolute(config: RunConfig) -> RunConfig:
    """The config with absolute paths for what lies here: other processes have other working directories.

    A hub's names stay as they are.
    """
    for option in (*MODELS, "data.path", "eval.data", "output_dir"):
        path = _get(config, option)
        if path is not None and (option in ("eval.data", "output_dir") or is_file(path)):
            config = _put(config, option, _absolute(path))
    files = [_absolute(name) if name.endswith(".jsonl") else name for name in config.eval.benchmarks]
    return _put(config, "eval.benchmarks", files)


def shown(path: str | Path) -> str:
    """A path as people write it: relative where it lies below the working directory."""
    folder = Path.cwd()
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else str(path)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _get(section: Any, option: str) -> Any:
    """The value of "section.option"."""
    return functools.reduce(getattr, option.split("."), section)


def _put(section: Any, option: str, value: Any) -> Any:
    """A copy of `section` with another value of "section.option"."""
    name, _, rest = option.partition(".")
    return section.model_copy(update={name: _put(getattr(section, name), rest, value) if rest else value})


# ---------------------------------------------------------------- the plan as text
def describe(plan: Plan) -> str:
    """The plan as people read it: arithmetic, pools, what is trained on how much."""
    c, r = plan.config, plan.config.rollout
    rows = r.prompts * plan.group_size
    updates = c.learner.minibatches * c.learner.epochs
    what = f", adapters of rank {c.model.lora.rank}" if c.model.lora else ""
    lines = [
        f"run       {c.name} in {shown(Path(c.output_dir) / c.name)}, {c.steps} steps, seed {c.seed}",
        f"policy    {shown(c.model.path)} ({c.model.dtype}{what})",
        f"method    {plan.method.name}: {', '.join(f'{k} {v}' for k, v in plan.method.pieces().items())}",
        f"step      {r.prompts} prompts x {plan.group_size} completions = {rows} completions, at most "
        f"{rows * r.max_tokens} completion tokens; {updates} update{'s' * (updates > 1)} of "
        f"{r.prompts // c.learner.minibatches * plan.group_size} completions",
        f"whole run {c.steps * rows} completions from {c.steps * r.prompts} prompts",
        f"learner   {c.learner.ranks} rank(s) on {c.learner.device}, {c.learner.token_budget} tokens a micro-batch, "
        f"{c.learner.optimizer.name} at {c.learner.optimizer.lr:g}",
    ]
    if plan.demonstrations:
        column = c.data.completion_column
        lines.append(f"data      demonstrations in column '{column}' of {shown(c.data.path)}; no actors")
    else:
        overlap = "on-policy" if r.max_staleness == 0 else f"up to {r.max_staleness} updates behind"
        weights = ", ".join(f"{name} x {part.get('weight', 1.0):g}" for name, part in c.rewards.components.items())
        policy = c.rewards.weighting.get("policy")
        weights += "" if policy == "static" else f", weighed by {policy}"
        lines += [
            f"actors    {c.actors.count} on {c.actors.device}, tensor parallel {c.actors.tensor_parallel}, {overlap}",
            f"rewards   {weights}",
        ]
    lines.append(f"pools     {_pools(plan)}")
    for name, (benchmark, rows_) in plan.benchmarks.items():
        lines.append(f"eval      {name}: {len(rows_)} problems x {c.eval.samples} ({benchmark.about})")
    return "\n".join(lines)


def _pools(plan: Plan) -> str:
    """What the two pools ask for, against what there is."""
    config, have = plan.config, here()
    asked = describe_pools(pools(config, have["GPU"], sampling=not plan.demonstrations))
    if config.cluster.address is not None:
        return f"{asked}; the cluster at {config.cluster.address} must have them"
    own = ", so each process keeps to cores of its own" if config.cluster.pin_cores and not have["GPU"] else ""
    return f"{asked}; this machine has {have['CPU']} CPU and {have['GPU']} GPU{own}"
