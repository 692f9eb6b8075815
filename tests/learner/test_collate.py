"""Packed rows say what single sequences say; micro-batches are balanced, within the budget, and the same every time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.config import ModelConfig
from core.schema import Completion, Group, Prompt, Score
from learner.collate import Micro, Sequences, collate, pack, split
from learner.model import Policy, load_policy
from learner.ranks import Ranks
from tests.learner import samples

CPU = torch.device("cpu")


def policy(path: Path, attention: str = "sdpa", **options) -> Policy:
    return load_policy(
        ModelConfig(path=str(path), attention=attention), str(path), Ranks(), temperature=1.0, chunk=64, **options
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_equals_its_sequences_one_by_one(tiny: Path, attention: str) -> None:
    _, sequences = collate(samples.groups(longest=60))
    rows = list(range(len(sequences.prompts)))
    model = policy(tiny, attention)
    with torch.no_grad():
        together, entropy = model(Micro.of(sequences, rows, CPU, share=model.shares_prompts))
        apart = [model(Micro.of(sequences, [r], CPU)) for r in rows]
    assert torch.allclose(together, torch.cat([a for a, _ in apart]), atol=1e-5, rtol=0)
    assert torch.allclose(entropy, torch.cat([e for _, e in apart]), atol=1e-5, rtol=0)


def test_log_probs_are_those_of_the_plain_model_also_in_the_gradient(tiny: Path) -> None:
    _, sequences = collate(samples.groups(prompts=2, size=3))
    rows, model = list(range(6)), policy(tiny)
    model(Micro.of(sequences, rows, CPU))[0].sum().backward()
    ours = {n: p.grad.clone() for n, p in model.hf.named_parameters()}
    model.zero_grad()
    plain = policy(tiny, "eager").hf
    for r in rows:
        whole = torch.tensor([sequences.prompts[r] + sequences.completions[r]])
        start = len(sequences.prompts[r])
        logprobs = plain(input_ids=whole, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        logprobs.gather(-1, whole[0, start:, None]).sum().backward()
    for name, p in plain.named_parameters():
        assert torch.allclose(ours[name], p.grad, atol=1e-4, rtol=1e-4), name


def test_activation_checkpointing_changes_no_gradient(tiny: Path) -> None:
    _, sequences = collate(samples.groups(prompts=2))
    micro, gradients = Micro.of(sequences, list(range(8)), CPU), []
    for checkpointing in (False, True):
        model = policy(tiny, checkpointing=checkpointing)
        model(micro)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_a_sliding_window_hides_what_lies_further_back() -> None:
    from learner.attention import packed_sdpa, packing

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 4) for _ in range(3))
    packed, _ = packed_sdpa(
        torch.nn.Identity(), q, k, v, None, packing=packing([(0, 1), (3, 2)], [(1, 2), (5, 2)]), sliding_window=2
    )
    # Token 6 is the last of the second sequence (tokens 3..6) and sees only 5 and 6.
    scores = (q[0, :, 6:] @ k[0, :, 5:7].transpose(1, 2) / 2).softmax(-1)
    assert torch.allclose(packed[0, 6], (scores @ v[0, :, 5:7])[:, 0], atol=1e-6)


def test_a_batch_holds_every_completion_in_order() -> None:
    c = Completion((7, 8, 9), (-1.0, -2.0, -3.0), (4, 4, 5), "", "length")
    d = Completion((6,), (-0.5,), (5,), "", "stop")
    group = Group("g", Prompt(0, "", (1, 2)), (c, d), totals=(1.0, math.nan))
    batch, sequences = collate([group, replace(group, completions=(d,), totals=(0.0,))])
    assert batch.mask.tolist() == [[True, True, True], [True, False, False], [True, False, False]]
    assert batch.group.tolist() == [0, 0, 1]
    assert batch.truncated.tolist() == [True, False, False]
    assert batch.rollout_logprobs[0].tolist() == [-1.0, -2.0, -3.0] and batch.versions[0].tolist() == [4, 4, 5]
    assert batch.rewards[0] == 1.0 and batch.rewards[1].isnan() and batch.rewards[2] == 0.0
    micro = Micro.of(sequences, [0, 1, 2], CPU)
    # The first group's prompt is read once; the last token of each completion is predicted, not read.
    assert micro.tokens.tolist() == [[1, 2, 7, 8, 1, 2]]
    assert micro.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert micro.predict.tolist() == [1, 2, 3, 1, 5] and micro.targets.tolist() == [7, 8, 9, 6, 6]
    assert micro.rectangle(torch.arange(5.0), 4).tolist() == [[0, 1, 2, 0], [3, 0, 0, 0], [4, 0, 0, 0]]
    assert Micro.of(sequences, [0, 1], CPU, share=False).tokens.tolist() == [[1, 2, 7, 8, 1, 2]]


def test_columns_apart_come_with_a_weight_for_every_row() -> None:
    c = Completion((7,), (-1.0,), (4,), "", "stop")
    group = Group("g", Prompt(0, "", (1,)), (c, c), totals=(1.5, math.nan))
    group = replace(group, columns={"right": (1.0, math.nan), "gold": (9.0, 9.0)}, weights={"right": (1.0, 0.5)})
    batch, _ = collate([group], apart=True)
    assert batch.rewards.shape == (2, 1) and batch.rewards[0].tolist() == [1.0] and batch.rewards[1].isnan().all()
    assert batch.reward_weights.tolist() == [[1.0], [0.5]]  # gold weighs nothing: it is no objective
    assert collate([group])[0].rewards[0].item() == 1.5


def test_filters_judge_the_component_that_the_config_names() -> None:
    c = Completion((7,), (-1.0,), (4,), "", "stop")
    scores = {"right": (Score("ok", 1.0), Score("ok", 1.0)), "style": (Score("ok", 0.0), Score("timeout"))}
    group = Group("g", Prompt(0, "", (1,)), (c, c), components=scores, totals=(1.0, 1.0))
    assert collate([group], accuracy="right")[0].accuracy.tolist() == [1.0, 1.0]
    assert collate([group], accuracy="style")[0].accuracy[1].isnan() and collate([group])[0].accuracy is None


def test_a_mixture_of_sampled_and_given_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="others do not"):
        collate(samples.groups(1) + samples.groups(1, sampled=False))


@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    budget=st.integers(20, 200),
    ranks=st.integers(1, 4),
)
def test_every_sequence_has_one_place_within_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    bins = pack(lengths, lengths, budget, ranks)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert len(bins) % ranks == 0
    assert all(sum(lengths[i] for i in b) <= budget or len(b) == 1 for b in bins)
    assert bins == pack(lengths, lengths, budget, ranks)


def test_micro_batches_cost_nearly_the_same() -> None:
    lengths = [n % 50 + 1 for n in range(400)]  # 10200 tokens
    loads = [sum(lengths[i] for i in b) for b in pack(lengths, lengths, 2600, 2)]
    assert len(loads) == 4 and max(loads) - min(loads) <= 50


def test_a_group_stays_together_unless_it_is_too_long_or_there_are_too_few() -> None:
    sequences = Sequences([(1, 2)] * 6, [(3, 4, 5)] * 5 + [()], [0, 0, 0, 1, 1, 1])  # 2 + 3 * 2 and 2 + 2 * 2 tokens
    assert sequences.units(100, share=True) == [[0, 1, 2], [3, 4]]
    assert sequences.units(6, share=True) == [[0, 1], [2], [3, 4]]
    assert sequences.units(100, share=False) == [[0], [1], [2], [3], [4]]
    assert split(sequences, 8, 100, 1) == [[0, 1, 2, 3, 4]]
    alone = sequences.rows([0, 1, 2, 3])
    assert split(alone.rows([0, 1]), 8, 100, 2) == [[0], [1]]  # one group, two ranks
    assert split(alone.rows([0]), 8, 100, 2) == [[0], []]
