"""Snapshots: what they hold, what their digest covers, what is refused."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.weights import Broadcast, Refused, layout, snapshot, verify

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


def test_a_broadcast_has_a_digest_of_its_version_and_layout():
    plan = layout(TENSORS.items(), "bfloat16")
    assert plan[0] == ("a", "bfloat16", (2, 3)) and plan[2] == ("c", "int64", ())
    assert Broadcast(1, plan).digest == Broadcast(1, plan).digest
    assert len({Broadcast(1, plan).digest, Broadcast(2, plan).digest, Broadcast(1, plan[1:]).digest}) == 3
