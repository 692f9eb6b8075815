"""A whole run on this machine, without Ray and without vLLM, for tests and benches of what survives.

    config = run_config(tmp_path, steps=8, rollout={"max_staleness": 2, "deterministic": True})
    steps = Rig(config, HashLearner).run()          # begins the run, or goes on with it

Real are the loop, the coordinator, ledger, payloads, checkpoints, the pool of actors, the scoring processes, watchdog
and metrics. Engines are fakes, in threads or in processes. The learner is `HashLearner`, which takes no time and whose
state says all that it was ever given, or `LocalLearner`, the real one in this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.engine import EngineSpec, FakeEngine, Rejected
from actors.placement import Host, Make, ThreadHost
from actors.pool import Published
from core.config import RunConfig
from core.schema import Group, GroupRequest, Mixture, Prompt

VOCABULARY = 100


class PickyEngine(FakeEngine):
    """A fake that takes no prompt whose ordinal leaves the rest 1 when divided by `every`; 0 takes all."""

    def __init__(self, spec: EngineSpec, *, latency: float = 0.0, every: int = 0) -> None:
        super().__init__(spec, latency=latency, vocabulary=VOCABULARY)
        self.every = every

    def add(self, request: GroupRequest) -> None:
        if refused(request.prompt.ordinal, self.every):
            raise Rejected(f"prompt {request.prompt.ordinal} is not to its taste")
        super().add(request)


def refused(ordinal: int, every: int) -> bool:
    """Whether a PickyEngine takes no such prompt."""
    return every > 0 and ordinal % every == 1


class Prompts:
    """An endless stream of short prompts, each different from the one before."""

    too_long = 0

    def __getitem__(self, ordinal: int) -> Prompt:
        ids = tuple(4 + (ordinal * 7 + i) % (VOCABULARY - 4) for i in range(1 + ordinal % 3))
        return Prompt(ordinal, f"prompt {ordinal}", ids)


class NoEvaluator:
    """There are no benchmarks."""

    async def run(self, *_: Any) -> tuple[dict[str, float], dict[str, float]]:
        return {}, {}


# ---------------------------------------------------------------- learners
@dataclass(frozen=True)
class Update:
    """What `Run` reads of a step."""

    metrics: dict[str, float]
    advantages: list[list[float]]
    kl: None = None


def told(groups: Sequence[Group], mixture: Mixture) -> str:
    """All that may shape an update, as text: not which actor has sampled, nor in which attempt."""
    each = [
        (
            g.id,
            g.prompt.ordinal,
            [(c.token_ids, c.rollout_logprobs, c.versions, c.finish_reason) for c in g.completions],
            [(name, [(s.status, repr(s.value)) for s in scores]) for name, scores in sorted(g.components.items())],
            [(name, list(map(repr, column))) for name, column in sorted(g.columns.items())],
            [(name, list(map(repr, column))) for name, column in sorted(g.weights.items())],
            list(map(repr, g.totals)),
        )
        for g in groups
    ]
    return repr((each, mixture))


class HashLearner:
    """Its weights are a hash chain over everything that it was given, in order; it remembers which groups those were.

    `lose`: of the version, whether this learner is lost in its next step or while it is saved. `seconds` of a step.
    """

    def __init__(self, config: RunConfig, *, lose: Callable[[int], bool] = lambda version: False, seconds: float = 0.0):
        self.state: dict[str, Any] = {"version": 0, "hash": hashlib.sha256(b"start").hexdigest(), "groups": []}
        self._lose, self._seconds = lose, seconds

    @property
    def hash(self) -> str:
        """Of all that was trained on."""
        return self.state["hash"]

    async def step(self, groups: Sequence[Group], version: int, mixture: Mixture) -> Update:
        """Raises LearnerLost where it is to be lost, ValueError for a step that is not the next one."""
        from learner.pool import LearnerLost

        if version != self.state["version"]:
            raise ValueError(f"step {version} for a learner of version {self.state['version']}")
        await asyncio.sleep(self._seconds)
        if self._lose(version):
            raise LearnerLost(f"the learner is lost in step {version + 1}, as it was told")
        before = self.state
        self.state = {
            "version": version + 1,
            "hash": hashlib.sha256((before["hash"] + told(groups, mixture)).encode()).hexdigest(),
            "groups": [*before["groups"], *(g.prompt.ordinal for g in groups)],
        }
        return Update({"optim/grad_norm": 1.0}, [[0.0] * len(g.completions) for g in groups])

    async def weights(self, dtype: str) -> Any:
        """A Snapshot that another history would not have."""
        import torch

        from actors.weights import snapshot

        values = torch.frombuffer(bytearray.fromhex(self.hash), dtype=torch.uint8).float()
        return snapshot([("weights", values)], self.state["version"], dtype)

    async def save(self, folder: Path) -> None:
        """Raises LearnerLost where it is to be lost."""
        from learner.pool import LearnerLost

        for name in ("model", "trainer"):
            (folder / name).mkdir()
        (folder / "model" / "weights.txt").write_text(self.hash)
        if self._lose(self.state["version"]):
            raise LearnerLost("the learner is lost while it is saved, as it was told")
        (folder / "trainer" / "state.json").write_text(json.dumps(self.state))

    async def load(self, folder: Path) -> int:
        self.state = json.loads((folder / "trainer" / "state.json").read_text())
        return self.state["version"]

    def processes(self) -> Mapping[str, Any]:
        return {}

    async def close(self) -> None:
        """There is nothing to end."""


class LocalLearner:
    """`learner.Learner` in this process, behind the face of a `LearnerPool`."""

    def __init__(self, config: RunConfig) -> None:
        from algos.methods import resolve
        from learner.learner import Learner

        method = resolve(config.method, context={"max_tokens": config.rollout.max_tokens})
        self.learner = Learner(config, method)

    @property
    def hash(self) -> str:
        """Of the float32 parameters and the state of the optimiser, bit for bit."""
        digest = hashlib.sha256()
        for name, tensor in [*self.learner.policy.hf.named_parameters(), *self.learner.optimiser.state()]:
            digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    async def step(self, groups: Sequence[Group], version: int, mixture: Mixture) -> Any:
        return await asyncio.to_thread(self.learner.step, groups, version, mixture)

    async def weights(self, dtype: str) -> Any:
        from actors.weights import snapshot

        return self.learner.export(lambda tensors: snapshot(tensors, self.learner.steps_done, dtype))

    async def save(self, folder: Path) -> None:
        await asyncio.to_thread(self.learner.save, folder)

    async def load(self, folder: Path) -> int:
        self.learner.load(folder)
        return self.learner.steps_done

    def processes(self) -> Mapping[str, Any]:
        return {}

    async def close(self) -> None:
        """It goes with this process."""


# ---------------------------------------------------------------- a run
def run_config(folder: Path, **tree: Any) -> RunConfig:
    """A small run in `folder`/run: 2 prompts x 2 completions x 8 tokens, a checkpoint every 3 steps."""
    from core.loading import parse_config

    plain: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "steps": 8,
        "method": {"row": "grpo", "kl": "none"},
        "model": {"path": "none"},
        "data": {"path": "none.jsonl", "max_prompt_tokens": 8},
        "rollout": {"prompts": 2, "group_size": 2, "max_tokens": 8},
        "actors": {"count": 2, "start_timeout": 60.0, "max_num_seqs": 16},
        "rewards": {"components": {"tokens": {"per": 8}}},
        "checkpoint": {"every": 3},
    }
    for name, value in tree.items():
        both = isinstance(value, dict) and isinstance(plain.get(name), dict)
        plain[name] = {**plain[name], **value} if both else value
    return parse_config(plain, "the rig")


@dataclass
class Rig:
    """One process's part of a run. After `run`, `learner` is the one that the run ended with.

    start: makes a learner. host, make: where actors live and what their engines are. look: is given the archive before
    the first record, to watch it or to break it.
    """

    config: RunConfig
    start: Callable[[RunConfig], Any]
    host: Callable[[], Host] = ThreadHost
    make: Make = PickyEngine
    look: Callable[[Any], None] = lambda archive: None
    say: Callable[[str], None] = lambda text: None
    learner: Any = None
    said: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.output_dir) / self.config.name

    def run(self) -> int:
        """Begin, or go on from the newest checkpoint that is whole; the steps done. Raises what ends a run."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        from actors.pool import ActorPool
        from algos.methods import resolve
        from alignlab.archive import Archive
        from alignlab.lab import Lab
        from alignlab.plan import Plan
        from alignlab.run_dir import RunDir
        from rewards.composer import Composer

        config = self.config
        method = resolve(config.method, context={"max_tokens": config.rollout.max_tokens})
        run_dir = RunDir.create(config, resume=(self.folder / "config.yaml").exists())
        checkpoint = run_dir.newest_valid(self._say)
        async with AsyncExitStack() as stack:
            archive = Archive(run_dir.path, config.ledger, self._say)
            stack.callback(archive.close)
            self.look(archive)
            composer = Composer(config.rewards, steps=config.steps)
            stack.push_async_callback(composer.close)
            actors = ActorPool(config, run_dir.path / "logs", host=self.host(), make=self.make, say=self._say)
            stack.push_async_callback(actors.close)
            await actors.start()
            parts = (Prompts(), NoEvaluator(), actors, composer, self.start(config), archive)
            plan = Plan(config, method, {})
            lab = Lab(plan, run_dir, *parts, self._again, lambda learner: _publish(learner, actors), self._say)
            try:
                return await lab.run(checkpoint)
            finally:
                self.learner = lab.learner

    async def _again(self) -> Any:
        return self.start(self.config)

    def _say(self, text: str) -> None:
        self.said.append(text)
        self.say(text)


