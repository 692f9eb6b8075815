"""Pools that grow and shrink, and actors whose place is gone: with threads, fake engines and a host of few places."""

from __future__ import annotations

import asyncio
import functools
import threading

import pytest

from actors.engine import FakeEngine
from actors.placement import ThreadHost
from actors.pool import ActorLost, ActorPool
from actors.weights import snapshot
from core.errors import UserError
from core.loading import parse_config
from core.schema import GroupRequest, Prompt, Sampling


class Rooms(ThreadHost):
    """As many places as `rooms` says. A place that is `gone` is taken from its actor when it is lost."""

    def __init__(self, rooms: int) -> None:
        self.rooms, self.places, self.gone = rooms, set(), set()

    async def place(self, config, names):
        self.places = set(names)
        return await super().place(config, names)

    async def seat(self, name):
        await asyncio.sleep(0)
        if name in self.gone:
            self.gone.discard(name)
            self.places.discard(name)
        if name not in self.places and len(self.places) >= self.rooms:
            return f"{self.rooms} places, all taken"
        self.places.add(name)
        return ""

    def vacate(self, name):
        self.places.discard(name)


def requests(count: int, prefix: str = "g") -> list[GroupRequest]:
    prompt = Prompt(0, "?", (5, 9))
    return [GroupRequest(f"{prefix}{i}", prompt, (2 * i, 2 * i + 1), Sampling(8)) for i in range(count)]


def weights(version: int):
    import torch

    return snapshot([("w", torch.full((4,), float(version)))], version)


def with_pool(tmp_path, scenario, make=FakeEngine, *, rooms=9, host=None, timeout=300.0, **actors):
    """`scenario(pool, said)` with a started pool; `timeout`: cluster.start_timeout."""
    said: list[str] = []

    async def main():
        tree = {
            "name": "n",
            "steps": 1,
            "model": {"path": "m"},
            "data": {"path": "d.jsonl", "max_prompt_tokens": 8},
            "rollout": {"max_tokens": 8},
            "actors": {"count": 2, "start_timeout": 10.0, "publish_timeout": 5.0, "max_num_seqs": 4, **actors},
            "cluster": {"start_timeout": timeout},
        }
        config = parse_config(tree, "test")
        pool = ActorPool(config, tmp_path, host=host or Rooms(rooms), make=make, say=said.append)
        await pool.start()
        try:
            return await asyncio.wait_for(scenario(pool, said), 30)
        finally:
            await pool.close()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("actors.roster.PAUSE_SECONDS", 0.01)


def lose(pool, name: str) -> None:
    pool._lose(name, pool._handles[name], "killed")


async def serving(pool, name: str) -> tuple[int, int]:
    stats = (await pool.poll(name, 0.05)).stats
    return stats.incarnation, stats.version


def test_a_pool_grows_while_there_is_room_up_to_max_count(tmp_path):
    async def scenario(pool, said):
        await pool.publish(weights(1))
        assert await pool.join() == "actor-1" and pool.names == ("actor-0", "actor-1") == pool.well
        assert await serving(pool, "actor-1") == (0, 1)
        assert await pool.join() is None  # no room
        pool._host.rooms = 9
        assert await pool.join() == "actor-2"
        assert await pool.join() is None and len(pool._host.places) == 3  # max_count
        assert pool.incarnations == {"actor-0": 0, "actor-1": 0, "actor-2": 0}
        assert (await pool.publish(weights(2))).loaded == pool.names
        return [group.actor async for group in pool.run(requests(40))]

    busy = with_pool(tmp_path, scenario, functools.partial(FakeEngine, latency=0.001), rooms=2, count=1, max_count=3)
    assert len(busy) == 40 and set(busy) == {"actor-0", "actor-1", "actor-2"}


def test_without_max_count_a_pool_only_grows_back_to_its_count(tmp_path):
    async def scenario(pool, said):
        assert await pool.join() is None
        await pool.leave("actor-0")
        assert await pool.join() == "actor-2" and pool.names == ("actor-1", "actor-2")  # no name is used twice

    with_pool(tmp_path, scenario)


def test_two_joins_at_once_do_not_exceed_max_count(tmp_path):
    async def scenario(pool, said):
        return await asyncio.gather(pool.join(), pool.join(), pool.join())

    assert with_pool(tmp_path, scenario, count=1, max_count=3) == ["actor-1", "actor-2", None]


