"""The loop on fakes: order, files, failures. The same loop on real parts is in test_end_to_end.py."""

import asyncio
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from actors.actor import Failure, Poll
from actors.engine import EngineSpec, FakeEngine
from actors.pool import ActorLost, Published
from alignlab.archive import Archive
from alignlab.coordinator import Coordinator
from alignlab.metrics import MetricsWriter, overview, step_line
from alignlab.plan import Plan
from alignlab.run import Run
from alignlab.run_dir import RunDir
from alignlab.warnings import warnings
from alignlab.watchdog import EDGES, LOOP, Watchdog
from core.config import RewardsConfig
from core.loading import parse_config
from core.schema import Mixture, Prompt, Score


class FakeActors:
    """Engines without models, stepped by polls. `die_after`: polls of actor-0 before it is lost once."""

    def __init__(self, count=2, die_after=None, reject=()):
        self.names = tuple(f"actor-{i}" for i in range(count))
        self.engines = {name: FakeEngine(EngineSpec(model="", max_model_len=64)) for name in self.names}
        self.incarnations = dict.fromkeys(self.names, 0)
        self.die_after, self.reject, self.polls = die_after, set(reject), 0
        self.failed = {name: [] for name in self.names}
        self.suspects = frozenset()

    def present(self):
        return dict(self.incarnations)

    async def submit(self, name, requests):
        for request in requests:
            if request.prompt.ordinal in self.reject:
                self.failed[name].append(Failure(request.id, request.attempt, "too long"))
            else:
                self.engines[name].add(request)

    async def poll(self, name, timeout=1.0):
        await asyncio.sleep(0)
        if name == "actor-0" and self.die_after is not None:
            self.polls += 1
            if self.polls > self.die_after:
                self.die_after = None
                raise ActorLost(name, self.incarnations[name], "killed")
        failed, self.failed[name] = tuple(self.failed[name]), []
        return Poll(tuple(self.engines[name].step()), failed, None, 0)

    def metrics(self):
        return {"rollout/tokens_per_second": 1.0}

    async def abort(self, name, ids):
        self.engines[name].abort(ids)

    def suspect(self, name):
        pass

    async def trust(self, name):
        return None

    async def replace(self, name):
        self.incarnations[name] += 1
        self.engines[name] = FakeEngine(EngineSpec(model="", max_model_len=64))


class FakeComposer:
    async def score(self, group):
        group = replace(group, greedy=await self.score(group.greedy)) if group.greedy else group
        scores = tuple(Score("ok", float(i)) for i in range(len(group.completions)))
        return replace(group, components={"length": scores}, totals=tuple(s.value for s in scores))

    needs = frozenset({"gram"})
    objectives = ("length",)

    def __init__(self):
        self.weighed, self.learned = [], []

    async def columns(self, groups, step):
        return [replace(g, columns={"length": g.totals}) for g in groups]

    def weigh(self, groups, gram=None, lr=0.0):
        self.weighed.append((gram, lr))
        return [replace(g, weights={"length": (1.0,) * len(g.totals)}) for g in groups], Mixture(scale=2.0)

    def learn(self, kl=None, validation=None):
        self.learned.append((kl, validation))
        return {"weighting/slow": 0.0}

    def check(self, groups):
        pass

    def metrics(self, groups):
        return {"reward/total": 0.5}

    def state_dict(self):
        return {"seen": 1}


@dataclass
class FakeLearner:
    trained: list
    fail: bool = False

    async def gram(self, groups):
        assert all(group.weights == {"length": (1.0,) * len(group.completions)} for group in groups)
        return [[1.0]], 0.5

    async def step(self, groups, version, mixture):
        assert mixture.scale == 2.0
        if self.fail:
            raise RuntimeError("rank 0 died")
        self.trained.append([g.prompt.ordinal for g in groups])
        advantages = [[0.0] * len(g.completions) for g in groups]
        kl = [0.25 * i for g in groups for i in range(len(g.completions))]
        return SimpleNamespace(metrics={"optim/grad_norm": 1.0}, advantages=advantages, kl=kl)

    async def save(self, folder):
        (folder / "model").mkdir()


ROLLOUT = {"prompts": 2, "group_size": 2, "max_tokens": 8}


