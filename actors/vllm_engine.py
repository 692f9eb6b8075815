"""vLLM as an `Engine`: in this process, driven step by step, so that weights change between two steps.

Importing this file imports vLLM (5-10 s), which reads its environment once: call `prepare_environment` before.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actors.engine import EngineBroken, EngineSpec, Rejected, check_length, finished
from actors.weights import (
    Broadcast,
    Interrupted,
    ModelFiles,
    Refused,
    Shape,
    Snapshot,
    adapted,
    check_adapters,
    verify,
)
from core.memory import keep_freed_memory
from core.schema import Completion, Group, GroupRequest, Sampling

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams
    from vllm.engine.arg_utils import EngineArgs


def prepare_environment(spec: EngineSpec) -> None:
    """Set what vLLM and torch read from the environment at import. One engine per process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives here: no step runs unless we ask for it
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule actors.kv_cache_gib
    if spec.deterministic and spec.device == "cuda":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"  # on CPU its kernels are: see tests/actors/test_vllm_engine.py
    if spec.device == "cpu":
        keep_freed_memory()  # of logits and activations in every step, of packed weights in every publish
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        # Left alone, workers of several engines pin themselves to the same first cores.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if spec.enforce_eager:
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first request still waits for a compiler


def make(spec: EngineSpec) -> VLLMEngine:
    """An engine of vLLM, ready to serve the weights on disk as version 0."""
    prepare_environment(spec)
    return VLLMEngine(spec)


@dataclass(frozen=True, slots=True)
class Ready:
    """Weights that were checked; with a `shadow`, they are also in the form that the kernels want."""

    weights: Snapshot | Broadcast
    shadow: Any = None  # of actors.vllm_shadow


@dataclass(slots=True)
class _Pending:
    request: GroupRequest
    done: dict[int, Completion] = field(default_factory=dict)  # sample -> its completion


class VLLMEngine:
    """See `actors.engine.Engine`. Every sample is a request of its own with its own seed."""

    def __init__(self, spec: EngineSpec) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        self.spec, self.version, self.digest = spec, 0, ""
        self._llm = LLMEngine.from_engine_args(_engine_args(spec))
        self._llm.set_weight_version("0")
        self._tokenizer = self._llm.get_tokenizer()
        self._pending: dict[str, _Pending] = {}
        self._finished_tokens = 0
        self._layout: dict[str, Shape] = {}  # of the first snapshot
        one_process = spec.device == "cpu" and spec.tensor_parallel == 1 and spec.enforce_eager
        workers = self._llm.collective_rpc(_itself) if one_process else []
        self._worker = next((each for each in workers if each.can_prepare()), None)  # prepares beside the steps
        self._updates = 0  # changes of the weights, those that were interrupted too

    def add(self, request: GroupRequest) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        check_length(request, self.spec.max_model_len)
        self.abort([request.id])  # an older attempt of it that nobody waits for any more
        # The salt keeps apart the cached prefixes of different weights, also of those that cannot be evicted yet
        # because a request in flight holds them.
        prompt = tokens_input(list(request.prompt.token_ids), cache_salt=f"w{self._updates}")
        added = []
        try:
            for sample, (sampling, seed) in enumerate(_draws(request)):
                name = f"{request.id}/{sample}"
                self._llm.add_request(name, prompt, _sampling_params(sampling, seed))
                added.append(name)
        except (VLLMClientError, ValueError, TypeError) as error:  # vLLM's validation of a request
            self._llm.abort_request(added)
            raise Rejected(f"request {request.id}: {error}") from error
        self._pending[request.id] = _Pending(request)

    def step(self) -> list[Group]:
        from vllm import RequestOutput

        groups = []
        for output in self._llm.step():
            assert isinstance(output, RequestOutput)  # the other kind is of pooling models
            name, _, sample = output.request_id.rpartition("/")
            pending = self._pending[name]
            pending.done[int(sample)] = self._completion(output.outputs[0])
            if len(pending.done) == len(_draws(pending.request)):
                del self._pending[name]
                groups.append(finished(pending.request, [pending.done[i] for i in range(len(pending.done))]))
        return groups

    def _completion(self, output: CompletionOutput) -> Completion:
        """One finished sample. Raises EngineBroken when vLLM ended it for a reason that is no result."""
        from vllm.logprobs import FlatLogprobs

        if output.finish_reason not in ("stop", "length"):
            raise EngineBroken(f"vLLM ended a sample with '{output.finish_reason}' instead of stop or length")
        # Every finished sample has both, in the form that `_sampling_params` asks for.
        assert output.weight_versions is not None and isinstance(output.logprobs, FlatLogprobs)
        token_ids = tuple(output.token_ids)
        versions = tuple(int(s.version) for s in output.weight_versions for _ in range(s.start, s.end))
        self._finished_tokens += len(token_ids)
        return Completion(
            token_ids=token_ids,
            rollout_logprobs=tuple(output.logprobs.logprobs),  # flat, and only the sampled token's: logprobs=0
            versions=versions,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason="stop" if output.finish_reason == "stop" else "length",
        )

    def abort(self, ids: Collection[str]) -> None:
        for name in ids:
            if (pending := self._pending.pop(name, None)) is not None:
                samples = set(range(len(_draws(pending.request)))) - pending.done.keys()
                self._llm.abort_request([f"{name}/{sample}" for sample in samples])

    def unfinished(self) -> tuple[int, int]:
        total = self._llm.get_num_unfinished_requests()
        running = min(total, self.spec.max_num_seqs)
        return running, total - running

    def generated(self) -> int:
        states = list(self._llm.output_processor.request_states.values())  # a copy: another thread may be asking
        detokenizers = (state.detokenizer for state in states)
        return self._finished_tokens + sum(d.num_output_tokens() for d in detokenizers if d is not None)

    def prepare(self, weights: Snapshot | Broadcast) -> Ready:
        try:
            self._check(weights)
            if isinstance(weights, Broadcast) or self._worker is None:
                return Ready(weights)
            return Ready(weights, self._worker.prepare(weights))
        except Refused:
            raise
        except Exception as error:  # the weights that serve were not touched
            raise Refused(f"weights of version {weights.version} cannot be loaded: {error}") from error

    def update_weights(self, weights: Snapshot | Broadcast | Ready) -> str:
        ready = weights if isinstance(weights, Ready) else self.prepare(weights)
        version = ready.weights.version
        self._updates += 1
        self.version, self.digest = -1, ""  # nobody's, until all of them are there
        try:
            digest = self._receive(ready)
        except Interrupted:
            raise
        except Exception as error:
            raise EngineBroken(f"loading weights of version {version} failed: {error}") from error
        self._llm.set_weight_version(str(version))
        self._llm.reset_prefix_cache()
        self.version, self.digest = version, digest
        return digest

    def _check(self, weights: Snapshot | Broadcast) -> None:
        """Raises Refused for weights that must not be loaded, before anything is touched."""
        if isinstance(weights, Broadcast) and self.spec.weight_transfer != "nccl":
            raise Refused(f"this engine takes weights by {self.spec.weight_transfer}, not by nccl")
        entries = weights.layout if isinstance(weights, Broadcast) else weights.manifest
        shapes = {name: shape for name, _, shape in entries}
        if adapted(shapes) and shapes != self._layout:
            check_adapters(shapes, ModelFiles(self.spec.model, self.spec.revision).shapes(), weights.version)
        if isinstance(weights, Snapshot):
            verify(weights)
            if self._layout and shapes != self._layout:
                raise Refused(f"weights of version {weights.version}: other names or shapes than those before them")
            self._layout = shapes

    def _receive(self, ready: Ready) -> str:
        from actors.vllm_nccl import broadcast_info
        from actors.vllm_weights import snapshot_info

        weights = ready.weights
        if isinstance(weights, Broadcast):
            self._update(broadcast_info(weights))
            return agreed(weights.version, self._llm.collective_rpc("received"))
        if ready.shadow is not None:
            ready.shadow.take_over()
            return weights.digest
        with snapshot_info(weights, self.spec.tensor_parallel) as info:
            if self.spec.weight_transfer == "nccl":  # not by way of the learner's group
                self._llm.collective_rpc("load_snapshot", args=(info,))
            else:
                self._update(info)
        return weights.digest

    def _update(self, info: dict[str, Any]) -> None:
        """vLLM's own sequence."""
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", kwargs={"update_info": info})
        self._llm.collective_rpc("finish_weight_update")

    def connect(self, address: str, port: int, rank: int, world_size: int, seconds: float) -> None:
        info = {"master_address": address, "master_port": port, "rank_offset": rank, "world_size": world_size}
        problems = [problem for problem in self._llm.collective_rpc("join_group", args=(info, seconds)) if problem]
        if problems:
            raise Refused(f"the NCCL group was not joined: {problems[0]}")

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _itself(wrapper: Any) -> Any:
    """A worker, for one that lives in this process."""
    return wrapper.worker


