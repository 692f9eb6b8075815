"""The pool over actors in threads with fake engines: routing, losses, replacement, publishing. No Ray."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from actors.engine import FakeEngine
from actors.placement import ThreadHost
from actors.pool import ActorLost, ActorPool
from actors.weights import Broadcast, Interrupted, Refused, Stored, snapshot
from core.errors import UserError
from core.loading import parse_config
from core.schema import GroupRequest, Prompt, Sampling

PROMPT = Prompt(0, "?", (5, 9))


def requests(count: int, prefix: str = "g", max_tokens: int = 8) -> list[GroupRequest]:
    return [GroupRequest(f"{prefix}{i}", PROMPT, (2 * i, 2 * i + 1), Sampling(max_tokens)) for i in range(count)]


def weights(version: int):
    import torch

    return snapshot([("w", torch.full((4,), float(version)))], version)


def config(count: int = 2, **actors):
    tree = {
        "name": "n",
        "steps": 1,
        "model": {"path": "m"},
        "data": {"path": "d.jsonl", "max_prompt_tokens": 8},
        "rollout": {"max_tokens": 8},
        "actors": {"count": count, "start_timeout": 10.0, "publish_timeout": 5.0, **actors},
    }
    return parse_config(tree, "test")


def with_pool(tmp_path, scenario, make=FakeEngine, **actors):
    """Run an async scenario with a started pool, and close it whatever happens."""

    async def main():
        pool = ActorPool(config(**actors), tmp_path, host=ThreadHost(), make=make)
        await pool.start()
        try:
            return await asyncio.wait_for(scenario(pool), 30)
        finally:
            await pool.close()

    return asyncio.run(main())


class FailsOnce:
    """Makes fake engines; the first `times` of them fail at a given step."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times, self.made = step, times, itertools.count()

    def __call__(self, spec):
        return FakeEngine(spec, latency=0.001, fail_at_step=self.step if next(self.made) < self.times else 0)


async def names_of(stream) -> list[str]:
    return [group.id async for group in stream]


def test_run_returns_every_group_once_and_uses_all_actors(tmp_path):
    async def scenario(pool):
        return [group async for group in pool.run(requests(40))]

    groups = with_pool(tmp_path, scenario, functools.partial(FakeEngine, latency=0.001), max_num_seqs=4)
    assert sorted(g.id for g in groups) == sorted(r.id for r in requests(40))
    assert {g.actor for g in groups} == {"actor-0", "actor-1"}


def test_an_actor_lost_in_a_run_is_replaced_and_its_requests_are_given_again(tmp_path):
    async def scenario(pool):
        await pool.publish(weights(1))
        groups = [group async for group in pool.run(requests(40))]
        return groups, dict(pool.incarnations)

    groups, incarnations = with_pool(tmp_path, scenario, FailsOnce(step=3), max_num_seqs=4)
    assert sorted(g.id for g in groups) == sorted(r.id for r in requests(40))
    assert sum(incarnations.values()) == 1 and {g.attempt for g in groups} == {0, 1}
    # the new incarnation serves what was published, not the weights on disk
    assert {v for g in groups for c in g.completions for v in c.versions} == {1}


def test_requests_that_kill_every_engine_stop_the_run_with_the_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"lost with its actor 3 times \(rollout.max_attempts\)"):
        with_pool(tmp_path, lambda pool: names_of(pool.run(requests(2))), FailsOnce(step=1, times=99), count=1)


def test_a_request_that_cannot_be_served_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="max_model_len is 16"):
        with_pool(tmp_path, lambda pool: names_of(pool.run(requests(2, max_tokens=50))))


def test_a_loss_reaches_the_caller_of_poll_even_if_a_run_has_replaced_the_actor(tmp_path):
    async def scenario(pool):
        await pool.submit("actor-0", requests(1, "mine"))
        await names_of(pool.run(requests(4, "errand")))
        with pytest.raises(ActorLost, match=r"actor-0 \(incarnation 0\)"):
            for _ in range(50):
                await pool.poll("actor-0", 0.05)
        assert await pool.replace("actor-0") == 1  # done already: the number of the one that serves
        await pool.submit("actor-0", requests(1, "mine"))
        return (await pool.poll("actor-0", 5)).groups[0].id

    assert with_pool(tmp_path, scenario, FailsOnce(step=2), count=1) == "mine0"