def make(tmp_path, actors, trainer=None, evals=None, actors_section=None, **changes):
    tree = {"name": "r", "steps": 3, "model": {"path": "m"}, "data": {"path": "d"}, "output_dir": str(tmp_path)}
    tree |= {"rollout": ROLLOUT, "checkpoint": {"every": 2}, "actors": actors_section or {}} | changes
    config = parse_config(tree, "test")
    run_dir = RunDir.create(config, resume=False)
    prompts = SimpleNamespace()
    prompts = type("P", (), {"__getitem__": lambda self, n: Prompt(n, f"q{n}", (n + 1,))})()
    coordinator = Coordinator(2, config.steps, config.rollout.max_staleness)
    archive = Archive(run_dir.path, config.ledger)
    archive.begin({"seed": 0, "prompts": 2, "group_size": 2, "steps": 3, "max_staleness": 0, "reason": "start"}, 0, 0)
    limits = dict.fromkeys((*EDGES, LOOP), 60.0)
    watchdog = Watchdog(run_dir.path, print, limits, str, dict)
    published = []

    async def publish(version):
        published.append(version)
        return Published(version, f"digest {version}", tuple(actors.names), {})

    async def evaluate(step):
        evals.append(step)
        return {"eval/x/accuracy": 0.5}, {"x/accuracy": 0.5}

    plan = Plan(config, SimpleNamespace(needs=frozenset(), filter=None), {})
    learner = trainer or FakeLearner([])
    writer = MetricsWriter(run_dir.path)
    run = Run(
        plan,
        run_dir,
        coordinator,
        prompts,
        actors,
        FakeComposer(),
        learner,
        publish,
        evaluate,
        writer,
        archive,
        watchdog,
        say=lambda t: None,
    )
    return run, learner, published


