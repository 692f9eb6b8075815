"""Scores groups: every component on its own, in killable processes or in the pool of reward models, side by side.

scoring = Scoring(components, config, models)
group = await scoring.score(group)                    # what needs no state, as soon as a group is there
groups = await scoring.score_in_order(groups, step)   # rewards with state, when the step's groups are known
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from core.config import RewardsConfig
from core.schema import Group, Score
from core.stacks import Process
from rewards.components import Component
from rewards.reward import Reward, Samples, Scores
from rewards.workers import RewardFailure, Scored, Workers


class Scorer(Protocol):
    """Where components are scored: `rewards.workers.Workers`, `rewards.pool.ModelPool`."""

    async def score(self, component: str, samples: Samples, batch: bool) -> list[Scored]:
        """Every completion of `samples` under `component`, in order."""

    def processes(self) -> Mapping[str, Process]:
        """(pid, host, log) of each process that is up, by name."""


class Scoring:
    """The scored components of a run, and the states of those that have one. Processes start with the first score."""

    def __init__(self, components: Mapping[str, Component], config: RewardsConfig, models: Scorer | None) -> None:
        self.components = {c.name: c for c in components.values() if c.reward is not None}
        self.states: dict[str, Any] = {n: None for n, c in self.components.items() if c.reward and c.reward.keeper}
        self.seconds: dict[str, list[float]] = defaultdict(list)  # a completion, since somebody cleared them
        self._models = models
        self._workers = Workers(
            {n: {"fn": c.fn, "options": c.options} for n, c in self.components.items() if not _pooled(c)},
            count=config.workers,
            timeout=config.timeout,
            memory_gib=config.memory_gib,
        )
        self._references: dict[tuple[str, str], tuple[float, ...]] = {}  # (component, prompt) -> scores

    async def score(self, group: Group) -> Group:
        """The group (and its greedy completion) with the scores of components without state, and of references.

        Failures of user code are data (Score.status); RewardFailure is raised only when no scoring process starts.
        """
        if group.greedy:
            group = replace(group, greedy=await self.score(group.greedy))
        wanted = [c for name, c in self.components.items() if name not in self.states]
        parts = await asyncio.gather(*(self._component(group, c) for c in wanted))
        scores = {name: column for part in parts for name, column in part.items()}
        references = {c.name: await self._reference_scores(group, c) for c in wanted if c.references is not None}
        return replace(group, components={**group.components, **scores}, references=references)

    async def score_in_order(self, groups: Sequence[Group], step: int) -> list[Group]:
        """The groups of a step with the scores of the components with state, one group after the other."""
        done = list(groups)
        for name in self.states:
            for i, group in enumerate(done):
                scores = await self._component(group, self.components[name], step)
                done[i] = replace(group, components={**group.components, **scores})
        return done

    async def _component(self, group: Group, component: Component, step: int = 0) -> dict[str, tuple[Score, ...]]:
        assert component.reward is not None
        scored = await self._run(component, _samples(group, component.reward, step))
        self.seconds[component.name] += [one.seconds for one in scored]
        return _columns(component.name, scored)

    async def _run(self, component: Component, samples: Samples) -> list[Scored]:
        assert component.reward is not None
        if _pooled(component):
            if self._models is None:
                nothing = Score(
                    "abstain", detail="it is scored in the pool of reward models, which is not running here"
                )
                return [Scored(nothing, 0.0)] * len(samples.completions)
            return await self._models.score(component.name, samples, component.reward.batch)
        if component.name in self.states:
            before = self.states[component.name]
            scored, after = await self._workers.score_from(before, component.name, samples, component.reward.batch)
            self.states[component.name] = after
            return scored
        return await self._workers.score(component.name, samples, component.reward.batch)

    async def _reference_scores(self, group: Group, component: Component) -> tuple[float, ...]:
        """Scores of the reference answers to the prompt, given by the data or computed once and kept."""
        assert component.reward is not None and component.references is not None
        given = group.prompt.columns.get(component.references) or []
        if not all(isinstance(value, str) for value in given):
            return tuple(math.nan if value is None else float(value) for value in given)
        key = (component.name, group.prompt.text)
        if key not in self._references:
            own, count = _samples(group, component.reward), len(given)
            samples = Samples(own.prompt, own.columns, list(given), [[] for _ in given], [False] * count)
            scores = [one.scores for one in await self._run(component, samples)]
            for score in scores:
                if isinstance(score, Score) and score.status in ("error", "timeout"):
                    raise RewardFailure(
                        f"rewards.components.{component.name}.references: an answer of column '{component.references}' "
                        f"could not be scored: {score.status}: {score.detail}"
                    )
            self._references[key] = tuple(s.value if isinstance(s, Score) else math.nan for s in scores)
        return self._references[key]

    def processes(self) -> Mapping[str, Process]:
        """Of every scoring process and every process with models: see `Workers.processes`."""
        return {**self._workers.processes(), **(self._models.processes() if self._models is not None else {})}

    async def close(self) -> None:
        """Kill the scoring processes. The pool of models is its owner's to close."""
        await self._workers.close()


def _pooled(component: Component) -> bool:
    return component.reward is not None and component.reward.pool


def _samples(group: Group, reward: Reward, step: int = 0) -> Samples:
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
        step=step,
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