def test_a_run_and_a_caller_of_poll_share_the_actors_without_mixing_their_groups(tmp_path):
    async def scenario(pool):
        await pool.submit("actor-0", requests(5, "mine"))
        errand = await names_of(pool.run(requests(20, "errand")))
        mine = []
        while len(mine) < 5:
            mine += [g.id for g in (await pool.poll("actor-0", 1)).groups]
        return errand, mine

    errand, mine = with_pool(tmp_path, scenario)
    assert {n[:6] for n in errand} == {"errand"} and len(errand) == 20
    assert sorted(mine) == [f"mine{i}" for i in range(5)]


def test_leaving_a_run_early_aborts_the_rest(tmp_path):
    short = GroupRequest("short", PROMPT, (0,), Sampling(8))  # 2 tokens
    long = [GroupRequest(f"long{i}", PROMPT, (0, 1), Sampling(8, ignore_eos=True)) for i in range(10)]  # 16 tokens each

    async def scenario(pool):
        stream = pool.run([short, *long])
        async for group in stream:
            assert group.id == "short"
            break
        await stream.aclose()
        for name in pool.names:
            while (stats := (await pool.poll(name, 0.1)).stats).running:
                pass
            totals.append(stats.tokens)

    totals: list[int] = []
    with_pool(tmp_path, scenario, functools.partial(FakeEngine, latency=0.1))
    # after 2 steps 2 + 20 * 2 tokens exist; the whole would be 2 + 20 * 8
    assert 42 <= sum(totals) < 162


def test_publish_says_who_serves_the_version_and_corrupt_weights_change_nothing(tmp_path):
    async def scenario(pool):
        first = await pool.publish(weights(1))
        bad = weights(2)
        refused = await pool.publish(replace(bad, pieces=(np.bitwise_xor(bad.pieces[0], 1),)))
        groups = [group async for group in pool.run(requests(4))]
        return first, refused, groups

    first, refused, groups = with_pool(tmp_path, scenario)
    assert first.loaded == ("actor-0", "actor-1") and first.stale == {} and first.digest == weights(1).digest
    assert refused.loaded == () and "changed on the way" in refused.stale["actor-1"]
    assert {v for g in groups for c in g.completions for v in c.versions} == {1}


def test_an_actor_that_misses_the_publish_deadline_is_stale_and_the_others_do_not_wait(tmp_path):
    made = []

    def make(spec):
        made.append(spec)
        return FakeEngine(spec, latency=3.0 if len(made) == 1 else 0.0)  # one engine is inside a long step

    async def scenario(pool):
        for name in pool.names:
            await pool.submit(name, requests(1, name))
        await asyncio.sleep(0.1)
        published = await pool.publish(weights(1))
        (slow,) = published.stale
        with pytest.raises(ActorLost, match=r"no new weights in 0\.5 s"):
            await pool.poll(slow, 0.1)
        assert await pool.replace(slow) == 1
        return published, (await pool.poll(slow, 0.1)).stats

    published, stats = with_pool(tmp_path, scenario, make, publish_timeout=0.5)
    assert len(published.loaded) == 1
    assert (stats.version, stats.digest, stats.incarnation) == (1, weights(1).digest, 1)


def test_an_actor_that_is_replaced_during_a_publish_serves_the_newest_version(tmp_path):
    made = []

    def make(spec):
        made.append(spec)
        time.sleep(0.3 if len(made) == 2 else 0)  # the replacement is still starting when version 2 is published
        return FakeEngine(spec, fail_at_step=1 if len(made) == 1 else 0)

    async def scenario(pool):
        await pool.publish(weights(1))
        await pool.submit("actor-0", requests(1))
        with pytest.raises(ActorLost, match="told to fail"):
            await pool.poll("actor-0", 5)
        replacing = asyncio.create_task(pool.replace("actor-0"))
        await asyncio.sleep(0.05)
        published = await pool.publish(weights(2))
        await replacing
        return published, (await pool.poll("actor-0", 0.05)).stats

    published, stats = with_pool(tmp_path, scenario, make, count=1)
    assert (published.loaded, published.stale) == (("actor-0",), {})
    assert (stats.version, stats.digest, stats.incarnation) == (2, weights(2).digest, 1)


