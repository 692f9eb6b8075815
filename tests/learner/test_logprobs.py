"""The chunked log-probs are those of log_softmax, gradients included, and never hold all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from algos.tw_grpo import group_divergence
from learner.logprobs import Head, divergences, sum_of_squares, tempered, token_logprobs

N, H, V = 50, 8, 300


def case(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden, weight, b = (torch.randn(s).to(dtype).requires_grad_() for s in ((N, H), (V, H), (V,)))
    return hidden, weight, b if bias else None, torch.randint(0, V, (N,))


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    z = torch.nn.functional.linear(hidden, weight, bias).float() * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    logprobs = (z / head.temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


HEADS = [Head(), Head(temperature=0.7), Head(softcap=2.0, temperature=1.3), Head(scale=0.25, softcap=1.0)]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_values_and_gradients_equal_plain_log_softmax(head: Head, bias: bool, chunk: int) -> None:
    hidden, weight, b, targets = case(bias)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    up = torch.randn(2, N)
    expected = plain(hidden, weight, b, targets, head)
    wanted = torch.autograd.grad((up * torch.stack(expected)).sum(), leaves)
    values = token_logprobs(hidden, weight, b, targets, head, chunk)
    got = torch.autograd.grad((up * torch.stack(values)).sum(), leaves)
    for x, y in zip([*values, *got], [*expected, *wanted], strict=True):
        assert torch.allclose(x, y, atol=2e-5, rtol=1e-5)


def test_gradients_of_log_probs_alone_and_of_entropies_alone() -> None:
    hidden, weight, b, targets = case()
    for which in (0, 1):
        wanted = torch.autograd.grad(plain(hidden, weight, b, targets, Head())[which].sum(), [hidden, weight, b])
        got = torch.autograd.grad(
            token_logprobs(hidden, weight, b, targets, Head(), 16)[which].sum(), [hidden, weight, b]
        )
        assert all(torch.allclose(x, y, atol=2e-5, rtol=1e-5) for x, y in zip(got, wanted, strict=True))


def test_bfloat16_differs_from_plain_by_its_rounding_only() -> None:
    hidden, weight, b, targets = case(dtype=torch.bfloat16)
    got, wanted = (f(hidden, weight, b, targets, Head(), *c)[0] for f, c in ((token_logprobs, (16,)), (plain, ())))
    assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=1e-5)
    g, w = (torch.autograd.grad(x.sum(), weight)[0].float() for x in (got, wanted))
    assert (g - w).norm() < 0.02 * w.norm()  # bfloat16 keeps 8 bits: 0.4 % per number


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest result of any operation."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight() -> None:
    hidden, weight, b, targets = case()
    with LargestTensor() as seen:
        sum(token_logprobs(hidden, weight, b, targets, Head(), 10)).sum().backward()
    assert seen.numbers == 10 * V  # the full logits would be N * V, five times as many


def test_only_numbers_per_token_are_kept_for_the_backward_pass() -> None:
    hidden, weight, b, targets = case()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, weight, b, targets, Head(), 10)
    assert sorted(kept) == sorted([N * H, V * H, V, N, N, N])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_other_readers_say_what_the_whole_distribution_says(chunk: int) -> None:
    hidden, weight, b, targets = (x if x is None else x.detach() for x in case())
    head = Head(temperature=0.7)
    p = (torch.nn.functional.linear(hidden, weight, b) / 0.7).softmax(-1)
    (squares,) = sum_of_squares(hidden, weight, b, targets, head, chunk)
    assert torch.allclose(squares, (p**2).sum(-1), atol=1e-5)
    hot, _ = tempered(1.2)(hidden, weight, b, targets, head, chunk)
    assert torch.allclose(hot, plain(hidden, weight, b, targets, Head(temperature=0.84))[0], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_divergence_within_groups_is_that_of_the_padded_rectangle(chunk: int) -> None:
    """Rows 0, 1, 3 are one group with 3, 1 and 2 tokens, row 2 is alone with 2."""
    hidden, weight, b, _ = (x if x is None else x.detach() for x in case())
    rows, steps = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 2, 0, 0, 1, 0, 1])
    groups, sizes = torch.tensor([7, 7, 5, 7]), {7: 4, 5: 1}  # a fourth completion of the first group is empty
    (got,) = divergences(rows, steps, groups, sizes)(hidden[:8], weight, b, rows, Head(), chunk)
    logprobs = torch.nn.functional.linear(hidden[:8], weight, b).log_softmax(-1)
    q, present = torch.zeros(1, 4, 3, V), torch.zeros(1, 4, 3).bool()
    for cell, row in ((0, 0), (1, 0), (2, 0), (3, 1), (6, 2), (7, 2)):
        q[0, row, steps[cell]], present[0, row, steps[cell]] = logprobs[cell], True
    want = group_divergence(q, present)[0]
    assert torch.allclose(got[[0, 1, 2, 3, 6, 7]], want[[0, 1, 2, 0, 0, 1]], rtol=1e-4)
    assert torch.allclose(got[4:6], torch.zeros(2), atol=1e-4)  # alone, it agrees with itself
