"""Weights on their way when things go wrong: a fake learner, actors in threads, and a group that needs all its members.

The group is a barrier with a deadline, as NCCL is to us: who does not come holds up all others until they give up.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import ray
import torch

from actors.engine import EngineBroken, FakeEngine
from actors.placement import ThreadHost
from actors.pool import ActorLost, ActorPool
from actors.weights import Broadcast, Checksum, Interrupted, Refused, Snapshot
from alignlab import handoff as module
from alignlab.handoff import Handoff, HandoffFailed
from core.loading import parse_config
from core.schema import GroupRequest, Prompt, Sampling

PATIENCE = 2.0  # publish_timeout


class Net:
    """NCCL groups by the port where they meet."""

    def __init__(self) -> None:
        self.lock, self.groups, self.formed = threading.Lock(), {}, 0
        self.digest = self.arrives = ""  # of what was sent; of what arrives, if that is something else

    def meet(self, port: int, size: int, seconds: float) -> threading.Barrier:
        with self.lock:
            group = self.groups.setdefault(port, threading.Barrier(size))
        assert group.parties == size
        if group.wait(seconds) == 0:
            self.formed += 1
        return group


class Engine(FakeEngine):
    """A member; `spoiled`: what it does instead of receiving the next broadcasts."""

    def __init__(self, spec, net: Net) -> None:
        super().__init__(spec)
        self.net, self.group, self.spoiled, self.slow, self.received = net, None, [], 0.0, []

    def connect(self, address, port, rank, world_size, seconds):
        time.sleep(self.slow)
        try:
            self.group = self.net.meet(port, world_size, seconds)
        except threading.BrokenBarrierError:
            raise Refused("the group was not joined") from None

    def update_weights(self, weights):
        self.received.append(type(weights))
        if isinstance(weights, Snapshot):
            return super().update_weights(weights)
        self.version = -1
        if self.spoiled:
            self.spoiled.pop()()
        try:
            self.group.wait(weights.seconds)
        except threading.BrokenBarrierError:
            raise Interrupted("not all of it came") from None
        self.version, self.digest = weights.version, self.net.arrives or self.net.digest
        return self.digest


def dies():
    raise RuntimeError("the GPU fell off the bus")


def finds_other_weights():
    raise EngineBroken("the weights that came are not those that were sent")


class Learner:
    """Rank 0 on a thread, one call after the other; its weights are its version."""

    def __init__(self) -> None:
        self.version, self._queue, self.exports = 0, asyncio.Lock(), []

    async def step(self, seconds: float = 0.0) -> None:
        async with self._queue:
            await asyncio.sleep(seconds)
            self.version += 1

    async def export(self, visit):
        async with self._queue:
            self.exports.append(type(visit).__name__)
            tensors = iter([("w", torch.full((4,), float(self.version)))])
            return await asyncio.to_thread(visit, tensors, self.version)

    async def ask(self, work):
        async with self._queue:
            return await asyncio.to_thread(work)


@pytest.fixture
def net(monkeypatch):
    net = Net()

    class Sender:
        def __init__(self, address, port, world_size, layout, seconds):
            self.group = net.meet(port, world_size, seconds)

        def send(self, tensors, seconds):
            summed = Checksum()
            for name, tensor in tensors:
                summed.add(name, tensor)
            net.digest = summed.digest()
            self.group.wait(seconds)
            return net.digest

        def close(self):
            self.group.abort()

    monkeypatch.setitem(sys.modules, "actors.vllm_nccl", SimpleNamespace(NcclSender=Sender))
    monkeypatch.setattr(module, "_sender", None)
    monkeypatch.setattr(ray, "put", lambda weights: weights)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "host")
    monkeypatch.setattr("actors.pool.GRACE_SECONDS", 0.3)
    return net


def run(tmp_path, net: Net, scenario, count: int = 2, transfer: str = "nccl") -> list[str]:
    """`scenario(learner, pool, publish, engines)` on a started pool; what the hand-off has said."""
    said, engines = [], []

    def make(spec):
        engines.append(Engine(spec, net))
        return engines[-1]

    async def main():
        tree = {"name": "n", "steps": 1, "model": {"path": "m"}, "data": {"path": "d", "max_prompt_tokens": 8}}
        actors = {"count": count, "start_timeout": 10.0, "publish_timeout": PATIENCE, "weight_transfer": transfer}
        config = parse_config({**tree, "rollout": {"max_tokens": 8}, "actors": actors}, "test")
        pool, learner = ActorPool(config, tmp_path, host=ThreadHost(), make=make), Learner()
        await pool.start()
        try:
            publish = Handoff(learner, pool, said.append)
            await asyncio.wait_for(scenario(learner, pool, publish, engines), 30)
        finally:
            await pool.close()

    asyncio.run(main())
    return said


def serving(pool) -> dict[str, tuple[int, bool]]:
    """(version, whether it came by broadcast) of the actors that are well."""
    stats = {name: pool._stats[name] for name in pool.well}
    return {name: (s.version, s.digest.startswith("nccl:")) for name, s in stats.items()}


def lose(pool, name: str) -> None:
    pool._lose(name, pool._handles[name], "killed")


def test_one_group_serves_all_publishes_and_both_ends_agree_on_the_digest(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        await publish(0)
        await learner.step()
        await publish(1)
        assert serving(pool) == {"actor-0": (1, True), "actor-1": (1, True)}
        assert learner.exports == ["Announce", "SendNccl", "SendNccl"]

    assert run(tmp_path, net, scenario) == [] and net.formed == 1


def test_an_actor_that_is_lost_is_left_out_of_the_group_and_joins_the_next_one(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        await publish(0)
        lose(pool, "actor-1")
        await learner.step()
        await publish(1)
        assert serving(pool) == {"actor-0": (1, True)}
        await pool.replace("actor-1")
        assert serving(pool)["actor-1"][0] == 1  # it caught up by itself
        await learner.step()
        await publish(2)
        assert serving(pool) == {"actor-0": (2, True), "actor-1": (2, True)}

    assert run(tmp_path, net, scenario) == [] and net.formed == 3


def test_an_actor_that_dies_in_a_broadcast_costs_the_deadline_and_not_the_run(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        await publish(0)
        engines[1].spoiled.append(dies)
        await learner.step()
        started = time.monotonic()
        await publish(1)
        assert time.monotonic() - started < PATIENCE + 3.0
        assert pool.well == ("actor-0",) and serving(pool)["actor-0"][0] == 1
        assert engines[0].received == [Broadcast, Broadcast, Snapshot]
        await pool.replace("actor-1")
        await learner.step()
        await publish(2)
        assert serving(pool) == {"actor-0": (2, True), "actor-1": (2, True)}

    said = run(tmp_path, net, scenario)
    assert len(said) == 1 and "version 1 go through the object store" in said[0] and net.formed == 2


def test_requests_in_flight_survive_an_interrupted_broadcast(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        await publish(0)
        engines[0].latency = 0.05
        await pool.submit("actor-0", [GroupRequest("g", Prompt(0, "?", (5,)), (6,), Sampling(8))])  # 8 tokens
        while not engines[0].generated():
            await asyncio.sleep(0.005)
        engines[1].spoiled.append(dies)
        await learner.step()
        await publish(1)
        (group,) = (await pool.poll("actor-0", 5)).groups
        assert set(group.completions[0].versions) == {0, 1}

    run(tmp_path, net, scenario)


def test_an_actor_that_does_not_come_to_the_meeting_is_left_out_and_replaced(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        engines[1].slow = 6.0
        await publish(0)
        assert serving(pool) == {"actor-0": (0, False)}
        assert pool.well == ("actor-0",) and engines[0].received == [Snapshot]
        await pool.replace("actor-1")
        await learner.step()
        await publish(1)
        assert serving(pool) == {"actor-0": (1, True), "actor-1": (1, True)}

    (said,) = run(tmp_path, net, scenario)
    assert "actor-1" in said and "the learner could not join" in said and net.formed == 1


def test_an_actor_that_finds_other_weights_than_were_sent_is_lost_alone(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        def after_all():
            engines[1].group.wait(5)  # it has received all of it
            finds_other_weights()

        engines[1].spoiled.append(after_all)
        await publish(0)
        assert serving(pool) == {"actor-0": (0, True)}
        with pytest.raises(ActorLost, match="not those that were sent"):
            await pool.poll("actor-1", 0.01)

    assert run(tmp_path, net, scenario) == []


def test_actors_that_agree_on_a_digest_that_the_learner_does_not_have_get_the_weights_again(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        net.arrives = "nccl:other"
        await publish(0)
        assert serving(pool) == {"actor-0": (0, False), "actor-1": (0, False)}

    (said,) = run(tmp_path, net, scenario)
    assert "other weights than the learner has sent" in said


def test_a_learner_that_cannot_join_or_send_says_so_and_the_object_store_serves(tmp_path, net, monkeypatch):
    async def scenario(learner, pool, publish, engines):
        sender = sys.modules["actors.vllm_nccl"]
        working, sender.NcclSender = sender.NcclSender, None
        await publish(0)
        assert {version for version, _ in serving(pool).values()} == {0} and pool.well == pool.names
        sender.NcclSender = working
        await learner.step()
        await publish(1)  # in a new group
        module._sender.group.abort()
        await learner.step()
        await publish(2)
        assert {version for version, _ in serving(pool).values()} == {2} and pool.well == pool.names

    first, second = run(tmp_path, net, scenario)
    assert "could not join: TypeError" in first and "could not send: BrokenBarrierError" in second and net.formed == 1


def test_a_late_joiner_gets_the_label_of_the_weights_that_it_gets(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        await publish(0)
        lose(pool, "actor-1")
        step = asyncio.create_task(learner.step(seconds=PATIENCE + 0.3))  # longer than a publish may take
        await asyncio.sleep(0)
        await pool.replace("actor-1")
        assert step.done() and {n: v for n, (v, _) in serving(pool).items()} == {"actor-0": 0, "actor-1": 1}
        await publish(1)
        assert serving(pool) == {"actor-0": (1, True), "actor-1": (1, True)}

    run(tmp_path, net, scenario)


@pytest.mark.parametrize("transfer", ["nccl", "object_store"])
def test_a_publish_says_what_it_took(tmp_path, net, transfer):
    async def scenario(learner, pool, publish, engines):
        costs = (await publish(0)).costs
        assert costs["weights/bytes"] == 16  # 4 float32
        assert 0 <= costs["weights/stall_seconds"] < 1 and 0 <= costs["weights/prepare_seconds"] < 1
        assert ("weights/put_seconds" in costs) == (transfer == "object_store")  # nothing is put for a broadcast

    run(tmp_path, net, scenario, transfer=transfer)


@pytest.mark.parametrize("transfer", ["nccl", "object_store"])
def test_when_no_actor_is_left_a_publish_waits_for_the_first_replacement(tmp_path, net, transfer):
    async def scenario(learner, pool, publish, engines):
        lose(pool, "actor-0"), lose(pool, "actor-1")
        await publish(0)
        assert {version for version, _ in serving(pool).values()} == {0}

    said = run(tmp_path, net, scenario, transfer=transfer)
    assert [line.partition(": ")[2] for line in said] == ["no actor is well"] * (transfer == "nccl")


def test_weights_of_another_version_than_was_asked_for_are_an_error(tmp_path, net):
    async def scenario(learner, pool, publish, engines):
        with pytest.raises(HandoffFailed, match="version 3 was to be published, and the learner is at 0"):
            await publish(3)

    run(tmp_path, net, scenario, transfer="object_store")
