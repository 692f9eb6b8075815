"""THE loop. The coordinator decides, this file executes; a batch goes from top to bottom:

    prompts -> actors -> rewards -> weights of rewards -> learner -> weights -> actors
      _generate   _hear     _score        _weigh           _train     publish

Synchronous, overlapped and free-running runs, and runs on demonstrations, are this same code with other numbers and
other parts. Whatever happens is in the ledger before it has consequences. Every wait is on an edge of this dataflow,
with a deadline that the watchdog keeps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from actors.actor import Poll
from actors.pool import ActorLost, Published
from alignlab import events as e
from alignlab.archive import Archive
from alignlab.coordinator import Coordinator
from alignlab.metrics import MetricsWriter, group_metrics, rollout_rows, step_line
from alignlab.plan import Plan
from alignlab.profile import NAME as TIMELINE
from alignlab.profile import write_timeline
from alignlab.run_dir import RunDir
from alignlab.sources import advantage_signal, alignment_signal, by_source
from alignlab.watchdog import Blocked, Watchdog
from core.patience import settled
from core.schema import Group, GroupRequest, Mixture, group_id, sample_seed
from learner.profiling import PROFILED, step_folder
from rewards.math_answer import final_answer

Say = Callable[[str], None]

TICK_SECONDS = 1.0  # between two looks at the clock
GROWTH_SECONDS = 10.0  # between two looks for room for one more actor


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
    coordinator: Coordinator
    prompts: Any  # `alignlab.prompts.PromptStream`, `alignlab.sources.MixedPrompts`
    actors: Any
    composer: Any
    learner: Any
    publish: Callable[[int], Awaitable[Published]]
    evaluate: Callable[[int], Awaitable[tuple[dict[str, float], dict[str, float]]]]
    writer: MetricsWriter
    archive: Archive
    watchdog: Watchdog
    saved: int = -1  # the step whose checkpoint is on disk; -1 for none
    say: Say = print
    _events: asyncio.Queue[tuple[e.Event, Group | None] | Exception] = field(default_factory=asyncio.Queue)
    _groups: dict[int, Group] = field(default_factory=dict)  # scored and not yet trained, by ordinal
    _ordinals: dict[str, int] = field(default_factory=dict)  # group id -> ordinal, while leased
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _mail: dict[str, asyncio.Lock] = field(default_factory=dict)  # one message to an actor at a time, in order
    _lost: dict[str, float] = field(default_factory=dict)  # actors that are being replaced, since when
    _moved: asyncio.Event = field(default_factory=asyncio.Event)  # an actor has sampled something, or has nothing to do
    _may_publish: asyncio.Event = field(default_factory=asyncio.Event)
    _step_ended: float = field(default_factory=time.monotonic)
    _step_seconds: list[float] = field(default_factory=list)
    _after: dict[str, float] = field(default_factory=dict)  # seconds of what followed the last step's publication

    async def loop(self) -> None:
        """Run to the last step, or to the end of the step during which `stop` was called; then save.

        Raises RunAborted when it cannot go on, and whatever a part raised.
        """
        self._step_ended = time.monotonic()
        try:
            self._meet()
            for work in (self._tick(), self._grow(), self._watch_actors()):
                self._spawn(work)
            while not self._execute(*await self._next_event()):
                pass
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.saved != self.coordinator.trained:
            await self._checkpoint(self.coordinator.trained)

    def stop(self) -> None:
        """Finish the step that is under way, then end (Ctrl-C)."""
        self._tell(e.StopRequested())

    def _tell(self, event: e.Event, group: Group | None = None) -> None:
        self._events.put_nowait((event, group))

    async def _next_event(self) -> tuple[e.Event, Group | None]:
        """The next event, of which the clock sends one a second. Raises what a part raised."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def _execute(self, event: e.Event, group: Group | None) -> bool:
        """Give one event to the coordinator, record what it says, start what it asks for. True when the run is over."""
        actions = self.coordinator.step(event, time.monotonic())
        self.archive.record([action for action in actions if isinstance(action, e.Record)])
        for action in actions:
            match action:
                case e.Generate(actor, leases):
                    self._spawn(self._generate(actor, leases))
                case e.Cancel(actor, ordinals):
                    self._spawn(self._cancel(actor, ordinals))
                case e.Replace(actor):
                    self._spawn(self._replace(actor))
                case e.Retire(actor):
                    self._spawn(self.actors.leave(actor))
                case e.Score(ordinal):
                    arrived = group is not None and group.prompt.ordinal == ordinal
                    self._spawn(self._score(ordinal, *((group, "") if arrived else self.archive.take(ordinal))))
                case e.Train(step, ordinals):
                    self._spawn(self._train(step, ordinals))
                case e.Publish():
                    self._may_publish.set()
                case e.Abort(reason):
                    raise RunAborted(f"step {self.coordinator.trained + 1}: {reason}")
                case e.Finish():
                    return True
        return False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the loop; what it raises ends the run."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._events.put_nowait(error)

    # ------------------------------------------------------------ actors
    def _meet(self) -> None:
        """Take up the actors as they are: of an attempt that went on before this one some may be silent, or lost."""
        present, silent = self.actors.present(), self.actors.suspects
        self._tell(e.Started(present))
        for name in self.actors.names:
            if name in silent:
                self._tell(e.ActorSuspected(name, self.actors.incarnations[name], "it was silent before"))
            self._spawn(self._attend(name) if name in present or name in silent else self._replace(name))

    async def _attend(self, actor: str) -> None:
        """Hear what one incarnation of an actor has to say, to its end."""
        incarnation, sampled = self.actors.incarnations[actor], 0
        try:
            while actor in self.actors.names:
                poll = await self._hear(actor, incarnation)
                if poll.stats is not None and poll.stats.tokens != sampled:
                    sampled = poll.stats.tokens
                    self._moved.set()
                self._take(poll, actor, incarnation)
        except ActorLost as lost:
            if actor in self.actors.names:
                self.say(f"{lost}; its groups go to other actors, and a new one is started")
            self._lost[actor] = time.monotonic()
            self._tell(e.ActorLost(actor, incarnation, lost.reason))

    async def _hear(self, actor: str, incarnation: int) -> Poll:
        """The next poll. An actor that is silent, or stuck in a step, is suspected until it speaks or is given up."""
        patience, suspected = self.plan.config.actors.suspect_timeout, actor in self.actors.suspects
        while True:
            call = asyncio.ensure_future(self.actors.poll(actor))
            try:
                await settled([call], patience)
                if call.done() and (error := call.exception()):
                    raise error
                stalled = call.result().stats.stalled_seconds if call.done() and call.result().stats else 0.0
                if not suspected and (not call.done() or stalled > patience):
                    suspected = True
                    self.say(f"{actor} has not answered for {patience:g} s: its groups go to others until it does")
                    self.actors.suspect(actor)
                    self._tell(e.ActorSuspected(actor, incarnation, f"silent for {patience:g} s"))
                poll = await call
            finally:
                call.cancel()
            if stalled > patience and not (poll.groups or poll.failures):
                continue
            if suspected:
                version = await self.actors.trust(actor)
                self.say(f"{actor} answers again")
                self._tell(e.ActorRecovered(actor, incarnation, version))
            return poll

    def _take(self, poll: Poll, actor: str, incarnation: int) -> None:
        """Keep what an actor has finished, and tell."""
        for group in poll.groups:
            self._ordinals.pop(group.id, None)
            versions = [version for completion in group.completions for version in completion.versions]
            span = (min(versions, default=self.coordinator.version), max(versions, default=self.coordinator.version))
            lease = (group.prompt.ordinal, actor, incarnation, group.attempt)
            self._tell(e.GroupDone(*lease, group.tokens, *span, self.archive.keep_rollout(group)), group)
            self._moved.set()
        for failure in poll.failures:
            if (ordinal := self._ordinals.get(failure.id)) is not None:
                self._tell(e.GroupFailed(ordinal, actor, incarnation, failure.attempt, failure.reason))

    async def _replace(self, actor: str) -> None:
        self._lost.setdefault(actor, time.monotonic())
        known = self.coordinator.fleet.actors.get(actor)
        # The pool may have begun already, for a publish or an evaluation, and is then ahead of this number.
        self._tell(e.ActorStarting(actor, self.actors.incarnations[actor] if known is None else known.incarnation + 1))
        try:
            await self.actors.replace(actor)
        except ActorLost:
            if actor in self.actors.names:
                raise
            return  # it was to leave, and has left
        self._tell(e.ActorJoined(actor, self.actors.incarnations[actor]))
        self.say(f"{actor} serves again, {time.monotonic() - self._lost.pop(actor):.1f} s after it was lost")
        await self._attend(actor)

    async def _generate(self, actor: str, leases: Sequence[e.Lease]) -> None:
        requests = [self._request(lease) for lease in leases]
        with suppress(ActorLost):  # its poll says so too, and there the loss is dealt with, once
            async with self._mail.setdefault(actor, asyncio.Lock()):
                await self.actors.submit(actor, requests)

    def _request(self, lease: e.Lease) -> GroupRequest:
        seed = self.plan.config.seed
        name = group_id(seed, lease.ordinal)
        self._ordinals[name] = lease.ordinal
        seeds = tuple(sample_seed(seed, lease.ordinal, sample) for sample in range(self.plan.group_size))
        prompt, greedy = self.prompts[lease.ordinal], "greedy" in self.plan.method.needs
        return GroupRequest(name, prompt, seeds, self.plan.sampling, greedy, lease.attempt)

    async def _cancel(self, actor: str, ordinals: Sequence[int]) -> None:
        names = [group_id(self.plan.config.seed, ordinal) for ordinal in ordinals]
        with suppress(ActorLost):
            async with self._mail.setdefault(actor, asyncio.Lock()):
                await self.actors.abort(actor, names)

    async def _watch_actors(self) -> None:
        """Nobody samples although groups wait for it: say so. The leases run into rollout.timeout."""
        while True:
            self._moved.clear()
            with suppress(Blocked), self.watchdog.waiting("generate", seconds=self.plan.config.rollout.timeout):
                await self._moved.wait()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._tell(e.Tick())
            if not self.coordinator.tally()["leased"]:
                self._moved.set()
            for name in self.run_dir.leavers():
                if len(self.actors.names) > 1:
                    self._tell(e.ActorLeaving(name))
                else:
                    self.say(f"{name} stays: it is the only actor")

    async def _grow(self) -> None:
        """One more actor whenever the cluster has room for it, up to actors.max_count."""
        most = self.plan.config.actors.max_count
        while most is not None:
            await asyncio.sleep(GROWTH_SECONDS)
            # A place that comes up is first for those that have lost theirs.
            if not self._lost and (name := await self.actors.join()) is not None:
                self.say(f"{name} has joined")
                self._tell(e.ActorJoined(name, self.actors.incarnations[name]))
                self._spawn(self._attend(name))

    # ------------------------------------------------------------ the way of a batch
    async def _score(self, ordinal: int, group: Group, digest: str) -> None:
        """`digest`: of the scores that the group has already, empty for none."""
        if not digest:
            if not self.plan.demonstrations:
                with self.watchdog.waiting("score", f"group {ordinal}"):
                    group = await self.composer.score(group)
            if "answers" in self.plan.method.needs:
                group = replace(group, answers=tuple(final_answer(c.text) for c in group.completions))
            digest = self.archive.keep_scores(group)
        drop = self.plan.drop(group)
        if drop is None:
            self._groups[ordinal] = group
        self._tell(e.GroupScored(ordinal, drop, digest))

    async def _train(self, step: int, ordinals: Sequence[int]) -> None:
        """Train on a batch, serve the new weights, write down what happened. `step` counts from 0."""
        groups, mixture = [self._groups.pop(ordinal) for ordinal in ordinals], Mixture()
        version, times = step + 1, {"time/wait_groups": time.monotonic() - self._step_ended}
        metrics = group_metrics(groups, step, self.plan.config.rollout.token_age)
        with _timed(times, "time/weigh"), self.watchdog.waiting("weigh"):
            if not self.plan.demonstrations:
                groups, mixture = await self._weigh(groups, step)
                metrics |= self.composer.metrics(groups)
        with _timed(times, "time/keep"):
            digest = self.archive.keep_step(groups, mixture)
        with _timed(times, "time/train"), self.watchdog.waiting("train", f"step {version}"):
            result = await self.learner.step(groups, step, mixture)
        self._may_publish.clear()
        self._tell(e.Trained(step, int(metrics["rollout/masked"]), digest))
        with _timed(times, "time/wait_publish"):
            await self._may_publish.wait()
        with _timed(times, "time/publish"), self.watchdog.waiting("publish", f"version {version}"):
            published = await self.publish(version)
        self._tell(e.Served(version, published.loaded, published.stale, published.digest))
        await asyncio.sleep(0)  # new groups are on their way before files are written
        times["time/step"] = time.monotonic() - self._step_ended
        rates, means = self.actors.metrics(), await self._evaluate(version)
        if not self.plan.demonstrations:
            metrics |= self.composer.learn(result.kl, means)
            metrics |= await self._mix_sources(groups, result.advantages)
        metrics |= result.metrics | times | rates | published.costs | self._after
        self._after.clear()
        with _timed(self._after, "time/write"):
            self._write(version, groups, result, metrics)
        if self.plan.config.profile and len(self._step_seconds) == PROFILED:
            out = step_folder(self.run_dir.path, version) / TIMELINE
            await asyncio.to_thread(write_timeline, self.run_dir.path, out)
        if (every := self.plan.config.checkpoint.every) and version % every == 0:
            await self._checkpoint(version)
        self.actors.metrics()  # what was sampled for the evaluation is no rollout
        self._step_ended = time.monotonic()
        self._tell(e.StepDone(step))

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
        with self.watchdog.waiting("evaluate", f"step {version}"):
            metrics, means = await self.evaluate(version)
        self.writer.write(version, metrics)
        return means

    def _write(self, step: int, groups: list[Group], result: Any, metrics: dict[str, float]) -> None:
        self._step_seconds = [*self._step_seconds[-19:], metrics["time/step"]]
        counts = self.coordinator.counts
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
        with _timed(self._after, "time/checkpoint"), self.watchdog.waiting("checkpoint", f"step {step}"):
            folder = self.run_dir.begin_checkpoint(step)
            await self.learner.save(folder)
            if self.plan.config.rollout.deterministic:  # after a power cut it could not sample them again
                await asyncio.to_thread(self.archive.sync_payloads, self.archive.under_way())
            state = {"step": step, "coordinator": self.coordinator.state_dict(), "rewards": self.composer.state_dict()}
            if self.plan.config.data.sources is not None:
                state["sources"] = self.prompts.state_dict()
            state["ledger_offset"] = self.archive.sync()
            keep = self.plan.config.checkpoint.keep
            await asyncio.to_thread(self.run_dir.commit_checkpoint, step, state, keep=keep)
        self.archive.record([e.Record("checkpoint", {"step": step, "offset": state["ledger_offset"]})])
        self.archive.prune(min(checkpoint.state()["ledger_offset"] for checkpoint in self.run_dir.checkpoints()))
        self.saved = step


class _timed:
    """Adds the seconds of its block to `times[name]`."""

    def __init__(self, times: dict[str, float], name: str) -> None:
        self._times, self._name = times, name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._times[self._name] = time.monotonic() - self._started
