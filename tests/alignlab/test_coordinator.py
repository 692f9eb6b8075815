"""The state machine of a run: exact counts, bounded staleness, nothing lost, nothing trained twice."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab import events as e
from alignlab.coordinator import Coordinator
from alignlab.events import Lease, Train
from alignlab.states import Phase, Sampled


def acts(actions):
    """Without the records."""
    return [action for action in actions if not isinstance(action, e.Record)]


def kinds(actions):
    """The records' kinds."""
    return [action.kind for action in actions if isinstance(action, e.Record)]


class World:
    """Plays actors, scorer, learner in a random order, with losses, freezes and leavers; checks after every event."""

    def __init__(self, coordinator, seed, actors=2, loss=0.0, drop=0.0, fail=0.0, tokens=3):
        self.c, self.random = coordinator, random.Random(seed)
        self.loss, self.drop, self.fail, self.size = loss, drop, fail, tokens
        self.todo = []  # events that could happen next
        self.trained, self.served, self.ages = [], coordinator.version, []
        self.sampled = {}  # ordinal -> version of its first token, by the lease that counts
        self.finished = self.aborted = None
        self.joined, self.now = 0, 0.0
        for _ in range(actors):
            self.join()

    def join(self):
        self.joined += 1
        self.tell(e.ActorJoined(f"a{self.joined}"))

    def tell(self, event):
        self.now += 1.0
        for action in self.c.step(event, self.now):
            match action:
                case e.Generate(actor, leases):
                    for lease in leases:
                        self.todo.append(("sample", actor, self.c.fleet.actors[actor].incarnation, lease, self.served))
                case e.Score(ordinal):
                    self.todo.append(e.GroupScored(ordinal, "equal" if self.random.random() < self.drop else None))
                case e.Train(step, ordinals):
                    assert len(ordinals) == self.c.prompts and step == self.served
                    self.ages += [step - self.sampled[ordinal] for ordinal in ordinals]
                    self.trained += ordinals
                    self.todo.append(e.Trained(step, masked=self.random.randrange(2)))
                case e.Publish(version):
                    self.todo.append(("publish", version))
                case e.Replace(actor):
                    self.todo.append(e.ActorJoined(actor, self.c.fleet.actors[actor].incarnation + 1))
                case e.Abort(reason):
                    self.aborted = reason
                case e.Finish():
                    self.finished = True
        self.check()

    def check(self):
        tally, tokens = self.c.tally(), self.c.token_tally()
        assert tally.pop("admitted") == sum(tally.values())
        assert tokens.pop("generated") == sum(tokens.values())
        assert len(self.c.groups) <= (self.c.max_staleness + 1) * self.c.prompts
        assert all(n >= 0 for n in (*tally.values(), *tokens.values()))

    def play(self, event):
        match event:
            case ("sample", actor, incarnation, lease, version):
                # With weights changed in flight the first token is as old as the start of the lease.
                bad = self.random.random() < self.fail
                where = (lease.ordinal, actor, incarnation, lease.attempt)
                group = self.c.groups.get(lease.ordinal)
                if group is not None and (group.actor, group.attempt) == (actor, lease.attempt):
                    self.sampled[lease.ordinal] = version
                self.tell(e.GroupFailed(*where, "bad") if bad else e.GroupDone(*where, self.size, version, version))
            case ("publish", version):
                self.served = version
                self.tell(e.Served(version, tuple(self.c.fleet.actors)))
                self.todo.append(e.StepDone(version - 1))
            case _:
                self.tell(event)

    def trouble(self):
        """An actor is lost, frozen, thawed, leaves, or one joins."""
        name = self.random.choice(sorted(self.c.fleet.actors)) if self.c.fleet.actors else None
        what = self.random.randrange(5)
        if name is None or what == 0:
            return self.join()
        incarnation = self.c.fleet.actors[name].incarnation
        serving = self.c.fleet.count()["serving"]
        match what:
            case 1:
                self.tell(e.ActorLost(name, incarnation, "killed"))  # its results still arrive, late
            case 2:
                self.tell(e.ActorSuspected(name, incarnation, "silent"))
                self.todo.append(e.ActorRecovered(name, incarnation))
            case 3 if serving > 1:
                self.tell(e.ActorLeaving(name))
            case _:
                self.tell(e.Tick())

    def step(self):
        if self.random.random() < self.loss:
            self.trouble()
        if not (self.finished or self.aborted):
            if not self.todo:
                self.join()
                return
            self.play(self.todo.pop(self.random.randrange(len(self.todo))))

    def run(self, events=10_000):
        for _ in range(events):
            if self.finished or self.aborted:
                return self
            self.step()
        raise AssertionError("the run did not end")


