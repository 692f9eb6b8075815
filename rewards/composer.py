"""The reward of a run: components are scored apart, kept apart, and mixed anew in every step.

    composer = Composer(config.rewards, steps=60)     # checks everything the user wrote; starts nothing
    group = await composer.score(group)               # components filled, totals under the latest weights
    groups = await composer.columns(groups, step)     # a whole step: rewards with state, derived ones, shaping
    groups, mixture = composer.weigh(groups, gram)    # weights and totals of this step
    metrics = composer.metrics(groups)                # raises RewardFailure when a component fails too often
    metrics |= composer.learn(kl, validation)         # the policy learns; it counts from the next step on

Raw scores travel with the rollouts and weights never do: a stale rollout is weighted with the weights of its step.
total = sum of weight x column over what is there; NaN where nothing is. A missing value is never taken for 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from core.config import RewardsConfig
from core.errors import UserError
from core.schema import Group, Mixture
from core.stacks import Process
from rewards.columns import Columns, Table, group_index, per_group
from rewards.components import check_components, objectives
from rewards.constrained import KL, Lagrange
from rewards.metrics import component_metrics, group_metrics, of_component, shaped_means, table_metrics
from rewards.mixing import Mix, StepBatch, soft_min, tchebycheff, weighted_sum
from rewards.numeric import Floats, mean
from rewards.policies import Policy, build
from rewards.scoring import Scorer, Scoring
from rewards.threshold_search import make_search
from rewards.watch import Watch
from rewards.weighting import Static, with_weights
from rewards.workers import RewardFailure


class Composer:
    """Construction validates and raises UserError; processes start with the first `score`.

    models: the pool in which components that want one are scored; without it they abstain. steps: of the whole run.
    """

    def __init__(
        self, config: RewardsConfig, where: str = "rewards.components", *, steps: int = 1, models: Scorer | None = None
    ) -> None:
        self.config, self.steps = config, steps
        self.components = check_components(config, where)
        self.policy = self._build(objectives(self.components, config.gold))
        self.search = make_search(config.threshold_search, self._searched(), steps)
        self.watch = Watch(config.alarm.window, config.alarm.margin)
        self._scoring = Scoring(self.components, config, models)
        self._columns = Columns(self.components)
        self._weights: dict[str, float] = {}  # of the latest step, mean over its rows; empty before the first
        self._step: tuple[StepBatch, Table] | None = None  # the step under way
        self._step_metrics: dict[str, float] = {}
        self._any_total = False  # ever; one step without any is bad luck, all of them are a mistake

    @property
    def needs(self) -> frozenset[str]:
        """What a step must bring beside scores: kl, gram, validation."""
        return self.policy.needs | ({"validation"} if self.search else frozenset())

    async def score(self, group: Group) -> Group:
        """The group (and its greedy completion) with components filled, and totals under the latest weights.

        Failures of user code are data (Score.status); RewardFailure is raised only when no scoring process starts.
        Rewards with state are not scored here but in `columns`.
        """
        return self._provisional(self._alone(await self._scoring.score(group)))

    # ------------------------------------------------------------ a step
    async def columns(self, groups: Sequence[Group], step: int, *, scored: bool = False) -> list[Group]:
        """The groups of a step with their columns: what rewards with state say, what is derived, everything shaped.

        Groups are taken in the order given, so a resumed run comes to the same states. scored: the groups have the
        scores of rewards with state already.
        """
        done = list(groups) if scored else await self._scoring.score_in_order(groups, step)
        table = self._columns(done, learn=True)
        names = objectives(self.components, self.config.gold, table.shaped)
        if isinstance(self.policy, Static) and set(names) != set(self.policy.names):
            self.policy = self._build(names)  # only now it is known what a function returns
        self._step = (self._step_batch(done, table, names, step), table)
        return self._filled(done, table)

    def weigh(self, groups: Sequence[Group], gram: Any = None, lr: float = 0.0) -> tuple[list[Group], Mixture]:
        """The step's groups with weights and totals, and how the learner is to join the columns.

        gram: inner products [K, K] of the gradients of the columns `objectives`, where `needs` asks for them.
        """
        batch, table = self._current
        batch = replace(batch, gram=None if gram is None else np.asarray(gram, dtype=np.float64), lr=lr)
        self._step = (batch, table)
        learned = self.policy.update(batch) if self.policy.update_first else {}
        mix = self.policy.weigh(batch)
        weights = np.broadcast_to(np.asarray(mix.weights, dtype=np.float64), batch.scores.shape)
        self._weights = {name: mean(column) for name, column in zip(batch.names, weights.T, strict=True)}
        totals = self._totals(batch.scores, weights, mix)
        self._step_metrics = learned | {f"weighting/weight/{name}": weight for name, weight in self._weights.items()}
        self._step_metrics |= table_metrics(batch, weights, self._columns.bounds)
        self._step_metrics |= shaped_means(table.raw, table.shaped)
        self._step_metrics |= {f"diagnostics/disagreement/{n}": v for n, v in self._columns.disagreement(table).items()}
        each = {name: per_group(w.tolist(), groups) for name, w in zip(batch.names, weights.T, strict=True)}
        rows = per_group(totals.tolist(), groups)
        done = [
            replace(group, weights={name: column[i] for name, column in each.items()}, totals=rows[i])
            for i, group in enumerate(groups)
        ]
        return [self._with_greedy(group) for group in done], _mixture(mix)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The columns that the policy weighs, in their order; known after `columns`."""
        return self._current[0].names

    def learn(
        self, kl: Sequence[float] | None = None, validation: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """After the learner's step: policy, threshold search and alarm take it in; returns their metrics.

        kl [B]: of each completion to the reference, in the order of the rows. validation: means of the objectives, and
        benchmark/accuracy, where this step was followed by an evaluation. Raises RewardFailure at an alarm that stops.
        """
        batch, table = self._current
        batch = replace(batch, kl=None if kl is None else np.array(kl, dtype=np.float64), validation=validation)
        found = {} if self.policy.update_first else self.policy.update(batch)
        if validation is not None:
            found |= self._searched_on(batch.step + 1, validation)
        found |= self._watched(batch, table)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def begin(self, validation: Mapping[str, float]) -> None:
        """The validation of the model before the first step."""
        if validation:
            self.policy.begin(validation)
            self._searched_on(0, validation)

    # ------------------------------------------------------------ numbers and failures
    def check(self, groups: Sequence[Group]) -> None:
        """Raise RewardFailure if a component failed on more than `max_failed` of a step's completions, or if no
        completion has had a total yet.
        """
        for name in self.components:
            scores = of_component([*groups, *(g.greedy for g in groups if g.greedy)], name)
            failures = [s for s in scores if s.status in ("timeout", "error")]
            if scores and len(failures) / len(scores) > self.config.max_failed:
                (status, detail), count = Counter((s.status, s.detail) for s in failures).most_common(1)[0]
                raise RewardFailure(
                    f"rewards.components.{name}: {len(failures)} of {len(scores)} completions of this step could not "
                    f"be scored (rewards.max_failed is {self.config.max_failed:g}); "
                    f"most often ({count} of them) {status}: {detail}"
                )
        self._any_total |= any(math.isfinite(t) for group in groups for t in group.totals)
        if groups and not self._any_total:
            every = [(name, score) for name in self.components for score in of_component(groups, name)]
            said = Counter(f"{name} says {s.status}: {s.detail}" for name, s in every if s.status != "ok")
            none = "shaping left no value of what was scored" if every else "no component said anything"
            raise RewardFailure(
                "rewards.components: no completion of this step has a total, so there is nothing to learn from; most "
                f"often {said.most_common(1)[0][0] if said else none}"
            )

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """The metrics of a step. What has no value (a mean over nothing) is left out, never 0.

        Latencies are of everything scored since the last call. Raises RewardFailure, naming the component and the most
        common reason, if it failed on more than `max_failed` of the step's completions.
        """
        self.check(groups)
        found = group_metrics(groups)
        for name in dict.fromkeys(name for g in groups for name in (*g.components, *g.columns)):
            found |= component_metrics(name, groups)
        for name, seconds in self._scoring.seconds.items():
            found[f"reward/{name}_seconds"] = mean(np.array(seconds))
        self._scoring.seconds.clear()
        return {name: value for name, value in (found | self._step_metrics).items() if math.isfinite(value)}

    def _watched(self, batch: StepBatch, table: Table) -> dict[str, float]:
        """What the gold component says of the reward: the objectives' means under their own, constant weights."""
        gold = self.config.gold
        if gold is None:
            return {}
        proxy = math.fsum(self._own_weight(name) * m for name, m in batch.means().items() if math.isfinite(m))
        found = self.watch.push(proxy, mean(table.raw.get(gold, np.empty(0))))
        if found.get("overoptimization/alarm") and self.config.alarm.stop:
            drop = found.get("overoptimization/drop", math.nan)
            raise RewardFailure(
                f"rewards.gold: '{gold}' is {drop:.3g} below its peak, and the reward rises: "
                "it is being gamed (rewards.alarm.stop): constrain the components, or use an ensemble of them"
            )
        return found

    # ------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON by name."""
        return {
            "components": sorted(self.components),
            "objectives": list(self.policy.names),
            "policy": self.policy.state_dict(),
            "weights": dict(self._weights),
            "shapers": self._columns.state_dict(),
            "rewards": dict(self._scoring.states),
            "search": None if self.search is None else self.search.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError if it was made with other components."""
        if state["components"] != sorted(self.components):
            saved, now = ", ".join(state["components"]), ", ".join(sorted(self.components))
            raise UserError(
                f"rewards.components: the checkpoint was made with {saved or 'none'}, the config has {now or 'none'}; "
                f"resume with the same components, or start a new run from the checkpoint's model"
            )
        if isinstance(self.policy, Static):
            self.policy = self._build(state["objectives"])
        self.policy.load_state_dict(state["policy"])
        self._weights = dict(state["weights"])
        self._columns.load_state_dict(state["shapers"])
        self._scoring.states |= state["rewards"]
        self.watch.load_state_dict(state["watch"])
        if self.search is not None:
            self.search.load_state_dict(state["search"])

    def processes(self) -> Mapping[str, Process]:
        """(pid, host, log) of every process that scores, by name."""
        return self._scoring.processes()

    async def close(self) -> None:
        """Kill the scoring processes."""
        await self._scoring.close()

    # ------------------------------------------------------------ parts of a step
    @property
    def _current(self) -> tuple[StepBatch, Table]:
        if self._step is None:
            raise ValueError("the composer has seen no step yet: `columns` comes first")
        return self._step

    def _filled(self, groups: Sequence[Group], table: Table) -> list[Group]:
        """The groups with their columns; a greedy completion is in no statistic, so it has a table of its own."""
        each = {name: per_group(values.tolist(), groups) for name, values in table.shaped.items()}
        done = [replace(g, columns={name: rows[i] for name, rows in each.items()}) for i, g in enumerate(groups)]
        return [replace(g, greedy=self._alone(g.greedy)) if g.greedy else g for g in done]

    def _alone(self, group: Group) -> Group:
        return self._filled([group], self._columns([group], learn=False))[0]

    def _step_batch(self, groups: Sequence[Group], table: Table, names: Sequence[str], step: int) -> StepBatch:
        sources = [str(group.prompt.columns.get("source", "")) for group in groups]
        index = group_index(groups)
        return StepBatch(
            names=tuple(names),
            raw=table.matrix(names, raw=True),
            scores=table.matrix(names),
            group=index,
            lengths=np.array([len(c.token_ids) for g in groups for c in g.completions], dtype=np.int64),
            source=tuple(sources[i] for i in index),
            step=step,
            total_steps=self.steps,
        )

    def _provisional(self, group: Group) -> Group:
        """The group with totals under the latest weights; before the first step, under the components' own."""
        names = objectives(self.components, self.config.gold, group.columns)
        rows = [
            [group.columns[name][i] for name in names if name in group.columns] for i in range(len(group.completions))
        ]
        weights = np.array([self._weights.get(n, self._own_weight(n)) for n in names if n in group.columns])
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(weights))
        totals = weighted_sum(table, weights, renormalize_missing=self.config.renormalize_missing)
        return self._with_greedy(replace(group, totals=tuple(totals.tolist())))

    def _with_greedy(self, group: Group) -> Group:
        return replace(group, greedy=self._provisional(group.greedy)) if group.greedy else group

    def _own_weight(self, objective: str) -> float:
        own = self.components[objective.partition("/")[0]].weight
        return 1.0 if own is None else own

    def _totals(self, scores: Floats, weights: Floats, mix: Mix) -> Floats:
        if mix.reduce == "tchebycheff":
            assert mix.ideal is not None
            return tchebycheff(scores, weights, ideal=mix.ideal)
        if mix.reduce == "softmin":
            low = soft_min(scores, weights, sharpness=mix.sharpness)
            return np.where(np.isfinite(scores).any(axis=1), low, np.nan)
        return weighted_sum(scores, weights, renormalize_missing=self.config.renormalize_missing)

    def _build(self, names: Sequence[str]) -> Policy:
        weights = {name: self._own_weight(name) for name in names}
        return build(with_weights(self.config.weighting, weights, "rewards.weighting"), names, "rewards.weighting")

    def _searched(self) -> list[str]:
        """Objectives whose thresholds a search may move."""
        return [n for n in self.policy.thresholds if n != KL] if isinstance(self.policy, Lagrange) else []

    def _searched_on(self, step: int, validation: Mapping[str, float]) -> dict[str, float]:
        if self.search is None:
            return {}
        if self.search.update(step, validation, validation.get(self.search.gold)):
            assert isinstance(self.policy, Lagrange)
            self.policy.set_thresholds(self.search.thresholds)
        return self.search.metrics()


def _mixture(mix: Mix) -> Mixture:
    apart = mix.order == "normalize_then_sum"
    return Mixture(
        apart=apart,
        whiten=mix.whiten,
        by_std=mix.by_std,
        task=mix.task,
        kl_mean=mix.kl_mean,
        sharpness=mix.sharpness if mix.reduce == "softmin" else None,
        scale=mix.scale,
        kl_coef=mix.kl_coef,
    )
