"""Operations of the tiny policy, counted by hand and by torch; where a step's seconds go."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from algos.methods import resolve
from core.config import LoraConfig
from learner import flops, metrics
from learner.collate import Micro, Sequences
from learner.flops import needed, peak
from learner.learner import Learner
from learner.meter import PHASES, Meter, Spent
from tests.learner import samples

# A block of the tiny policy: q 128 x 128, k and v 128 x 64, o 128 x 128, three of 128 x 384 = 196,608 weights. There
# are three blocks, and each weight is a multiplication and an addition.
TOKEN = 2 * 3 * 196_608
HEAD = 2 * 128 * 400
PAIR = 2 * 3 * 4 * (32 + 32)  # 3 layers, 4 heads (not the 2 of the keys), a score and a share of a value, 32 wide each
CPU = torch.device("cpu")
# One prompt of 3 tokens with completions of 4 and 2, whose last tokens are not read: 7 tokens, or 10 where each has its
# own prompt. They see 1 + 2 + 3, 4 + 5 + 6 and 4 tokens; with a prompt of its own the second sees 1 + 2 + 3 again.
SEQUENCES = Sequences([(1, 2, 3)] * 2, [(4, 5, 6, 7), (8, 9)], [0, 0])


@pytest.fixture(scope="module")
def hf(tiny: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")


@pytest.mark.parametrize(("share", "read", "seen"), [(True, 7, 25), (False, 10, 31)])
def test_a_packed_row_needs_what_a_person_counts(hf: nn.Module, share: bool, read: int, seen: int) -> None:
    needs, micro = needed(hf), Micro.of(SEQUENCES, [0, 1], CPU, share)
    assert needs is not None
    forward = TOKEN * read + HEAD * 6 + PAIR * seen
    assert needs.forward(micro) == forward and needs.backward(micro) == 2 * forward
    assert needs.forward(Micro.of(SEQUENCES, [], CPU)) == needs.backward(Micro.of(SEQUENCES, [], CPU)) == 0


def test_torch_counts_the_same_where_it_computes_no_more_than_is_needed(hf: nn.Module) -> None:
    with FlopCounterMode(display=False) as counter:
        hf(input_ids=torch.arange(8)[None]).logits.sum().backward()
    # All 64 pairs are computed, of which causal attention needs 36; the first block's input has a gradient.
    assert counter.get_total_flops() == 3 * (8 * (TOKEN + HEAD) + 64 * PAIR)


def test_weights_that_are_frozen_need_no_gradient_of_their_own(hf: nn.Module) -> None:
    frozen = AutoModelForCausalLM.from_config(hf.config).requires_grad_(False)
    for layer in frozen.model.layers:
        layer.self_attn.o_proj.requires_grad_(True)  # 3 x 128 x 128 weights
    needs, micro = needed(frozen), Micro.of(SEQUENCES, [0, 1], CPU)
    assert needs is not None
    inputs = TOKEN * 7 + HEAD * 6 + 2 * PAIR * 25
    assert needs.backward(micro) == inputs + 2 * 3 * 128 * 128 * 7


def test_adapters_are_small_matrices_beside_frozen_ones(tiny: Path) -> None:
    config = samples.config(tiny)
    lora = config.model.model_copy(update={"lora": LoraConfig(rank=8)})
    needs = needed(Learner(config.model_copy(update={"model": lora}), resolve("grpo")).policy.hf)
    # A and B of q and o have 8 x (128 + 128) weights, of k and v 8 x (128 + 64), of the other three 8 x (128 + 384).
    adapters = 2 * 3 * 8 * (2 * 256 + 2 * 192 + 3 * 512)
    assert needs is not None and (needs.token, needs.trained) == (TOKEN + adapters, (adapters, 0))


def test_a_window_ends_what_a_token_sees() -> None:
    config = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 4}
    needs = needed(MistralForCausalLM(MistralConfig(**config, **heads)))
    assert needs is not None and needs.pairs == {4: 2 * 2 * 8}
    # q and o 8 x 8, k and v 8 x 4, three of 8 x 8; of the sums above 5, 6 and 4 become 4.
    expected = 2 * (2 * 64 + 2 * 32 + 3 * 64) * 7 + 2 * 8 * 32 * 6 + 32 * (1 + 2 + 3 + 4 + 4 + 4 + 4)
    assert needs.forward(Micro.of(SEQUENCES, [0, 1], CPU)) == expected


def test_of_a_mixture_the_active_experts_count_and_without_their_number_nothing_is_said() -> None:
    config = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "moe_intermediate_size": 16}
    hf = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, **heads, num_experts_per_tok=2))
    needs = needed(hf)
    # q and o 8 x 8, k and v 8 x 4, the router 4 x 8, and two experts of three matrices 8 x 16 each
    assert needs is not None and needs.token == 2 * (2 * 64 + 2 * 32 + 32 + 2 * 3 * 128)
    hf.config.num_experts_per_tok = 0
    assert needed(hf) is None


def test_the_rate_of_a_device_is_measured_once_or_known(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.perf_counter()
    rate = peak(CPU, torch.float32)
    assert time.perf_counter() - started < 2 and 1e8 < rate < 1e14
    assert peak(CPU, torch.float32) == rate
    for name, known in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak.__wrapped__(torch.device("cuda", 0), torch.bfloat16) == known


def test_every_second_of_a_step_belongs_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("learner.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(CPU)
    meter.begin()  # 0
    with meter("gradients"), meter("optimizer"):  # 1, 3 .. 6
        pass
    spent = meter.end()  # gradients end at 10, the step at 15
    assert spent.phases == {"collate": 1 + 5, "passes": 0, "gradients": 2 + 4, "optimizer": 3} and spent.seconds == 15


def test_ranks_share_the_work_and_the_slowest_gives_the_time() -> None:
    ranks = [Spent({"collate": 1.0, "gradients": 3.0}, 600.0), Spent({"collate": 2.0, "gradients": 1.0}, 200.0)]
    assert metrics.spending(ranks, peak=800.0) == {
        "time/learner": 4.0,
        "time/learner_collate": 1.0,
        "time/learner_gradients": 3.0,
        "learner/flops": 800.0,
        "learner/flops_per_second": 200.0,
        "learner/mfu": 0.25,  # 200 of 800
    }
    unknown = metrics.spending([ranks[0], Spent({"collate": 1.0}, None)], peak=800.0)
    assert "learner/mfu" not in unknown and "learner/flops" not in unknown


def test_a_step_says_what_it_needed_and_what_its_seconds_were_spent_on(tiny: Path) -> None:
    learner = Learner(samples.config(tiny), resolve("grpo"))
    groups = samples.groups()
    found = learner.step(groups, version=0).metrics
    shared = sum(len(g.prompt.token_ids) + sum(len(c.token_ids) - 1 for c in g.completions) for g in groups)
    targets = sum(len(c.token_ids) for g in groups for c in g.completions)
    seen = 0
    for g in groups:
        prompt = len(g.prompt.token_ids)
        seen += sum(range(1, prompt + 1))
        seen += sum(prompt + i for c in g.completions for i in range(1, len(c.token_ids)))
    forward = TOKEN * shared + HEAD * targets + PAIR * seen
    # Forward and backward of the update are three forward passes; the reference is a fourth.
    assert found["learner/flops"] == 4 * forward
    assert sum(found[f"time/learner_{phase}"] for phase in PHASES) == pytest.approx(found["time/learner"])
    assert all(found[f"time/learner_{phase}"] > 0 for phase in PHASES)
    rate = peak(CPU, torch.float32)
    assert found["learner/mfu"] == pytest.approx(4 * forward / found["time/learner"] / rate)