def agreed(version: int, outcomes: list[tuple[str, str]]) -> str:
    """The digest that all workers of an engine have received. Raises Interrupted, or ValueError if they differ."""
    if problems := [problem for _, problem in outcomes if problem]:
        raise Interrupted(f"the broadcast of version {version} was interrupted: {problems[0]}")
    digests = {digest for digest, _ in outcomes}
    if len(digests) > 1:
        raise ValueError("its workers received different weights")
    return digests.pop()


def _engine_args(spec: EngineSpec) -> EngineArgs:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    from actors.vllm_nccl import NAME

    cpu = spec.device == "cpu"
    return EngineArgs(
        model=spec.model,
        revision=spec.revision,
        trust_remote_code=False,
        dtype=spec.dtype,
        seed=spec.seed,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        tensor_parallel_size=spec.tensor_parallel,
        distributed_executor_backend="uni" if spec.tensor_parallel == 1 else "mp",
        enable_prefix_caching=spec.prefix_caching,
        enforce_eager=spec.enforce_eager,
        # A prompt cut between two steps makes vLLM rewind the sample's generator, which a CPU generator cannot do.
        enable_chunked_prefill=False if cpu else None,
        max_num_batched_tokens=max(4096, spec.max_model_len) if cpu else None,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        kv_cache_memory_bytes=int(spec.kv_cache_gib * 2**30) if cpu else None,
        # Log-probabilities of the distribution that is sampled from: after temperature, top-k, top-p, min-p.
        logprobs_mode="processed_logprobs",
        # A step scheduled ahead would run on the old weights and be labelled with the new version.
        async_scheduling=False,
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=NAME if spec.weight_transfer == "nccl" else "object_store"),
        worker_extension_cls="actors.vllm_weights.WorkerExtension",
    )


def _draws(request: GroupRequest) -> list[tuple[Sampling, int]]:
    """How each sample of a request is drawn: the seeds', then the greedy one."""
    drawn = [(request.sampling, seed) for seed in request.seeds]
    return [*drawn, (replace(request.sampling, temperature=0.0), 0)] if request.greedy else drawn


def _sampling_params(sampling: Sampling, seed: int) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        ignore_eos=sampling.ignore_eos,
        detokenize=bool(sampling.stop),  # text is decoded once, at the end, unless stop strings are looked for
        logprobs=0,  # the sampled token's only
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
