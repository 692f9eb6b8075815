"""Snapshots: what they hold, what their digest covers, what is refused."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash

from actors.weights import (
    Checksum,
    Refused,
    check_adapters,
    check_complete,
    cut,
    layout,
    merged,
    snapshot,
    verify,
    view,
    write,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16).T,  # not contiguous in memory order of its shape
    "c": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def test_tensors_survive_a_pickle_and_one_buffer():
    weights = snapshot(TENSORS.items(), version=3)
    stream = io.BytesIO()
    write(weights, stream)
    # "a" takes 24 bytes, so "b" starts at 64, "c" at 128, and the empty one at 192
    assert len(stream.getvalue()) == 192 and weights.nbytes == 24 + 4 + 8
    pieces = cut(np.frombuffer(stream.getvalue(), np.uint8), weights.manifest)
    for back in (pickle.loads(pickle.dumps(weights)), replace(weights, pieces=pieces)):
        verify(back)
        tensors = dict(back.tensors())
        assert tensors.keys() == TENSORS.keys() and back.version == 3
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def test_the_digest_is_the_xxh3_of_header_and_bytes():
    one = snapshot([("a", torch.tensor([1.0]))], version=1)
    by_hand = xxhash.xxh3_128(b"('a', 'float32', (1,))" + np.float32(1).tobytes()).hexdigest()
    assert one.digest == f"xxh3:{by_hand}"
    verify(one)


def test_floating_tensors_take_the_engines_dtype():
    weights = dict(snapshot(TENSORS.items(), version=1, dtype="bfloat16").tensors())
    assert weights["a"].dtype == torch.bfloat16 and weights["c"].dtype == torch.int64
    assert weights["a"].float().equal(TENSORS["a"])  # small integers are exact in bfloat16


def test_a_snapshot_is_a_copy_and_a_view_is_none():
    tensor = torch.ones(4)
    copied, seen = snapshot([("a", tensor)], version=1), view([("a", tensor)], version=1)
    assert copied.digest == seen.digest
    tensor.zero_()
    assert dict(copied.tensors())["a"].sum() == 4 and dict(seen.tensors())["a"].sum() == 0
    with pytest.raises(Refused, match="changed on the way"):
        verify(seen)


@pytest.mark.parametrize(("piece", "byte"), [(0, 0), (0, 23), (1, 0), (2, 7)])
def test_one_flipped_byte_is_refused(piece, byte):
    weights = snapshot(TENSORS.items(), version=5)
    weights.pieces[piece][byte] ^= 1
    with pytest.raises(Refused, match=r"version 5.*changed on the way"):
        verify(weights)


@pytest.mark.parametrize("change", [{"name": "z"}, {"dtype": "int32"}, {"shape": (3, 2)}])
def test_a_changed_manifest_is_refused(change):
    weights = snapshot(TENSORS.items(), version=5)
    manifest = (weights.manifest[0]._replace(**change), *weights.manifest[1:])
    with pytest.raises(Refused):
        verify(replace(weights, manifest=manifest))


def test_a_piece_that_ends_early_is_refused():
    weights = snapshot(TENSORS.items(), version=5)
    with pytest.raises(Refused, match="'c' has 2 bytes, not 8"):
        verify(replace(weights, pieces=(*weights.pieces[:2], weights.pieces[2][:2], weights.pieces[3])))


def test_adapters_are_added_to_the_models_own_weights_and_what_was_trained_whole_replaces_them():
    base = {"q": torch.zeros(2, 3, dtype=torch.bfloat16), "v": torch.ones(2, 2), "norm": torch.ones(3)}
    given = {"q.lora_A": torch.tensor([[1.0, 2.0, 3.0]]), "q.lora_B": torch.tensor([[10.0], [1.0]]), "v": torch.eye(2)}
    whole = dict(merged(base, given))
    assert list(whole) == ["q", "v", "norm"]  # in the order of the model's own files
    assert whole["q"].tolist() == [[10, 20, 30], [1, 2, 3]] and whole["q"].dtype == torch.float32
    assert whole["v"].tolist() == [[1, 0], [0, 1]] and whole["norm"].tolist() == [1, 1, 1]
    both = given | {"q": torch.ones(2, 3)}  # trained whole and adapted
    assert dict(merged(base, both))["q"].tolist() == [[11, 21, 31], [2, 3, 4]]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"z.lora_A": (1, 3), "z.lora_B": (2, 1)}, "'z' which the engine's own model lacks"),
        ({"q.lora_A": (1, 3)}, r"'q' of shapes A \[1, 3\] and B \[\]"),
        ({"q.lora_A": (1, 3), "q.lora_B": (2, 2)}, r"B \[2, 2\], which do not make its \[2, 3\]"),
        ({"q.lora_A": (1, 4), "q.lora_B": (2, 1)}, r"A \[1, 4\]"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(given, problem):
    check_adapters({"q.lora_A": (1, 3), "q.lora_B": (2, 1), "norm": (3,)}, {"q": (2, 3)}, version=4)
    with pytest.raises(Refused, match=f"version 4 have an adapter for .*{problem}"):
        check_adapters(given, {"q": (2, 3)}, version=4)


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
