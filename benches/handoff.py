"""Weights from the learner to an actor that is sampling: bytes/s against a memory copy's, and what stands still.

    python -m benches.handoff [--dtype bfloat16]        # about 3 minutes

SmolLM2-135M, float32 in the learner's process, the engine's dtype on the way, a real Ray object store, one thread a
process. In each round an actor samples 64 completions of 192 tokens; meanwhile the learner hands its weights over, as a
run does: digest and `ray.put` in the learner, then in the actor `ray.get`, digest, packing for vLLM's kernels, and
between two steps the change. Rows, each a ratio of a round:

    through the store     from the learner's tensors to tensors that the actor has verified
    the whole way         the same and packing, with the actor sampling on the same core or another one
    share of a step       the whole way / the time of the round, in which nobody trains: a step is longer
    longest delay         seconds by which the longest step of the engine since the publish began exceeds the median one

A memory copy is that of the same tensors, by the learner's process, in turn with the hand-off: into memory that is new
(`Tensor.clone`), which is what a hand-off is compared with, and into memory that was written before (`Tensor.copy_`).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from benches.harness import Ratio, main, need_model

GROUPS, SAMPLES, TOKENS = 16, 4, 192
WARM = 10  # hand-offs before the first round, until the store's memory and the engine's was used before


class Learner:
    """The learner's process: tensors, and what is done with them."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch

        from actors.weights import ModelFiles

        torch.set_num_threads(1)
        files = ModelFiles(model)
        self._tensors = {name: files[name].float() for name in files}
        self._place = {name: tensor.to(getattr(torch, dtype)).clone() for name, tensor in self._tensors.items()}
        self._dtype = dtype

    def copies(self) -> tuple[float, float]:
        """Seconds of a copy of the tensors, in the dtype in which they travel: into new memory, into old memory."""
        import torch

        source = {name: tensor.to(getattr(torch, self._dtype)) for name, tensor in self._tensors.items()}
        started = time.perf_counter()
        new = {name: tensor.clone() for name, tensor in source.items()}
        middle = time.perf_counter()
        del new
        started_old = time.perf_counter()
        for name, tensor in source.items():
            self._place[name].copy_(tensor)
        return middle - started, time.perf_counter() - started_old

    def put(self, version: int) -> Any:
        """As a run's learner does it, of other weights than before."""
        from alignlab.handoff import PutSnapshot

        for tensor in self._tensors.values():
            tensor.mul_(0.9999)
        return PutSnapshot(self._dtype)(iter(self._tensors.items()), version)


class Steps:
    """An engine whose steps are timed: (begin, end) of each."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def make(self, spec: Any) -> Any:
        """For a RolloutActor."""
        from actors.vllm_engine import make

        engine = make(spec)
        engine.step = self._timed(engine.step)
        return engine

    def _timed(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            began = time.perf_counter()
            try:
                return step()
            finally:
                self.times.append((began, time.perf_counter()))

        return timed

    def delay(self, since: float, until: float) -> float:
        """Seconds by which the longest time from step to step there exceeds the median of all in this round."""
        ends = [end for _, end in self.times]
        gaps = [(after, after - before) for before, after in pairwise(ends)]
        usual = statistics.median(gap for _, gap in gaps)
        return max([gap for after, gap in gaps if since <= after <= until] or [usual]) - usual


def measure(rounds: int, dtype: str = "float32") -> list[Ratio]:
    """All rows, after one round that does not count."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    model = need_model()
    import ray

    from actors.actor import RolloutActor
    from actors.engine import EngineSpec

    root = str(Path(__file__).resolve().parents[1])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=4 << 30,
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
    )
    steps = Steps()
    actor = RolloutActor("actor-0", 0, EngineSpec(model, 256, dtype=dtype, max_num_seqs=64), steps.make)
    try:
        learner = ray.remote(Learner).remote(model, dtype)
        actor.ready(300)
        for number in range(WARM):
            _hand_over(number + 1, learner, actor)
        done = [_round(number, learner, actor, steps) for number in range(WARM + 1, WARM + rounds + 1)]
    finally:
        actor.close()
        ray.shutdown()
    return _rows(done, dtype)


