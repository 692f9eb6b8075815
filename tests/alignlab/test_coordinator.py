"""The state machine of a run: exact counts, bounded staleness, nothing lost, nothing trained twice."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab import coordinator as c
from alignlab.coordinator import Coordinator, Lease, Train


class World:
    """Plays the actors, the scorer and the learner, in a random order; checks the rules after every event."""

    def __init__(self, coordinator, seed, actors=2, loss=0.0, drop=0.0, fail=0.0):
        self.c, self.random = coordinator, random.Random(seed)
        self.loss, self.drop, self.fail = loss, drop, fail
        self.todo = []  # events that could happen next
        self.trained = []
        self.version_of = {}  # ordinal -> version served when it was (last) generated
        self.finished = self.aborted = None
        for i in range(actors):
            self.tell(c.ActorJoined(f"a{i}"))

    def tell(self, event):
        for action in self.c.step(event, now=0.0):
            match action:
                case c.Generate(actor, leases):
                    for lease in leases:
                        self.version_of[lease.ordinal] = self.c.version
                        kind = c.GroupFailed if self.random.random() < self.fail else c.GroupDone
                        extra = ("bad",) if kind is c.GroupFailed else ()
                        self.todo.append(kind(lease.ordinal, actor, lease.attempt, *extra))
                case c.Score(ordinal):
                    dropped = "equal" if self.random.random() < self.drop else None
                    self.todo.append(c.GroupScored(ordinal, dropped))
                case Train(step, ordinals):
                    assert len(ordinals) == self.c.prompts
                    for ordinal in ordinals:
                        assert 0 <= step - self.version_of[ordinal] <= self.c.max_staleness
                    self.trained += ordinals
                    self.todo.append(c.StepDone(step))
                case c.Abort(reason):
                    self.aborted = reason
                case c.Finish():
                    self.finished = True
        tally = self.c.tally()
        assert tally.pop("admitted") == sum(tally.values())
        assert len(self.c.groups) <= (self.c.max_staleness + 1) * self.c.prompts

    def run(self, events=10_000):
        for _ in range(events):
            if self.finished or self.aborted or not self.todo:
                return self
            if self.random.random() < self.loss and len(self.c.actors) > 1:
                actor = self.random.choice(sorted(self.c.actors))
                self.tell(c.ActorLost(actor, "killed"))  # its results still arrive, late
                self.todo.append(c.ActorJoined(f"{actor}'"))
            self.tell(self.todo.pop(self.random.randrange(len(self.todo))))
        raise AssertionError("the run did not end")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 0.05]),
    st.sampled_from([0, 0.3]), st.sampled_from([0, 0.1]), st.integers(1, 4),
)  # fmt: skip
def test_whatever_happens_every_step_trains_its_groups_once(seed, prompts, steps, staleness, loss, drop, fail, actors):
    coordinator = Coordinator(prompts, steps, staleness, max_attempts=100, max_dropped=1000)
    world = World(coordinator, seed, actors, loss, drop, fail).run()
    assert world.finished and coordinator.version == steps
    assert len(world.trained) == len(set(world.trained)) == steps * prompts
    # Dropped groups apart, the prompts trained are exactly the first ones of the stream.
    if not drop and not fail:
        assert sorted(world.trained) == list(range(steps * prompts))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2), st.integers(1, 30))
def test_a_resumed_run_trains_the_rest_once(seed, staleness, events):
    first = Coordinator(3, 4, staleness)
    world = World(first, seed)
    for _ in range(events):
        if world.todo and not world.finished:
            world.tell(world.todo.pop(world.random.randrange(len(world.todo))))
    done = world.trained[: first.version * 3]
    # A checkpoint is written when a step has been trained; a crash later undoes what followed it.
    if first.version == 0 or len(world.trained) != first.version * 3:
        return
    second = Coordinator(3, 4, staleness)
    second.load_state_dict(first.state_dict())
    rest = World(second, seed + 1).run()
    assert sorted(done + rest.trained) == list(range(12))


def test_on_policy_by_hand():
    run = Coordinator(prompts=2, steps=2)
    assert run.step(c.ActorJoined("a"), 0) == [c.Generate("a", (Lease(0, 0), Lease(1, 0)))]
    assert run.step(c.GroupDone(1, "a", 0), 0) == [c.Score(1)]
    assert run.step(c.GroupScored(1), 0) == []  # on-policy: waits for group 0
    assert run.step(c.GroupDone(0, "a", 0), 0) == [c.Score(0)]
    assert run.step(c.GroupScored(0), 0) == [Train(0, (0, 1))]
    assert run.step(c.StepDone(0), 0) == [c.Generate("a", (Lease(2, 0), Lease(3, 0)))]


def test_overlap_by_hand():
    run = Coordinator(prompts=1, steps=3, max_staleness=1)
    assert run.step(c.ActorJoined("a"), 0) == [c.Generate("a", (Lease(0, 0), Lease(1, 0)))]
    run.step(c.GroupDone(1, "a", 0), 0)
    assert run.step(c.GroupScored(1), 0) == [Train(0, (1,))]  # 1 overtakes 0 ...
    assert run.step(c.StepDone(0), 0) == [c.Generate("a", (Lease(2, 0),))]
    run.step(c.GroupDone(2, "a", 0), 0)
    assert run.step(c.GroupScored(2), 0) == []  # ... once: 0 would be two versions old in the next step
    run.step(c.GroupDone(0, "a", 0), 0)
    assert run.step(c.GroupScored(0), 0) == [Train(1, (0,))]


def test_groups_go_to_the_least_loaded_actor():
    run = Coordinator(prompts=4, steps=1)
    run.step(c.ActorJoined("a"), 0)
    run.step(c.ActorLost("a", "gone"), 0)
    run.actors = {"a": 2, "b": 0}
    actions = run.step(c.ActorJoined("c"), 0)
    assert {a.actor: len(a.leases) for a in actions} == {"b": 2, "c": 2}


def test_a_late_result_of_a_lost_actor_is_refused_and_counted():
    run = Coordinator(prompts=1, steps=1)
    run.step(c.ActorJoined("a"), 0)
    run.step(c.ActorLost("a", "frozen"), 0)
    assert run.step(c.ActorJoined("a"), 0) == [c.Generate("a", (Lease(0, 1),))]
    assert run.step(c.GroupDone(0, "a", 0), 0) == []
    assert run.counts["refused"] == 1
    assert run.step(c.GroupDone(0, "a", 1), 0) == [c.Score(0)]


def test_a_group_that_kills_its_actors_stops_the_run():
    run = Coordinator(prompts=1, steps=1, max_attempts=2)
    run.step(c.ActorJoined("a"), 0)
    run.step(c.ActorLost("a", "died"), 0)
    run.step(c.ActorJoined("a"), 0)
    (abort,) = run.step(c.ActorLost("a", "died"), 0)
    assert "group 0 lost its actor 2 times" in abort.reason


def test_prompts_that_are_all_dropped_stop_the_run():
    run = Coordinator(prompts=1, steps=1, max_dropped=3)
    actions = run.step(c.ActorJoined("a"), 0)
    while isinstance(actions[0], c.Generate):
        (lease,) = actions[0].leases
        run.step(c.GroupDone(lease.ordinal, "a", 0), 0)
        actions = run.step(c.GroupScored(lease.ordinal, drop="equal rewards"), 0)
    assert "4 groups were dropped while 1 were wanted" in actions[0].reason


@pytest.mark.parametrize("staleness", [0, 1])
def test_stop_finishes_the_step_under_way_and_no_other(staleness):
    run = Coordinator(prompts=2, steps=10, max_staleness=staleness)
    world = World(run, seed=1)
    while not run._training:
        world.tell(world.todo.pop(0))
    world.tell(c.StopRequested())
    world.run()
    assert world.finished and run.version == 1 and len(world.trained) == 2
