"""Several components at once: what is checked, how they are mixed, what is counted, when a run stops."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.config import RewardsConfig
from core.errors import UserError
from core.schema import Completion, Group, Mixture, Prompt, Score
from rewards.components import check_components, check_data, objectives
from rewards.composer import Composer
from rewards.metrics import METRICS, all_equal
from rewards.workers import RewardFailure

OK, MISSING = Score("ok", 1.0), Score("abstain")


def config(components: dict[str, Any], **settings: Any) -> RewardsConfig:
    return RewardsConfig(components=components, **{"timeout": 1.0, "memory_gib": 2.0, **settings})


def group(*texts: str, **columns: Any) -> Group:
    completions = tuple(Completion((1,) * len(t), (0.0,) * len(t), (0,) * len(t), t, "stop") for t in texts)
    return Group("g", Prompt(0, "Q?", (1,), columns), completions)


def scored(totals: tuple[float, ...], **components: tuple[Score, ...]) -> Group:
    return replace(group(*["x"] * len(totals)), components=components, totals=totals)


@pytest.fixture
def run() -> Iterator[Any]:
    """Score groups with a config in one loop and close everything."""

    def score(settings: RewardsConfig, *groups: Group) -> tuple[Composer, list[Group]]:
        async def main() -> tuple[Composer, list[Group]]:
            composer = Composer(settings)
            try:
                return composer, list(await asyncio.gather(*(composer.score(g) for g in groups)))
            finally:
                await composer.close()

        return asyncio.run(asyncio.wait_for(main(), 60))

    yield score


def test_components_stay_apart_and_the_total_is_their_weighted_sum(run: Any) -> None:
    settings = config(
        {
            "math_answer": {},
            "brief": {"fn": "length", "weight": 0.5, "target": 10, "alpha": 0.1},
            "form": {"fn": "boxed", "weight": 0.25},
        }
    )
    given = group(r"\boxed{5}", r"\boxed{4}", "5", answer="5")  # 9, 9 and 1 tokens
    composer, (found,) = run(settings, given)
    assert [s.value for s in found.components["math_answer"]] == [1.0, 0.0, 0.0]
    assert [s.value for s in found.components["brief"]] == pytest.approx([-0.1, -0.1, -0.9])
    assert [s.value for s in found.components["form"]] == [1.0, 1.0, 0.0]
    # 1 - 0.05 + 0.25; 0 - 0.05 + 0.25; 0 - 0.45 + 0
    assert found.totals == pytest.approx((1.2, 0.2, -0.45))
    assert given.totals == () and given.components == {}  # a stage returns a copy

    metrics = composer.metrics([found])
    assert metrics["reward/total"] == pytest.approx(0.95 / 3)
    assert metrics["reward/math_answer"] == pytest.approx(1 / 3)
    assert metrics["reward/math_answer_std"] == pytest.approx(math.sqrt(1 / 3))  # of 1, 0, 0 with n - 1
    assert metrics["reward/math_answer_failed"] == metrics["reward/unscorable"] == metrics["reward/equal_groups"] == 0
    assert 0 < metrics["reward/form_seconds"] < 1
    known = {name.replace("<component>", c) for name in METRICS for c in ("math_answer", "brief", "form")}
    assert set(metrics) <= known
    (stepped,) = asyncio.run(composer.columns([found], 0))
    ((weighed,), mixture) = composer.weigh([stepped])
    assert weighed.totals == found.totals and mixture == Mixture()
    assert weighed.weights == {"math_answer": (1.0,) * 3, "brief": (0.5,) * 3, "form": (0.25,) * 3}
    assert composer.metrics([weighed])["diagnostics/say/form"] == pytest.approx(0.25 / (1 + 0.4 + 0.25))


def test_without_a_right_answer_nothing_is_known_and_nothing_is_zero(run: Any) -> None:
    composer, (found,) = run(config({"math_answer": {}}), group(r"\boxed{5}", "5"))
    assert [s.status for s in found.components["math_answer"]] == ["abstain", "abstain"]
    assert all(math.isnan(t) for t in found.totals)
    composer.check([scored((1.0,), math_answer=(OK,))])
    metrics = composer.metrics([found])
    assert "reward/total" not in metrics and "reward/math_answer" not in metrics
    assert metrics["reward/unscorable"] == metrics["reward/math_answer_abstained"] == 1.0


def test_a_greedy_completion_is_scored_like_the_others_and_is_in_no_statistic(run: Any) -> None:
    greedy = group(r"\boxed{3}", answer="4")
    sampled = replace(group(r"\boxed{4}", r"\boxed{5}", answer="4"), greedy=greedy)
    composer, (scored_group,) = run(config({"math_answer": {"weight": 2.0}}), sampled)
    (stepped,) = asyncio.run(composer.columns([scored_group], 0))
    ((weighed,), _) = composer.weigh([stepped])
    assert weighed.totals == (2.0, 0.0) and weighed.greedy is not None and weighed.greedy.totals == (0.0,)
    assert composer.metrics([weighed])["reward/total"] == 1.0


def test_a_failure_costs_its_own_part_of_the_total(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(completion):\n    while completion == 'bb': pass\n    return 1 / (completion != 'a')"
    )
    settings = config({"mine": {"fn": f"{tmp_path}/mine.py:f"}, "form": {"fn": "boxed", "weight": 3.0}}, timeout=0.5)
    composer, (found,) = run(settings, group("a", "bb", r"\boxed{5}"))
    assert [s.status for s in found.components["mine"]] == ["error", "timeout", "ok"]
    assert found.totals == (0.0, 0.0, 4.0)
    with pytest.raises(RewardFailure, match=r"rewards.components.mine: 2 of 3 completions .*rewards.max_failed is 0.5"):
        composer.metrics([found])


def test_the_message_of_a_failing_step_names_the_most_common_reason() -> None:
    composer = Composer(config({"form": {"fn": "boxed"}, "math_answer": {}}, max_failed=0.25))
    often, seldom = Score("error", detail="KeyError: 'b'"), Score("timeout")
    composer.check([scored((1.0,) * 4, form=(OK, OK, OK, seldom))])  # a quarter is allowed
    with pytest.raises(UserError, match=r"most often \(2 of them\) error: KeyError: 'b'"):
        composer.check([scored((1.0,) * 4, form=(OK, often, often, seldom), math_answer=(OK,) * 4)])


def test_a_mapping_becomes_components_under_one_weight(run: Any, tmp_path: Path) -> None:
    source = "def f(completion): return {'a': 1, 'b': None} if completion == 'x' else {'a': 3, 'c': 1}"
    (tmp_path / "mine.py").write_text(source)
    composer, (found,) = run(config({"m": {"fn": f"{tmp_path}/mine.py:f", "weight": 2}}), group("x", "y"))
    assert {name: [s.status for s in scores] for name, scores in found.components.items()} == {
        "m/a": ["ok", "ok"],
        "m/b": ["abstain", "abstain"],
        "m/c": ["abstain", "ok"],
    }
    assert found.totals == (2.0, 8.0)
    assert composer.metrics([found])["reward/m/a"] == 2.0


def test_a_total_is_the_sum_of_what_there_is() -> None:
    rows = scored((), a=(OK, MISSING, MISSING), b=(Score("ok", 4.0), Score("ok", 4.0), Score("error")))
    rows = replace(rows, completions=group("x", "x", "x").completions)
    entries = {"a": {"fn": "boxed"}, "b": {"fn": "boxed", "weight": 0.5}}
    for settings, expected in ((config(entries), 2.0), (config(entries, renormalize_missing=True), 2.0 * 1.5 / 0.5)):
        composer = Composer(settings)
        ((found,), _) = composer.weigh(asyncio.run(composer.columns([rows], 0)))
        assert found.totals[:2] == (3.0, expected)  # neither zero nor, by default, rescaled
        assert math.isnan(found.totals[2])


def test_groups_of_equal_totals_are_counted() -> None:
    assert all_equal((0.5, 0.5)) and all_equal((0.5, math.nan)) and all_equal((math.nan,) * 2)
    assert not all_equal((0.5, math.nan, 0.0))
    composer = Composer(config({}))
    metrics = composer.metrics([scored((1.0, 1.0)), scored((1.0, 0.0)), scored((0.0, 0.0)), scored((0.0, 0.0))])
    assert (metrics["reward/equal_groups"], metrics["reward/total"]) == (0.75, 0.375)


@pytest.mark.parametrize(
    ("components", "says"),
    [
        (
            {"math_anwser": {}},
            "rewards.components.math_anwser: there is no reward 'math_anwser'; did you mean 'math_answer'",
        ),
        (
            {"length": {"traget": 5}},
            "rewards.components.length.traget: unknown option of 'length'; did you mean 'target'",
        ),
        ({"boxed": {"wieght": 2}}, "rewards.components.boxed.wieght: unknown option of 'boxed'; did you mean 'weight'"),
        ({"length": {"target": "5"}}, "rewards.components.length.target: "),
        ({"length": {"target": 0}}, "rewards.components.length.target: "),
        ({"length": {}}, "rewards.components.length.target: field required"),
        ({"boxed": {"weight": "1"}}, "rewards.components.boxed.weight: '1' is not a number"),
        ({"boxed": {"weight": True}}, "rewards.components.boxed.weight: True is not a number"),
        ({"boxed": {"weight": math.nan}}, "rewards.components.boxed.weight: nan is not a number"),
        ({"b": {"fn": 3}}, "rewards.components.b.fn: 3 is not a name"),
        ({"b": {"fn": "nowhere.py:f"}}, "rewards.components.b: 'nowhere.py:f' names the file"),
        ({"a/b": {"fn": "boxed"}}, "rewards.components.a/b: a component's name has no '/'"),
        ({"math_answer": {"extract": "all"}}, "rewards.components.math_answer.extract: "),
        ({"e": {"fn": "ensemble"}}, "rewards.components.e.members: 'ensemble' is made of other components"),
        ({"e": {"fn": "ensemble", "members": ["a"]}}, "rewards.components.e.members: 'a' is no scored component"),
        ({"boxed": {"members": ["a"]}}, "rewards.components.boxed.members: 'boxed' scores completions itself"),
        ({"boxed": {"shape": ["parr"]}}, "rewards.components.boxed.shape.parr: there is no shaper 'parr'; did you"),
        ({"boxed": {"shape": "par"}}, "rewards.components.boxed.shape: 'par' is not a list"),
        ({"boxed": {"bounds": [1, 0]}}, "rewards.components.boxed.bounds: [1, 0] is no [lowest, highest]"),
        ({"boxed": {"keys": []}}, "rewards.components.boxed.keys: [] is no list of names"),
        (
            {"e": {"fn": "ensemble", "members": ["boxed"]}, "boxed": {"weight": 2}},
            "rewards.components.boxed.weight: it is no objective",
        ),
    ],
)
def test_mistakes_in_the_config_are_explained_before_anything_starts(components: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        check_components(config(components))
    assert str(error.value).startswith(says)


def test_a_component_says_what_stands_behind_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completion, *, bonus: float = 1.0): return bonus")
    found = check_components(config({"m": {"fn": f"{tmp_path}/mine.py:f", "bonus": 2.0}, "boxed": {"shape": ["clip"]}}))
    record = found["m"].record()
    assert record["options"] == {"bonus": 2.0} and len(record["file_hash"]) == 32
    (tmp_path / "mine.py").write_text("def f(completion, *, bonus: float = 1.0): return 2 * bonus")
    assert found["m"].record()["file_hash"] != record["file_hash"]
    assert found["boxed"].record() == {"fn": "boxed", "options": {}, "members": [], "shape": ["clip"]}


def test_data_without_a_column_that_a_reward_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def near(completion, target, *, scale: float = 1.0): return 0.0\n")
    found = check_components(config({"math_answer": {}, "near": {"fn": f"{tmp_path}/mine.py:near"}}))
    check_data(found, {"answer", "target", "question"})
    with pytest.raises(UserError, match=r"components\.math_answer: it reads the column 'answer', .*mean 'answers'"):
        check_data(found, {"answers", "target"})
    with pytest.raises(UserError, match=r"components\.near: it reads the column 'target'"):
        check_data(found, {"answer"})
    check_data(check_components(config({"math_answer": {"gold_column": "solution"}})), {"solution"})


def test_a_step_in_which_nothing_has_a_total_ends_the_run() -> None:
    composer = Composer(config({"math_answer": {}}))
    silent = scored((math.nan, math.nan), math_answer=(Score("abstain", detail="no right answer"),) * 2)
    with pytest.raises(RewardFailure, match=r"nothing to learn from; most often math_answer says abstain: no right"):
        composer.check([silent])
    composer.check([scored((1.0,), math_answer=(OK,))])
    composer.check([silent])  # one step is bad luck


def test_an_option_called_weight_could_never_be_set(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completion, *, weight=1.0): return weight")
    with pytest.raises(UserError, match="has an option 'weight'"):
        check_components(config({"mine": {"fn": f"{tmp_path}/mine.py:f"}}))


def test_a_checkpoint_fits_the_same_components_only() -> None:
    composer = Composer(config({"math_answer": {}, "boxed": {}}))
    Composer(config({"boxed": {"weight": 2}, "math_answer": {}})).load_state_dict(composer.state_dict())
    with pytest.raises(UserError, match="made with boxed, math_answer, the config has boxed"):
        Composer(config({"boxed": {}})).load_state_dict(composer.state_dict())


def stepped(settings: RewardsConfig, groups: list[Group], step: int = 0) -> tuple[Composer, list[Group]]:
    """A step of scored groups through columns and weights."""

    async def main() -> tuple[Composer, list[Group]]:
        composer = Composer(settings, steps=10)
        try:
            return composer, composer.weigh(await composer.columns(groups, step))[0]
        finally:
            await composer.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def values(**columns: list[float | None]) -> Group:
    """A group whose components say these numbers; none is missing."""
    size = len(next(iter(columns.values())))
    said = {n: tuple(MISSING if v is None else Score("ok", v) for v in vs) for n, vs in columns.items()}
    return replace(group(*["x"] * size), components=said)


def test_a_derived_component_is_made_of_its_members_which_are_no_objectives() -> None:
    settings = config(
        {
            "both": {"fn": "ensemble", "members": ["a", "b"], "mode": "uwo", "coef": 0.5, "weight": 2.0},
            "a": {"fn": "boxed"},
            "b": {"fn": "boxed"},
            "right": {"fn": "boxed"},
        }
    )
    composer, (found,) = stepped(settings, [values(a=[1.0, 0.0, None], b=[3.0, 0.0, 5.0], right=[0.0, 1.0, 0.0])])
    # mean 2, variance 1; mean 0; one member has a score
    assert found.columns["both"] == (1.5, 0.0, 5.0)
    assert found.totals == (3.0, 1.0, 10.0) and set(found.weights) == {"both", "right"}
    metrics = composer.metrics([found])
    assert metrics["reward/both"] == pytest.approx(6.5 / 3) and metrics["reward/a"] == 0.5
    assert metrics["diagnostics/disagreement/both"] == pytest.approx((1 + 0) / 2)


def test_shaping_is_a_matter_of_the_step_and_its_statistics_are_kept() -> None:
    settings = config({"a": {"fn": "boxed", "shape": ["minmax", {"ceil": {"ceil": 0.75}}]}})
    composer, (found,) = stepped(settings, [values(a=[1.0, 2.0, 5.0])])
    assert found.columns["a"] == (0.0, 0.25, 0.75) == found.totals
    metrics = composer.metrics([found])
    assert metrics["reward/a"] == pytest.approx(8 / 3) and metrics["reward/a_shaped"] == pytest.approx(1 / 3)
    other = Composer(settings)
    other.load_state_dict(json.loads(json.dumps(composer.state_dict())))
    (again,) = asyncio.run(other.columns([values(a=[3.0])], 1))
    assert again.columns["a"] == (0.5,)


def test_a_score_is_compared_with_those_of_reference_answers(run: Any) -> None:
    entry = {"fn": "length", "target": 10, "alpha": 1.0, "references": "others", "shape": [{"par": {"k": 1.0}}]}
    _, (found,) = run(config({"near": entry}), group("x" * 10, "x" * 9, others=[-1.0, None]))
    assert found.references["near"][0] == -1.0 and math.isnan(found.references["near"][1])
    assert found.columns["near"] == pytest.approx((1 / (1 + math.exp(-1)), 0.5))
    scoring = {"fn": "boxed", "references": "others", "shape": ["centered"]}
    _, (found,) = run(config({"form": scoring}), group("x", others=[r"\boxed{1}", "none"]))
    assert found.references["form"] == (1.0, 0.0) and found.columns["form"] == (-0.5,)


def test_gold_is_scored_and_watched_and_never_rewarded() -> None:
    entries = {"proxy": {"fn": "boxed"}, "truth": {"fn": "boxed"}}
    settings = config(entries, gold="truth", alarm={"window": 1, "margin": 0.1})
    assert objectives(check_components(settings), "truth") == ("proxy",)
    composer = Composer(settings)
    alarms = []
    for step, (proxy, truth) in enumerate([(0.1, 0.5), (0.4, 0.8), (0.6, 0.75), (0.8, 0.6)]):
        groups = asyncio.run(composer.columns([values(proxy=[proxy] * 2, truth=[truth] * 2)], step))
        ((found,), _) = composer.weigh(groups)
        assert found.totals == (proxy, proxy)
        alarms.append(composer.learn()["overoptimization/alarm"])
    assert alarms == [0, 0, 0, 1]


def test_a_reward_with_state_sees_the_groups_in_order_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Novel:\n"
        "    'How many texts were seen before.'\n"
        "    def __init__(self, *, start: int = 0): self.seen = start\n"
        "    def __call__(self, completion, step):\n"
        "        if completion == 'die': raise SystemExit\n"
        "        self.seen += 1\n"
        "        return self.seen + 100 * step\n"
        "    def state_dict(self): return {'seen': self.seen}\n"
        "    def load_state_dict(self, state): self.seen = state['seen']\n"
    )
    settings = config({"novel": {"fn": f"{tmp_path}/mine.py:Novel", "start": 5}})
    composer, (first, second) = stepped(settings, [group("a", "b"), group("c", "die")])
    assert first.totals == (6.0, 7.0) and second.totals[0] == 8.0 and math.isnan(second.totals[1])

    async def resumed() -> Group:
        other = Composer(settings)
        try:
            other.load_state_dict(json.loads(json.dumps(composer.state_dict())))
            return (await other.columns([group("d")], 1))[0]
        finally:
            await other.close()

    assert asyncio.run(resumed()).columns["novel"] == (109.0,)


def test_a_policy_that_knows_its_objectives_wants_the_keys_of_a_mapping_declared() -> None:
    entry = {"fn": "boxed", "keys": ["a", "b"]}
    spec = {"policy": "lagrange", "kind": "projected", "thresholds": {"m/a": 0.5}}
    assert Composer(config({"m": entry}, weighting=spec)).policy.names == ("m/a", "m/b")
    with pytest.raises(UserError, match="no objective m/a; the run has m"):
        Composer(config({"m": {"fn": "boxed"}}, weighting=spec))


def test_weights_of_components_are_those_of_the_policy_or_refused() -> None:
    entries = {"a": {"fn": "boxed", "weight": 2.0}, "b": {"fn": "boxed"}}
    assert Composer(config(entries, weighting={"policy": "softmin"})).policy.weights == {"a": 2.0, "b": 1.0}
    hyper = Composer(config(entries, weighting={"policy": "hypervolume"})).policy
    assert hyper.inner.weights == {"a": 2.0, "b": 1.0}
    with pytest.raises(UserError, match=r"'recap' decides the weights itself, but rewards.components.a has a weight"):
        Composer(config(entries, weighting={"policy": "recap"}))


def test_the_quickstart_reward_of_ones_own_tells_answers_at_once_from_worked_ones(run: Any) -> None:
    path = Path(__file__).parents[2] / "examples" / "quickstart" / "my_rewards.py"
    settings = config({"terse": {"fn": f"{path}:terse", "worked": 0.25}})
    _, (found,) = run(settings, group(r"The answer is \boxed{10}.", r"7 + 5 = 12. The answer is \boxed{12}."))
    assert found.totals == (1.0, 0.25)


STATEFUL = (
    "class S:\n"
    "    def __init__(self, *, size: int = 0): self.size = size\n"
    "    def __call__(self, completion): return 1.0\n"
    "    def state_dict(self): return {'set': {1}} if not self.size else {'text': 'x' * self.size}\n"
    "    def load_state_dict(self, state): pass\n"
    "class Pooled(S):\n"
    "    pool = True\n"
)


@pytest.mark.parametrize("size", [0, 2**21])
def test_a_state_that_cannot_be_sent_costs_the_scores_and_says_why(tmp_path: Path, size: int) -> None:
    (tmp_path / "mine.py").write_text(STATEFUL)
    settings = config({"s": {"fn": f"{tmp_path}/mine.py:S", "size": size}})
    composer, (found,) = stepped(settings, [group("a", "b")])
    assert all(s.status == "error" and s.detail.startswith("its state: ") for s in found.components["s"])
    with pytest.raises(RewardFailure, match=r"components\.s: 2 of 2 .* its state: "):
        composer.check([found])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"components": {"a": {"fn": "boxed", "shape": ["par"]}}}, "components.a.shape: it compares with reference"),
        ({"components": {"a": {"fn": "boxed", "shape": [3]}}}, "components.a.shape: 3 is no shaper"),
        ({"components": {"a": {"fn": "boxed", "shape": [{"par": 3}]}}}, "components.a.shape: {'par': 3} is no shaper"),
        ({"components": {"a": {"fn": "boxed"}}, "gold": "a"}, "rewards.gold: no other component is left to reward"),
        (
            {"components": {"e": {"fn": "ensemble", "members": ["a"]}, "a": {"fn": "boxed"}}, "gold": "a"},
            "rewards.gold: 'a' is a member of another",
        ),
        (
            {"components": {"a": {"fn": "boxed", "keys": ["x"]}, "b": {"fn": "boxed"}}, "gold": "a"},
            "rewards.gold: 'a' returns a mapping",
        ),
        (
            {"components": {"w": {"fn": "weighted_mean", "members": ["a"]}, "a": {"fn": "boxed"}}},
            "components.w.members: 'weighted_mean' is made of two, not of 1",
        ),
        (
            {
                "components": {"a": {"fn": "boxed", "weight": 2}},
                "weighting": {"policy": "lagrange", "thresholds": {"a": 1}},
            },
            "rewards.weighting.thresholds: 'a' is held at a threshold",
        ),
        (
            {"components": {"a": {"fn": "boxed", "weight": -1}}, "weighting": {"policy": "softmin"}},
            "softmin: the soft minimum takes no negative",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        Composer(RewardsConfig(**settings))
    assert says in str(error.value)


def test_a_pooled_reward_keeps_no_state(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STATEFUL)
    with pytest.raises(UserError, match="has a state and pool = True"):
        check_components(config({"s": {"fn": f"{tmp_path}/mine.py:Pooled"}}))
