"""Runs the components of a run's reward apart, keeps them apart, and mixes them into one total.

    composer = Composer(config.rewards)          # checks everything the user wrote; starts nothing
    group = await composer.score(group)          # components and totals filled
    groups = composer.weigh(groups)              # totals of a whole step under the step's weights
    metrics |= composer.metrics(groups)          # raises RewardFailure when a component fails too often

total = sum of weight x value over the components that have a value; NaN where none has. A missing value is never
taken for 0, and the other weights are not rescaled to make up for it.
"""

from __future__ import annotations

import asyncio
import math
import statistics as stats
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.config import RewardsConfig
from core.errors import UserError, nearest
from core.schema import Group, Score
from rewards.reward import Reward, Samples, Scores, bind
from rewards.weighting import WeightingPolicy, fixed, statistics
from rewards.workers import RewardFailure, Scored, Workers

METRICS: dict[str, tuple[str, str, str]] = {
    # name: (meaning, healthy range, what to do when it leaves it)
    "reward/total": (
        "mean total over the completions that have one",
        "rises",
        "flat: look at reward/equal_groups and at the components; falling: lower the learning rate",
    ),
    "reward/<component>": (
        "mean of one component over the completions it scored",
        "rises, or stays where it is full",
        "one rises while another falls: they are traded, change weights; compare with a held-out evaluation",
    ),
    "reward/<component>_std": (
        "mean over groups of the component's standard deviation (n - 1) within the group",
        "above 0",
        "weight x std is a component's say in the total: change the weight; 0: it is solved or never earned",
    ),
    "reward/<component>_failed": (
        "share of completions whose score is timeout or error",
        "below 0.02",
        "read the details in the rollouts; above rewards.max_failed the run stops",
    ),
    "reward/<component>_abstained": (
        "share of completions that the component did not judge",
        "0, or the share of rows without a right answer",
        "check the dataset's answers and the name of their column",
    ),
    "reward/<component>_seconds": (
        "mean seconds the component takes for one completion",
        "far below rewards.timeout",
        "more rewards.workers, a faster function, a lower timeout",
    ),
    "reward/unscorable": (
        "share of completions without a total",
        "below 0.02",
        "see which component fails or abstains; unscorable completions teach nothing",
    ),
    "reward/equal_groups": (
        "share of groups whose totals are all equal: they give no advantage",
        "below 0.5",
        "all right: harder prompts; all wrong: easier ones or a warm start; more completions a group",
    ),
}


@dataclass(frozen=True)
class Component:
    """One entry of `rewards.components`, checked."""

    name: str
    weight: float
    fn: str  # a registered name, or an absolute path and a function
    options: Mapping[str, Any]
    reward: Reward


def check_components(config: RewardsConfig, where: str = "rewards.components") -> dict[str, Component]:
    """The components of a config. Raises UserError (place, problem, what is allowed); starts no process.

    A user's file is loaded here, so that a mistake in it is found before anything slow.
    """
    return {name: _component(name, entry, f"{where}.{name}") for name, entry in config.components.items()}


def check_data(
    components: Mapping[str, Component], columns: Collection[str], where: str = "rewards.components"
) -> None:
    """Refuse data that lacks a column which a component reads; raises UserError with the nearest name."""
    for component in components.values():
        for name in component.reward.columns:
            if name not in columns:
                raise UserError(
                    f"{where}.{component.name}: it reads the column '{name}', which the data has not; "
                    f"{nearest(name, columns)}"
                )


def _component(name: str, entry: Mapping[str, Any], where: str) -> Component:
    if "/" in name or not name:
        raise UserError(f"{where}: a component's name has no '/'; it separates the name from what a function returns")
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {entry!r} is not a mapping; write {name}: {{weight: 1.0, fn: {name}, ...}}")
    options = dict(entry)
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise UserError(f"{where}.weight: {weight!r} is not a number; a weight is a finite number, 1.0 if left out")
    fn = options.pop("fn", name)
    if not isinstance(fn, str):
        raise UserError(f"{where}.fn: {fn!r} is not a name; give a reward of `alignlab ls rewards` or file.py:function")
    reward = bind(fn, options, where, beside=("weight", "fn"))
    if ":" in fn:
        file, _, function = fn.rpartition(":")
        fn = f"{Path(file).expanduser().resolve()}:{function}"  # scoring processes need not share our directory
    return Component(name, float(weight), fn, options, reward)