SHAPES = (st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2))


@settings(deadline=None)  # 100,000 orders: pytest --hypothesis-profile=orders -k whatever
@given(
    *SHAPES, st.booleans(), st.sampled_from([0, 0.1]), st.sampled_from([0, 0.3]), st.sampled_from([0, 0.1]),
    st.integers(1, 4), st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_whatever_happens_every_step_trains_its_groups_once(
    seed, prompts, steps, staleness, wider, deterministic, loss, drop, fail, actors, capacity
):
    coordinator = Coordinator(
        prompts, steps, staleness, staleness + wider, deterministic, max_attempts=1000, max_dropped=1000,
        capacity=capacity, lease_seconds=30,
    )  # fmt: skip
    world = World(coordinator, seed, actors, loss, drop, fail).run()
    assert world.finished and coordinator.version == steps
    assert len(world.trained) == len(set(world.trained)) == steps * prompts
    assert min(world.ages) >= 0 and max(world.ages) <= coordinator.window
    # Dropped groups apart, the prompts trained are exactly the first ones of the stream.
    if not drop and not fail:
        assert sorted(world.trained) == list(range(steps * prompts))


@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_the_age_bound_is_attained(window):
    ages = [
        age
        for seed in range(60)
        for age in World(Coordinator(2, 8, min(window, 1), window), seed, loss=0.05).run().ages
    ]
    assert max(ages) == window


@settings(max_examples=100, deadline=None)
@given(*SHAPES[:4], st.sampled_from([0, 0.1]), st.sampled_from([0, 0.3]))
def test_a_deterministic_run_samples_and_trains_the_same_whatever_happens(seed, prompts, steps, staleness, loss, drop):
    """Which version sampled a group and which step trained it depend on nothing but the group's place in the stream."""

    class Fixed(World):
        def tell(self, event):
            if isinstance(event, e.GroupScored):
                event = e.GroupScored(event.ordinal, "equal" if drop and event.ordinal % 3 == 1 else None)
            super().tell(event)

    ends = []
    for order, actors in ((seed, 1), (seed + 1, 3)):
        coordinator = Coordinator(prompts, steps, staleness, deterministic=True, max_attempts=1000, max_dropped=1000)
        world = Fixed(coordinator, order, actors, loss).run()
        assert world.finished
        ends.append((world.trained, [world.sampled[ordinal] for ordinal in world.trained]))
    assert ends[0] == ends[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2), st.integers(1, 60), st.booleans())
def test_a_resumed_run_trains_the_rest_once(seed, staleness, events, found):
    first = Coordinator(3, 4, staleness)
    world = World(first, seed)
    for _ in range(events):
        world.step()
    while not world.finished and first.phase is not Phase.CLOSING:
        world.step()
    # A checkpoint is written when a step has been trained; a crash later undoes what followed it.
    state = first.state_dict()
    second = Coordinator(3, 4, staleness)
    sampled = (
        {o: Sampled("x", g.tokens, g.version, g.version) for o, g in first.groups.items() if g.tokens} if found else {}
    )
    second.load_state_dict(state, sampled)
    rest = World(second, seed + 1)
    rest.sampled = dict(world.sampled)
    rest.run()
    assert sorted(world.trained + rest.trained) == list(range(12))
    assert second.token_tally()["generated"] == 36


def test_on_policy_by_hand():
    run = Coordinator(prompts=2, steps=2)
    assert acts(run.step(e.ActorJoined("a"), 0)) == [e.Generate("a", (Lease(0, 0), Lease(1, 0)))]
    assert acts(run.step(e.GroupDone(1, "a", 0, 0), 0)) == [e.Score(1)]
    assert acts(run.step(e.GroupScored(1), 0)) == []  # on-policy: waits for group 0
    assert acts(run.step(e.GroupDone(0, "a", 0, 0), 0)) == [e.Score(0)]
    assert acts(run.step(e.GroupScored(0), 0)) == [Train(0, (0, 1))]
    assert acts(run.step(e.Trained(0), 0)) == [e.Publish(1)]
    assert acts(run.step(e.Served(1, ("a",)), 0)) == []
    assert acts(run.step(e.StepDone(0), 0)) == [e.Generate("a", (Lease(2, 0), Lease(3, 0)))]


