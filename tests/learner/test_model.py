"""Models of other families: what the policy computes is what they compute, or they are refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from core.config import ModelConfig
from core.errors import UserError
from learner.collate import Micro, collate
from learner.model import Policy, as_published, full, load_policy, named_tensors
from learner.ranks import Ranks
from tests.learner import samples

SMALL = {
    **{"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "initializer_range": 0.3},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
GEMMA2 = {"head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def write(folder: Path, family: str, **options: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path, attention: str = "sdpa") -> Policy:
    config = ModelConfig(path=str(folder), attention=attention)
    return load_policy(config, str(folder), Ranks(), temperature=0.7, chunk=8)


@pytest.mark.parametrize(
    ("family", "attention", "options"),
    [
        ("Llama", "sdpa", {"tie_word_embeddings": False}),
        ("Qwen2", "sdpa", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("Mistral", "sdpa", {"sliding_window": 3}),
        ("Gemma2", "eager", GEMMA2),
        ("Granite", "sdpa", {"logits_scaling": 3.0}),
        ("Cohere", "sdpa", {"logit_scale": 0.5}),
        ("Qwen3Moe", "sdpa", EXPERTS),
    ],
)
def test_packed_log_probs_are_those_of_the_model_alone(
    tmp_path: Path, family: str, attention: str, options: dict[str, Any]
) -> None:
    policy = load(write(tmp_path, family, **options), attention)  # it compares, and raises where they differ
    assert len(policy.blocks) == 2


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("Gemma2", GEMMA2, "cannot compute Gemma2Attention"),
        ("FalconH1", {}, "cannot be trained on packed sequences"),  # a recurrent state crosses from one to the next
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(
    tmp_path: Path, family: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        load(write(tmp_path, family, **options))


def test_exported_names_are_those_of_the_published_files(tmp_path: Path) -> None:
    hf = load(write(tmp_path, "Qwen3Moe", **EXPERTS)).hf
    ours = {n: t for name, shard in named_tensors(hf) for n, t in as_published(hf, name, full(shard)).items()}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(ours) == set(file.keys()) and any(".experts.3." in name for name in ours)
        assert all(torch.equal(ours[name], file.get_tensor(name)) for name in ours)


def test_compiled_blocks_say_the_same_and_pass_gradients_of_any_length(tiny: Path, monkeypatch) -> None:
    """Traced as for the compiler, then run by Python: the compiler itself is torch's and takes a minute."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="eager", **options))
    config = ModelConfig(path=str(tiny))
    policies = [load_policy(config, str(tiny), Ranks(), temperature=1.0, chunk=64, compiled=c) for c in (False, True)]
    for prompts in (2, 3):
        _, sequences = collate(samples.groups(prompts=prompts, seed=prompts))
        micro, found = Micro.of(sequences, range(4 * prompts), torch.device("cpu")), []
        for policy in policies:
            policy.zero_grad()
            logprobs, _ = policy(micro)
            logprobs.sum().backward()
            found.append((logprobs, torch.cat([p.grad.flatten() for p in policy.parameters()])))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