def test_a_run_trains_every_group_once_and_leaves_its_files(tmp_path):
    evals = []
    run, learner, published = make(tmp_path, FakeActors(), evals=evals, eval={"every": 1})
    asyncio.run(run.loop())
    assert learner.trained == [[0, 1], [2, 3], [4, 5]]
    assert (published, evals) == ([1, 2, 3], [1, 2])  # the last evaluation is the caller's
    rows = [json.loads(line) for line in (run.run_dir.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward/total" in row] == [1, 2, 3]
    assert [c.step for c in run.run_dir.checkpoints()] == [2, 3]
    assert run.run_dir.checkpoints()[-1].state()["coordinator"]["next_ordinal"] == 6
    rollouts = (run.run_dir.path / "rollouts" / "step-000002.jsonl").read_text().splitlines()
    row = json.loads(rollouts[1])
    assert len(rollouts) == 4 and row["components"] == row["columns"] == {"length": 1.0}
    assert (row["weights"], row["kl"]) == ({"length": 1.0}, 0.25)
    # Every step is weighed once with the gradients' agreement, and learnt from once, with the evaluation after it.
    assert run.composer.weighed == [([[1.0]], 0.5)] * 3
    assert run.composer.learned == [
        ([0.0, 0.25] * 2, means) for means in ({"x/accuracy": 0.5}, {"x/accuracy": 0.5}, None)
    ]


def test_a_method_gets_the_greedy_completions_and_answers_that_it_needs(tmp_path):
    seen = []

    class Looking(FakeLearner):
        async def step(self, groups, version, mixture):
            seen.extend(groups)
            return await super().step(groups, version, mixture)

    run, _, _ = make(tmp_path, FakeActors(), Looking([]))
    run.plan = replace(run.plan, method=SimpleNamespace(needs=frozenset({"greedy", "answers"}), filter=None))
    asyncio.run(run.loop())
    assert all(len(g.greedy.completions) == 1 and g.answers == ("", "") for g in seen) and len(seen) == 6


def test_a_lost_actor_loses_no_group_and_samples_do_not_depend_on_who_generates(tmp_path):
    runs = []
    for name, actors in {"whole": FakeActors(), "lost": FakeActors(die_after=2), "one": FakeActors(1)}.items():
        run, learner, _ = make(tmp_path / name, actors)
        asyncio.run(run.loop())
        assert learner.trained == [[0, 1], [2, 3], [4, 5]]
        path = run.run_dir.path / "rollouts"
        rows = [json.loads(line) for file in sorted(path.iterdir()) for line in file.read_text().splitlines()]
        runs.append([(row["ordinal"], row["sample"], row["completion"]) for row in rows])
    assert runs[0] == runs[1] == runs[2]


def test_a_prompt_that_no_engine_takes_is_dropped_with_its_reason(tmp_path):
    run, learner, _ = make(tmp_path, FakeActors(reject=[1]))
    asyncio.run(run.loop())
    assert learner.trained == [[0, 2], [3, 4], [5, 6]]
    assert run.coordinator.counts["dropped/failed: too long"] == 1


def test_what_a_part_raises_ends_the_run(tmp_path):
    run, _, _ = make(tmp_path, FakeActors(), FakeLearner([], fail=True))
    with pytest.raises(RuntimeError, match="rank 0 died"):
        asyncio.run(run.loop())


def test_a_silent_actor_gives_its_groups_away_and_may_come_back(tmp_path):
    class Silent(FakeActors):
        silenced = False

        async def poll(self, name, timeout=1.0):
            if name == "actor-0" and self.engines[name].unfinished()[0] and not self.silenced:
                self.silenced = True
                await asyncio.sleep(0.6)
            return Poll(tuple(self.engines[name].step()), (), None, 0) if await asyncio.sleep(0.01) is None else None

    run, learner, _ = make(tmp_path, Silent(), actors_section={"suspect_timeout": 0.2})
    said = []
    run.say = said.append
    asyncio.run(run.loop())
    assert learner.trained == [[0, 1], [2, 3], [4, 5]]
    assert run.coordinator.counts["retried"] == 1
    assert said[0] == "actor-0 has not answered for 0.2 s: its groups go to others until it does"


def test_groups_that_nobody_samples_are_named_and_given_to_another(tmp_path):
    class Forgetful(FakeActors):
        forgot = False

        async def submit(self, name, requests):
            if self.forgot or name != "actor-0":
                return await super().submit(name, requests)
            self.forgot = True

        async def poll(self, name, timeout=1.0):
            await asyncio.sleep(0.05)
            return await super().poll(name)

    run, learner, _ = make(tmp_path, Forgetful(), rollout=ROLLOUT | {"timeout": 0.5})
    said = []
    run.watchdog = Watchdog(run.run_dir.path, said.append, dict.fromkeys((*EDGES, LOOP), 60.0), str, dict)
    run.coordinator.lease_seconds = 0.5

    async def watched():
        with run.watchdog:
            await run.loop()

    asyncio.run(watched())
    assert len(learner.trained) == 3 and run.coordinator.counts["retried"] == 1
    assert len(said) == 1 and "generate" in said[0]


def test_a_step_or_an_evaluation_may_take_longer_than_a_group(tmp_path):
    run, learner, _ = make(tmp_path, FakeActors(), rollout=ROLLOUT | {"timeout": 0.5}, eval={"every": 1})

    async def slow(step):
        await asyncio.sleep(1.2)
        return {}, {}

    run.evaluate = slow
    asyncio.run(run.loop())
    assert len(learner.trained) == 3 and run.coordinator.counts["retried"] == 0


def test_times_of_evaluations_are_not_times_of_steps(tmp_path):
    run, _, _ = make(tmp_path, FakeActors(), evals=[], eval={"every": 1})

    async def slow(step):
        await asyncio.sleep(1.0)
        return {"eval/x/accuracy": 0.5}, {"x/accuracy": 0.5}

    run.evaluate = slow
    asyncio.run(run.loop())
    rows = [json.loads(line) for line in (run.run_dir.path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/total" in row]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3]  # a line a step, a line an evaluation
    assert all(row["time/step"] < 0.9 for row in steps)
    assert [("time/checkpoint" in row) for row in steps] == [False, False, True]  # that of step 2


def test_a_resumed_run_that_has_nothing_left_to_do_saves_nothing(tmp_path):
    run, _, _ = make(tmp_path, FakeActors())
    run.coordinator, run.saved = Coordinator(2, 3, version=3, trained=3), 3
    asyncio.run(run.loop())
    assert run.run_dir.checkpoints() == []


def test_a_skipped_update_and_an_empty_one_are_said(tmp_path):
    assert warnings({"optim/skipped": 0.0, "optim/empty": 0.0}, tmp_path) == []
    skipped, empty = warnings({"optim/skipped": 1.0, "optim/empty": 2.0}, tmp_path)
    assert str(tmp_path / "skipped") in skipped.advice and empty.text == "2 update(s) had nothing to train on"
    writer = MetricsWriter(tmp_path)
    (line,) = writer.warn(3, {"reward/style_failed": 0.3}, tmp_path)
    assert writer.warn(4, {"reward/style_failed": 0.3, "reward/other_failed": 0.01}, tmp_path) == []  # said just now
    assert len(writer.warn(5, {"reward/other_failed": 0.3, "optim/empty": 1.0}, tmp_path)) == 2
    assert len(writer.warn(6, {"reward/other_failed": 0.3, "optim/empty": 1.0}, tmp_path)) == 1
    assert len(writer.warn(24, {"reward/style_failed": 0.3}, tmp_path)) == 1
    writer.close()
    assert line.startswith("warning failing: 'style' failed on 30% of the completions; read")
    kept = [json.loads(row) for row in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [3, 5, 5, 6, 24]


def test_the_overview_shows_what_the_rewards_of_the_run_move():
    plain = overview(RewardsConfig())
    held = overview(RewardsConfig(weighting={"policy": "lagrange", "thresholds": {"a": 1.0}}, gold="a"))
    assert "reward" in plain and set(held) - set(plain) == {
        "weights of the objectives",
        "constraints and their bounds",
        "multipliers",
        "gold against the reward",
    }


def test_stop_finishes_the_step_and_saves(tmp_path):
    run, learner, _ = make(tmp_path, FakeActors())

    async def interrupted():
        run.stop()
        await run.loop()

    asyncio.run(interrupted())
    assert len(learner.trained) <= 1
    assert [c.step for c in run.run_dir.checkpoints()] == [len(learner.trained)]


def test_the_step_line_has_at_most_eight_numbers():
    metrics = {"reward/total": 0.5, "completion/length_mean": 20.25, "optim/grad_norm": 1.0, "time/step": 3.0}
    assert step_line(3, 60, metrics, eta_seconds=83) == "step  3/60  reward 0.500  length 20.2  grad 1.00  eta 1:23"
