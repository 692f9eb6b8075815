"""What the real coordinator and the real archive write, killed and resumed at random, is green under the audit."""

import json
import random
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab import events as e
from alignlab.archive import Archive
from alignlab.audit import audit
from alignlab.coordinator import Coordinator
from core.config import LedgerConfig
from core.schema import Completion, Group, Mixture, Prompt, group_id

FACTS = {"seed": 0, "group_size": 1, "reason": "test"}


class Killed(Exception):
    """The process ends here."""


class Lab:
    """One run folder; attempt after attempt is killed at a random event, the last one finishes."""

    def __init__(self, folder, seed, shape, loss, drop):
        self.folder, self.random, self.shape = folder, random.Random(seed), shape
        self.loss, self.drop = loss, drop
        (folder / "rollouts").mkdir(parents=True)
        (folder / "metrics.jsonl").touch()

    def attempt(self, kill_after):
        """From the newest checkpoint to the end, or to the kill. Returns whether it has come to the end."""
        self.archive = Archive(self.folder, LedgerConfig(sync_seconds=1e9), say=lambda line: None)
        self.c = Coordinator(**self.shape, max_attempts=1000, max_dropped=1000, lease_seconds=40)
        manifest = self.newest()
        facts = {name: self.shape[name] for name in ("prompts", "steps", "max_staleness", "deterministic")}
        facts |= FACTS | {"max_age": self.c.window}
        found = self.archive.begin(facts, manifest["step"], manifest["ledger_offset"])
        self.forget_after(manifest["step"])
        self.c.load_state_dict(manifest["coordinator"], found)
        self.groups, self.todo, self.left, self.now, self.joined = {}, [], kill_after, 0.0, 0
        self.finished = False
        try:
            self.record("published", version=self.c.version, digest=f"w{self.c.version}", loaded=[], stale={})
            for _ in range(2):
                self.join()
            while not self.finished:
                self.trouble() if self.random.random() < self.loss or not self.todo else self.play()
            self.record("end", step=self.c.trained, reason="done")
        except Killed:
            self.archive._ledger._file.close()  # as the kernel does
            return False
        self.archive.close()
        return True

    def newest(self):
        found = sorted((self.folder / "checkpoints").glob("step-*/run.json"))
        if found and len(found) > 1 and self.random.random() < 0.2:  # the newest is damaged
            shutil.rmtree(found.pop().parent)
        start = {"version": 0, "next_ordinal": 0, "owed": {}, "counts": {}, "tokens": {}}
        return json.loads(found[-1].read_text()) if found else {"step": 0, "ledger_offset": 0, "coordinator": start}

    def forget_after(self, step):
        for path in (self.folder / "rollouts").glob("*"):
            if int(path.stem[-6:]) > step:
                path.unlink()
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (self.folder / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= step))

    def record(self, kind, **fields):
        self.archive.record([e.Record(kind, fields)])

    # ------------------------------------------------------------ what happens
    def join(self):
        self.joined += 1
        self.tell(e.ActorJoined(f"a{self.joined}"))

    def trouble(self):
        names = sorted(self.c.fleet.actors)
        name = self.random.choice(names) if names else None
        what = self.random.randrange(5) if name else 0
        if what == 0:
            self.join()
        elif what == 1:
            self.tell(e.ActorLost(name, self.c.fleet.actors[name].incarnation, "killed"))
        elif what == 2:
            incarnation = self.c.fleet.actors[name].incarnation
            self.tell(e.ActorSuspected(name, incarnation, "silent"))
            self.todo.append(e.ActorRecovered(name, incarnation))
        elif what == 3 and len(names) > 1:
            self.tell(e.ActorLeaving(name))
        else:
            self.tell(e.Tick())

    def play(self):
        event = self.todo.pop(self.random.randrange(len(self.todo)))
        match event:
            case ("sample", actor, incarnation, lease, version):
                self.sample(actor, incarnation, lease, version)
            case ("score", ordinal):
                digest = self.archive.keep_scores(self.groups[ordinal])
                equal = random.Random(ordinal).random() < self.drop  # the same group is dropped in every attempt
                self.tell(e.GroupScored(ordinal, "equal" if equal else None, digest))
            case ("train", step, ordinals):
                digest = self.archive.keep_step([self.groups[ordinal] for ordinal in ordinals], Mixture())
                self.batch = ordinals
                self.tell(e.Trained(step, self.random.randrange(2), digest))
            case ("publish", version):
                self.tell(e.Served(version, tuple(self.c.fleet.actors), {}, f"w{version}"))
                self.write(version)
                if self.random.random() < 0.5:
                    self.checkpoint(version)
                self.tell(e.StepDone(version - 1))
            case _:
                self.tell(event)

    def sample(self, actor, incarnation, lease, version):
        newest = max(version, min(self.c.version, version + self.random.randrange(2)))
        if self.shape["deterministic"]:
            newest = version
        versions = (version,) * 2 + (newest,) * self.random.randrange(3)
        tokens = Completion((7,) * len(versions), (-0.5,) * len(versions), versions, "x", "stop")
        group = Group(group_id(0, lease.ordinal), Prompt(lease.ordinal, "?", (5,)), (tokens,), lease.attempt, actor)
        facts = (len(versions), version, max(versions), self.archive.keep_rollout(group))
        entry = self.c.groups.get(lease.ordinal)
        if entry is not None and (entry.actor, entry.attempt) == (actor, lease.attempt):
            self.groups[lease.ordinal] = group
        self.tell(e.GroupDone(lease.ordinal, actor, incarnation, lease.attempt, *facts))

    def write(self, version):
        rows = "".join(json.dumps({"ordinal": ordinal, "sample": 0}) + "\n" for ordinal in self.batch)
        (self.folder / "rollouts" / f"step-{version:06d}.jsonl").write_text(rows)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": version, "time/step": 1.0}) + "\n")

    def checkpoint(self, step):
        state = {"step": step, "coordinator": self.c.state_dict(), "ledger_offset": self.archive.sync()}
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(state))
        self.record("checkpoint", step=step, offset=state["ledger_offset"])

    def tell(self, event):
        self.left -= 1
        if self.left < 0:
            raise Killed
        self.now += 1.0
        actions = self.c.step(event, self.now)
        self.archive.record([action for action in actions if isinstance(action, e.Record)])
        for action in actions:
            match action:
                case e.Generate(actor, leases):
                    incarnation = self.c.fleet.actors[actor].incarnation
                    self.todo += [("sample", actor, incarnation, lease, self.c.version) for lease in leases]
                case e.Score(ordinal):
                    if not isinstance(event, e.GroupDone) or event.ordinal != ordinal:
                        self.groups[ordinal] = replace(self.archive.take(ordinal)[0])
                    self.todo.append(("score", ordinal))
                case e.Train(step, ordinals):
                    self.todo.append(("train", step, ordinals))
                case e.Publish(version):
                    self.todo.append(("publish", version))
                case e.Replace(actor):
                    self.todo.append(e.ActorJoined(actor, self.c.fleet.actors[actor].incarnation + 1))
                case e.Finish():
                    self.finished = True
                case e.Abort(reason):
                    raise AssertionError(reason)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), st.booleans(),
    st.sampled_from([0, 0.1]), st.sampled_from([0, 0.2]), st.lists(st.integers(0, 120), max_size=4),
)  # fmt: skip
def test_a_run_that_is_killed_at_random_is_green_each_time(
    tmp_path_factory, seed, prompts, steps, staleness, deterministic, loss, drop, kills
):
    shape = {"prompts": prompts, "steps": steps, "max_staleness": staleness, "deterministic": deterministic}
    folder = tmp_path_factory.mktemp("run") / "run"
    lab = Lab(folder, seed, shape, loss, drop)
    for kill_after in kills:
        if lab.attempt(kill_after):
            break
        assert audit(folder).problems == []
    else:
        assert lab.attempt(10**6)
    found = audit(folder)
    assert found.problems == []
    assert found.finished and found.groups["trained"] == steps * prompts and found.groups["pending"] == 0
    shutil.rmtree(folder)


def test_a_kill_after_every_event_of_a_small_run_is_green(tmp_path):
    shape = {"prompts": 2, "steps": 3, "max_staleness": 1, "deterministic": False}
    for kill_after in range(0, 60, 3):
        lab = Lab(tmp_path / str(kill_after), 7, shape, 0.1, 0.2)
        while not lab.attempt(kill_after):
            assert audit(lab.folder).problems == []
            kill_after += 7
        assert audit(lab.folder).groups["trained"] == 6


@pytest.mark.parametrize("kind", ["leased", "done", "scored", "batched", "trained"])
def test_and_red_once_a_record_is_missing(tmp_path, kind, monkeypatch):
    lab = Lab(tmp_path / "run", 3, {"prompts": 2, "steps": 2, "max_staleness": 1, "deterministic": False}, 0, 0)
    record, seen = Archive.record, []

    def forgetful(archive, records):
        kept = []
        for each in records:
            seen.append(each.kind)
            if each.kind != kind or seen.count(kind) != 2:
                kept.append(each)
        record(archive, kept)

    monkeypatch.setattr(Archive, "record", forgetful)
    lab.attempt(10**6)
    assert audit(lab.folder).problems
