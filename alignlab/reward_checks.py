"""What of a run's rewards can be known to be wrong before it starts: with its method, its data, its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignlab.benchmarks import Benchmark
from alignlab.prompts import Row, check_column
from core.config import RunConfig
from core.errors import UserError, nearest


def _are_references(value: Any) -> bool:
    if value is None:
        return True
    texts = isinstance(value, list) and all(isinstance(x, str) for x in value)
    return texts or (isinstance(value, list) and all(x is None or type(x) in (int, float) for x in value))


REFERENCES = ("a list of answers, or of their scores", _are_references)


def check_rewards(config: RunConfig, method: Any) -> None:
    """Refuse rewards that do not go with the method or with themselves. Raises UserError."""
    from rewards.composer import Composer

    if "demonstrations" in method.needs:
        _check_demonstrations(config)
        return
    if config.data.completion_column is not None:
        raise UserError(
            "data.completion_column: this method samples its completions; leave the column out, or use method: sft"
        )
    if not config.rewards.components:
        raise UserError(
            "rewards.components: a run needs at least one, for instance rewards.components.math_answer={weight: 1.0}; "
            "`alignlab ls rewards` lists them"
        )
    composer = Composer(config.rewards, steps=config.steps)
    _check_accuracy(config, method, composer)
    _check_policy(config, method, composer)


def _check_demonstrations(config: RunConfig) -> None:
    if config.data.completion_column is None:
        raise UserError(
            "method: it learns from demonstrations, so data.completion_column must name their column "
            "(for instance data.completion_column=completion)"
        )
    if config.rewards.components:
        raise UserError("rewards.components: a method that learns from demonstrations has no rewards; leave them out")
    if config.data.sources is not None:
        raise UserError("data.sources: nothing of a run on demonstrations could move the probabilities; leave it out")


def _check_accuracy(config: RunConfig, method: Any, composer: Any) -> None:
    """Filters and greedy completions are judged when a group is there, by what is known of it then."""
    rewards, by = config.rewards, config.rewards.accuracy
    stateful = [n for n, c in composer.components.items() if c.reward and c.reward.keeper is not None]
    if by is not None and by not in rewards.components:
        near = nearest(by, rewards.components)
        raise UserError(f"rewards.accuracy: there is no component '{by}'; {near}")
    if by is not None and (composer.components[by].reward is None or composer.components[by].keys or by in stateful):
        raise UserError(
            f"rewards.accuracy: '{by}' is derived, has a state or returns a mapping; name a component that scores one "
            "number as soon as a group is there"
        )
    if stateful and by is None and method.filter is not None:
        raise UserError(
            f"rewards.components.{stateful[0]}: it has a state and is scored when the step is complete, which is after "
            f"the filter of method {method.name} has judged; name another component in rewards.accuracy"
        )
    if stateful and "greedy" in method.needs:
        raise UserError(
            f"rewards.components.{stateful[0]}: it has a state, so greedy completions have no score of it, and method "
            f"{method.name} compares with them; leave it out, or use another method"
        )


def _check_policy(config: RunConfig, method: Any, composer: Any) -> None:
    from algos.method import apart

    if composer.policy.apart:
        apart(method)
    if composer.policy.steers_kl and method.kl is None:
        raise UserError(
            f"rewards.weighting.kl_coef: it is the coefficient of the KL in the loss, where method {method.name} has "
            "none; add it: method: {row: ..., kl: {coef: 0.001}}"
        )
    if "validation" in composer.needs and not (config.eval.every and config.eval.benchmarks):
        raise UserError(
            "rewards.weighting: this policy (or search) learns from evaluations during the run; name eval.benchmarks "
            "and set eval.every, for instance eval.every=10"
        )


def check_reward_data(
    config: RunConfig, rows: Sequence[Row], problems: Mapping[str, tuple[Benchmark, Sequence[Row]]]
) -> None:
    """Refuse data, and problems by which a policy learns, that lack what the components read. Raises UserError."""
    if not config.rewards.components:
        return
    from rewards.components import check_data
    from rewards.composer import Composer

    composer = Composer(config.rewards, steps=config.steps)
    check_data(composer.components, rows[0])
    for name, component in composer.components.items():
        if component.references is not None:
            where = f"rewards.components.{name}.references"
            check_column(rows, config.data.path, where, component.references, REFERENCES)
            if "completion_ids" in component.reward.inputs and _has_texts(rows, component.references):
                raise UserError(
                    f"{where}: '{component.fn}' reads token ids, which the data's answers have not; give their scores"
                )
    if "validation" in composer.needs:
        _check_validation(composer, problems)


def _has_texts(rows: Sequence[Row], column: str) -> bool:
    return any(isinstance(value, str) for row in rows for value in row[column] or ())


def _check_validation(composer: Any, problems: Mapping[str, tuple[Benchmark, Sequence[Row]]]) -> None:
    """What a policy looks at must be measured in every evaluation, and on the scale of training."""
    from rewards.components import check_data

    for name, (_, own) in problems.items():
        check_data(composer.components, own[0], f"benchmark {name}: rewards.components")
    for name, component in composer.components.items():
        if component.reward and component.reward.keeper is not None:
            raise UserError(
                f"rewards.components.{name}: it has a state, so evaluations do not score it, and this weighting policy "
                "(or search) learns from evaluations"
            )
        if any(shaper.learns for _, shaper in component.shaper().shapers):
            raise UserError(
                f"rewards.components.{name}.shape: its statistics are empty in the first evaluation, from which this "
                "weighting policy (or search) starts; use a shaper without statistics"
            )
    gold, accuracies = composer.search and composer.search.gold, [f"{name}/accuracy" for name in problems]
    if gold and gold not in (*accuracies, *composer.components):
        raise UserError(
            f"rewards.threshold_search.gold: no evaluation measures '{gold}'; "
            f"{nearest(gold, [*accuracies, *composer.components])}"
        )