def _round(number: int, learner: Any, actor: Any, steps: Steps) -> Mapping[str, float]:
    """What a hand-off in the middle of a round has taken, in seconds."""
    from core.schema import GroupRequest, Prompt, Sampling

    steps.times.clear()
    began = time.perf_counter()
    sampling = Sampling(TOKENS, ignore_eos=True)
    prompts = [Prompt(i, "", tuple(range(1000 + 50 * i, 1032 + 50 * i))) for i in range(GROUPS)]
    seeds = [tuple(range(SAMPLES * i, SAMPLES * (i + 1))) for i in range(GROUPS)]
    actor.submit([GroupRequest(f"{number}-{p.ordinal}", p, s, sampling) for p, s in zip(prompts, seeds, strict=True)])
    _until(lambda: len(steps.times) > TOKENS // 4)
    started = time.perf_counter()
    parts = _hand_over(number, learner, actor)
    served, ended = len(steps.times), time.perf_counter()
    _until(lambda: len(steps.times) > served + 2)
    _until(lambda: actor.status().running == 0)
    return {**parts, "delay": steps.delay(started, ended + 0.5), "round": time.perf_counter() - began}


def _hand_over(version: int, learner: Any, actor: Any) -> dict[str, float]:
    """One hand-off, and before it the two copies; the seconds of each part."""
    import ray

    new, old = ray.get(learner.copies.remote())
    stored = ray.get(learner.put.remote(version))
    handed = time.perf_counter()
    weights = ray.get(stored.reference)
    get = time.perf_counter() - handed
    verify = _verify(weights)
    published = time.perf_counter()
    stats = actor.publish(weights)
    publish = time.perf_counter() - published
    return {
        "bytes": stored.nbytes,
        "new": new,
        "old": old,
        "put": stored.seconds,
        "get": get,
        "verify": verify,
        "prepare": stats.prepare_seconds,
        "swap": stats.stall_seconds,
        "whole": stored.seconds + get + publish,
    }


def _verify(weights: Any) -> float:
    from actors.weights import verify

    started = time.perf_counter()
    verify(weights)
    return time.perf_counter() - started


def _until(there: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            raise TimeoutError("the actor does not sample")
        time.sleep(0.005)


def _rows(done: list[Mapping[str, Any]], dtype: str) -> list[Ratio]:
    def middle(name: str) -> float:
        return statistics.median(one[name] for one in done)

    parts = {f"{name} ms": 1e3 * middle(name) for name in ("new", "old", "put", "get", "verify", "prepare", "swap")}
    through = [one["put"] + one["get"] + one["verify"] for one in done]
    copies = {"new": [one["new"] for one in done], "old": [one["old"] for one in done]}

    def over(seconds: list[float], copy: str) -> list[float]:
        return [a / b for a, b in zip(copies[copy], seconds, strict=True)]

    facts = {"dtype": dtype, "MB": middle("bytes") / 1e6, **parts}
    whole, delays = [one["whole"] for one in done], [one["delay"] for one in done]
    share = [one["whole"] / one["round"] for one in done]
    return [
        Ratio("hand-off: bytes/s through the store / a copy into new memory", over(through, "new"), 0.5, facts=facts),
        Ratio("hand-off: the same / a copy into memory written before", over(through, "old")),
        Ratio("hand-off: bytes/s of the whole way / a copy into new memory", over(whole, "new")),
        Ratio("hand-off: the whole way's share of a step", share, at_most=0.02, facts={"round s": middle("round")}),
        Ratio("hand-off: longest delay of a step of the engine, s", delays, at_most=0.1),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, dtype="float32"))
