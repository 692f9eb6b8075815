"""N learner ranks as Ray workers: place, connect, call all, notice a dead one.

    pool = await LearnerPool.start(config, run_dir)
    result = await pool.step(groups, version)
    answer = await pool.export(visit)     # visit(tensors, version) is sent to rank 0 and runs there
    answer = await pool.ask(work)         # so is work(), and the other ranks are left alone
    await pool.save(folder); await pool.load(folder); await pool.close()

Ray must be initialised. Every call has the deadline `learner.timeout`; a rank that dies or stays silent is a
`LearnerLost` that names it and carries its last words (all it prints goes to `logs/learner-R.log` of the run's
folder). After that the pool can only be closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from algos.methods import resolve
from core import cores, patience, stacks
from core.config import RunConfig
from core.errors import UserError
from core.schema import Group, Mixture
from learner.learner import PLAIN, Learner, StepResult
from learner.profiling import PROFILED, profiled, step_folder
from learner.ranks import Ranks, own_device

Result = TypeVar("Result")
Visit = Callable[[Iterator[tuple[str, Tensor]], int], Result]

LAST_LINES = 20
# When a rank dies, its peers fail too, in a collective. Waiting this long for them shows who died and who only noticed.
NOTICE_SECONDS = 5.0


class LearnerLost(RuntimeError):
    """A rank died, failed or missed its deadline; the message says which, in what, and its last words."""


class LearnerPool:
    """Handles of the ranks. All methods are coroutines and must not overlap (the ranks run collectives)."""

    def __init__(self, config: RunConfig, run_dir: Path, placement: PlacementGroup, workers: list[Any]) -> None:
        self.config, self.run_dir, self.placement, self.workers = config, run_dir, placement, workers
        self._where: list[tuple[int, str]] = []  # (pid, host) of each rank

    @classmethod
    async def start(cls, config: RunConfig, run_dir: Path, *, reference: bool = False) -> LearnerPool:
        """Place `learner.ranks` workers, connect them, load the model, and the `reference` where rewards need it.

        UserError for the user's mistakes.
        """
        device = config.learner.device
        if device == "auto":
            device = "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"
        share = {"CPU": float(config.learner.threads)} | ({"GPU": 1.0} if device == "cuda" else {})
        placement = placement_group([share] * config.learner.ranks, strategy=config.cluster.placement)
        try:
            await asyncio.wait_for(_result(placement.ready()), config.cluster.start_timeout)
        except TimeoutError:
            remove_placement_group(placement)
            raise UserError(
                f"learner: the cluster did not provide {config.learner.ranks} x {share} within cluster.start_timeout "
                f"{config.cluster.start_timeout:g} s; it has {ray.available_resources()} free. Lower learner.ranks or "
                "learner.threads, or give the cluster more"
            ) from None
        workers = [
            _Worker.options(  # type: ignore[attr-defined]  # ray's remote(...) with options is typed to leave the class
                num_cpus=share["CPU"],
                num_gpus=share.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
            ).remote(rank, str(run_dir))
            for rank in range(config.learner.ranks)
        ]
        pool = cls(config, run_dir, placement, workers)
        try:
            address = (await pool._call("find an address", workers[:1], "address"))[0]
            await pool._call("load the model", workers, "build", config, address, device, reference)
            pool._where = await pool._call("say where it is", workers, "where")
        except BaseException:
            await pool.close()
            raise
        return pool

    async def step(self, groups: Sequence[Group], version: int, mixture: Mixture = PLAIN) -> StepResult:
        """`Learner.step` on all ranks; the groups travel once, through Ray's object store."""
        results = await self._call("step", self.workers, "step", ray.put(list(groups)), version, mixture)
        return results[0]

    async def gram(self, groups: Sequence[Group]) -> tuple[list[list[float]], float]:
        """`Learner.gram` on all ranks."""
        return (await self._call("compare gradients", self.workers, "run", "gram", ray.put(list(groups))))[0]

    async def export(self, visit: Visit[Result]) -> Result:
        """`Learner.export` on all ranks; `visit(tensors, version)` runs on rank 0 and its result comes back.

        Only there is the version known: an export that is asked for during a step sees the weights after it.
        """
        return (await self._call("export the weights", self.workers, "export", visit))[0]

    async def ask(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in the process of rank 0, to which `visit` may have left something."""
        return (await self._call("answer", self.workers[:1], "ask", work))[0]

    async def save(self, folder: Path) -> None:
        """`Learner.save` on all ranks."""
        await self._call("save", self.workers, "run", "save", folder)

    async def load(self, folder: Path) -> int:
        """`Learner.load` on all ranks; returns the steps done."""
        await self._call("load", self.workers, "run", "load", folder)
        return (await self._call("count steps", self.workers[:1], "steps_done"))[0]

    def processes(self) -> dict[str, tuple[int, str, Path]]:
        """(pid, host, log) of every rank's process."""
        return {f"learner-{r}": (*where, _log(self.run_dir, r)) for r, where in enumerate(self._where)}

    async def close(self) -> None:
        """End the workers and free their place. Never raises for a worker that is already gone."""
        for worker in self.workers:
            ray.kill(worker)
        remove_placement_group(self.placement)
        self.workers = []

    async def _call(self, what: str, workers: Sequence[Any], method: str, *arguments: Any) -> list[Any]:
        """The answers of `workers` to a method, in their order; LearnerLost or UserError where one has none."""
        calls = [asyncio.ensure_future(_result(getattr(w, method).remote(*arguments))) for w in workers]
        done, pending = await patience.settled(calls, self.config.learner.timeout)
        if any(call.exception() for call in done) and pending:
            await asyncio.wait(pending, timeout=NOTICE_SECONDS)
        failures = {rank: call.exception() for rank, call in enumerate(calls) if call.done() and call.exception()}
        silent = [rank for rank, call in enumerate(calls) if not call.done()]
        for call in calls:
            call.cancel()
        if failures:
            raise self._lost(what, failures)
        if silent:
            last = "\n".join(self._last_words(rank) for rank in silent)
            raise LearnerLost(
                f"learner rank {', '.join(map(str, silent))} did not {what} within learner.timeout "
                f"{self.config.learner.timeout:g} s\n{last}"
            )
        return [call.result() for call in calls]

    def _lost(self, what: str, failures: dict[int, Any]) -> Exception:
        """The failure behind the others: the user's mistake, else a rank that died, else the first that raised."""
        for error in failures.values():
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                return error.cause
        rank, error = min(failures.items(), key=lambda item: (not isinstance(item[1], RayActorError), item[0]))
        how = "died while it should" if isinstance(error, RayActorError) else "failed to"
        return LearnerLost(f"learner rank {rank} {how} {what}: {error}\n{self._last_words(rank)}")

    def _last_words(self, rank: int) -> str:
        path = _log(self.run_dir, rank)
        if not path.is_file():
            return f"(no {path} on this machine)"
        lines = path.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"last lines of {path}:", *lines])


