"""The verb `train`: check everything, start the parts, hand them to the loop, say what to do next."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from alignlab.cluster import cluster
from alignlab.evaluate import Evaluator
from alignlab.lab import Lab
from alignlab.plan import Plan, load_tokenizer, make_plan, shown
from alignlab.run import RunAborted
from alignlab.run_dir import Checkpoint, RunDir
from alignlab.sources import prompt_stream
from alignlab.watchdog import Blocked
from core.config import RunConfig
from core.errors import UserError


def train(config: RunConfig, *, resume: bool = False) -> int:
    """Run `config` to its last step. 0: it got there, 130: Ctrl-C ended it, 1: a part was lost. Raises UserError."""
    plan = make_plan(config)
    config = plan.config
    tokenizer = load_tokenizer(config.model)
    prompts = prompt_stream(config.data, tokenizer, config.seed, plan.rows)
    evaluator = Evaluator(plan, tokenizer)
    run_dir = RunDir.create(config, resume=resume)
    checkpoint = run_dir.newest_valid(print)
    if checkpoint and "ledger_offset" not in checkpoint.state():
        raise UserError(f"{checkpoint.path} was written before there was a ledger; start anew from its model/ folder")
    _say_start(plan, run_dir, prompts, checkpoint, resume)
    with cluster(config):
        try:
            step = asyncio.run(_train(plan, run_dir, tokenizer, prompts, evaluator, checkpoint))
        except OSError as error:
            if error.errno not in FULL:
                raise
            return _say_failed(run_dir, f"{_disk(run_dir)} ({error})")
        except _failures() as error:
            return _say_failed(run_dir, str(error))
    _say_end(plan, run_dir, step)
    return 0 if step >= config.steps else 130


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What an operating system says of a disk on which there is no more room for this user or file."""


def _failures() -> tuple[type[Exception], ...]:
    """What ends a run without being a mistake of ours: a part was lost for good. Anything else keeps its traceback."""
    from actors.pool import ActorLost
    from alignlab.handoff import HandoffFailed
    from learner.pool import LearnerLost

    return RunAborted, ActorLost, LearnerLost, HandoffFailed, Blocked


def _say_failed(run_dir: RunDir, why: str) -> int:
    """Why a run ended, and how it goes on."""
    print(f"alignlab train: {why}\nlogs: {shown(run_dir.path / 'logs')}", file=sys.stderr)
    saved = run_dir.checkpoints()
    kept = f"the checkpoint of step {saved[-1].step} is whole" if saved else "no checkpoint was written yet"
    print(f"next, when the cause is mended ({kept}): {_resume(run_dir)}", file=sys.stderr)
    return 1


def _disk(run_dir: RunDir) -> str:
    free = shutil.disk_usage(run_dir.path).free / 2**20
    return f"no room left on the disk of {shown(run_dir.path)} ({free:.0f} MiB free): make room, then go on"


def _resume(run_dir: RunDir) -> str:
    return f"alignlab train {shown(run_dir.path)}/config.yaml --resume"


async def _train(
    plan: Plan, run_dir: RunDir, tokenizer: Any, prompts: Any, evaluator: Evaluator, checkpoint: Checkpoint | None
) -> int:
    """Start the parts, run to the end, end the parts. Returns the number of steps done."""
    async with AsyncExitStack() as stack:
        lab = await Lab.open(plan, run_dir, tokenizer, prompts, evaluator, stack)
        return await lab.run(checkpoint)


def _say_start(plan: Plan, run_dir: RunDir, prompts: Any, checkpoint: Checkpoint | None, resume: bool) -> None:
    config, folder = plan.config, shown(run_dir.path)
    print(f"{config.name}: {config.steps} steps into {folder}; tensorboard --logdir {folder}/tensorboard")
    left_out = f", {prompts.too_long} left out as too long" if prompts.too_long else ""
    print(f"  {len(prompts)} prompts of {shown(config.data.path)}{left_out}")
    if checkpoint:
        print(f"  going on from {shown(checkpoint.path)}")
    elif resume:
        print("  no checkpoint was written yet: starting over")


def _say_end(plan: Plan, run_dir: RunDir, step: int) -> None:
    config, folder = plan.config, shown(run_dir.path)
    newest = run_dir.checkpoints()[-1]
    print(f"done: {step} of {config.steps} steps; policy in {shown(newest.model)}")
    for name in plan.benchmarks:
        before, after = (_accuracy(run_dir.path, number, name) for number in (0, step))
        if before and after:
            print(f"{name}: accuracy {before} -> {after}")
    if step < config.steps:
        print(f"next: {_resume(run_dir)}")
    else:
        benchmarks = ",".join(map(shown, config.eval.benchmarks)) or "gsm8k"
        data = f" --data {shown(config.eval.data)}" if config.eval.data else ""
        print(f"next: alignlab eval {folder} --benchmarks {benchmarks}{data}")
        print(f"      alignlab report {folder}; tensorboard --logdir {folder}/tensorboard")


def _accuracy(folder: Path, step: int, benchmark: str) -> str | None:
    path = folder / "evals" / f"step-{step:06d}" / f"{benchmark}.summary.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())["result"]
    numbers = [result[key] for key in ("accuracy", "low", "high")]
    return None if None in numbers else "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)
