"""What an actor needs of an inference engine, and a deterministic fake of it.

An engine is driven by one thread: `add` requests, call `step` until `unfinished()` is 0, change weights between steps.
What another thread may do meanwhile is to `prepare` new weights.
Requests in flight survive a change of weights; their later tokens carry the new version. `actors.vllm_engine` is the
real one. This file imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from actors.weights import Broadcast, Snapshot, verify
from core.config import RunConfig
from core.schema import Completion, FinishReason, Group, GroupRequest
from core.section import DType

Device = Literal["cpu", "cuda"]


class Rejected(Exception):
    """A request that this engine can never serve (too long, impossible options). The engine itself is well."""


class EngineBroken(Exception):
    """The engine can no longer be trusted, for instance after a change of weights that stopped halfway. Replace it."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that makes one engine: what `core.config` says, with every "auto" and "none" decided."""

    model: str
    max_model_len: int
    revision: str | None = None
    device: Device = "cpu"
    dtype: DType = "float32"
    tensor_parallel: int = 1
    max_num_seqs: int = 256
    prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float = 1.0
    enforce_eager: bool = True
    threads: int = 1
    weight_transfer: Literal["nccl", "object_store"] = "object_store"
    seed: int = 0
    deterministic: bool = False  # a completion must not depend on what else is in the batch

    @classmethod
    def of(cls, config: RunConfig, device: Device) -> EngineSpec:
        """The engine that `config` describes on `device` (what "auto" stands for is known only once the cluster is)."""
        actors, gpu = config.actors, device == "cuda"
        longest = config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.eval.max_tokens or 0)
        gpu_to_gpu = gpu and config.learner.device != "cpu"
        transfer = ("nccl" if gpu_to_gpu else "object_store") if actors.weight_transfer == "auto" else None
        return cls(
            model=config.model.path,
            revision=config.model.revision,
            max_model_len=actors.max_model_len or longest,
            device=device,
            dtype=actors.dtype or config.model.dtype,
            tensor_parallel=actors.tensor_parallel,
            max_num_seqs=actors.max_num_seqs,
            prefix_caching=actors.prefix_caching,
            gpu_memory_utilization=actors.gpu_memory_utilization,
            kv_cache_gib=actors.kv_cache_gib,
            enforce_eager=not gpu if actors.enforce_eager is None else actors.enforce_eager,
            threads=actors.threads,
            weight_transfer=transfer or actors.weight_transfer,  # type: ignore[arg-type]
            seed=config.seed,
            deterministic=config.rollout.deterministic,
        )


class Engine(Protocol):
    """One engine on one thread. `version` and `digest` are those of the weights that serve now."""

    version: int  # 0 for the weights on disk; -1 after weights.Interrupted: then it must not step
    digest: str  # "" until weights were loaded through `update_weights`

    def add(self, request: GroupRequest) -> None:
        """Queue all samples of a request (and its greedy one); they start with the next step. Raises Rejected."""

    def step(self) -> list[Group]:
        """One decoding step of everything in flight; the groups whose last sample finished in it."""

    def abort(self, ids: Collection[str]) -> None:
        """Forget these requests; what was generated for them is dropped. Unknown ids are no error."""

    def unfinished(self) -> tuple[int, int]:
        """Samples (running, waiting)."""

    def generated(self) -> int:
        """Tokens sampled since the start, those of aborted requests included."""

    def prepare(self, weights: Snapshot | Broadcast) -> Any:
        """Do of a change of weights what can be done beside `step`, on another thread; what `update_weights` takes.

        Raises weights.Refused.
        """

    def update_weights(self, weights: Any) -> str:
        """Serve weights, prepared or not, from the next step on; their digest. Caches of the old ones are dropped.

        Raises weights.Refused with nothing changed (the old version serves on), weights.Interrupted, or EngineBroken.
        """

    def connect(self, address: str, port: int, rank: int, world_size: int, seconds: float) -> None:
        """Join the learner's NCCL group, instead of an older one; `rank` is that of this engine's first worker.

        Blocks until all have joined. Raises weights.Refused when not all have within `seconds`.
        """

    def close(self) -> None:
        """Free everything; the engine is of no use afterwards."""


