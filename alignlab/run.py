"""THE loop. The coordinator decides, this file executes; a batch goes from top to bottom:

    prompts -> actors -> rewards -> weights of rewards -> learner -> weights -> actors
      _generate   _poll     _score        _weigh           _train     publish

Synchronous and overlapped runs, and runs on demonstrations, are this same code with other numbers and other parts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.pool import ActorLost
from alignlab import coordinator as c
from alignlab.metrics import MetricsWriter, group_metrics, rollout_rows, step_line
from alignlab.plan import Plan
from alignlab.run_dir import RunDir
from alignlab.sources import advantage_signal, alignment_signal, by_source
from core.schema import Group, GroupRequest, Mixture, group_id, sample_seed
from rewards.math_answer import final_answer

Say = Callable[[str], None]


class RunAborted(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class Run:
    """One run on parts that are ready. Tests hand in fakes.

    actors: `actors.pool.ActorPool` or `alignlab.demonstrations.Demonstrations`. publish(version) makes the actors serve
    the learner's weights; evaluate(step) evaluates and returns metrics, and the means that weighting policies look at.
    Both are called between steps.
    """

    plan: Plan
    run_dir: RunDir
    coordinator: c.Coordinator
    prompts: Any  # `alignlab.prompts.PromptStream`, `alignlab.sources.MixedPrompts`
    actors: Any
    composer: Any
    learner: Any
    publish: Callable[[int], Awaitable[None]]
    evaluate: Callable[[int], Awaitable[tuple[dict[str, float], dict[str, float]]]]
    writer: MetricsWriter
    saved: int = -1  # the step whose checkpoint is on disk; -1 for none
    say: Say = print
    _events: asyncio.Queue[tuple[c.Event, Group | None] | Exception] = field(default_factory=asyncio.Queue)
    _groups: dict[int, Group] = field(default_factory=dict)  # accepted and not yet trained, by ordinal
    _ordinals: dict[str, int] = field(default_factory=dict)  # group id -> ordinal, while leased
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _step_ended: float = field(default_factory=time.monotonic)
    _step_seconds: list[float] = field(default_factory=list)
    _checkpoint_seconds: float | None = None  # of the checkpoint after the last step
    _progress: float = field(default_factory=time.monotonic)  # when the actors last had sampled something
    _training: bool = False

    async def loop(self) -> None:
        """Run to the last step, or to the end of the step during which `stop` was called; then save.

        Raises RunAborted when it cannot go on, and whatever a part raised.
        """
        self._step_ended = self._progress = time.monotonic()
        try:
            for name in self.actors.names:
                self._spawn(self._poll(name))
                self._tell(c.ActorJoined(name))
            while not self._execute(*await self._next_event()):
                pass
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.saved != self.coordinator.version:
            await self._checkpoint(self.coordinator.version)

    def stop(self) -> None:
        """Finish the step that is under way, then end (Ctrl-C)."""
        self._tell(c.StopRequested())

    def _tell(self, event: c.Event, group: Group | None = None) -> None:
        self._events.put_nowait((event, group))

    def _execute(self, event: c.Event, group: Group | None) -> bool:
        """Give one event to the coordinator and start what it asks for. True when the run is over."""
        for action in self.coordinator.step(event, time.monotonic()):
            match action:
                case c.Generate(actor, leases):
                    self._spawn(self._generate(actor, leases))
                case c.Score(ordinal):
                    assert group is not None  # only GroupDone leads here, and it brings its group
                    self._spawn(self._score(ordinal, group))
                case c.Train(step, ordinals):
                    self._spawn(self._train(step, ordinals))
                case c.Abort(reason):
                    raise RunAborted(f"step {self.coordinator.version + 1}: {reason}")
                case c.Finish():
                    return True
        return False

    async def _next_event(self) -> tuple[c.Event, Group | None]:
        """The next event. Raises what a part raised, and RunAborted when nothing moves any more.

        Every part has its own deadline, so a step under way is not judged here; nor are actors that sample.
        """
        limit = self.plan.config.learner.timeout
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), limit)
            except TimeoutError:
                if self._training or time.monotonic() - self._progress < limit:
                    continue
                raise RunAborted(
                    f"nothing happened for {limit:g} s (learner.timeout); groups by state: {self.coordinator.tally()}; "
                    f"see {self.run_dir.path / 'logs'}"
                ) from None
            if isinstance(event, Exception):
                raise event
            return event

    def _spawn(self, work: Awaitable[None]) -> None:
        """Run `work` beside the loop; what it raises ends the run."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self._events.put_nowait(error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ the way of a batch
    async def _generate(self, actor: str, leases: Sequence[c.Lease]) -> None:
        seed, size = self.plan.config.seed, self.plan.group_size
        requests = []
        for lease in leases:
            name = group_id(seed, lease.ordinal)
            self._ordinals[name] = lease.ordinal
            seeds = tuple(sample_seed(seed, lease.ordinal, sample) for sample in range(size))
            prompt, greedy = self.prompts[lease.ordinal], "greedy" in self.plan.method.needs
            requests.append(GroupRequest(name, prompt, seeds, self.plan.sampling, greedy, lease.attempt))
        try:
            await self.actors.submit(actor, requests)
        except ActorLost:
            return  # its poll says so too, and there the loss is dealt with, once

    async def _poll(self, actor: str) -> None:
        sampled = 0
        while True:
            try:
                poll = await self.actors.poll(actor)
            except ActorLost as lost:
                self.say(f"{lost}; its groups go to other actors, and a new one is started")
                self._tell(c.ActorLost(actor, lost.reason))
                await self.actors.replace(actor)
                self._tell(c.ActorJoined(actor))
                continue
            if poll.stats is not None and poll.stats.tokens != sampled:
                sampled, self._progress = poll.stats.tokens, time.monotonic()
            for group in poll.groups:
                self._tell(c.GroupDone(self._ordinals[group.id], actor, group.attempt), group)
            for failure in poll.failures:
                ordinal = self._ordinals[failure.id]
                self._tell(c.GroupFailed(ordinal, actor, failure.attempt, failure.reason))

    async def _score(self, ordinal: int, group: Group) -> None:
        if not self.plan.demonstrations:
            group = await self.composer.score(group)
        if "answers" in self.plan.method.needs:
            group = replace(group, answers=tuple(final_answer(c.text) for c in group.completions))
        drop = self.plan.drop(group)
        if drop is None:
            self._groups[ordinal] = group
        self._tell(c.GroupScored(ordinal, drop))

    async def _train(self, step: int, ordinals: Sequence[int]) -> None:
        """Train on a batch, serve the new weights, write down what happened. `step` counts from 0."""
        self._training = True
        groups, mixture = [self._groups.pop(ordinal) for ordinal in ordinals], Mixture()
        version, times = step + 1, {"time/wait_groups": time.monotonic() - self._step_ended}
        metrics = group_metrics(groups, version=step)
        with _timed(times, "time/weigh"):
            if not self.plan.demonstrations:
                groups, mixture = await self._weigh(groups, step)
                metrics |= self.composer.metrics(groups)
        with _timed(times, "time/train"):
            result = await self.learner.step(groups, step, mixture)
        with _timed(times, "time/publish"):
            await self.publish(version)
        times["time/step"] = time.monotonic() - self._step_ended
        rates, means = self.actors.metrics(), await self._evaluate(version)
        if not self.plan.demonstrations:
            metrics |= self.composer.learn(result.kl, means)
            metrics |= await self._mix_sources(groups, result.advantages)
        self._write(version, groups, result, metrics | times | rates)
        if (every := self.plan.config.checkpoint.every) and version % every == 0:
            await self._checkpoint(version)
        self.actors.metrics()  # what was sampled for the evaluation is no rollout
        self._step_ended, self._training = time.monotonic(), False
        self._tell(c.StepDone(step))

    async def _weigh(self, groups: list[Group], step: int) -> tuple[list[Group], Mixture]:
        """The groups with the columns, weights and totals of this step, and how the learner joins them."""
        groups = await self.composer.columns(groups, step)
        if "gram" not in self.composer.needs:
            return self.composer.weigh(groups)
        # The learner compares the gradients of the columns that weigh; what they weigh is not known yet.
        named = [
            replace(group, weights={name: (1.0,) * len(group.completions) for name in self.composer.objectives})
            for group in groups
        ]
        gram, lr = await self.learner.gram(named)
        return self.composer.weigh(groups, gram, lr)

    async def _mix_sources(self, groups: list[Group], advantages: Sequence[Sequence[float]]) -> dict[str, float]:
        """The probabilities of the sources of prompts, from what this step says of each; nothing without sources."""
        sources = self.plan.config.data.sources
        if sources is None:
            return {}
        if sources.signal == "advantage":
            signal = advantage_signal(groups, advantages)
        else:
            gram, _ = await self.learner.gram(by_source(groups))
            signal = alignment_signal(groups, gram, sources.target)
        return self.prompts.mix(signal, self.coordinator.next_ordinal)

    async def _evaluate(self, version: int) -> dict[str, float] | None:
        """The evaluation that is due after this step, written down; its means for the weighting policy, or none."""
        config = self.plan.config
        if not config.eval.every or version % config.eval.every or version >= config.steps:
            return None
        metrics, means = await self.evaluate(version)
        self.writer.write(version, metrics)
        return means

    def _write(self, step: int, groups: list[Group], result: Any, metrics: dict[str, float]) -> None:
        self._step_seconds = [*self._step_seconds[-19:], metrics["time/step"]]
        counts = self.coordinator.counts
        metrics |= result.metrics
        if self._checkpoint_seconds is not None:
            metrics["time/checkpoint"], self._checkpoint_seconds = self._checkpoint_seconds, None
        metrics["rollout/retried"], metrics["rollout/refused"] = counts["retried"], counts["refused"]
        metrics["rollout/dropped"] = self.coordinator.tally()["dropped"]
        self.writer.write(step, metrics)
        rows = rollout_rows(step, groups, result.advantages, result.kl)
        self.run_dir.write_rollouts(step, rows)
        self.writer.rollouts(step, rows)
        steps, mean = self.plan.config.steps, sum(self._step_seconds) / len(self._step_seconds)
        self.say(step_line(step, steps, metrics, (steps - step) * mean))
        for line in self.writer.warn(step, metrics, self.run_dir.path):
            self.say(f"  {line}")

    async def _checkpoint(self, step: int) -> None:
        """Everything that the next step depends on, in one folder that is there as a whole or not at all."""
        started = time.monotonic()
        folder = self.run_dir.begin_checkpoint(step)
        await self.learner.save(folder)
        state = {"step": step, "coordinator": self.coordinator.state_dict(), "rewards": self.composer.state_dict()}
        if self.plan.config.data.sources is not None:
            state["sources"] = self.prompts.state_dict()
        self.run_dir.commit_checkpoint(step, state, keep=self.plan.config.checkpoint.keep)
        self.saved, self._checkpoint_seconds = step, time.monotonic() - started


class _timed:
    """Adds the seconds of its block to `times[name]`."""

    def __init__(self, times: dict[str, float], name: str) -> None:
        self._times, self._name = times, name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._times[self._name] = time.monotonic() - self._started
