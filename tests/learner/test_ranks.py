"""Two ranks of FSDP2 over gloo do what one rank does, and read each other's checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from algos.methods import resolve
from core.schema import Mixture
from learner.learner import Learner
from learner.model import full
from learner.ranks import Ranks
from tests.learner import samples

STEPS = 3
# A critic, a token reward model, statistics of whole groups; a critic that nothing trains; a reference that moves.
ROWS = {name: {"row": name} for name in ("ppo", "oreal", "tw_grpo", "grpo")}
ROWS["frozen"] = {"row": "ppo", "value": "none"}


def run(learner: Learner) -> dict[str, Any]:
    """Three steps: of groups, of a single group with a single completion (a rank without work), of groups."""
    results = []
    for step in range(STEPS):
        groups = samples.groups(prompts=1, size=1) if step == 1 else samples.groups(seed=step)
        results.append(learner.step(groups, version=step))
    tensors = learner.export(lambda items: {n: t.clone() for n, t in items})
    return {"results": results, "tensors": tensors}


def learner(model: Path, name: str, ranks: Ranks | None = None) -> Learner:
    spikes = {"interval": 2, "warmup": 2, "grace": 1, "theta": 1.0, "norm": True}  # all of it acts within three steps
    config = samples.config(model, token_budget=80, optimizer={"name": name, "spikes": spikes})
    return Learner(config, resolve({"row": "grpo", "kl": {"in_loss": {"coef": 0.1}}}), ranks=ranks)


def with_companions(model: Path, row: str, ranks: Ranks | None = None) -> dict[str, Any]:
    """Two steps of a row; its tensors and those of what is trained beside the policy."""
    config = samples.config(model, token_budget=80, critic={"lr": 1e-3}, token_reward_model={"lr": 1e-3})
    config = config.model_copy(update={"model": config.model.model_copy(update={"reference_every": 1})})
    worker = Learner(config, resolve(ROWS[row]), ranks=ranks)
    for step in range(2):
        worker.step(samples.groups(prompts=3 - 2 * step, seed=step), version=step)  # a rank without work in the second
    models = {field: c.model.hf for field, c in worker.companions.items()}
    beside = {f"{field}/{name}": full(p) for field, hf in models.items() for name, p in hf.named_parameters()}
    return {"tensors": (worker.export(lambda items: {n: t.clone() for n, t in items}) or {}) | beside}


def compared(model: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """What a weighting policy asks of the learner: agreement of gradients, KL of every row, columns joined apart."""
    worker = Learner(samples.config(model, token_budget=80), resolve("grpo"), ranks=ranks, reference=True)
    table, _ = worker.gram(samples.groups())
    result = worker.step(samples.groups(), 0, Mixture(apart=True, whiten=False, task=0.5))
    return {"gram": table, "kl": result.kl, "advantages": result.advantages}


def work(rank: int, model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, 2, f"file://{folder}/meet", torch.device("cpu"), timeout=120)
    for name in ("adamw", "muon", "spam", "stable_spam"):
        worker = learner(model, name, ranks)
        torch.save(run(worker), folder / f"{name}-{rank}.pt")
        if name == "adamw":
            target = folder / "checkpoint"
            if rank == 0:
                target.mkdir()
            ranks.wait()
            worker.save(target)
    config = samples.config(model)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    torch.save(compared(model, ranks), folder / f"compared-{rank}.pt")
    halves = Learner(config, resolve("grpo"), ranks=ranks)
    torch.save(run(halves), folder / f"bfloat16-{rank}.pt")
    for row in ROWS:
        torch.save(with_companions(model, row, ranks), folder / f"{row}-{rank}.pt")
    ranks.wait()
    # Everything is on disk. Gloo's threads may abort a process that ends in the ordinary way beside one that has ended.
    os._exit(0)


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(tiny, folder), nprocs=2)
    return folder


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_ranks_train_like_one(two: Path, tiny: Path) -> None:
    alone, (first, second) = run(learner(tiny, "adamw")), load(two, "adamw")
    assert second["tensors"] is None
    for key, tensor in alone["tensors"].items():
        assert torch.allclose(tensor, first["tensors"][key], atol=1e-5, rtol=0), key
    for mine, theirs in zip(alone["results"], first["results"], strict=True):
        assert mine.advantages == theirs.advantages
        for metric in ("policy/loss", "policy/entropy", "policy/kl_ref", "optim/grad_norm", "learner/tokens"):
            assert mine.metrics.get(metric) == pytest.approx(theirs.metrics.get(metric), rel=1e-3, abs=1e-5), metric
    assert [r.metrics for r in first["results"]] == [r.metrics for r in second["results"]]


def test_two_ranks_compare_gradients_and_join_columns_like_one(two: Path, tiny: Path) -> None:
    alone, (first, second) = compared(tiny), load(two, "compared")
    for key in ("gram", "kl", "advantages"):
        for together in (first, second):
            torch.testing.assert_close(torch.tensor(together[key]), torch.tensor(alone[key]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_two_ranks_train_companions_like_one(two: Path, tiny: Path, row: str) -> None:
    alone, together = with_companions(tiny, row)["tensors"], load(two, row)[0]["tensors"]
    for key, tensor in alone.items():
        assert torch.allclose(tensor, together[key], atol=1e-5, rtol=0), key


@pytest.mark.parametrize("name", ["spam", "stable_spam"])
def test_spike_guards_on_shards_move_as_on_whole_tensors(two: Path, tiny: Path, name: str) -> None:
    alone, shards = run(learner(tiny, name))["tensors"], load(two, name)[0]["tensors"]
    for key, tensor in alone.items():
        assert torch.allclose(tensor, shards[key], atol=1e-5, rtol=0), key


def test_muon_on_shards_moves_as_on_whole_matrices(two: Path, tiny: Path) -> None:
    start = learner(tiny, "muon").export(lambda items: {n: t.clone() for n, t in items})
    alone, shards = run(learner(tiny, "muon"))["tensors"], load(two, "muon")[0]["tensors"]
    for key in (k for k in alone if ".layers." in k and alone[k].ndim == 2):
        # It orthogonalises in bfloat16, so the two agree to a few of its roundings and not to float32's.
        assert (alone[key] - shards[key]).norm() < 0.05 * (alone[key] - start[key]).norm(), key


def test_one_rank_reads_what_two_have_written(two: Path, tiny: Path) -> None:
    alone = learner(tiny, "adamw")
    alone.load(two / "checkpoint")
    tensors = alone.export(dict)
    assert alone.steps_done == STEPS
    for key, tensor in load(two, "adamw")[0]["tensors"].items():
        assert torch.equal(tensor, tensors[key]), key


def test_bfloat16_computes_in_it_and_keeps_float32_weights(two: Path, tiny: Path) -> None:
    halves, full = load(two, "bfloat16")[0], run(Learner(samples.config(tiny), resolve("grpo")))
    assert all(t.dtype == torch.float32 for t in halves["tensors"].values())
    entropies = [r["results"][0].metrics["policy/entropy"] for r in (halves, full)]
    assert entropies[0] != entropies[1] and entropies[0] == pytest.approx(entropies[1], rel=0.02)
