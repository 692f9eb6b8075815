"""Actors in child processes: the pool cannot tell, nobody hangs on one that is frozen, none outlives its parent."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.actor import Stats
from actors.engine import EngineSpec, FakeEngine
from actors.placement import Gone, alive
from actors.pool import ActorPool
from actors.process_host import ProcessHost
from actors.weights import Refused, Snapshot, snapshot
from core.errors import UserError
from core.loading import parse_config
from core.schema import GroupRequest, Prompt, Sampling

SPEC = EngineSpec(model="", max_model_len=64)
ROOT = Path(__file__).parents[2]


class Odd(Refused):
    """An exception that a pickle cannot bring over: it cannot be made from its message alone."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)


class Moody(FakeEngine):
    """Raises `Odd` where a FakeEngine joins a group."""

    def connect(self, *arguments):
        raise Odd("not today", 7)


def requests(count: int) -> list[GroupRequest]:
    prompt = Prompt(0, "?", (5, 9))
    return [GroupRequest(f"g{i}", prompt, (2 * i, 2 * i + 1), Sampling(8)) for i in range(count)]


def weights(version: int) -> Snapshot:
    import torch

    return snapshot([("w", torch.full((4,), float(version)))], version)


def config(**actors):
    tree = {
        "name": "n",
        "steps": 1,
        "model": {"path": "m"},
        "data": {"path": "d.jsonl", "max_prompt_tokens": 8},
        "rollout": {"max_tokens": 8},
        "actors": {"count": 2, "start_timeout": 30.0, "publish_timeout": 5.0, "max_num_seqs": 4, **actors},
    }
    return parse_config(tree, "test")


def with_handle(tmp_path, scenario, make=FakeEngine):
    """`scenario(host, handle, stats)` with one child process that serves."""

    async def main():
        host = ProcessHost()
        handle = host.start("actor-0", 3, SPEC, make, tmp_path / "logs" / "actor-0.3.log")
        try:
            stats = await handle.call("ready", 30.0, timeout=30.0)
            return await asyncio.wait_for(scenario(host, handle, stats), 30)
        finally:
            await host.close([])

    return asyncio.run(main())


def test_a_child_starts_light_and_its_call_waits_in_one_thread_while_another_answers(tmp_path):
    async def scenario(host, handle, stats: Stats):
        assert stats.pid != os.getpid() and (stats.actor, stats.incarnation) == ("actor-0", 3)
        assert "torch" not in Path(f"/proc/{stats.pid}/maps").read_text()
        waiting = asyncio.create_task(handle.call("poll", 20.0, 0, timeout=20.0))
        served = await handle.call("publish", host.share(weights(1)), timeout=10.0)
        assert (served.version, served.digest) == (1, weights(1).digest) and not waiting.done()
        await handle.call("submit", requests(1), timeout=10.0)
        poll = await waiting
        assert [g.id for g in poll.groups] == ["g0"] and poll.groups[0].completions[0].versions == (1, 1)
        return stats.pid

    assert not alive(with_handle(tmp_path, scenario))


def test_errors_arrive_as_themselves_or_as_what_they_say(tmp_path):
    async def scenario(host, handle, stats):
        bad = replace(weights(1), pieces=(np.bitwise_xor(weights(1).pieces[0], 1),))
        with pytest.raises(Refused, match="changed on the way"):
            await handle.call("publish", host.share(bad), timeout=10.0)
        with pytest.raises(RuntimeError, match="Odd: not today"):
            await handle.call("connect", "here", 1, 1, 2, 5.0, timeout=10.0)

    with_handle(tmp_path, scenario, Moody)


def test_weights_are_mapped_and_not_copied_into_every_child(tmp_path):
    import torch

    large = snapshot([("w", torch.zeros(2**26))], 1)  # 256 MiB

    async def scenario(host, handle, stats):
        mapped = host.share(large)
        assert (await handle.call("publish", mapped, timeout=20.0)).digest == large.digest
        status = Path(f"/proc/{stats.pid}/status").read_text()
        private = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
        assert private < 128 * 1024  # kB: the interpreter and its modules
        path = Path(mapped.path)
        assert path.exists()
        del mapped
        assert not path.exists()

    with_handle(tmp_path, scenario)


def test_a_frozen_child_costs_the_deadline_and_a_dead_one_nothing(tmp_path):
    async def scenario(host, handle, stats):
        os.kill(stats.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await handle.call("status", timeout=0.3)
        assert time.monotonic() - started < 3
        os.kill(stats.pid, signal.SIGCONT)
        assert (await handle.call("status", timeout=10.0)).pid == stats.pid  # the late answer was not taken for it
        waiting = asyncio.create_task(handle.call("poll", 20.0, 0, timeout=20.0))
        await asyncio.sleep(0.1)
        os.kill(stats.pid, signal.SIGKILL)
        with pytest.raises(Gone, match="its process ended: signal 9"):
            await waiting
        with pytest.raises(Gone, match="signal 9"):
            await handle.call("status", timeout=10.0)

    with_handle(tmp_path, scenario)


def test_an_engine_that_cannot_be_built_in_a_child_says_why_in_its_log(tmp_path):
    pool = ActorPool(config(count=1), tmp_path, host=ProcessHost(), make=functools.partial(FakeEngine, no_option=1))
    with pytest.raises(UserError, match=r"actor-0: it did not start(.|\n)*no_option"):
        asyncio.run(pool.start())
    with pytest.raises(UserError, match="child processes run on CPU"):
        asyncio.run(ActorPool(config(device="cuda"), tmp_path, host=ProcessHost(), make=FakeEngine).start())


def test_a_run_loses_no_request_to_kill_9_and_to_a_freeze(tmp_path, monkeypatch):
    monkeypatch.setattr("actors.pool.CALL_SECONDS", 1.0)

    async def scenario():
        make = functools.partial(FakeEngine, latency=0.005)
        pool = ActorPool(config(silence_timeout=1.0), tmp_path, host=ProcessHost(), make=make)
        try:
            await pool.start()
            await pool.publish(weights(1))
            pids = {name: where[0] for name, where in pool.processes().items()}
            groups = []
            async for group in pool.run(requests(80)):
                groups.append(group)
                if len(groups) == 4:
                    os.kill(pids["actor-0"], signal.SIGKILL)
                if len(groups) == 40:
                    os.kill(pids["actor-1"], signal.SIGSTOP)
            return groups, dict(pool.incarnations), [*pids.values(), *(w[0] for w in pool.processes().values())]
        finally:
            await pool.close()

    groups, incarnations, pids = asyncio.run(scenario())
    assert sorted(g.id for g in groups) == sorted(r.id for r in requests(80))
    assert {v for g in groups for c in g.completions for v in c.versions} == {1}
    assert incarnations == {"actor-0": 1, "actor-1": 1}
    assert not any(alive(pid) for pid in pids)


PARENT = """
import asyncio, sys
from pathlib import Path
from actors.engine import FakeEngine
from actors.pool import ActorPool
from actors.process_host import ProcessHost
from tests.actors.test_process_host import config

async def main():
    pool = ActorPool(config(), Path(sys.argv[1]), host=ProcessHost(), make=FakeEngine)
    await pool.start()
    print(*(where[0] for where in pool.processes().values()), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_children_die_with_a_parent_that_is_killed_even_one_that_is_stopped(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        os.kill(pids[0], signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(alive, pids))