def test_every_transition_is_one_record():
    run = Coordinator(prompts=1, steps=1)
    assert kinds(run.step(e.ActorJoined("a"), 0)) == ["actor", "admitted", "leased"]
    assert kinds(run.step(e.GroupDone(0, "a", 0, 0, tokens=5, oldest=0, payload="x"), 0)) == ["done"]
    assert kinds(run.step(e.GroupScored(0, None, "y"), 0)) == ["scored", "batched"]
    (trained, publish) = run.step(e.Trained(0, masked=2, payload="z"), 0)
    assert trained == e.Record("trained", {"step": 0, "groups": [0], "payload": "z", "tokens": 5, "masked": 2})
    assert publish == e.Publish(1) and run.token_tally()["trained"] == 3
    assert kinds(run.step(e.Served(1, ("a",), {}, "d"), 0)) == ["published"]
    assert run.step(e.StepDone(0), 0) == [e.Finish()]


def test_overlap_by_hand():
    run = Coordinator(prompts=1, steps=3, max_staleness=1)
    assert acts(run.step(e.ActorJoined("a"), 0)) == [e.Generate("a", (Lease(0, 0), Lease(1, 0)))]
    run.step(e.GroupDone(1, "a", 0, 0), 0)
    assert acts(run.step(e.GroupScored(1), 0)) == [Train(0, (1,))]  # 1 overtakes 0 ...
    assert acts(run.step(e.Trained(0), 0)) == [e.Publish(1)]
    # The slot is given back as soon as the new version is served; the next batch waits for the end of the step.
    assert acts(run.step(e.Served(1, ("a",)), 0)) == [e.Generate("a", (Lease(2, 0),))]
    run.step(e.StepDone(0), 0)
    run.step(e.GroupDone(2, "a", 0, 0), 0)
    assert acts(run.step(e.GroupScored(2), 0)) == []  # ... once: 0 would be two versions old in the next step
    run.step(e.GroupDone(0, "a", 0, 0), 0)
    assert acts(run.step(e.GroupScored(0), 0)) == [Train(1, (0,))]


def test_a_deterministic_version_waits_for_the_groups_of_the_one_before():
    run = Coordinator(prompts=1, steps=3, max_staleness=1, deterministic=True)
    run.step(e.ActorJoined("a"), 0)
    run.step(e.GroupDone(0, "a", 0, 0), 0)
    assert acts(run.step(e.GroupScored(0), 0)) == [Train(0, (0,))]
    assert acts(run.step(e.Trained(0), 0)) == []  # group 1 is still sampled by version 0
    run.step(e.GroupDone(1, "a", 0, 0), 0)
    assert acts(run.step(e.GroupScored(1, "equal"), 0)) == [e.Generate("a", (Lease(2, 0),))]  # and so is its successor
    run.step(e.GroupDone(2, "a", 0, 0), 0)
    assert acts(run.step(e.GroupScored(2), 0)) == [e.Publish(1)]


def test_groups_go_to_the_least_loaded_actor_that_has_room():
    run = Coordinator(prompts=4, steps=1, capacity=2)
    (given,) = acts(run.step(e.ActorJoined("a"), 0))
    assert [lease.ordinal for lease in given.leases] == [0, 1]  # no more than its capacity
    (given,) = acts(run.step(e.ActorJoined("b"), 0))
    assert (given.actor, [lease.ordinal for lease in given.leases]) == ("b", [2, 3])
    assert acts(run.step(e.ActorLost("b", 0, "gone"), 0)) == [e.Replace("b")]
    (given,) = acts(run.step(e.ActorJoined("c"), 0))
    assert given == e.Generate("c", (Lease(2, 1), Lease(3, 1)))


def test_the_first_groups_are_spread_over_all_actors():
    given = acts(Coordinator(prompts=5, steps=1).step(e.Started({"a": 0, "b": 2}), 0))
    assert [(action.actor, len(action.leases)) for action in given] == [("a", 3), ("b", 2)]


def test_a_late_result_is_refused_and_counted():
    run = Coordinator(prompts=1, steps=1)
    run.step(e.ActorJoined("a"), 0)
    run.step(e.ActorLost("a", 0, "killed"), 0)
    assert acts(run.step(e.ActorJoined("a", 1), 0)) == [e.Generate("a", (Lease(0, 1),))]
    assert kinds(run.step(e.GroupDone(0, "a", 0, 0, tokens=7), 0)) == ["refused"]  # another incarnation
    assert kinds(run.step(e.GroupDone(0, "a", 1, 0, tokens=7), 0)) == ["refused"]  # another attempt
    assert run.counts["refused"] == 2 and run.token_tally()["refused"] == 14
    assert acts(run.step(e.GroupDone(0, "a", 1, 1), 0)) == [e.Score(0)]