def test_one_that_leaves_gives_its_place_back_and_is_known_no_more(tmp_path):
    async def scenario(pool, said):
        await pool.submit("actor-0", requests(1))
        polling = asyncio.create_task(pool.poll("actor-1", 5.0))
        await asyncio.sleep(0.05)
        await pool.leave("actor-1")
        for late in (polling, pool.poll("actor-1"), pool.submit("actor-1", []), pool.replace("actor-1")):
            with pytest.raises(ActorLost, match=r"actor-1 \(incarnation 0\).*(it has left|closed)"):
                await late
        await pool.leave("actor-1")  # nothing happens
        assert pool.names == pool.well == ("actor-0",) and pool.incarnations == {"actor-0": 0}
        assert pool._host.places == {"actor-0"} and list(pool.processes()) == ["actor-0"]
        published = await pool.publish(weights(1))
        assert (published.loaded, published.stale) == (("actor-0",), {})
        with pytest.raises(UserError, match="the only actor"):
            await pool.leave("actor-0")
        assert [g.id for g in (await pool.poll("actor-0", 5.0)).groups] == ["g0"]

    with_pool(tmp_path, scenario)


def test_a_run_goes_on_while_actors_come_and_go_and_no_request_counts_as_lost(tmp_path):
    async def scenario(pool, said):
        groups, changes = [], {8: pool.join, 20: lambda: pool.leave("actor-0"), 30: lambda: pool.leave("actor-1")}
        async for group in pool.run(requests(80)):
            groups.append(group)
            if change := changes.pop(len(groups), None):
                await change()
        assert pool.names == ("actor-2",)
        return groups

    groups = with_pool(tmp_path, scenario, functools.partial(FakeEngine, latency=0.002), max_count=3)
    assert sorted(g.id for g in groups) == sorted(r.id for r in requests(80))
    assert {g.attempt for g in groups} == {0}
    assert {g.actor for g in groups} == {"actor-0", "actor-1", "actor-2"} and groups[-1].actor == "actor-2"


def test_one_that_joins_during_publishes_serves_the_newest_and_holds_up_none(tmp_path):
    loading, go_on = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        """The third engine hangs in its first load."""

        made = 0

        def __init__(self, spec):
            super().__init__(spec)
            Slow.made += 1
            self.hangs = Slow.made == 3

        def update_weights(self, weights):
            if self.hangs and not loading.is_set():
                loading.set()
                go_on.wait(10)
            return super().update_weights(weights)

    async def scenario(pool, said):
        await pool.publish(weights(1))
        joining = asyncio.create_task(pool.join())
        assert await asyncio.to_thread(loading.wait, 10)
        published = await asyncio.wait_for(pool.publish(weights(2)), 2)
        assert (published.loaded, published.stale) == (("actor-0", "actor-1"), {})
        assert pool.names == pool.well == ("actor-0", "actor-1")
        go_on.set()
        assert await joining == "actor-2"
        return await serving(pool, "actor-2")

    assert with_pool(tmp_path, scenario, Slow, max_count=3) == (0, 2)


def test_a_newcomer_that_does_not_start_is_said_and_leaves_nothing_behind(tmp_path):
    made = []

    def make(spec):
        made.append(spec)
        if len(made) == 3:
            raise OSError("no space left on device")
        return FakeEngine(spec)

    async def scenario(pool, said):
        assert await pool.join() is None
        assert "actor-2 could not join" in said[0] and "no space left" in said[0]
        assert len(pool._host.places) == len(pool.names) == len(pool.incarnations) == 2
        assert await pool.join() == "actor-3"

    with_pool(tmp_path, scenario, make, max_count=3)


def test_an_actor_whose_place_is_gone_waits_for_another_while_others_serve(tmp_path):
    async def scenario(pool, said):
        await pool.publish(weights(1))
        host = pool._host
        host.rooms, host.gone = 1, {"actor-0"}
        lose(pool, "actor-0")
        replacing = asyncio.create_task(pool.replace("actor-0"))
        groups = [group async for group in pool.run(requests(10))]
        assert {group.actor for group in groups} == {"actor-1"} and len(groups) == 10
        await asyncio.sleep(0.3)  # longer than cluster.start_timeout
        assert pool.waiting_for_place == {"actor-0": "1 places, all taken"} and not replacing.done()
        assert await pool.join() is None  # the next place is for it
        host.rooms = 2
        assert await replacing == 1 and pool.waiting_for_place == {}
        assert await serving(pool, "actor-0") == (1, 1)
        assert said[0] == "actor-0 waits for a place (0 s by now): 1 places, all taken"
        assert "actor-0 has a place again" in said[-1] and len(said) >= 3

    with_pool(tmp_path, scenario, rooms=2, timeout=0.1, max_count=3)


