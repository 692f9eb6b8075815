"""The fake engine keeps the Engine contract, and specs decide what the config leaves open."""

from __future__ import annotations

import pytest

from actors.engine import EngineSpec, FakeEngine, Rejected
from actors.weights import Snapshot, snapshot
from core.loading import parse_config
from core.schema import GroupRequest, Prompt, Sampling

SPEC = EngineSpec(model="", max_model_len=32)


def request(name: str, seeds: tuple[int, ...] = (1, 2), prompt: tuple[int, ...] = (5, 9), **sampling) -> GroupRequest:
    return GroupRequest(name, Prompt(0, "?", prompt), seeds, Sampling(**{"max_tokens": 8, **sampling}))


def drain(engine) -> dict:
    groups = []
    while sum(engine.unfinished()):
        groups += engine.step()
    return {group.id: group for group in groups}


def fake_weights(version: int) -> Snapshot:
    return snapshot([], version)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours():
    alone, crowd = FakeEngine(SPEC), FakeEngine(SPEC)
    alone.add(request("a"))
    for name in "bac":
        crowd.add(request(name, seeds=(1, 2) if name == "a" else (3, 4)))
    assert drain(alone)["a"] == drain(crowd)["a"]


def test_tokens_logprobs_and_versions_go_together_and_lengths_follow_the_rules():
    engine = FakeEngine(SPEC)
    engine.add(request("a", seeds=(0, 6), max_tokens=4))
    short, long = drain(engine)["a"].completions
    # length 2 + seed % 7: seed 0 stops at 2 tokens, seed 6 would stop at 8 and is cut at 4
    assert (len(short.token_ids), short.finish_reason, short.token_ids[-1]) == (2, "stop", 2)
    assert (len(long.token_ids), long.finish_reason) == (4, "length")
    for c in (short, long):
        assert len(c.token_ids) == len(c.rollout_logprobs) == len(c.versions) and max(c.rollout_logprobs) < 0
    assert engine.generated() == 6


def test_new_weights_label_the_later_tokens_of_requests_in_flight():
    engine = FakeEngine(SPEC)
    engine.add(request("a", seeds=(6,)))
    engine.step(), engine.step()
    engine.update_weights(fake_weights(3))
    assert drain(engine)["a"].completions[0].versions == (0, 0, 3, 3, 3, 3, 3, 3)


def test_a_greedy_completion_comes_beside_the_samples():
    engine = FakeEngine(SPEC)
    engine.add(GroupRequest("a", Prompt(0, "?", (5, 9)), (1, 2), Sampling(8), greedy=True))
    engine.add(request("b"))
    groups = drain(engine)
    assert len(groups["a"].completions) == 2 and len(groups["a"].greedy.completions) == 1
    assert groups["a"].completions == groups["b"].completions and groups["b"].greedy is None
    assert groups["a"].tokens == groups["b"].tokens + groups["a"].greedy.tokens


def test_abort_forgets():
    engine = FakeEngine(SPEC)
    engine.add(request("a"))
    engine.add(request("b"))
    engine.abort(["a", "unknown"])
    assert list(drain(engine)) == ["b"]


def test_what_cannot_fit_is_rejected_and_the_engine_lives_on():
    engine = FakeEngine(SPEC)
    with pytest.raises(Rejected, match="40 tokens and max_tokens 8 need 48"):
        engine.add(request("long", prompt=(1,) * 40))
    with pytest.raises(Rejected, match="has no tokens"):
        engine.add(request("empty", prompt=()))
    engine.add(request("a"))
    assert list(drain(engine)) == ["a"]


CONFIG = {"name": "n", "steps": 1, "model": {"path": "m"}, "data": {"path": "d.jsonl", "max_prompt_tokens": 100}}


@pytest.mark.parametrize(
    ("device", "actors", "learner", "transfer", "eager"),
    [
        ("cpu", {}, {}, "object_store", True),
        ("cuda", {}, {}, "nccl", False),
        ("cuda", {}, {"device": "cpu"}, "object_store", False),
        ("cuda", {"weight_transfer": "object_store", "enforce_eager": True}, {}, "object_store", True),
    ],
)
def test_a_spec_decides_what_the_config_leaves_to_the_device(device, actors, learner, transfer, eager):
    config = parse_config(
        {**CONFIG, "actors": actors, "learner": learner, "rollout": {"max_tokens": 20}, "eval": {"max_tokens": 50}}, "t"
    )
    spec = EngineSpec.of(config, device)
    # the longest of training and evaluation: 100 + max(20, 50)
    assert (spec.weight_transfer, spec.enforce_eager, spec.max_model_len) == (transfer, eager, 150)
