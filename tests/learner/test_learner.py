"""A learner on one rank: what may not change the update, what must, and what happens to numbers that are not finite."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algos.methods import methods, resolve
from core.config import RunConfig
from core.errors import UserError
from learner.learner import Learner
from learner.metrics import METRICS
from tests.learner import samples


def parameters(learner: Learner) -> Tensor:
    return learner.export(lambda tensors: torch.cat([t.flatten() for _, t in tensors])).clone()


def trained(tiny: Path, steps: int = 3, method: Any = "grpo", **learner: Any) -> Tensor:
    worker = Learner(samples.config(tiny, **learner), resolve(method))
    for step in range(steps):
        worker.step(samples.groups(seed=step), version=step)
    return parameters(worker)


def test_the_update_does_not_depend_on_the_micro_batches(tiny: Path) -> None:
    whole = trained(tiny, token_budget=100_000)
    assert not torch.allclose(whole, parameters(Learner(samples.config(tiny), resolve("grpo"))), atol=1e-3)
    assert torch.allclose(whole, trained(tiny, token_budget=64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", methods)
def test_every_row_trains_two_steps_and_its_update_does_not_depend_on_the_micro_batches(tiny: Path, name: str) -> None:
    method = resolve(name, context={"max_tokens": 20})
    column = "value" if "baselines" in method.needs else None
    ends = []
    for budget in (100_000, 64):
        worker = Learner(samples.config(tiny, column, minibatches=2, token_budget=budget), method)
        before = parameters(worker)
        for version in (0, 1):
            data = samples.groups(seed=version, sampled="demonstrations" not in method.needs)
            # A single best one in every group: all that `passk` learns from.
            data = [replace(g, totals=(1.0, 0.0, 0.0, 0.0)) for g in data]
            data = samples.pairs(seed=version) if "preferences" in method.needs else data
            metrics = worker.step(data, version=version).metrics
            assert metrics["optim/skipped"] == metrics["optim/empty"] == 0.0
            assert metrics["optim/grad_norm"] > 0 and all(map(math.isfinite, metrics.values()))
        ends.append(parameters(worker))
        assert not torch.equal(before, ends[-1])
    assert torch.allclose(*ends, atol=1e-6, rtol=0)


def test_a_method_that_needs_what_is_not_there_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="'custom' needs given"):
        Learner(samples.config(tiny), resolve({"advantage": "given"}))


def test_the_update_does_not_depend_on_the_attention_kernel(tiny: Path) -> None:
    config = samples.config(tiny)
    eager = config.model_copy(update={"model": config.model.model_copy(update={"attention": "eager"})})
    one, other = (Learner(c, resolve("grpo")) for c in (config, eager))
    for worker in (one, other):
        worker.step(samples.groups(), version=0)
    assert torch.allclose(parameters(one), parameters(other), atol=1e-5, rtol=0)


def test_minibatches_and_epochs_are_updates_of_their_own(tiny: Path) -> None:
    worker = Learner(samples.config(tiny, minibatches=2, epochs=3), resolve("grpo"))
    worker.step(samples.groups(), version=0)
    assert {int(t) for n, t in worker.optimiser.state() if n.endswith("/step")} == {6}


def test_a_second_update_of_a_step_sees_a_ratio(tiny: Path) -> None:
    def clipped(**learner: Any) -> float:
        worker = Learner(samples.config(tiny, optimizer={"lr": 1e-2}, **learner), resolve("grpo"))
        metrics = worker.step(samples.groups(), version=0).metrics
        return metrics["policy/clip_low"] + metrics["policy/clip_high"]

    assert clipped() == 0.0 and clipped(epochs=2) > 0.0


def test_a_resumed_learner_continues_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    options = {"optimizer": {"name": "muon", "lr": 1e-3, "schedule": "cosine"}, "minibatches": 2}
    straight = Learner(samples.config(tiny, **options), resolve("grpo"))
    first, second = (Learner(samples.config(tiny, **options), resolve("grpo")) for _ in range(2))
    for step in range(4):
        straight.step(samples.groups(seed=step), version=step)
    for step in range(2):
        first.step(samples.groups(seed=step), version=step)
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.steps_done == 2
    for step in range(2, 4):
        second.step(samples.groups(seed=step), version=step)
    assert torch.equal(parameters(straight), parameters(second))
    for (name, x), (_, y) in zip(straight.optimiser.state(), second.optimiser.state(), strict=True):
        assert torch.equal(x, y), name


def moving(tiny: Path, share: float, every: int = 2) -> Learner:
    config = samples.config(tiny)
    model = config.model.model_copy(update={"reference_every": every, "reference_share": share})
    return Learner(config.model_copy(update={"model": model}), resolve("grpo"))


def test_the_reference_moves_when_and_as_far_as_it_should(tiny: Path) -> None:
    def weights(policy: Any) -> Tensor:
        return torch.cat([p.detach().flatten() for p in policy.hf.parameters()]).clone()

    worker = moving(tiny, share=0.25)
    start = weights(worker.reference)
    worker.step(samples.groups(), version=0)
    assert torch.equal(weights(worker.reference), start)
    worker.step(samples.groups(seed=1), version=1)
    moved, policy = weights(worker.reference), weights(worker.policy)
    assert torch.allclose(moved, 0.75 * start + 0.25 * policy, atol=1e-7) and not torch.equal(moved, start)


def test_a_moving_reference_resumes_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    straight, first, second = (moving(tiny, share=1.0) for _ in range(3))
    for step in range(4):
        straight.step(samples.groups(seed=step), version=step)
    for step in range(2):
        first.step(samples.groups(seed=step), version=step)
    first.save(tmp_path)
    second.load(tmp_path)
    for step in range(2, 4):
        second.step(samples.groups(seed=step), version=step)
    assert torch.equal(parameters(straight), parameters(second))


def test_one_rank_in_bfloat16_also_resumes_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    config = samples.config(tiny)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    first, second = (Learner(config, resolve("grpo")) for _ in range(2))
    first.step(samples.groups(), version=0)
    first.save(tmp_path)
    second.load(tmp_path)
    for worker in (first, second):
        worker.step(samples.groups(seed=1), version=1)
    assert torch.equal(parameters(first), parameters(second))


def test_a_checkpoint_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    worker = Learner(samples.config(tiny), resolve("grpo"))
    with pytest.raises(UserError, match="not a complete trainer state"):
        worker.load(tmp_path)
    worker.save(tmp_path)
    other = Learner(samples.config(tiny, optimizer={"name": "muon"}), resolve("grpo"))
    with pytest.raises(UserError, match="does not fit"):
        other.load(tmp_path)


def test_the_saved_model_is_one_that_transformers_loads(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    worker = Learner(samples.config(tiny), resolve("grpo"))
    worker.step(samples.groups(), version=0)
    worker.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    plain.load_state_dict(worker.export(lambda tensors: {n: t.clone() for n, t in tensors}), strict=False)
    plain.tie_weights()
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    names = worker.export(lambda tensors: [n for n, _ in tensors])
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names  # tied: once


def test_an_update_that_is_not_finite_is_skipped_and_kept(tiny: Path, tmp_path: Path) -> None:
    worker = Learner(samples.config(tiny), resolve("grpo"), skipped=tmp_path)
    groups = samples.groups()
    with torch.no_grad():
        next(iter(worker.policy.hf.model.layers[0].mlp.parameters()))[0, 0] = math.nan
    before = parameters(worker)
    metrics = worker.step(groups, version=0).metrics
    assert metrics["optim/skipped"] == 1.0 and "optim/grad_norm" not in metrics
    assert torch.equal(before.nan_to_num(), parameters(worker).nan_to_num())
    kept = [json.loads(line) for line in (tmp_path / "step-0" / "groups.jsonl").read_text().splitlines()]
    assert sorted(g["id"] for g in kept) == ["g0", "g1", "g2", "g3"]
    assert json.loads((tmp_path / "step-0" / "why.json").read_text())["loss"] == "nan"


def test_nothing_to_train_is_no_update(tiny: Path) -> None:
    worker = Learner(samples.config(tiny), resolve("dapo", context={"max_tokens": 20}))
    before = parameters(worker)
    equal = [replace(g, totals=(1.0,) * len(g.totals)) for g in samples.groups()]
    result = worker.step(equal, version=0)
    assert result.metrics["optim/empty"] == 1.0
    assert torch.equal(before, parameters(worker))
    assert all(math.isnan(a) for row in result.advantages for a in row)


def test_advantages_come_back_in_the_shape_of_the_groups(tiny: Path) -> None:
    groups = samples.groups(prompts=2)
    result = Learner(samples.config(tiny), resolve("grpo")).step(groups, version=0)
    assert [len(row) for row in result.advantages] == [4, 4]
    for group, row in zip(groups, result.advantages, strict=True):
        assert [a > 0 for a in row] == [t == 1.0 for t in group.totals]


def test_demonstrations_are_learned(tiny: Path) -> None:
    worker = Learner(samples.config(tiny, optimizer={"name": "muon", "lr": 3e-3}), resolve("sft"))
    data = samples.groups(prompts=4, size=1, sampled=False)
    losses = [worker.step(data, version=0).metrics["policy/loss"] for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_reference_changes_the_update_once_the_policy_has_left_it(tiny: Path) -> None:
    with_kl = {"row": "grpo", "kl": {"in_loss": {"coef": 1.0}}}
    worker = Learner(samples.config(tiny), resolve(with_kl))
    kl = [worker.step(samples.groups(), version=v).metrics["policy/kl_ref"] for v in range(3)]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[2] > 1e-4


def test_every_metric_of_the_learner_is_explained(tiny: Path) -> None:
    metrics = Learner(samples.config(tiny), resolve("grpo")).step(samples.groups(), version=0).metrics
    own = {n for n in metrics if n.split("/")[0] in ("optim", "learner", "time")}
    assert own <= set(METRICS) and own
    assert metrics["learner/tokens"] > 0 and metrics["learner/micro_batches"] == 1


def test_a_folder_without_a_model_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path"):
        Learner(samples.config(tmp_path), resolve("grpo"))


def test_exact_log_probs_of_the_engine_stand_in_for_a_pass_and_their_mismatch_is_shown(tiny: Path) -> None:
    """With the learner's own log-probs as the engine's, the update is the same; with others it is seen how far off."""
    options: dict[str, Any] = {"epochs": 2, "optimizer": {"lr": 1e-2}}
    asked, spared = (
        Learner(samples.config(tiny, old_logprobs=old, **options), resolve({"kl": "none"}))
        for old in ("recompute", "rollout")
    )
    data, passes = samples.groups(), []
    logprobs, _ = asked.logprobs(data)
    rows = iter(logprobs)
    exact = [
        replace(
            group,
            completions=tuple(
                replace(c, rollout_logprobs=tuple(next(rows)[: len(c.token_ids)].tolist())) for c in group.completions
            ),
        )
        for group in data
    ]
    measured = spared._without_gradient
    spared._without_gradient = lambda *a: passes.append(a) or measured(*a)
    for worker in (asked, spared):
        mismatch = worker.step(exact, version=0).metrics["policy/mismatch_kl"]
        assert mismatch == pytest.approx(0, abs=1e-9)
    assert torch.allclose(parameters(asked), parameters(spared), atol=1e-6, rtol=0) and not passes
    assert spared.step(samples.groups(), version=1).metrics["policy/mismatch_kl"] > 0.1  # the engine says -5 each


def test_log_probs_of_an_older_policy_do_not_stand_in(tiny: Path) -> None:
    config = samples.config(tiny, old_logprobs="rollout").model_dump()
    with pytest.raises(ValueError, match="of older policies; use recompute"):
        RunConfig(**{**config, "rollout": {**config["rollout"], "max_staleness": 1}})
