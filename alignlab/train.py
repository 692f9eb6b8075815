"""The verb `train`: check everything, start the parts, hand them to the loop, say what to do next."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.cluster import cluster
from alignlab.coordinator import Coordinator
from alignlab.demonstrations import Demonstrations
from alignlab.evaluate import Evaluator
from alignlab.metrics import MetricsWriter, overview
from alignlab.plan import Plan, load_tokenizer, make_plan, shown
from alignlab.run import Run, RunAborted
from alignlab.run_dir import Checkpoint, RunDir
from alignlab.sources import prompt_stream
from core.config import RunConfig

if TYPE_CHECKING:
    from learner.pool import LearnerPool


def train(config: RunConfig, *, resume: bool = False) -> int:
    """Run `config` to its last step. 0: it got there, 130: Ctrl-C ended it, 1: a part was lost. Raises UserError."""
    plan = make_plan(config)
    config = plan.config
    tokenizer = load_tokenizer(config.model)
    prompts = prompt_stream(config.data, tokenizer, config.seed, plan.rows)
    evaluator = Evaluator(plan, tokenizer)
    run_dir = RunDir.create(config, resume=resume)
    checkpoint = (run_dir.checkpoints() or [None])[-1]
    _say_start(plan, run_dir, prompts, checkpoint, resume)
    with cluster(config):
        try:
            step = asyncio.run(_train(plan, run_dir, tokenizer, prompts, evaluator, checkpoint))
        except _failures() as error:
            print(f"alignlab train: {error}\nlogs: {shown(run_dir.path / 'logs')}", file=sys.stderr)
            print(f"next, when the cause is mended: {_resume(run_dir)}", file=sys.stderr)
            return 1
    _say_end(plan, run_dir, step)
    return 0 if step >= config.steps else 130


def _failures() -> tuple[type[Exception], ...]:
    """What ends a run without being a mistake of ours: a part was lost for good. Anything else keeps its traceback."""
    from actors.pool import ActorLost
    from alignlab.handoff import HandoffFailed
    from learner.pool import LearnerLost

    return RunAborted, ActorLost, LearnerLost, HandoffFailed


def _resume(run_dir: RunDir) -> str:
    return f"alignlab train {shown(run_dir.path)}/config.yaml --resume"


async def _train(
    plan: Plan,
    run_dir: RunDir,
    tokenizer: Any,
    prompts: Any,
    evaluator: Evaluator,
    checkpoint: Checkpoint | None,
) -> int:
    """Start the parts, run the loop, end the parts. Returns the number of steps done."""
    from alignlab.handoff import Handoff

    config = plan.config
    first = checkpoint.step if checkpoint else 0
    run_dir.forget_after(first)
    async with AsyncExitStack() as stack:
        actors, composer, learner = await _parts(plan, run_dir, tokenizer, stack)
        run_dir.write_rewards({name: component.record() for name, component in composer.components.items()})
        coordinator = Coordinator(
            prompts=config.rollout.prompts,
            steps=config.steps,
            max_staleness=config.rollout.max_staleness,
            max_attempts=config.rollout.max_attempts,
        )
        if checkpoint:
            await learner.load(checkpoint.path)
            coordinator.load_state_dict(checkpoint.state()["coordinator"])
            composer.load_state_dict(checkpoint.state()["rewards"])
            if config.data.sources is not None:
                prompts.load_state_dict(checkpoint.state()["sources"])
        writer = MetricsWriter(run_dir.path, first_step=first, overview=overview(config.rewards))
        stack.callback(writer.close)

        publish = _nothing if plan.demonstrations else Handoff(learner, actors)

        async def evaluate(version: int) -> tuple[dict[str, float], dict[str, float]]:
            folder = run_dir.path / "evals" / f"step-{version:06d}"
            scored = composer.score if "validation" in composer.needs else None
            return await evaluator.run(actors, folder, version, scored)

        saved = checkpoint.step if checkpoint else -1
        run = Run(plan, run_dir, coordinator, prompts, actors, composer, learner, publish, evaluate, writer, saved)
        await publish(first)
        if first == 0:
            metrics, means = await evaluate(0)
            writer.write(0, metrics)
            composer.begin(means)
        with _ctrl_c(run):
            await run.loop()
        if coordinator.version >= config.steps:
            writer.write(coordinator.version, (await evaluate(coordinator.version))[0])
        return coordinator.version


async def _parts(plan: Plan, run_dir: RunDir, tokenizer: Any, stack: AsyncExitStack) -> tuple[Any, Any, LearnerPool]:
    """Actors, composer and learner, ready; `stack` ends them."""
    from actors.pool import ActorPool
    from learner.pool import LearnerPool
    from rewards.composer import Composer
    from rewards.pool import ModelPool

    config, logs = plan.config, run_dir.path / "logs"
    models = ModelPool(config, logs)
    composer = Composer(config.rewards, steps=config.steps, models=models)
    stack.push_async_callback(models.close)
    stack.push_async_callback(composer.close)
    if plan.demonstrations:
        actors: Any = Demonstrations(config, tokenizer)
        learner = await LearnerPool.start(config, run_dir.path)
    else:
        actors = ActorPool(config, logs)
        stack.push_async_callback(actors.close)
        learning = LearnerPool.start(config, run_dir.path, reference="kl" in composer.needs)
        learner = await _together(learning, actors.start(), models.start())
    stack.push_async_callback(learner.close)
    return actors, composer, learner


async def _together(learner: Coroutine[Any, Any, LearnerPool], *others: Coroutine[Any, Any, None]) -> LearnerPool:
    """Start the pools side by side; if one cannot start, nothing of the learner stays behind."""
    pool, *problems = await asyncio.gather(learner, *others, return_exceptions=True)
    for error in (pool, *problems):
        if isinstance(error, BaseException):
            if not isinstance(pool, BaseException):
                await pool.close()
            raise error
    return pool


async def _nothing(version: int) -> None:
    """Where no actor samples, nobody waits for new weights."""


class _ctrl_c:
    """The first Ctrl-C (or SIGTERM) ends the run after the present step; the second ends it at once."""

    def __init__(self, run: Run) -> None:
        self._run, self._asked = run, False

    def __enter__(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._run.say("stopping: this step is finished and saved first; Ctrl-C again stops at once")
        self._run.stop()


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
