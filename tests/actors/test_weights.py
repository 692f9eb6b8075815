"""Snapshots: what they hold, what their digest covers, what is refused."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.weights import Checksum, Refused, check_complete, layout, snapshot, verify

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16).T,  # not contiguous in memory order of its shape
    "c": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def test_tensors_survive_and_start_at_aligned_offsets():
    weights = snapshot(TENSORS.items(), version=3)
    # "a" takes 24 bytes, so "b" starts at 64, "c" at 128, and the empty one after c's 8 bytes at 192
    assert [entry.offset for entry in weights.manifest] == [0, 64, 128, 192]
    back = dict(pickle.loads(pickle.dumps(weights)).tensors())
    assert back.keys() == TENSORS.keys() and weights.version == 3
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_the_digest_is_the_sha256_of_header_and_bytes():
    one = snapshot([("a", torch.tensor([1.0]))], version=1)
    by_hand = hashlib.sha256(b"('a', 'float32', (1,))" + np.float32(1).tobytes()).hexdigest()
    assert one.digest == by_hand
    verify(one)


def test_floating_tensors_take_the_engines_dtype():
    weights = dict(snapshot(TENSORS.items(), version=1, dtype="bfloat16").tensors())
    assert weights["a"].dtype == torch.bfloat16 and weights["c"].dtype == torch.int64
    assert weights["a"].float().equal(TENSORS["a"])  # small integers are exact in bfloat16


def test_a_snapshot_is_a_copy():
    tensor = torch.ones(4)
    weights = snapshot([("a", tensor)], version=1)
    tensor.zero_()
    assert dict(weights.tensors())["a"].sum() == 4


@pytest.mark.parametrize("position", [0, 23, 64, 135])
def test_one_flipped_byte_is_refused(position):
    weights = snapshot(TENSORS.items(), version=5)
    buffer = weights.buffer.copy()
    buffer[position] ^= 1
    with pytest.raises(Refused, match=r"version 5.*changed on the way"):
        verify(replace(weights, buffer=buffer))


@pytest.mark.parametrize("change", [{"name": "z"}, {"dtype": "int32"}, {"shape": (3, 2)}])
def test_a_changed_manifest_is_refused(change):
    weights = snapshot(TENSORS.items(), version=5)
    manifest = (weights.manifest[0]._replace(**change), *weights.manifest[1:])
    with pytest.raises(Refused):
        verify(replace(weights, manifest=manifest))


def test_a_buffer_that_ends_early_is_refused():
    weights = snapshot(TENSORS.items(), version=5)
    with pytest.raises(Refused, match="ends within 'c'"):
        verify(replace(weights, buffer=weights.buffer[:130]))


def test_a_layout_says_in_which_dtype_tensors_will_travel():
    plan = layout(TENSORS.items(), "bfloat16")
    assert plan[0] == ("a", "bfloat16", (2, 3)) and plan[2] == ("c", "int64", ())


def checksum(tensors) -> str:
    summed = Checksum()
    for name, tensor in tensors:
        summed.add(name, tensor)
    return summed.digest()


def flipped(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    bits = tensor.contiguous().clone().view(-1).view(torch.uint8)
    bits[byte] ^= 128
    return bits.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_a_checksum_sees_every_flipped_byte_and_every_exchange_of_two_elements(dtype):
    tensor = (torch.arange(1, 7) % 2 if dtype == torch.bool else torch.arange(1, 7)).to(dtype)
    seen = {checksum([("w", tensor)])}
    if dtype != torch.bool:
        seen |= {checksum([("w", flipped(tensor, byte))]) for byte in range(6 * tensor.element_size())}
        assert len(seen) == 1 + 6 * tensor.element_size()
    swapped = tensor.clone()
    swapped[[0, 5]] = tensor[[5, 0]]
    assert checksum([("w", swapped)]) not in seen


def test_a_checksum_sees_swapped_tensors_and_other_names_dtypes_and_shapes():
    one, two = torch.ones(4), torch.full((4,), 2.0)
    variants = [
        [("a", one), ("b", two)],
        [("a", two), ("b", one)],
        [("b", two), ("a", one)],
        [("a", one), ("c", two)],
        [("a", one), ("b", two.view(2, 2))],
        [("a", one), ("b", two.view(torch.int32))],
        [("a", one)],
    ]
    assert len({checksum(v) for v in variants}) == len(variants)


def test_a_checksum_is_the_weighted_sum_of_the_bits_modulo_2_to_the_64(monkeypatch):
    monkeypatch.setattr("actors.weights.BLOCK", 7)  # several blocks, the last one not full
    tensor = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)) * 1e30
    summed = Checksum()
    summed.add("w", tensor)
    bits = tensor.numpy().view(np.int32).reshape(-1).astype(object)
    by_hand = int(sum(int(x) * (2 * i + 1) for i, x in enumerate(bits))) % 2**64
    assert int(summed.sums().numpy().view(np.uint64)[0]) == by_hand


def test_a_checksum_does_not_care_how_a_tensor_lies_in_memory():
    tensor = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    packed = torch.cat([torch.zeros(2, dtype=torch.uint8), tensor.view(-1).view(torch.uint8)])
    unaligned = packed[2:].view(torch.bfloat16).view(3, 4)  # as vLLM unpacks what it received
    assert checksum([("w", tensor)]) == checksum([("w", unaligned)]) == checksum([("w", tensor.T.contiguous().T)])
    assert checksum([("scalar", torch.tensor(3)), ("empty", torch.empty(0, 4))]).startswith("nccl:")


def test_a_parameter_without_weights_is_named():
    check_complete({"a"}, {"a", "b"})
    with pytest.raises(ValueError, match=r"lack 1 of the model's parameters, like \['b'\]"):
        check_complete({"a", "b"}, {"a"})
