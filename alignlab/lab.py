"""The parts of a run, started, and what is done when one is lost for which there is no replacement inside the loop.

A lost learner starts again from the last checkpoint, while the actors keep their engines: what followed the checkpoint
is undone in the ledger, and what was sampled by versions that are still true is used.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.pool import ActorLost, Published
from alignlab import events as e
from alignlab.archive import Archive
from alignlab.coordinator import Coordinator
from alignlab.demonstrations import Demonstrations
from alignlab.evaluate import Evaluator
from alignlab.metrics import MetricsWriter, overview
from alignlab.plan import Plan
from alignlab.run import Run
from alignlab.run_dir import Checkpoint, RunDir
from alignlab.watchdog import LOOP, Blocked, Watchdog
from core.patience import within
from core.schema import group_id

if TYPE_CHECKING:
    from learner.pool import LearnerPool

Say = Callable[[str], None]
Publish = Callable[[int], Awaitable[Published]]


@dataclass
class Lab:
    """What the attempts of one process share. `open` starts real parts, which `stack` ends; tests bring their own.

    start_learner: a new learner in the place of a lost one. publisher: what makes the actors serve its weights.
    """

    plan: Plan
    run_dir: RunDir
    prompts: Any
    evaluator: Evaluator
    actors: Any
    composer: Any
    learner: LearnerPool
    archive: Archive
    start_learner: Callable[[], Awaitable[LearnerPool]]
    publisher: Callable[[LearnerPool], Publish]
    say: Say = print
    _attempts: int = 0
    _first: dict[str, Any] = field(init=False)  # states of a run without a checkpoint, at its first step
    _last: Coordinator | None = None  # of the attempt before this one

    @classmethod
    async def open(
        cls, plan: Plan, run_dir: RunDir, tokenizer: Any, prompts: Any, evaluator: Evaluator, stack: AsyncExitStack
    ) -> Lab:
        """Start actors, composer and learner, side by side. Raises UserError for what does not start."""
        from alignlab.handoff import Handoff
        from learner.pool import LearnerPool

        archive = Archive(run_dir.path, plan.config.ledger)
        stack.callback(archive.close)
        actors, composer, learner = await _parts(plan, run_dir, tokenizer, stack)
        run_dir.write_rewards({name: component.record() for name, component in composer.components.items()})

        async def start_learner() -> LearnerPool:
            return await LearnerPool.start(plan.config, run_dir.path, reference="kl" in composer.needs)

        def publisher(pool: LearnerPool) -> Publish:
            return _nothing if plan.demonstrations else Handoff(pool, actors)

        lab = cls(plan, run_dir, prompts, evaluator, actors, composer, learner, archive, start_learner, publisher)
        stack.push_async_callback(lab.close_learner)
        return lab

    def __post_init__(self) -> None:
        self._first = {"rewards": self.composer.state_dict()}
        if self.plan.config.data.sources is not None:
            self._first["sources"] = self.prompts.state_dict()

    async def run(self, checkpoint: Checkpoint | None) -> int:
        """Attempt after attempt until one comes to its end; the number of steps done. Raises what ends a run."""
        from learner.pool import LearnerLost

        losses, reason = 0, "start" if checkpoint is None else "resume"
        while True:
            attempt = AsyncExitStack()
            try:
                async with attempt:
                    return await self._attempt(checkpoint, reason, attempt)
            except (LearnerLost, Blocked) as lost:
                if isinstance(lost, Blocked) and lost.edge not in ("train", "weigh", "checkpoint"):
                    raise
                newest = self.run_dir.newest_valid(self.say)
                losses = 1 if newest is not None and newest != checkpoint else losses + 1
                if losses > self.plan.config.learner.max_restarts:
                    raise
                checkpoint, reason = newest, "learner lost"
                where = "the start" if newest is None else f"step {newest.step}"
                self.say(f"{lost}\nthe learner starts again from {where}; the actors keep serving")
                await self._restart_learner()

    async def _attempt(self, checkpoint: Checkpoint | None, reason: str, stack: AsyncExitStack) -> int:
        config = self.plan.config
        while (coordinator := await self._go_on(checkpoint, reason)) is None:
            checkpoint = self.run_dir.newest_valid(self.say)
        first = checkpoint.step if checkpoint else 0
        writer = MetricsWriter(self.run_dir.path, first_step=first, overview=overview(config.rewards))
        stack.callback(writer.close)
        watchdog = stack.enter_context(self._watchdog(coordinator))
        publish = self.publisher(self.learner)

        async def evaluate(version: int) -> tuple[dict[str, float], dict[str, float]]:
            folder = self.run_dir.path / "evals" / f"step-{version:06d}"
            scored = self.composer.score if "validation" in self.composer.needs else None
            return await self.evaluator.run(self.actors, folder, version, scored)

        parts = (self.prompts, self.actors, self.composer, self.learner, publish, evaluate, writer)
        saved = checkpoint.step if checkpoint else -1
        run = Run(self.plan, self.run_dir, coordinator, *parts, self.archive, watchdog, saved, self.say)
        with watchdog.waiting("publish", f"version {first}"):
            published = await publish(first)
        self._note_published(published)
        if first == 0 and self._attempts == 1:
            with watchdog.waiting("evaluate", "before the first step"):
                metrics, means = await evaluate(0)
            writer.write(0, metrics)
            self.composer.begin(means)
            self._first["rewards"] = self.composer.state_dict()
        with _ctrl_c(run):
            await run.loop()
        steps = coordinator.trained
        if steps >= config.steps:
            with watchdog.waiting("evaluate", "after the last step"):
                metrics, _ = await evaluate(steps)
            writer.write(steps, metrics)
        self.archive.record([e.Record("end", {"step": steps, "reason": "done" if steps >= config.steps else "stop"})])
        return steps

    async def _go_on(self, checkpoint: Checkpoint | None, reason: str) -> Coordinator | None:
        """All parts as they were at the checkpoint, or at the start; the coordinator of the attempt.

        None where that would be another run than before: then this one is put aside, for there is an earlier one.
        """
        config, r = self.plan.config, self.plan.config.rollout
        state = checkpoint.state() if checkpoint else {"step": 0, "ledger_offset": 0, **self._first}
        free = r.max_staleness > 0 and not r.deterministic
        coordinator = Coordinator(
            prompts=r.prompts,
            steps=config.steps,
            max_staleness=r.max_staleness,
            window=r.group_age,
            deterministic=r.deterministic,
            max_attempts=r.max_attempts,
            lease_seconds=r.timeout,
            # Groups beyond what an engine decodes at once wait here, for whoever is free first.
            capacity=max(1, -(-2 * config.actors.max_num_seqs // self.plan.group_size)) if free else None,
            first_attempt=self._last.last_attempt + 1 if self._last else 0,
        )
        facts = {
            "seed": config.seed,
            "prompts": r.prompts,
            "group_size": self.plan.group_size,
            "steps": config.steps,
            "max_staleness": r.max_staleness,
            "max_age": coordinator.window,
            "deterministic": r.deterministic,
            "reason": reason,
        }
        found = self.archive.begin(facts, state["step"], state["ledger_offset"])
        self.run_dir.forget_after(state["step"])
        start = {"version": 0, "next_ordinal": 0, "owed": {}, "counts": {}, "tokens": {}}
        saved = state.get("coordinator", start)
        lost = [o for o, version in saved["owed"].items() if version < state["step"] and int(o) not in found]
        if r.deterministic and lost:
            told = f"groups {', '.join(map(str, lost))} cannot be read, and the versions that sampled them are gone"
            if checkpoint and any(other.step < checkpoint.step for other in self.run_dir.checkpoints()):
                aside = self.run_dir.put_aside(checkpoint)
                self.say(f"{told}: checkpoint {checkpoint.path} is moved to {aside.name}, and the one before is used")
                return None
            self.say(f"{told}: they are sampled anew, and from here on this run is another one")
        coordinator.load_state_dict(saved, found)
        if checkpoint:
            await self.learner.load(checkpoint.path)
        if checkpoint or self._attempts:
            self.composer.load_state_dict(state["rewards"])
            if config.data.sources is not None:
                self.prompts.load_state_dict(state["sources"])
        self._attempts, self._last = self._attempts + 1, coordinator
        return coordinator

    def _note_published(self, published: Published) -> None:
        fields = {"digest": published.digest, "loaded": list(published.loaded), "stale": dict(published.stale)}
        self.archive.record([e.Record("published", {"version": published.version, **fields})])

    def _watchdog(self, coordinator: Coordinator) -> Watchdog:
        config = self.plan.config

        def describe() -> str:
            return (
                f"step {coordinator.trained + 1} is {coordinator.phase.value}; groups {coordinator.tally()}; actors "
                f"{dict(coordinator.fleet.count())}; the oldest lease has lasted {coordinator.oldest_lease:.1f} s"
            )

        limits = {
            "prompts": config.deadlines.ledger,
            "submit": config.actors.silence_timeout,
            "start": config.actors.start_timeout,
            LOOP: config.deadlines.ledger,
            "generate": config.rollout.timeout,
            "score": config.deadlines.score,
            "weigh": config.deadlines.weigh,
            "train": 0.9 * config.learner.timeout,  # before the pool's own deadline, which knows less
            "publish": 2.5 * config.actors.publish_timeout,  # over NCCL, then through the object store
            "evaluate": config.deadlines.evaluate,
            "checkpoint": config.deadlines.checkpoint,
            "ledger": config.deadlines.ledger,
        }
        return Watchdog(self.run_dir.path, self.say, limits, describe, self._processes)

    def _processes(self) -> dict[str, tuple[int, str, Any]]:
        """(pid, host, log) of every process of the run but this one."""
        pools = (self.actors, self.learner, self.composer)
        return {name: where for pool in pools for name, where in pool.processes().items()}

    async def _restart_learner(self) -> None:
        """A new learner; the actors forget what they were sampling for the old one."""
        assert self._last is not None
        names = [group_id(self.plan.config.seed, ordinal) for ordinal in self._last.groups]
        await asyncio.gather(*(self._forget(actor, names) for actor in self.actors.names))
        if not self.plan.demonstrations:
            self.actors.disconnect()
        await self.close_learner()
        self.learner = await self.start_learner()

    async def _forget(self, actor: str, names: list[str]) -> None:
        """Have an actor abort groups, if it hears: what it samples of them nevertheless is refused."""
        with suppress(ActorLost, TimeoutError):
            await within(self.actors.abort(actor, names), self.plan.config.actors.suspect_timeout)

    async def close_learner(self) -> None:
        """End the present learner."""
        await self.learner.close()


async def _parts(plan: Plan, run_dir: RunDir, tokenizer: Any, stack: AsyncExitStack) -> tuple[Any, Any, LearnerPool]:
    """Actors, composer and learner, ready; `stack` ends the first two."""
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
        return Demonstrations(config, tokenizer), composer, await LearnerPool.start(config, run_dir.path)
    actors = ActorPool(config, logs)
    stack.push_async_callback(actors.close)
    learning = LearnerPool.start(config, run_dir.path, reference="kl" in composer.needs)
    return actors, composer, await _together(learning, actors.start(), models.start())


async def _together(learner: Coroutine[Any, Any, LearnerPool], *others: Coroutine[Any, Any, None]) -> LearnerPool:
    """Start the pools side by side; if one cannot start, nothing of the learner stays behind."""
    pool, *problems = await asyncio.gather(learner, *others, return_exceptions=True)
    for error in (pool, *problems):
        if isinstance(error, BaseException):
            if not isinstance(pool, BaseException):
                await pool.close()
            raise error
    return pool


async def _nothing(version: int) -> Published:
    """Where no actor samples, nobody waits for new weights."""
    return Published(version, "", (), {})


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