def test_a_publish_with_no_actor_left_waits_for_replacements(tmp_path):
    async def scenario(pool):
        await pool.submit("actor-0", requests(1))
        with pytest.raises(ActorLost, match="told to fail"):
            await pool.poll("actor-0", 5)
        published = await pool.publish(weights(1))
        with pytest.raises(ActorLost, match="incarnation 0"):  # whoever polls still learns of the loss
            await pool.poll("actor-0", 0.05)
        return published, await pool.replace("actor-0"), (await pool.poll("actor-0", 0.05)).stats.version

    published, incarnation, version = with_pool(tmp_path, scenario, FailsOnce(step=1), count=1)
    assert (published.loaded, incarnation, version) == (("actor-0",), 1, 1)


def try_twice(pool) -> None:
    rollout = pool.config.rollout.model_copy(update={"max_attempts": 2})
    pool.config = pool.config.model_copy(update={"rollout": rollout})


def test_a_place_where_replacements_fail_does_not_end_a_run_that_another_actor_serves(tmp_path, monkeypatch):
    monkeypatch.setattr("actors.roster.PAUSE_SECONDS", 0.01)
    starts = []

    def make(spec):
        starts.append(spec)
        if 3 <= len(starts) <= 5:
            raise OSError("no space left on device")
        return FakeEngine(spec, latency=0.001, fail_at_step=3 if len(starts) == 1 else 0)

    async def scenario(pool):
        try_twice(pool)  # and three fail
        groups = [group async for group in pool.run(requests(40))]
        lost = next(name for name in pool.names if pool.incarnations[name])
        await pool.replace(lost)
        return groups, pool.incarnations[lost]

    groups, incarnation = with_pool(tmp_path, scenario, make, max_num_seqs=4)
    assert len(groups) == 40 and incarnation == 4


def test_an_actor_that_cannot_be_replaced_is_given_up_when_no_other_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr("actors.roster.PAUSE_SECONDS", 0.01)
    starts = []

    def make(spec):
        starts.append(spec)
        if len(starts) > 1:
            raise OSError("no space left on device")
        return FakeEngine(spec, fail_at_step=1)

    async def scenario(pool):
        try_twice(pool)
        await pool.submit("actor-0", requests(1))
        with pytest.raises(ActorLost):
            await pool.poll("actor-0", 5)
        published = await pool.publish(weights(1))
        assert published.loaded == () and "no space left" in published.stale["actor-0"]
        with pytest.raises(ActorLost, match="no space left"):
            await pool.replace("actor-0")

    with_pool(tmp_path, scenario, make, count=1)
    assert len(starts) == 5  # the first, and twice two replacements


class Member(FakeEngine):
    """An engine whose joining and receiving can be told to fail."""

    problems: dict[str, Exception] = {}  # noqa: RUF012 - the test's

    def connect(self, address, port, rank, world_size, seconds):
        self.place = (rank, world_size)
        if "connect" in self.problems:
            raise self.problems["connect"]

    def update_weights(self, weights):
        if isinstance(weights, Broadcast) and "broadcast" in self.problems:
            self.version = -1
            raise self.problems["broadcast"]
        return super().update_weights(weights)


def members(tmp_path, scenario, problems: dict[int, dict[str, Exception]], **actors):
    """`with_pool` of Members; `problems` by the number of the engine in the order of their start."""
    made = []

    def make(spec):
        made.append(Member(spec))
        made[-1].problems = problems.get(len(made) - 1, {})
        return made[-1]

    return with_pool(tmp_path, lambda pool: scenario(pool, made), make, **actors)


async def lose(pool, name: str) -> None:
    pool._lose(name, pool._handles[name], "killed")