def test_a_frozen_actor_gives_its_groups_away_and_may_come_back():
    run = Coordinator(prompts=2, steps=1)
    run.step(e.ActorJoined("a"), 0)
    run.step(e.ActorJoined("b"), 0)
    cancel, given = acts(run.step(e.ActorSuspected("a", 0, "silent"), 0))
    assert (cancel, given) == (e.Cancel("a", (0, 1)), e.Generate("b", (Lease(0, 1), Lease(1, 1))))
    assert kinds(run.step(e.GroupDone(0, "a", 0, 0, tokens=7), 0)) == ["refused"]
    run.step(e.ActorRecovered("a", 0), 0)
    assert run.fleet.actors["a"].health.value == "serving"
    assert acts(run.step(e.ActorLost("b", 0, "killed"), 0))[-1] == e.Generate("a", (Lease(0, 2), Lease(1, 2)))


def test_an_actor_that_leaves_finishes_what_it_holds():
    run = Coordinator(prompts=1, steps=2, max_staleness=1, capacity=1)
    run.step(e.ActorJoined("a"), 0)
    assert acts(run.step(e.ActorLeaving("a"), 0)) == []
    assert acts(run.step(e.GroupDone(0, "a", 0, 0), 0)) == [e.Retire("a"), e.Score(0)]
    assert run.fleet.actors == {}


def test_stale_actors_get_no_groups():
    run = Coordinator(prompts=1, steps=3)
    run.version = 2
    assert acts(run.step(e.ActorJoined("a", 0, version=1), 0)) == []
    assert run.fleet.count() == {"stale": 1}
    run.step(e.ActorJoined("b", 0, version=2), 0)
    run.phase = Phase.PUBLISHING
    run.step(e.Served(3, ("a",), {"b": "late"}), 0)
    assert {name: actor.health.value for name, actor in run.fleet.actors.items()} == {"a": "serving", "b": "stale"}


def test_a_lease_that_lasts_too_long_goes_to_another():
    run = Coordinator(prompts=1, steps=1, lease_seconds=10)
    run.step(e.ActorJoined("a"), 0)
    run.step(e.ActorJoined("b"), 0)
    assert acts(run.step(e.Tick(), 9)) == [] and run.oldest_lease == 9
    assert acts(run.step(e.Tick(), 10)) == [e.Cancel("a", (0,)), e.Generate("a", (Lease(0, 1),))]
    assert run.oldest_lease == 0


def test_a_group_that_kills_its_actors_is_dropped_or_stops_a_deterministic_run():
    for deterministic in (False, True):
        run = Coordinator(prompts=1, steps=1, max_attempts=2, deterministic=deterministic)
        run.step(e.ActorJoined("a"), 0)
        run.step(e.ActorLost("a", 0, "died"), 0)
        run.step(e.ActorJoined("a", 1), 0)
        actions = acts(run.step(e.ActorLost("a", 1, "died"), 0))
        if deterministic:
            assert "group 0 was lost with its actor 2 times" in actions[0].reason
        else:
            assert run.counts["dropped/retries: lost with its actor 2 times"] == 1 and actions == [e.Replace("a")]


def test_prompts_that_are_all_dropped_stop_the_run():
    run = Coordinator(prompts=1, steps=1, max_dropped=3)
    actions = acts(run.step(e.ActorJoined("a"), 0))
    while isinstance(actions[0], e.Generate):
        (lease,) = actions[0].leases
        run.step(e.GroupDone(lease.ordinal, "a", 0, 0), 0)
        actions = acts(run.step(e.GroupScored(lease.ordinal, drop="equal rewards"), 0))
    assert "4 groups were dropped while 1 were wanted" in actions[0].reason


@pytest.mark.parametrize(("staleness", "deterministic"), [(0, False), (1, False), (1, True)])
def test_stop_finishes_the_step_under_way_and_no_other(staleness, deterministic):
    run = Coordinator(prompts=2, steps=10, max_staleness=staleness, deterministic=deterministic)
    world = World(run, seed=1)
    while run.phase is not Phase.TRAINING:
        world.play(world.todo.pop(0))
    world.tell(e.StopRequested())
    world.run()
    assert world.finished and run.version == 1 and len(world.trained) == 2