class FakeEngine:
    """An engine without a model: its tokens are a pure function of (version's digest, prompt, seed, position).

    Each sample emits one token per step and ends with token 2 after a length that its seed decides, or at `max_tokens`.

    >>> from core.schema import Prompt, Sampling
    >>> engine = FakeEngine(EngineSpec(model="", max_model_len=64))
    >>> engine.add(GroupRequest("g", Prompt(0, "2+3?", (5, 9)), seeds=(1, 2), sampling=Sampling(max_tokens=4)))
    >>> groups = []
    >>> while sum(engine.unfinished()): groups += engine.step()
    >>> [len(c.token_ids) for c in groups[0].completions], groups[0].completions[0].versions[0]
    ([3, 4], 0)
    """

    def __init__(self, spec: EngineSpec, *, latency: float = 0.0, fail_at_step: int = 0, vocabulary: int = 100) -> None:
        """`latency` seconds per step; step number `fail_at_step` (from 1; 0 never) raises, as a broken engine does."""
        self.spec, self.latency, self.fail_at_step, self.vocabulary = spec, latency, fail_at_step, vocabulary
        self.version, self.digest = 0, ""
        self._steps = self._tokens = 0
        self._flight: dict[str, tuple[GroupRequest, list[Completion]]] = {}

    def add(self, request: GroupRequest) -> None:
        check_length(request, self.spec.max_model_len)
        blank = Completion((), (), (), "", "abort")
        self._flight[request.id] = (request, [blank] * (len(request.seeds) + request.greedy))

    def step(self) -> list[Group]:
        self._steps += 1
        time.sleep(self.latency)
        if self._steps == self.fail_at_step:
            raise RuntimeError(f"fake engine: told to fail at step {self._steps}")
        done = []
        for request, completions in list(self._flight.values()):
            for i, completion in enumerate(completions):
                if completion.finish_reason == "abort":
                    completions[i] = self._extend(request, completion, (*request.seeds, 0)[i])
            if all(c.finish_reason != "abort" for c in completions):
                done.append(finished(request, completions))
                del self._flight[request.id]
        return done

    def _extend(self, request: GroupRequest, so_far: Completion, seed: int) -> Completion:
        position, sampling = len(so_far.token_ids), request.sampling
        text = f"{self.digest}/{request.prompt.token_ids}/{seed}/{position}"
        draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        ends = position + 1 >= 2 + seed % 7 and not sampling.ignore_eos
        token = 2 if ends else 3 + draw % (self.vocabulary - 3)
        reason: FinishReason = "stop" if ends else "length" if position + 1 >= sampling.max_tokens else "abort"
        self._tokens += 1
        return replace(
            so_far,
            token_ids=(*so_far.token_ids, token),
            rollout_logprobs=(*so_far.rollout_logprobs, -(1 + draw % 1000) / 1000),
            versions=(*so_far.versions, self.version),
            text=so_far.text if ends else f"{so_far.text} t{token}".strip(),
            finish_reason=reason,
        )

    def abort(self, ids: Collection[str]) -> None:
        for name in ids:
            self._flight.pop(name, None)

    def unfinished(self) -> tuple[int, int]:
        return sum(c.finish_reason == "abort" for _, row in self._flight.values() for c in row), 0

    def generated(self) -> int:
        return self._tokens

    def prepare(self, weights: Snapshot | Broadcast) -> Snapshot | Broadcast:
        if isinstance(weights, Snapshot):
            verify(weights)
        return weights

    def update_weights(self, weights: Snapshot | Broadcast) -> str:
        self.prepare(weights)
        self.version = weights.version
        self.digest = weights.digest if isinstance(weights, Snapshot) else f"nccl:{weights.version}"
        return self.digest

    def connect(self, address: str, port: int, rank: int, world_size: int, seconds: float) -> None:
        """A fake has nobody to talk to."""

    def close(self) -> None:
        self._flight.clear()


def finished(request: GroupRequest, completions: Sequence[Completion]) -> Group:
    """The group of a request from its completions, in the order of the seeds; a greedy one comes last."""
    drawn = tuple(completions[: len(request.seeds)])
    group = Group(request.id, request.prompt, drawn, request.attempt)
    return replace(group, greedy=replace(group, completions=(completions[-1],))) if request.greedy else group


def check_length(request: GroupRequest, max_model_len: int) -> None:
    """Raises Rejected if prompt and completion cannot fit, instead of a silently shorter completion."""
    prompt, longest = len(request.prompt.token_ids), request.sampling.max_tokens
    if not prompt:
        raise Rejected(f"request {request.id}: the prompt (ordinal {request.prompt.ordinal}) has no tokens")
    if prompt + longest > max_model_len:
        raise Rejected(
            f"request {request.id}: a prompt of {prompt} tokens and max_tokens {longest} need {prompt + longest}, but "
            f"actors.max_model_len is {max_model_len}; raise it, or lower data.max_prompt_tokens or max_tokens"
        )
