"""A rollout actor around the fake engine: order, batches, no lost results, no silent failures."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from actors.actor import EngineFailed, RolloutActor
from actors.engine import EngineSpec, FakeEngine
from actors.weights import Broadcast, Interrupted, Refused, snapshot
from core.schema import GroupRequest, Prompt, Sampling

SPEC = EngineSpec(model="", max_model_len=64)


def request(name: str, seeds: tuple[int, ...] = (1, 2), **sampling) -> GroupRequest:
    return GroupRequest(name, Prompt(0, "?", (5, 9)), seeds, Sampling(**{"max_tokens": 8, **sampling}))


def weights(version: int):
    import torch

    return snapshot([("w", torch.full((4,), float(version)))], version)


@pytest.fixture
def start():
    actors = []

    def make(**options) -> RolloutActor:
        actors.append(RolloutActor("actor-0", 0, SPEC, functools.partial(FakeEngine, **options)))
        return actors[-1]

    yield make
    for actor in actors:
        actor.close()


def collect(actor: RolloutActor, count: int) -> list:
    """All groups so far, once there are `count`; nothing is confirmed."""
    deadline = time.monotonic() + 10
    while len(groups := actor.poll(0.1).groups) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    return list(groups)


def test_groups_come_back_with_the_actors_name_and_stats_add_up(start):
    actor = start()
    actor.ready(10)
    actor.submit([request("a"), request("b", seeds=(0,))])
    groups = collect(actor, 2)
    assert {group.id for group in groups} == {"a", "b"} and {group.actor for group in groups} == {"actor-0"}
    stats = actor.status()
    # lengths are 2 + seed % 7: 3 + 4 for "a", 2 for "b"
    assert (stats.tokens, stats.running, stats.waiting, stats.version) == (9, 0, 0, 0)
    assert stats.stalled_seconds == 0 and stats.max_rss_gib > 0


def test_a_result_is_sent_again_until_the_next_poll_confirms_it(start):
    actor = start()
    actor.submit([request("a")])
    first = actor.poll(10)
    again = actor.poll(10)  # as if the first answer had been lost on its way
    assert [g.id for g in first.groups] == [g.id for g in again.groups] == ["a"]
    assert actor.poll(0, first.sequence).groups == ()


def test_a_submission_enters_the_engine_as_a_whole(start):
    actor = start(latency=0.01)
    actor.submit([request(str(i), seeds=(6,)) for i in range(20)])
    # equal lengths, so all of them finish in the same step and one poll brings them all
    assert len(actor.poll(10).groups) == 20


def test_a_rejected_request_is_a_failure_and_the_others_go_on(start):
    actor = start()
    actor.submit([request("long", max_tokens=100), request("a")])
    assert [g.id for g in collect(actor, 1)] == ["a"]
    failure = actor.poll(1).failures[0]  # an unconfirmed result comes again
    assert failure.id == "long" and "max_model_len is 64" in failure.reason


def test_publish_relabels_requests_in_flight_and_wait_lets_them_finish(start):
    actor, first, second = start(latency=0.1), weights(1), weights(2)
    actor.submit([request("a", seeds=(6,))])
    while actor.status().tokens < 2:
        time.sleep(0.01)
    assert actor.publish(first).version == 1
    versions = collect(actor, 1)[-1].completions[0].versions
    assert set(versions) == {0, 1} and list(versions) == sorted(versions)

    actor.submit([request("b", seeds=(6,))])
    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(actor.publish, second, True)
        while not any(job.when_idle for job in actor._jobs):
            time.sleep(0.001)
        actor.submit([request("c", seeds=(6,))])  # asked for later, so it starts under the new version
        assert published.result(10).version == 2
    _, b, c = collect(actor, 3)
    assert (b.id, set(b.completions[0].versions)) == ("b", {1})
    assert (c.id, set(c.completions[0].versions)) == ("c", {2})


class Thorough(FakeEngine):
    """Takes its time to prepare weights."""

    def prepare(self, weights):
        time.sleep(0.3)
        return super().prepare(weights)

    def update_weights(self, weights):
        self.version = weights.version
        return weights.digest


def test_the_engine_goes_on_while_weights_are_prepared():
    actor = RolloutActor("actor-0", 0, SPEC, functools.partial(Thorough, latency=0.02))
    try:
        actor.submit([request("a", seeds=(6,), max_tokens=40, ignore_eos=True)])
        while actor.status().tokens < 2:
            time.sleep(0.001)
        before = actor.status().tokens
        stats = actor.publish(weights(1))
        assert stats.tokens > before + 5  # of 15 steps that fit into the time
        assert stats.prepare_seconds >= 0.3 > 0.1 > stats.stall_seconds
        versions = collect(actor, 1)[0].completions[0].versions
        assert versions.count(0) >= stats.tokens > 0 and set(versions) == {0, 1}
    finally:
        actor.close()


def test_refused_weights_leave_the_old_version_serving(start):
    actor = start()
    good = actor.publish(weights(1))
    bad = weights(2)
    bad = replace(bad, pieces=(np.bitwise_xor(bad.pieces[0], 1),))
    with pytest.raises(Refused):
        actor.publish(bad)
    assert (actor.status().version, actor.status().digest) == (1, good.digest)
    actor.submit([request("a")])
    assert set(collect(actor, 1)[0].completions[0].versions) == {1}


def test_a_failing_engine_surfaces_with_its_traceback_in_every_call(start):
    actor = start(fail_at_step=2)
    actor.submit([request("a")])
    with pytest.raises(EngineFailed, match="told to fail at step 2"):
        for _ in range(100):
            actor.poll(0.1)
    for call in (lambda: actor.submit([request("b")]), actor.status, lambda: actor.publish(weights(1))):
        with pytest.raises(EngineFailed, match="Traceback"):
            call()


def test_an_engine_that_does_not_start_says_why():
    def broken(spec: EngineSpec) -> FakeEngine:
        raise ValueError("no such model")

    actor = RolloutActor("actor-0", 0, SPEC, broken)
    with pytest.raises(EngineFailed, match="no such model"):
        actor.ready(10)


def test_a_step_that_does_not_end_shows_as_stalled(start):
    actor = start(latency=1.0)
    actor.ready(10)
    actor.submit([request("a", seeds=(0,))])
    time.sleep(0.3)
    assert 0.1 < actor.status().stalled_seconds < 1.0


def test_aborted_requests_send_nothing(start):
    actor = start(latency=0.01)
    actor.submit([request("a", seeds=(6,)), request("b", seeds=(6,))])
    actor.abort(["a"])
    assert [g.id for g in collect(actor, 1)] == ["b"]
    assert actor.poll(0.1).stats.running == 0


class Torn(FakeEngine):
    """Every broadcast ends halfway; a step on what that leaves behind is an error."""

    def update_weights(self, weights):
        if isinstance(weights, Broadcast):
            self.version, self.digest = -1, ""
            raise Interrupted("not all of it came")
        return super().update_weights(weights)

    def step(self):
        assert self.version >= 0
        return super().step()


@pytest.mark.parametrize("wait", [False, True])
def test_after_an_interrupted_broadcast_nothing_is_sampled_until_whole_weights_come(wait):
    actor = RolloutActor("actor-0", 0, SPEC, functools.partial(Torn, latency=0.05))
    try:
        actor.submit([request("before", seeds=(6,))])
        while actor.status().tokens < 2:
            time.sleep(0.001)
        with pytest.raises(Interrupted, match="not all of it came"):
            actor.publish(Broadcast(1, ()))
        actor.submit([request("after", seeds=(0,))])
        tokens = actor.status().tokens
        assert actor.poll(0.2).groups == () and actor.status().tokens == tokens
        assert actor.status().version == -1 and actor.status().stalled_seconds == 0
        assert actor.publish(weights(1), wait).version == 1  # nothing has to be finished first: nothing can be
        groups = {group.id: group for group in collect(actor, 2)}
        versions = groups["before"].completions[0].versions
        assert set(versions) == {0, 1} and list(versions) == sorted(versions)
        assert groups["after"].completions[0].versions == (1, 1)
    finally:
        actor.close()
