"""The pool of reward models: Ray actors that hold classifiers and judges and score while the rollout actors generate.

    pool = ModelPool(config, logs); await pool.start()
    scored = await pool.score("helpful", samples, batch=True)      # as `rewards.workers.Workers.score`

Every process holds all components that want a model. What waits for one component is handed over together, up to
`rewards.models.batch` completions. A call has a deadline: past it, or when a process dies, its completions are
`timeout` or `error`, and a new process takes its place.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import patience, stacks
from core.config import RunConfig
from core.errors import UserError
from core.schema import Score
from rewards.components import check_components
from rewards.reward import Reward, Samples, Scores, bind, describe_error
from rewards.workers import RewardFailure, Scored

ATTEMPTS = 3  # starts of one process in a row that may fail before the run stops


def pooled(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The components that are scored in the pool, as a process binds them: name -> fn, options."""
    found = check_components(config.rewards)
    return {n: {"fn": c.fn, "options": dict(c.options)} for n, c in found.items() if c.reward and c.reward.pool}


@dataclass(eq=False)
class _Job:
    """One group that waits for one component."""

    component: str
    samples: Samples
    batch: bool
    done: asyncio.Future[list[Scored]]


class ModelPool:
    """`rewards.models.count` processes; none where no component wants one. Belongs to one asyncio loop."""

    def __init__(self, config: RunConfig, logs: Path) -> None:
        self.config, self.options, self.logs = config, config.rewards.models, logs
        self.components = pooled(config)
        self._waiting: deque[_Job] = deque()
        self._wake = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._place: Any = None
        self._device = "cpu"
        self._problem: Exception | None = None
        self._where: dict[int, tuple[int, str]] = {}  # (pid, host) of each process

    async def start(self) -> None:
        """Reserve the place, load the models. Raises UserError for what the user can mend."""
        if not self.components:
            return
        await self._reserve()
        processes = [self._launch(index) for index in range(self.options.count)]
        try:
            await asyncio.gather(*(self._loaded(index, process) for index, process in enumerate(processes)))
        except BaseException:
            for process in processes:
                _kill(process)
            raise
        self._tasks = [asyncio.create_task(self._serve(i, process)) for i, process in enumerate(processes)]

    async def score(self, component: str, samples: Samples, batch: bool) -> list[Scored]:
        """Every completion of `samples`, in order. Raises RewardFailure once no process can be kept alive."""
        if self._problem is not None:
            raise self._problem
        job = _Job(component, samples, batch, asyncio.get_running_loop().create_future())
        async with self._wake:
            self._waiting.append(job)
            self._wake.notify()
        return await job.done

    def processes(self) -> dict[str, tuple[int, str, Path]]:
        """(pid, host, log) of every process that is up."""
        return {f"reward-models-{i}": (*where, self._log(i)) for i, where in self._where.items()}

    async def close(self) -> None:
        """End the processes and give their place back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._place is not None:
            import ray

            ray.util.remove_placement_group(self._place)
            self._place = None

    # ------------------------------------------------------------ one process
    async def _serve(self, index: int, process: Any) -> None:
        try:
            while True:
                jobs = await self._next_jobs()
                if not await self._score(process, jobs):
                    _kill(process)
                    process = await self._replaced(index)
        except RewardFailure as error:
            self._fail(error)
        finally:
            _kill(process)

    async def _next_jobs(self) -> list[_Job]:
        """The oldest waiting job, and others of its component up to a batch."""
        async with self._wake:
            await self._wake.wait_for(lambda: bool(self._waiting))
            first = self._waiting.popleft()
            jobs, size = [first], len(first.samples.completions)
            for job in list(self._waiting):
                fits = size + len(job.samples.completions) <= self.options.batch
                if fits and first.batch and job.component == first.component:
                    self._waiting.remove(job)
                    jobs.append(job)
                    size += len(job.samples.completions)
            return jobs

    async def _score(self, process: Any, jobs: Sequence[_Job]) -> bool:
        """Fill the jobs; False where the process is of no more use."""
        started, name = time.monotonic(), jobs[0].component
        call = process.score.remote(name, [job.samples for job in jobs], jobs[0].batch)
        try:
            answers = await patience.within(_answer(call), self.options.timeout)
        except TimeoutError:
            score = Score("timeout", detail=f"took longer than {self.options.timeout:g} s (rewards.models.timeout)")
        except Exception as error:  # of Ray: the process died
            score = Score("error", detail=f"the process of reward models ended: {describe_error(error)}"[:500])
        else:
            seconds = (time.monotonic() - started) / max(1, sum(len(job.samples.completions) for job in jobs))
            for job, scores in zip(jobs, answers, strict=True):
                _give(job, [Scored(one, seconds) for one in scores])
            return True
        for job in jobs:
            _give(job, [Scored(score, time.monotonic() - started)] * len(job.samples.completions))
        return False

    async def _replaced(self, index: int) -> Any:
        problem = ""
        for _ in range(ATTEMPTS):
            process = self._launch(index)
            try:
                await self._loaded(index, process)
                return process
            except Exception as error:
                _kill(process)
                problem = describe_error(error)
        raise RewardFailure(f"rewards.models: a process could not be replaced in {ATTEMPTS} attempts: {problem}")

    def _fail(self, error: Exception) -> None:
        self._problem = error
        while self._waiting:
            job = self._waiting.popleft()
            if not job.done.done():
                job.done.set_exception(error)

    # ------------------------------------------------------------ Ray
    async def _reserve(self) -> None:
        import ray

        gpu = ray.cluster_resources().get("GPU", 0) > 0
        self._device = "cuda" if self.options.device == "cuda" or (self.options.device == "auto" and gpu) else "cpu"
        share = {"CPU": 1.0, "GPU": 1.0} if self._device == "cuda" else {"CPU": float(self.options.threads)}
        bundles = [share] * self.options.count
        self._place = ray.util.placement_group(bundles, strategy=self.config.cluster.placement)
        seconds = self.config.cluster.start_timeout
        try:
            await patience.within(_answer(self._place.ready()), seconds)
        except TimeoutError:
            raise UserError(
                f"rewards.models: the cluster did not provide {self.options.count} x {share} in {seconds:g} s "
                f"(cluster.start_timeout); it has {ray.available_resources()} free. Lower rewards.models.count or "
                "threads, or give the cluster more"
            ) from None

    def _log(self, index: int) -> Path:
        return self.logs.resolve() / f"reward-models-{index}.log"

    def _launch(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=index)
        on_gpu = self._device == "cuda"
        remote = ray.remote(_Process).options(
            num_cpus=1 if on_gpu else self.options.threads,
            num_gpus=1 if on_gpu else 0,
            scheduling_strategy=place,
            max_restarts=0,
        )
        return remote.remote(str(self._log(index)), self.components, self.options.threads)

    async def _loaded(self, index: int, process: Any) -> None:
        try:
            self._where[index] = await patience.within(_answer(process.where.remote()), self.options.start_timeout)
            problem = await patience.within(_answer(process.load.remote()), self.options.start_timeout)
        except TimeoutError:
            raise UserError(
                f"rewards.models: loading took longer than {self.options.start_timeout:g} s "
                f"(rewards.models.start_timeout); see {self.logs}/reward-models-*.log"
            ) from None
        if problem:
            raise UserError(f"rewards.components.{problem}; see {self.logs}/reward-models-*.log")


class _Process:
    """One process of the pool: all that it prints, C++ included, goes to its log."""

    def __init__(self, log: str, components: Mapping[str, Mapping[str, Any]], threads: int) -> None:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        stacks.register(2)
        import torch

        torch.set_num_threads(threads)
        self.components, self.rewards = components, dict[str, Reward]()

    def where(self) -> tuple[int, str]:
        return os.getpid(), socket.gethostname()

    def load(self) -> str:
        """Empty once all models are there, else which component has none, and why."""
        for name, component in self.components.items():
            try:
                reward = bind(component["fn"], component["options"], name)
                if reward.prepare is not None:
                    reward.prepare()
            except UserError as error:
                return f"{name}: {error}"
            except BaseException as error:
                return f"{name}: {describe_error(error)}"
            self.rewards[name] = reward
        return ""

    def score(self, name: str, groups: Sequence[Samples], batch: bool) -> list[list[Scores]]:
        """The scores of every completion of every group."""
        reward = self.rewards[name]
        if batch:
            return reward.score_groups(groups)
        return [[reward.score_one(g, i) for i in range(len(g.completions))] for g in groups]


def _give(job: _Job, scored: list[Scored]) -> None:
    if not job.done.done():  # whoever asked may have been cancelled
        job.done.set_result(scored)


def _kill(process: Any) -> None:
    import ray

    ray.kill(process)


async def _answer(call: Any) -> Any:
    return await call
