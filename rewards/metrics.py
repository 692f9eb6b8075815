"""The numbers of a step's rewards: totals, components, who decides, and the signs of reward hacking."""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from core.schema import Group, Score
from rewards.diagnostics import decisions, diagnostics, effective_weights
from rewards.mixing import StepBatch
from rewards.numeric import Floats

METRICS: dict[str, tuple[str, str, str]] = {
    # name: (meaning, healthy range, what to do when it leaves it)
    "reward/total": (
        "mean total over the completions that have one",
        "rises",
        "flat: look at reward/equal_groups and at the components; falling: lower the learning rate",
    ),
    "reward/<component>": (
        "mean of one component over the completions it scored, before shaping",
        "rises, or stays where it is full",
        "one rises while another falls: they are traded, change weights; compare with a held-out evaluation",
    ),
    "reward/<component>_shaped": ("mean of the component after shaping, where it is shaped", "as above", "as above"),
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
    "weighting/weight/<objective>": (
        "weight of the objective in this step, mean over the completions",
        "settles",
        "it swings: a lower lr of the policy; negative for long: its threshold is below what comes for free",
    ),
    "weighting/measured/<constraint>": (
        "what a constrained policy compares with the threshold",
        "at the threshold, or on its right side",
        "not reached in many steps: it contradicts the task; loosen it",
    ),
    "weighting/threshold/<constraint>": ("the bound itself, which a search moves", "", ""),
    "weighting/multiplier/<constraint>": (
        "raw multiplier lambda",
        "settles, |lambda| below 10",
        "grows for ever: the constraint cannot be met; swings: lower the policy's lr",
    ),
    "weighting/slow": ("multipliers so large that they will be slow to turn around", "0", "a lower lr, a cap"),
    "weighting/kl_coef": ("coefficient of the KL in the loss, where the policy steers it", "settles", "kl_target"),
    "weighting/progress": ("factor of the advantages from the progress of the Pareto front", "0.5 to 2", "eval.every"),
    "weighting/hypervolume": ("volume that the front covers, in scaled units", "rises", "flat: the front stands still"),
    "weighting/influence/<objective>": (
        "agreement of the objective's gradient with the sum of all",
        "above 0",
        "below 0 for long: it is traded against the others",
    ),
    "weighting/convergence/<objective>": ("older loss over newer loss (RECAP)", "near 1", "above 1: still improving"),
    "weighting/instability/<objective>": (
        "spread of the loss over its window (RECAP)",
        "small",
        "noisy: larger window",
    ),
    "weighting/ideal/<objective>": ("best score seen (Tchebycheff)", "", ""),
    "weighting/agreement/<objective>": ("correlation with the advantage within groups", "near its target", "raise lr"),
    "search/evaluated": ("thresholds whose gold score is known", "rises", "none in many steps: raise band, patience"),
    "search/reached": ("of these, how many were reached and not given up", "most", "thresholds are out of reach"),
    "search/best": ("best gold score so far", "rises", ""),
    "diagnostics/say/<objective>": (
        "share of the objective in the spread of the total: |weight| x mean spread within groups",
        "what you mean it to be",
        "change its weight, or normalise first (weighting order normalize_then_sum)",
    ),
    "diagnostics/correlation/<a>/<b>": (
        "correlation of two objectives within groups",
        "not strongly negative",
        "two reward models that turn negative disagree on what the policy writes: read samples",
    ),
    "diagnostics/length_correlation/<objective>": (
        "correlation of the objective with length within groups",
        "near 0",
        "rising: length is being rewarded; add a length component or constraint",
    ),
    "diagnostics/saturated/<objective>": (
        "share of its values at the highest of its declared bounds",
        "below 0.9",
        "it is solved or gamed: lower its weight, harder prompts",
    ),
    "diagnostics/spreadless/<objective>": (
        "share of groups in which the objective has no spread",
        "below 0.5",
        "it teaches nothing there: harder prompts, or a finer reward",
    ),
    "diagnostics/flips": (
        "share of pairs of a group whose order a change of one weight by 10 %, or its loss, would turn",
        "below 0.3",
        "the order hangs on the weights: make one objective clearly the first",
    ),
    "diagnostics/disagreement/<component>": (
        "variance of a derived component's members, mean over completions",
        "steady",
        "rises as the policy leaves the members' data: a larger coef, a small KL penalty",
    ),
    "overoptimization/alarm": (
        "1 once the gold component has fallen below its peak while the reward is above its value there",
        "0",
        "the reward is being gamed: constrain the components, ensembles, PAR, or stop at the peak",
    ),
    "overoptimization/drop": ("how far gold is below its peak", "below rewards.alarm.margin", "as above"),
    "overoptimization/gold": ("mean of rewards.gold in the step", "rises", "as above"),
    "overoptimization/proxy": ("sum of weight x mean over the objectives, with the config's weights", "rises", ""),
}


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the totals say."""
    totals = [t for g in groups for t in g.totals]
    known = [t for t in totals if math.isfinite(t)]
    found: dict[str, float] = {}
    if known:
        found["reward/total"] = stats.fmean(known)
    if totals:
        found["reward/unscorable"] = 1 - len(known) / len(totals)
        found["reward/equal_groups"] = stats.fmean(all_equal(g.totals) for g in groups)
    return found


def all_equal(totals: Sequence[float]) -> bool:
    """Whether the totals that exist are all the same (also true of none or one): such a group gives no advantage."""
    return len({t for t in totals if math.isfinite(t)}) <= 1


def of_component(groups: Sequence[Group], name: str) -> list[Score]:
    """All scores of a component, of all its columns."""
    return [
        score
        for group in groups
        for column, scores in group.components.items()
        if column == name or column.startswith(f"{name}/")
        for score in scores
    ]


def component_metrics(name: str, groups: Sequence[Group]) -> dict[str, float]:
    """The metrics of one column, from its scores in each group; of a derived one, from its values."""
    columns = [group.components[name] for group in groups if name in group.components]
    if not columns:
        columns = [tuple(map(_scored, group.columns[name])) for group in groups if name in group.columns]
    scores = [score for column in columns for score in column]
    values = [[s.value for s in column if s.status == "ok"] for column in columns]
    spreads = [stats.stdev(v) for v in values if len(v) > 1]
    found: dict[str, float] = {}
    if any(values):
        found[f"reward/{name}"] = stats.fmean(v for row in values for v in row)
    if spreads:
        found[f"reward/{name}_std"] = stats.fmean(spreads)
    if scores:
        found[f"reward/{name}_failed"] = stats.fmean(s.status in ("timeout", "error") for s in scores)
        found[f"reward/{name}_abstained"] = stats.fmean(s.status == "abstain" for s in scores)
    return found


def _scored(value: float) -> Score:
    return Score("ok", value) if math.isfinite(value) else Score("abstain")


def table_metrics(
    batch: StepBatch, weights: Floats, bounds: Callable[[str], tuple[float, float] | None]
) -> dict[str, float]:
    """Who decides in this step, and the signs of hacking: of the objectives' table [B, K] under weights [B, K].

    What is NaN (nothing to measure) stays NaN; the writer leaves it out.
    """
    names = batch.names
    if not names or not len(batch.group):
        return {}
    limits = [bounds(name) or (-math.inf, math.inf) for name in names]
    low, high = np.array(limits, dtype=np.float64).T
    report = diagnostics(batch.raw, batch.group, low=low, high=high)
    mean_weights = np.asarray(weights.mean(axis=0))
    found: dict[str, float] = {}
    for k, name in enumerate(names):
        found[f"diagnostics/spreadless/{name}"] = float(report.zero_std_groups[k])
        if math.isfinite(high[k]):
            found[f"diagnostics/saturated/{name}"] = float(report.saturated_high[k])
    lengths = batch.lengths.astype(np.float64)
    with_length = diagnostics(
        np.column_stack([batch.raw, lengths]), batch.group, low=np.append(low, 0), high=np.append(high, 0)
    )
    for k, name in enumerate(names):
        found[f"diagnostics/length_correlation/{name}"] = float(with_length.within_group_pearson[k, -1])
    if len(names) > 1:
        say = effective_weights(batch.scores, batch.group, mean_weights)
        found |= {f"diagnostics/say/{name}": float(s) for name, s in zip(names, say, strict=True)}
        for (i, a), (j, b) in combinations(enumerate(names), 2):
            found[f"diagnostics/correlation/{a}/{b}"] = float(report.within_group_pearson[i, j])
        found["diagnostics/flips"] = decisions(batch.scores, batch.group, mean_weights).flips
    return found


def shaped_means(raw: Mapping[str, Floats], shaped: Mapping[str, Floats]) -> dict[str, float]:
    """reward/<component>_shaped of the columns that shaping has changed."""
    changed = {n: s for n, s in shaped.items() if not np.array_equal(s, raw[n], equal_nan=True)}
    return {f"reward/{n}_shaped": float(np.nanmean(s)) for n, s in changed.items() if np.isfinite(s).any()}