@ray.remote(max_restarts=0)
class _Worker:
    """One rank in its own process."""

    def __init__(self, rank: int, run_dir: str) -> None:
        self.rank, self.run_dir, self._steps = rank, Path(run_dir), 0
        path = _log(self.run_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):  # native code too: its last words are often the only ones
            os.dup2(descriptor, stream)
        stacks.register(2)

    def address(self) -> str:
        """Where rank 0 will listen: this node's address and a free port."""
        with socket.socket() as s:
            s.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def build(self, config: RunConfig, address: str, device: str, reference: bool) -> None:
        torch.set_num_threads(config.learner.threads)
        if device == "cpu" and config.cluster.pin_cores:
            print(cores.told(cores.claim(config.learner.threads)), flush=True)
        ranks = Ranks.join(self.rank, config.learner.ranks, address, own_device(device), timeout=config.learner.timeout)
        method = resolve(config.method, context={"max_tokens": config.rollout.max_tokens})
        self.learner = Learner(config, method, ranks=ranks, skipped=self.run_dir / "skipped", reference=reference)

    def step(self, groups: Sequence[Group], version: int, mixture: Mixture) -> StepResult:
        """`Learner.step`, profiled where the config wants it."""
        learner, self._steps = self.learner, self._steps + 1
        if not (learner.config.profile and self._steps == PROFILED):
            return learner.step(groups, version, mixture)
        with profiled(step_folder(self.run_dir, version + 1), self.rank, learner.ranks.device.type):
            return learner.step(groups, version, mixture)

    def run(self, method: str, *arguments: Any) -> Any:
        return getattr(self.learner, method)(*arguments)

    def export(self, visit: Visit[Result]) -> Result | None:
        return self.learner.export(lambda tensors: visit(tensors, self.learner.steps_done))

    def ask(self, work: Callable[[], Result]) -> Result:
        return work()

    def steps_done(self) -> int:
        return self.learner.steps_done

    def where(self) -> tuple[int, str]:
        return os.getpid(), socket.gethostname()


async def _result(ref: Any) -> Any:
    return await ref


def _log(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"learner-{rank}.log"
