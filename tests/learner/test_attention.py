"""Attention over packed rows against attention to each sequence alone, written out; values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.attention import Packing, packed_sdpa, packing
from learner.kernels import Ragged, classes, crossing

# Prompts of 3, 1, 5 tokens with 3, 1, 2 completions; the last completion of the first lies apart from the others; one
# is empty: of it only the prompt is read.
PROMPTS = [(0, 3), (0, 3), (8, 1), (10, 5), (10, 5), (0, 3)]
COMPLETIONS = [(3, 1), (4, 4), (9, 1), (15, 7), (22, 0), (22, 2)]
N = 24
ROWS = {
    "shared": packing(PROMPTS, COMPLETIONS),
    "alone": packing([(0, 2), (6, 3)], [(2, 4), (9, 15)]),
    "one class": packing([(0, 8)] * 2, [(8, 8), (16, 8)]),
}


def attention(query: Tensor, key: Tensor, value: Tensor, row: Packing, window: int | None = None) -> Tensor:
    """[1, heads, N, d], [1, kv heads, N, d] -> [N, heads, d], sequence by sequence, in float64."""
    q, (k, v) = query[0], (x[0].repeat_interleave(query.shape[1] // x.shape[1], 0) for x in (key, value))
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[-1], dtype=q.dtype)
    for prompt, completion in zip(row.prompts, row.completions, strict=True):
        tokens = torch.tensor([*range(prompt[0], sum(prompt)), *range(completion[0], sum(completion))])
        back = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
        hidden = (back < 0) | (back >= (window or len(tokens)))
        scores = (q[:, tokens] @ k[:, tokens].transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        out = out.index_copy(0, tokens, (scores.softmax(-1) @ v[:, tokens]).transpose(0, 1))
    return out


def tensors(heads: int, kv_heads: int, width: int = 8, value_width: int = 8) -> tuple[list[Tensor], Tensor]:
    """Query, key, value, and the gradient that flows into the output."""
    torch.manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return [torch.randn(1, h, N, d) for h, d in shapes], torch.randn(N, heads, value_width)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "value_width", "window"),
    [(2, 2, 8, None), (6, 2, 8, None), (2, 2, 4, None), (4, 2, 8, 3), (2, 2, 8, 100)],
    ids=["plain", "grouped queries", "values of another width", "window", "window beyond all"],
)
def test_a_packed_row_is_attention_to_each_sequence(
    row: Packing, heads: int, kv_heads: int, value_width: int, window: int | None
) -> None:
    given, grad = tensors(heads, kv_heads, value_width=value_width)
    single = [x.clone().requires_grad_() for x in given]
    double = [x.double().requires_grad_() for x in given]
    out, _ = packed_sdpa(torch.nn.Identity(), *single, None, packing=row, sliding_window=window)
    expected = attention(*double, row, window)
    assert torch.allclose(out[0].double(), expected, atol=1e-6)
    out[0].backward(grad)
    (expected * grad).sum().backward()
    for ours, theirs in zip(single, double, strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)


def test_padding_neither_gives_nor_takes_even_where_its_scores_are_huge() -> None:
    given, grad = tensors(2, 2)
    given[0][:, :, 0], given[1][:, :, 3:] = 100.0, 100.0  # token 0 stands in every padding cell
    single = [x.clone().requires_grad_() for x in given]
    double = [x.double().requires_grad_() for x in given]
    packed_sdpa(torch.nn.Identity(), *single, None, packing=ROWS["shared"])[0][0].backward(grad)
    (attention(*double, ROWS["shared"]) * grad).sum().backward()
    for ours, theirs in zip(single, double, strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-4)


def test_bfloat16_is_as_near_as_its_eight_bits() -> None:
    given, _ = tensors(4, 2)
    exact = attention(*(x.bfloat16().double() for x in given), ROWS["shared"])
    half, _ = packed_sdpa(torch.nn.Identity(), *(x.bfloat16() for x in given), None, packing=ROWS["shared"])
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half[0].double(), exact, atol=2**-6)


def test_completions_of_a_group_ask_its_prompt_at_once() -> None:
    (part,) = crossing(*ROWS["one class"]._spans[1:], torch.device("cpu"))
    assert (part.b, part.t, part.s) == (1, 16, 8)  # one member: both completions' 16 tokens, the prompt's 8 once
    assert [len(p.tokens) for p in ROWS["alone"].shared] == []


def test_classes_are_down_to_half_of_the_longest() -> None:
    spans = [(0, 9), (9, 5), (14, 4), (18, 2), (20, 1), (21, 0)]
    assert classes(spans) == [[(0, 9), (9, 5)], [(14, 4), (18, 2)], [(20, 1)]]


def test_on_a_gpu_all_members_lie_end_to_end_in_one_call() -> None:
    part = Ragged.of([(3, 2), (8, 1)], [(0, 3), (6, 2)], causal=False, device=torch.device("cpu"))
    assert part.tokens.tolist() == [3, 4, 8]
    assert part.keys.tolist() == [0, 1, 2, 6, 7]
    assert (part.ends_q.tolist(), part.ends_k.tolist(), part.longest) == ([0, 2, 3], [0, 3, 5], (2, 3))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_kernels_of_a_gpu_take_and_give_what_they_are_asked_for(is_causal: bool) -> None:
    """Shapes and types only, as torch's own rules for these kernels have them; nothing is computed."""
    meta = torch.device("meta")
    part = Ragged.of([(3, 2), (8, 1)], [(3, 2), (8, 1)] if is_causal else [(0, 3), (6, 2)], is_causal, meta)
    q, k = (torch.empty(N, heads, 64, dtype=torch.bfloat16, device=meta) for heads in (6, 2))
    out, lse = part.forward((q, k, k), 0.125)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((3, 6, 64), torch.bfloat16, (3, 6), torch.float32)
    part.backward((q, k, k), q, q, torch.empty(N, 6, device=meta), 0.125, (q, k, k))