class Composer:
    """The reward of a run. Construction validates and raises UserError; processes start with the first `score`."""

    def __init__(self, config: RewardsConfig, where: str = "rewards.components") -> None:
        self.components = check_components(config, where)
        self.policy: WeightingPolicy = fixed({c.name: c.weight for c in self.components.values()})
        self._weights = {c.name: c.weight for c in self.components.values()}
        self._max_failed = config.max_failed
        self._workers = Workers(
            {c.name: {"fn": c.fn, "options": c.options} for c in self.components.values()},
            count=config.workers,
            timeout=config.timeout,
            memory_gib=config.memory_gib,
        )
        self._any_total = False  # ever; one step without any is bad luck, all of them are a mistake
        self._policy_metrics: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = defaultdict(list)  # since the last call of `metrics`

    async def score(self, group: Group) -> Group:
        """The group (and its greedy completion) with components and totals filled, the latter under the latest weights.

        Failures of user code are data (Score.status); RewardFailure is raised only when no scoring process starts.
        """
        if group.greedy:
            group = replace(group, greedy=await self.score(group.greedy))
        parts = await asyncio.gather(*(self._score_component(group, c) for c in self.components.values()))
        columns = {name: scores for part in parts for name, scores in part.items()}
        return self._mix(replace(group, components=columns), self._weights)

    async def _score_component(self, group: Group, component: Component) -> dict[str, tuple[Score, ...]]:
        scored = await self._workers.score(component.name, _samples(group, component.reward), component.reward.batch)
        self._seconds[component.name] += [one.seconds for one in scored]
        return _columns(component.name, scored)

    def weigh(self, groups: Sequence[Group]) -> list[Group]:
        """A step's groups with totals under the weights that the policy gives this step; then the policy learns."""
        step = statistics(groups)
        self._weights = self.policy.weigh(step)
        self._policy_metrics = self.policy.update(step)
        return [self._mix(group, self._weights) for group in groups]

    @classmethod
    def _mix(cls, group: Group, weights: Mapping[str, float]) -> Group:
        if group.greedy:
            group = replace(group, greedy=cls._mix(group.greedy, weights))
        totals = (
            total({name: scores[i] for name, scores in group.components.items()}, weights)
            for i in range(len(group.completions))
        )
        return replace(group, totals=tuple(totals))

    def check(self, groups: Sequence[Group]) -> None:
        """Raise RewardFailure if a component failed on more than `max_failed` of a step's completions, or if no
        completion has had a total yet.
        """
        for name in self.components:
            scores = _of([*groups, *(g.greedy for g in groups if g.greedy)], name)
            failures = [s for s in scores if s.status in ("timeout", "error")]
            if scores and len(failures) / len(scores) > self._max_failed:
                (status, detail), count = Counter((s.status, s.detail) for s in failures).most_common(1)[0]
                raise RewardFailure(
                    f"rewards.components.{name}: {len(failures)} of {len(scores)} completions of this step could not "
                    f"be scored (rewards.max_failed is {self._max_failed:g}); "
                    f"most often ({count} of them) {status}: {detail}"
                )
        self._any_total |= any(math.isfinite(t) for group in groups for t in group.totals)
        if groups and not self._any_total:
            said = Counter(f"{n} says {s.status}: {s.detail}" for n in self.components for s in _of(groups, n))
            raise RewardFailure(
                "rewards.components: no completion of this step has a total, so there is nothing to learn from; most "
                f"often {said.most_common(1)[0][0] if said else 'no component said anything'}"
            )

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """The `METRICS` of a step. What has no value (a mean over nothing) is left out, never 0.

        Latencies are of everything scored since the last call. Raises RewardFailure, naming the component and the most
        common reason, if it failed on more than `max_failed` of the step's completions.
        """
        self.check(groups)
        totals = [t for g in groups for t in g.totals]
        known = [t for t in totals if math.isfinite(t)]
        found: dict[str, float] = {}
        if known:
            found["reward/total"] = stats.fmean(known)
        if totals:
            found["reward/unscorable"] = 1 - len(known) / len(totals)
            found["reward/equal_groups"] = stats.fmean(all_equal(g.totals) for g in groups)
        for name in dict.fromkeys(name for g in groups for name in g.components):
            found |= _component_metrics(name, [g.components[name] for g in groups if name in g.components])
        for name, seconds in self._seconds.items():
            found[f"reward/{name}_seconds"] = stats.fmean(seconds)
        self._seconds.clear()
        return found | self._policy_metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        return {"components": sorted(self.components), "policy": self.policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError if it was made with other components."""
        if state["components"] != sorted(self.components):
            saved, now = ", ".join(state["components"]), ", ".join(sorted(self.components))
            raise UserError(
                f"rewards.components: the checkpoint was made with {saved or 'none'}, the config has {now or 'none'}; "
                f"resume with the same components, or start a new run from the checkpoint's model"
            )
        self.policy.load_state_dict(state["policy"])

    async def close(self) -> None:
        """Kill the scoring processes."""
        await self._workers.close()


def total(scores: Mapping[str, Score], weights: Mapping[str, float]) -> float:
    """Weighted sum over the components that have a value; NaN when none has.

    >>> total({"right": Score("ok", 1.0), "style/short": Score("ok", 0.5)}, {"right": 1.0, "style": 0.2})
    1.1
    """
    parts = [_weight(name, weights) * score.value for name, score in scores.items() if score.status == "ok"]
    return math.fsum(parts) if parts else math.nan


def _weight(name: str, weights: Mapping[str, float]) -> float:
    return weights[name] if name in weights else weights[name.partition("/")[0]]


def all_equal(totals: Sequence[float]) -> bool:
    """Whether the totals that exist are all the same (also true of none or one): such a group gives no advantage."""
    return len({t for t in totals if math.isfinite(t)}) <= 1


def _samples(group: Group, reward: Reward) -> Samples:
    """What the component is sent of a group: no more than it names."""
    row = group.prompt.columns
    # A batch function's prompts are chat messages where the dataset has them, so it may need that column unnamed.
    columns = {
        k: v for k, v in row.items() if reward.needs(k) or k in reward.hidden or (reward.batch and k == "prompt")
    }
    ids = reward.needs("completion_ids")
    return Samples(
        prompt=group.prompt.text,
        columns=columns,
        completions=[c.text for c in group.completions],
        completion_ids=[list(c.token_ids) if ids else [] for c in group.completions],
        truncated=[c.truncated for c in group.completions],
    )


def _columns(name: str, scored: Sequence[Scored]) -> dict[str, tuple[Score, ...]]:
    """One component's column, or several named name/key where the function returned mappings."""
    keys = dict.fromkeys(key for one in scored if isinstance(one.scores, dict) for key in one.scores)
    if not keys:
        return {name: tuple(one.scores for one in scored if isinstance(one.scores, Score))}
    return {f"{name}/{key}": tuple(_under(key, one.scores) for one in scored) for key in keys}


def _under(key: str, scores: Scores) -> Score:
    if isinstance(scores, dict):
        return scores.get(key, Score("abstain", detail="not among the returned keys"))
    if scores.status == "ok":
        return Score("error", detail="returned a number where other completions of the group got a mapping")
    return scores


def _of(groups: Sequence[Group], name: str) -> list[Score]:
    """All scores of a component, of all its columns."""
    return [
        score
        for group in groups
        for column, scores in group.components.items()
        if column == name or column.startswith(f"{name}/")
        for score in scores
    ]


def _component_metrics(name: str, columns: Sequence[Sequence[Score]]) -> dict[str, float]:
    """The metrics of one component, from its column in each group."""
    scores = [score for column in columns for score in column]
    values = [[s.value for s in column if s.status == "ok"] for column in columns]
    spreads = [stats.stdev(v) for v in values if len(v) > 1]
    found = {
        f"reward/{name}_failed": stats.fmean(s.status in ("timeout", "error") for s in scores),
        f"reward/{name}_abstained": stats.fmean(s.status == "abstain" for s in scores),
    }
    if any(values):
        found[f"reward/{name}"] = stats.fmean(v for column in values for v in column)
    if spreads:
        found[f"reward/{name}_std"] = stats.fmean(spreads)
    return found