def test_when_nobody_else_is_well_no_place_within_the_timeout_is_the_end(tmp_path):
    async def scenario(pool, said):
        pool._host.rooms, pool._host.gone = 0, {"actor-0", "actor-1"}
        lose(pool, "actor-0"), lose(pool, "actor-1")
        for name in pool.names:
            with pytest.raises(ActorLost, match=r"no place for it in 0\.2 s \(cluster.start_timeout\).*all taken"):
                await pool.replace(name)

    with_pool(tmp_path, scenario, timeout=0.2)


def test_one_that_leaves_while_it_is_replaced_is_not_replaced(tmp_path):
    async def scenario(pool, said):
        pool._host.rooms, pool._host.gone = 1, {"actor-0"}
        lose(pool, "actor-0")
        replacing = asyncio.create_task(pool.replace("actor-0"))
        await asyncio.sleep(0.05)
        assert list(pool.waiting_for_place) == ["actor-0"]
        await pool.leave("actor-0")
        with pytest.raises(ActorLost, match=r"it leaves|has left"):
            await replacing
        assert pool.waiting_for_place == {} and pool.names == ("actor-1",) and pool._renewals == {}

    with_pool(tmp_path, scenario)


class Slowed(Rooms):
    """Answers to `method` of the first incarnation of actor-0 come when `let_go` is set; then it is long replaced."""

    def __init__(self, method: str) -> None:
        super().__init__(9)
        self.method, self.arrived, self.let_go = method, asyncio.Event(), asyncio.Event()

    def start(self, name, incarnation, *arguments):
        handle = super().start(name, incarnation, *arguments)
        if (name, incarnation) == ("actor-0", 0):
            call = handle.call

            async def late(method, *arguments, timeout):
                answer = await call(method, *arguments, timeout=timeout)
                if method == self.method:
                    self.arrived.set()
                    await self.let_go.wait()
                return answer

            handle.call = late
        return handle


def test_what_an_old_incarnation_says_is_never_delivered_after_it_was_lost(tmp_path):
    async def scenario(pool, said):
        host = pool._host
        await pool.submit("actor-0", requests(3, "old"))
        polling = asyncio.create_task(pool.poll("actor-0", 5.0))
        await host.arrived.wait()  # its groups are on their way
        lose(pool, "actor-0")
        host.let_go.set()
        with pytest.raises(ActorLost, match=r"actor-0 \(incarnation 0\).*killed"):
            await polling
        assert await pool.replace("actor-0") == 1
        await pool.submit("actor-0", requests(1, "new"))
        poll = await pool.poll("actor-0", 5.0)
        assert [g.id for g in poll.groups] == ["new0"] and poll.stats.incarnation == 1

    with_pool(tmp_path, scenario, host=Slowed("poll"))


def test_a_poll_that_was_asked_of_an_old_incarnation_brings_nothing_of_it(tmp_path):
    async def scenario(pool, said):
        host = pool._host
        await pool.submit("actor-0", requests(3, "old"))
        polling = asyncio.create_task(pool.poll("actor-0", 5.0))
        await host.arrived.wait()
        lose(pool, "actor-0")
        await pool.replace("actor-0")
        host.let_go.set()
        poll = await polling
        assert poll.groups == () and poll.stats.incarnation == pool.incarnations["actor-0"] == 1

    with_pool(tmp_path, scenario, host=Slowed("poll"))


def test_a_load_of_an_old_incarnation_says_nothing_of_the_new_one(tmp_path):
    async def scenario(pool, said):
        host = pool._host
        publishing = asyncio.create_task(pool.publish(weights(1)))
        await host.arrived.wait()
        lose(pool, "actor-0")
        replacing = asyncio.create_task(pool.replace("actor-0"))
        while pool._stats["actor-0"].incarnation == 0:
            await asyncio.sleep(0.01)
        host.let_go.set()
        assert "killed" in (await publishing).stale["actor-0"]
        await replacing
        return await serving(pool, "actor-0")

    assert with_pool(tmp_path, scenario, host=Slowed("publish")) == (1, 1)


def test_max_count_below_count_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"actors.max_count 1 is less than actors.count 2"):
        with_pool(tmp_path, None, max_count=1)
