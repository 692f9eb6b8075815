"""Adapters on one rank: they start as nothing, they alone are trained, and every form of them is the same policy."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from pydantic import ValidationError
from torch import Tensor

from algos.methods import resolve
from core.config import LoraConfig, ModelConfig, RunConfig
from core.errors import UserError
from learner import adapters
from learner.collate import Micro, collate
from learner.learner import Learner
from tests.learner import samples
from tests.learner.test_model import EXPERTS, write

CPU = torch.device("cpu")
KL = {"row": "grpo", "kl": {"in_loss": {"coef": 0.1}}}
LORA = LoraConfig(rank=4, alpha=8.0)


def with_lora(path: Path, lora: LoraConfig | None = LORA, dtype: str = "float32", **learner: Any) -> RunConfig:
    """`lora` None trains all weights."""
    config = samples.config(path, **learner)
    return config.model_copy(update={"model": ModelConfig(path=str(path), dtype=dtype, lora=lora)})


def stepped(worker: Learner, *steps: int) -> Learner:
    for step in steps:
        worker.step(samples.groups(seed=step), version=step)
    return worker


def exported(worker: Learner) -> dict[str, Tensor]:
    return worker.export(lambda tensors: {name: tensor.clone() for name, tensor in tensors})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_the_policy_is_the_base_model_exactly(tiny: Path, dtype: str) -> None:
    adapted, plain = (Learner(with_lora(tiny, lora, dtype), resolve("grpo")) for lora in (LORA, None))
    ours, theirs = (worker.logprobs(samples.groups())[0] for worker in (adapted, plain))
    assert torch.equal(ours, theirs) and ours.abs().max() > 1


def test_gradients_reach_the_adapters_alone_and_are_those_of_the_chain_rule(tiny: Path) -> None:
    adapted, plain = (Learner(with_lora(tiny, lora), resolve("grpo")) for lora in (LORA, None))
    micro = Micro.of(collate(samples.groups())[1], range(16), CPU, share=True)
    for worker in (adapted, plain):
        worker.policy(micro)[0].sum().backward()
    whole = dict(plain.policy.hf.named_parameters())
    pairs = adapters.pairs(adapted.policy.hf)
    assert len(pairs) == 3 * 7  # 3 layers, with 4 matrices of attention and 3 of the MLP each
    for name, (a, b, scale) in pairs.items():
        # W + s B A: the gradient of B is s G A^T; that of A is s B^T G, and B is zero at first. s = alpha 8 / rank 4.
        assert scale == 2.0 and not a.grad.any()
        assert torch.allclose(b.grad, 2.0 * whole[name].grad @ a.detach().T, rtol=1e-4, atol=1e-4), name
    with_gradient = {n for n, p in adapted.policy.hf.named_parameters() if p.grad is not None}
    assert with_gradient == set(adapted.optimiser.names.values()) and all(".lora_" in n for n in with_gradient)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_moves_float32_adapters_and_leaves_the_weights(tiny: Path, dtype: str) -> None:
    worker = Learner(with_lora(tiny, LORA, dtype), resolve("grpo"))
    before = {n: p.detach().clone() for n, p in worker.policy.hf.named_parameters()}
    stepped(worker, 0, 1)
    for name, p in worker.policy.hf.named_parameters():
        adapter = ".lora_" in name
        assert p.dtype == (torch.float32 if adapter else getattr(torch, dtype))
        assert torch.equal(before[name], p.detach()) != adapter, name


def test_recomputed_activations_give_the_same_update(tiny: Path) -> None:
    kept, again = (Learner(with_lora(tiny, activation_checkpointing=on), resolve("grpo")) for on in (False, True))
    ours, theirs = (exported(stepped(worker, 0, 1)) for worker in (kept, again))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6, rtol=0) for name in ours)


def test_the_reference_is_the_policy_without_its_adapters(tiny: Path) -> None:
    own = with_lora(tiny)
    given = own.model_copy(update={"model": own.model.model_copy(update={"reference": str(tiny)})})
    none, loaded = (Learner(config, resolve(KL)) for config in (own, given))
    for step in range(3):
        ours, theirs = (w.step(samples.groups(seed=step), version=step) for w in (none, loaded))
        assert ours.metrics["policy/kl_ref"] == theirs.metrics["policy/kl_ref"] and ours.kl == theirs.kl
    assert ours.metrics["policy/kl_ref"] > 1e-4
    assert loaded.reference.hf is not none.policy.hf and not hasattr(none.reference, "hf")  # no second copy
    with torch.no_grad():
        micro = Micro.of(collate(samples.groups())[1], range(16), CPU, share=True)
        assert not torch.equal(none.reference(micro)[0], none.policy(micro)[0])  # and the adapters are back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_learner_continues_bit_for_bit_from_its_adapters_alone(
    tiny: Path, tmp_path: Path, dtype: str
) -> None:
    config = with_lora(tiny, LORA, dtype, optimizer={"schedule": "cosine"}, minibatches=2)
    straight, first, second = (Learner(config, resolve(KL)) for _ in range(3))
    stepped(straight, 0, 1, 2, 3)
    stepped(first, 0, 1).save(tmp_path)
    second.load(tmp_path)
    stepped(second, 2, 3)
    ours, theirs = exported(straight), exported(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for (name, x), (_, y) in zip(straight.optimiser.state(), second.optimiser.state(), strict=True):
        assert torch.equal(x, y), name
    saved = dcp.FileSystemReader(tmp_path / "trainer").read_metadata().state_dict_metadata
    assert len(saved) == 4 * 2 * 21 and all(".lora_" in name for name in saved)  # value, two moments, step count


def test_merged_handed_over_and_published_by_peft_it_is_the_same_policy(tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    worker = stepped(Learner(with_lora(tiny), resolve("grpo")), 0, 1, 2)
    worker.save(tmp_path)
    groups = samples.groups(seed=9)
    ours = worker.logprobs(groups)[0]
    assert (ours - Learner(with_lora(tiny), resolve("grpo")).logprobs(groups)[0]).abs().max() > 0.01
    merged = Learner(with_lora(tmp_path / "model", None), resolve("grpo"))
    assert torch.allclose(ours, merged.logprobs(groups)[0], atol=1e-5, rtol=0)

    given, weights = exported(worker), exported(Learner(with_lora(tiny, None), resolve("grpo")))
    assert {name.rpartition(".")[0] for name in given} == set(adapters.pairs(worker.policy.hf))
    for name, whole in exported(merged).items():
        product = given[f"{name}.lora_B"] @ given[f"{name}.lora_A"] if f"{name}.lora_A" in given else 0.0
        assert torch.allclose(whole, weights[name] + product, atol=1e-6, rtol=0), name

    base, alone = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tiny, tmp_path / "model"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = alone(ids).logits
        assert torch.allclose(expected, PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits, atol=1e-4)
    chosen = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(chosen) == 7 and chosen == sorted(chosen)  # in the same order in every process


def test_a_hand_off_of_smollm2_is_below_two_percent_at_the_default_rank() -> None:
    config = transformers.LlamaConfig(
        **{"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    )
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(config)
        whole = sum(p.numel() for p in hf.parameters())
        adapters.inject(hf, LoraConfig(), seed=0)
    handed = sum(a.numel() + b.numel() for a, b, _ in adapters.pairs(hf).values())
    # A layer: q and o 2 x 1152, k and v 2 x 768, gate, up and down 3 x 2112: 10,176 numbers for each of 8 ranks.
    assert whole == 134_515_008 and handed == 30 * 10_176 * 8
    assert handed / whole < 0.02


def test_named_targets_alone_get_adapters(tiny: Path) -> None:
    lora = LoraConfig(targets=["q_proj", "layers.2.mlp.up_proj"])
    worker = stepped(Learner(with_lora(tiny, lora, "bfloat16"), resolve("grpo")), 0)
    attention = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]
    assert list(adapters.pairs(worker.policy.hf)) == [*attention, "model.layers.2.mlp.up_proj.weight"]


def test_handed_over_names_are_those_of_the_published_files(tmp_path: Path) -> None:
    given = exported(Learner(with_lora(write(tmp_path, "Qwen3Moe", **EXPERTS)), resolve("grpo")))
    assert set(given) == {  # experts are no linear layers
        f"model.layers.{n}.self_attn.{kind}_proj.weight.lora_{half}" for n in (0, 1) for kind in "qkvo" for half in "AB"
    }


def test_every_rank_and_run_of_a_seed_begins_with_the_same_adapters(tiny: Path) -> None:
    config = with_lora(tiny)
    first, second, other = (
        exported(Learner(c, resolve("grpo"))) for c in (config, config, config.model_copy(update={"seed": 1}))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == name.endswith("B") for name in first)  # B is zero


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("q_prj", r"model\.lora\.targets: there is no linear layer 'q_prj'; did you mean 'q_proj'"),
        ("lm_head", "there is no linear layer 'lm_head'"),  # its weight is read without calling it
        ("embed_tokens", "there is no linear layer 'embed_tokens'"),
    ],
)
def test_layers_that_cannot_have_adapters_are_refused(tiny: Path, target: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Learner(with_lora(tiny, LoraConfig(targets=[target])), resolve("grpo"))


def test_matrices_that_the_files_hold_joined_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(hf: Any, name: str, whole: Tensor) -> dict[str, Tensor]:
        return {re.sub(r"mlp\.(gate|up)_proj", "mlp.gate_up_proj", name): whole}

    monkeypatch.setattr("learner.model.as_published", joined)
    with pytest.raises(UserError, match=r"model\.lora\.targets: the files .*\.mlp\.gate_proj\.weight as one matrix"):
        Learner(with_lora(tiny), resolve("grpo"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": {"rank": 0}}, "greater than 0"),
        ({"lora": {"alpha": -1.0}}, "greater than 0"),
        ({"lora": {}, "reference_every": 10}, "model.lora the base model stays where it is"),
    ],
)
def test_options_that_cannot_be_are_refused(tiny: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig(path=str(tiny), **options)


def test_a_missing_peft_is_said_with_what_installs_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.lora: peft is not installed; `make env`"):
        Learner(with_lora(tiny), resolve("grpo"))


def test_checkpoints_of_another_rank_or_of_all_weights_do_not_fit(tiny: Path, tmp_path: Path) -> None:
    for name, lora in (("plain", None), ("wide", LoraConfig(rank=8))):
        (tmp_path / name).mkdir()
        Learner(with_lora(tiny, lora), resolve("grpo")).save(tmp_path / name)
        with pytest.raises(UserError, match="does not fit"):
            Learner(with_lora(tiny), resolve("grpo")).load(tmp_path / name)
