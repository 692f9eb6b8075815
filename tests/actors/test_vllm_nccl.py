"""Both ends of a broadcast in one process, over a wire of our own where vLLM would use NCCL. No GPU, no engine."""

from __future__ import annotations

import importlib
import os
import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from actors.engine import EngineSpec
from actors.vllm_engine import agreed, prepare_environment
from actors.weights import Broadcast, Checksum, Interrupted, layout

TENSORS = {f"layers.{i}.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(5)}


@pytest.fixture(scope="module")
def nccl():
    environment = dict(os.environ)
    prepare_environment(EngineSpec(model="", max_model_len=1))
    import actors.vllm_nccl

    importlib.import_module("vllm.model_executor.model_loader.mtp_validation")  # slow, and receiving needs it
    yield actors.vllm_nccl
    os.environ.clear()
    os.environ.update(environment)


class Wire:
    """A communicator that carries one buffer at a time, from one end to the other; `spoil` changes them on the way."""

    def __init__(self, carry: queue.Queue | None = None) -> None:
        self.disabled, self.carry, self.spoil = False, carry or queue.Queue(1), lambda number, buffer: buffer
        self.number = 0

    def broadcast(self, buffer: torch.Tensor, src: int, sends: bool) -> None:
        """Blocks until the other end is there, or the communicator is destroyed: then nothing happens any more."""
        while not self.disabled:
            try:
                if sends:
                    self.carry.put(buffer.clone(), timeout=0.01)
                else:
                    buffer.copy_(self.spoil(self.number, self.carry.get(timeout=0.01)))
                    self.number += 1
                return
            except (queue.Full, queue.Empty):
                continue

    def destroy(self) -> None:
        self.disabled = True


def producer(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers):
    """As vLLM's packed producer, without streams: a buffer for each tensor."""
    for item in iterator:
        group.broadcast(post_iter_func(item).contiguous().view(-1).view(torch.uint8), src, sends=True)


def consumer(iterator, group, src, post_unpack_func, buffer_size_bytes, num_buffers, device):
    """As vLLM's packed consumer, without streams: two tensors are handed on at once."""
    part = []
    for name, (shape, dtype) in iterator:
        flat = torch.zeros(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
        group.broadcast(flat, src, sends=False)
        part.append((name, flat.view(dtype).view(shape)))
        if len(part) == 2:
            post_unpack_func(part)
            part = []
    if part:
        post_unpack_func(part)


class Model(torch.nn.Module):
    """Keeps what it is given to load."""

    def __init__(self, tensors=TENSORS) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}
        self._names = list(tensors)

    def named_parameters(self):
        return [(name, None) for name in self._names]

    def load_weights(self, weights):
        self.loaded |= {name: tensor.clone() for name, tensor in weights}
        return {name for name, _ in weights}


@pytest.fixture
def ends(nccl, monkeypatch):
    """(sender, receiver, the receiver's wire, its model), joined."""
    engine = "vllm.distributed.weight_transfer.nccl_engine"
    monkeypatch.setattr(f"{engine}.packed_nccl_broadcast_producer", producer)
    monkeypatch.setattr(f"{engine}.packed_nccl_broadcast_consumer", consumer)
    near = Wire()
    far = Wire(near.carry)
    monkeypatch.setattr(f"{engine}.open_trainer_endpoint", lambda info: near)
    monkeypatch.setattr(nccl, "worker_init_process_group", lambda info, parallel: far)
    sender = nccl.NcclSender("host", 1, 2, layout(TENSORS.items()), seconds=60.0)
    sender._source._device = "cpu"
    model = Model()
    config = SimpleNamespace(parallel_config=None, model_config=None)
    receiver = nccl.NcclReceiver(None, config, torch.device("cpu"), model)
    receiver.join({"master_address": "host", "master_port": 1, "rank_offset": 1, "world_size": 2}, seconds=60.0)
    return sender, receiver, far, model


def receive(nccl, receiver, seconds: float = 60.0):
    info = nccl.broadcast_info(Broadcast(1, layout(TENSORS.items()), seconds))
    receiver.receive_weights(receiver.parse_update_info(info))
    return receiver.outcome


def in_thread(work):
    """Start `work`; calling the result waits for its end and gives what it returned or raised."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return lambda: (thread.join(60), outcome[0])[1]


def test_what_is_sent_arrives_and_both_ends_know_the_same_digest(nccl, ends):
    sender, receiver, _, model = ends
    sending = in_thread(lambda: sender.send(iter(TENSORS.items()), 60.0))
    digest, problem = receive(nccl, receiver)
    assert sending() == digest and digest.startswith("nccl:") and problem == ""
    assert model.loaded.keys() == TENSORS.keys()  # without the checksums
    assert all(torch.equal(model.loaded[name], tensor) for name, tensor in TENSORS.items())
    again = in_thread(lambda: sender.send(((n, t + 1) for n, t in TENSORS.items()), 60.0))  # the group serves on
    other, _ = receive(nccl, receiver)
    assert again() == other != digest


@pytest.mark.parametrize("number", [0, 4, 5], ids=["first tensor", "last tensor", "checksums"])
def test_a_byte_that_changes_on_the_way_is_an_error(nccl, ends, number):
    sender, receiver, wire, _ = ends

    def spoil(this, buffer):
        buffer[3] ^= this == number
        return buffer

    wire.spoil = spoil
    sending = in_thread(lambda: sender.send(iter(TENSORS.items()), 60.0))
    with pytest.raises(ValueError, match="not those that were sent"):
        receive(nccl, receiver)
    assert receiver.outcome[0] == "" and sending().startswith("nccl:")
    assert receiver.model.__class__ is Model  # vLLM's own again


def test_a_tensor_in_the_place_of_another_is_an_error(nccl, ends):
    sender, receiver, wire, _ = ends
    came = []

    def spoil(number, buffer):
        came.append(buffer)
        return came[0] if number == 1 else buffer

    wire.spoil = spoil
    sending = in_thread(lambda: sender.send(iter(TENSORS.items()), 60.0))
    with pytest.raises(ValueError, match="not those that were sent"):
        receive(nccl, receiver)
    sending()


def test_parameters_that_nothing_was_sent_for_are_an_error(nccl, ends):
    sender, receiver, _, _ = ends
    receiver._parameters = {*TENSORS, "forgotten"}
    sending = in_thread(lambda: sender.send(iter(TENSORS.items()), 60.0))
    with pytest.raises(ValueError, match="forgotten"):
        receive(nccl, receiver)
    sending()


def test_a_receiver_gives_up_in_time_and_has_left_the_group(nccl, ends):
    _, receiver, wire, _ = ends
    started = time.monotonic()
    digest, problem = receive(nccl, receiver, seconds=0.3)  # nobody sends
    assert 0.3 <= time.monotonic() - started < 3
    assert digest == "" and "not all of it came within" in problem
    assert wire.disabled and receiver.model_update_group is None
    assert "not initialized" in receive(nccl, receiver)[1]  # until it joins another one


def test_an_error_of_the_transport_interrupts_and_does_not_break(nccl, ends):
    _, receiver, wire, _ = ends

    def spoil(number, buffer):
        raise RuntimeError("NCCL error: remote process exited")

    wire.spoil = spoil
    wire.carry.put(torch.zeros(60, dtype=torch.uint8))
    assert receive(nccl, receiver) == ("", "RuntimeError: NCCL error: remote process exited")
    assert wire.disabled


def test_a_sender_gives_up_in_time_and_still_reads_all_tensors(nccl, ends):
    sender, *_ = ends
    read = []

    def tensors():
        for name, tensor in TENSORS.items():
            read.append(name)  # other ranks gather each of them too
            yield name, tensor

    started = time.monotonic()
    with pytest.raises(TimeoutError, match="not all of it was received"):
        sender.send(tensors(), 0.3)  # nobody receives
    assert 0.3 <= time.monotonic() - started < 3 and read == list(TENSORS)


def test_a_group_that_does_not_come_together_is_given_up(nccl, monkeypatch):
    meet, left = threading.Event(), []

    def never(info):
        meet.wait(10)
        group = Wire()
        left.append(group)
        return group

    monkeypatch.setattr("vllm.distributed.weight_transfer.nccl_engine.open_trainer_endpoint", never)
    with pytest.raises(TimeoutError, match="not within"):
        nccl.NcclSender("host", 1, 2, layout(TENSORS.items()), seconds=0.1)
    meet.set()  # the others come after all
    while not left or not left[0].disabled:  # and are not kept waiting in a group that nobody uses
        time.sleep(0.01)


def test_vllm_without_the_nccl_library_is_said_and_not_trusted(nccl, monkeypatch):
    silent = Wire()
    silent.disabled = True
    monkeypatch.setattr("vllm.distributed.weight_transfer.nccl_engine.open_trainer_endpoint", lambda info: silent)
    with pytest.raises(RuntimeError, match="did not find the NCCL library"):
        nccl.NcclSender("host", 1, 2, layout(TENSORS.items()), seconds=60.0)


def test_what_ends_in_time_returns_or_raises_as_it_is(nccl):
    assert nccl.within(60.0, lambda: 7, late=lambda _: None) == 7
    with pytest.raises(KeyError):
        nccl.within(60.0, lambda: {}["x"], late=lambda _: None)
    with pytest.raises(TimeoutError, match="its own"):

        def fails():
            raise TimeoutError("its own")

        nccl.within(60.0, fails, late=lambda _: None)


def test_the_workers_of_an_engine_must_agree():
    assert agreed(3, [("nccl:a", ""), ("nccl:a", "")]) == "nccl:a"
    with pytest.raises(Interrupted, match="version 3 was interrupted: gone"):
        agreed(3, [("nccl:a", ""), ("", "gone")])
    with pytest.raises(ValueError, match="different weights"):
        agreed(3, [("nccl:a", ""), ("nccl:b", "")])


def test_the_sender_sends_in_the_announced_dtype_and_its_checksums_last(nccl):
    stream = nccl._Stream(layout(TENSORS.items(), "bfloat16"), device="cpu")
    stream.tensors = TENSORS.items()
    sent = list(stream)
    announced = [(meta.name, meta.dtype, meta.shape) for meta in stream.metadata()]
    assert [(name, t.dtype, tuple(t.shape)) for name, t in sent] == announced
    assert {t.dtype for _, t in sent[:-1]} == {torch.bfloat16} and sent[-1][0] == nccl.CHECKSUMS
    by_hand = Checksum()
    for name, tensor in TENSORS.items():
        by_hand.add(name, tensor.bfloat16())
    assert stream.checksum.digest() == by_hand.digest()
