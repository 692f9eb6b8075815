"""Adapters on two ranks of FSDP2 over gloo: the steps of one rank, and checkpoints that either reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from algos.methods import resolve
from learner.learner import Learner
from learner.ranks import Ranks
from tests.learner import samples
from tests.learner.test_lora import KL, LORA, with_lora

STEPS = 3
NUMBERS = ("policy/loss", "policy/kl_ref", "optim/grad_norm", "learner/tokens")


def learner(model: Path, dtype: str, ranks: Ranks | None = None) -> Learner:
    return Learner(with_lora(model, LORA, dtype, token_budget=80), resolve(KL), ranks=ranks)


def run(worker: Learner) -> dict[str, Any]:
    """Three steps: of groups, of a single group with a single completion (a rank without work), of groups."""
    results = []
    for step in range(STEPS):
        groups = samples.groups(prompts=1, size=1) if step == 1 else samples.groups(seed=step)
        metrics = worker.step(groups, version=step).metrics
        results.append({name: metrics.get(name) for name in NUMBERS})
    return {"metrics": results, "tensors": worker.export(lambda items: {n: t.clone() for n, t in items})}


def work(rank: int, model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, 2, f"file://{folder}/meet", torch.device("cpu"), timeout=120)
    for dtype in ("float32", "bfloat16"):
        worker = learner(model, dtype, ranks)
        torch.save(run(worker), folder / f"{dtype}-{rank}.pt")
        target = folder / dtype
        target.mkdir(exist_ok=True)
        worker.save(target)
    ranks.wait()
    # Everything is on disk. Gloo's threads may abort a process that ends in the ordinary way beside one that has ended.
    os._exit(0)


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(tiny, folder), nprocs=2)
    return folder


def load(folder: Path, dtype: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{dtype}-{rank}.pt") for rank in range(2)]


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_two_ranks_train_like_one(two: Path, tiny: Path, dtype: str, close: float) -> None:
    start, alone, (first, second) = learner(tiny, dtype).export(dict), run(learner(tiny, dtype)), load(two, dtype)
    assert second["tensors"] is None and first["metrics"] == second["metrics"]
    assert distance(alone["tensors"], start) > 1e-3 and distance(alone["tensors"], first["tensors"]) < close
    for mine, theirs in zip(alone["metrics"], first["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=100 * close, abs=close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_rank_reads_and_merges_what_two_have_written(two: Path, tiny: Path, dtype: str) -> None:
    alone = learner(tiny, dtype)
    alone.load(two / dtype)
    assert alone.steps_done == STEPS and distance(alone.export(dict), load(two, dtype)[0]["tensors"]) == 0.0
    merged = Learner(with_lora(two / dtype / "model", None, dtype), resolve(KL))
    ours, theirs = (worker.logprobs(samples.groups())[0] for worker in (alone, merged))
    assert torch.allclose(ours, theirs, atol=1e-5 if dtype == "float32" else 0.1, rtol=0)