def _publish(learner: Any, actors: Any) -> Callable[[int], Any]:
    async def publish(version: int) -> Published:
        weights = await learner.weights(actors.spec.dtype)
        if weights.version != version:
            raise ValueError(f"version {version} was to be published, and the learner is at {weights.version}")
        published = await actors.publish(weights)
        if not published.loaded:
            raise RuntimeError(f"no actor serves version {version}: {published.stale}")
        return published

    return publish


# ---------------------------------------------------------------- what a run has left
def one_by_one(archive: Any, after: Callable[[Mapping[str, Any]], None]) -> None:
    """Have an archive write its records one at a time, and `after` told of each one that is written."""
    write = archive._ledger.append

    def append(records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            write([record])
            after(record)

    archive._ledger.append = append


def batches(folder: Path) -> list[tuple[int, list[int]]]:
    """(step, ordinals) of the steps that count, in the order in which they were trained."""
    from alignlab.ledger import read_ledger

    found: list[tuple[int, int, list[int]]] = []
    for at, record in read_ledger(folder / "ledger.jsonl"):
        if record["kind"] == "begin":
            found = [each for each in found if each[0] < record["offset"]]
        elif record["kind"] == "trained":
            found.append((at, record["step"], record["groups"]))
    return [(step, groups) for _, step, groups in found]