def test_a_group_is_formed_of_the_actors_that_are_well_and_is_broken_by_the_loss_of_one(tmp_path):
    async def scenario(pool, made):
        await lose(pool, "actor-1")
        assert pool.well == ("actor-0", "actor-2") and not pool.connected
        assert await pool.connect(pool.well, "host", 1, 5.0) == "" and pool.connected
        places = sorted(engine.place for engine in made if hasattr(engine, "place"))
        await pool.replace("actor-1")
        assert not pool.connected  # one is well and no member
        assert await pool.connect(pool.well, "host", 2, 5.0) == "" and pool.connected
        await lose(pool, "actor-0")
        assert not pool.connected
        return places

    # tensor_parallel 2: rank 0 is the learner's, then two for each engine
    assert members(tmp_path, scenario, {}, count=3, tensor_parallel=2) == [(1, 5), (3, 5)]


def test_an_actor_that_cannot_join_is_as_well_as_before(tmp_path):
    async def scenario(pool, made):
        problem = await pool.connect(pool.well, "host", 1, 5.0)
        assert "not within 5 s" in problem and not pool.connected and pool.well == pool.names

    members(tmp_path, scenario, {0: {"connect": Refused("not within 5 s")}})


def test_a_broadcast_that_ends_halfway_loses_nobody_and_a_snapshot_mends_it(tmp_path):
    async def scenario(pool, made):
        await pool.connect(pool.well, "host", 1, 5.0)
        halfway = await pool.publish(Broadcast(1, (), seconds=5.0))
        assert len(halfway.loaded) == 1 and "cut off" in next(iter(halfway.stale.values()))
        assert pool.well == pool.names
        stored = Stored(1, weights(1).digest, weights(1))
        mended = await pool.publish(stored)
        assert mended.loaded == pool.names and mended.digest == stored.digest and mended.stale == {}

    members(tmp_path, scenario, {0: {"broadcast": Interrupted("cut off")}})


def test_an_actor_that_joins_after_a_broadcast_asks_the_learner_and_waits_for_its_step(tmp_path):
    async def scenario(pool, made):
        async def supply():
            await asyncio.sleep(1.0)  # the learner is in a step, for longer than publish_timeout
            return Stored(2, weights(2).digest, weights(2))

        pool.supply = supply
        await pool.connect(pool.well, "host", 1, 5.0)
        await pool.publish(Broadcast(1, (), seconds=5.0))
        await lose(pool, "actor-1")
        replacing = asyncio.create_task(pool.replace("actor-1"))
        await asyncio.sleep(0.2)
        late = await pool.publish(Broadcast(1, (), seconds=5.0))  # the others do not wait for it
        assert late.loaded == ("actor-0",)
        await replacing
        return (await pool.poll("actor-1", 0.05)).stats.version

    assert members(tmp_path, scenario, {}, publish_timeout=0.5) == 2


def test_a_pool_that_does_not_start_says_which_actor_and_why(tmp_path):
    def broken(spec):
        raise ValueError("no such model")

    with pytest.raises(
        UserError, match=r"actor-0: it did not start(.|\n)*no such model(.|\n)*also not started: actor-1"
    ):
        with_pool(tmp_path, None, broken)


def test_a_silent_engine_is_presumed_dead(tmp_path):
    async def scenario(pool):
        await pool.submit("actor-0", requests(1))
        with pytest.raises(ActorLost, match="in one step for"):
            for _ in range(50):
                await pool.poll("actor-0", 0.1)

    with_pool(tmp_path, scenario, functools.partial(FakeEngine, latency=2.5), count=1, silence_timeout=1.0)


def test_metrics_count_tokens_of_all_incarnations_since_the_last_reading(tmp_path):
    async def scenario(pool):
        pool.metrics()
        groups = [group async for group in pool.run(requests(10))]
        counted = pool._meter._tokens
        pool.metrics()
        return counted, sum(g.tokens for g in groups), pool._meter._tokens

    counted, tokens, after = with_pool(tmp_path, scenario)
    assert counted == tokens and after == 0
