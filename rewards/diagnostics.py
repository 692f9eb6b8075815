"""What to log to see reward hacking: columns and their agreement, who decides the order, and when to stop.

| sign | likely cause |
|---|---|
| proxy up, gold flat or down | overoptimisation: constrain, ensemble, shape |
| a column saturated, groups without spread rising | it is solved or gamed: lower its weight, harder prompts |
| correlation of two reward models within groups turns negative | they disagree on what the policy writes |
| correlation of the reward with length rises | length hacking |

Definitions are ours; the scaling laws are those of Gao et al., arXiv 2210.10760 [as commonly quoted], the measures of
who decides follow "The Policy Cliff", arXiv 2507.20150 [paper]. B rows, K objectives; NaN = missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from rewards.numeric import Floats, Ints, finite, group_means, mean, rows_of, std


class Report(NamedTuple):
    """Of a table of scores [B, K]; per column [K] unless said otherwise."""

    mean: Floats
    std: Floats  # n - 1
    missing: Floats  # share of rows
    saturated_high: Floats  # share of scores at the upper bound
    saturated_low: Floats
    zero_std_groups: Floats  # share of groups with two or more scores whose spread is nothing
    mean_group_std: Floats  # over the same groups
    pearson: Floats  # [K, K] over rows that have both
    spearman: Floats  # [K, K] the same of ranks, ties sharing their mean rank
    within_group_pearson: Floats  # [K, K] after subtracting each group's mean: the one that matters for GRPO


def diagnostics(scores: Floats, group: Ints, *, low: Floats, high: Floats, tol: float = 1e-9) -> Report:
    """The report of a step, raw or shaped; `low` and `high` [K] are the columns' declared bounds.

    Shares and means of nothing are NaN; a correlation is NaN with fewer than three pairs or without variance.
    """
    scores = finite(scores)
    columns = list(scores.T)
    spreads = [group_stds(column, group) for column in columns]
    bounds = list(zip(columns, low, high, strict=True))
    centred = np.column_stack([column - group_means(column, group) for column in columns])
    return Report(
        mean=np.array([mean(column) for column in columns]),
        std=np.array([std(column) for column in columns]),
        missing=np.isnan(scores).mean(axis=0) if len(scores) else np.full(len(columns), np.nan),
        saturated_high=np.array([_share(column >= top - tol, np.isfinite(column)) for column, _, top in bounds]),
        saturated_low=np.array([_share(column <= bottom + tol, np.isfinite(column)) for column, bottom, _ in bounds]),
        zero_std_groups=np.array([mean((own <= tol).astype(np.float64)) for own in spreads]),
        mean_group_std=np.array([mean(own) for own in spreads]),
        pearson=_pairwise(scores, pearson),
        spearman=_pairwise(scores, spearman),
        within_group_pearson=_pairwise(centred, pearson),
    )


def group_stds(values: Floats, group: Ints) -> Floats:
    """Spread (n - 1) of each group that has two or more values."""
    return np.array([std(values[rows]) for rows in rows_of(group) if np.isfinite(values[rows]).sum() >= 2])


def pearson(x: Floats, y: Floats) -> float:
    """Correlation over the rows that have both; NaN with fewer than three or without variance."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 3 or std(x) == 0 or std(y) == 0:
        return math.nan
    dx, dy = x - mean(x), y - mean(y)
    return float(dx @ dy / math.sqrt(float(dx @ dx) * float(dy @ dy)))


def spearman(x: Floats, y: Floats) -> float:
    """Correlation of ranks over the rows that have both; NaN as for `pearson`."""
    both = np.isfinite(x) & np.isfinite(y)
    return pearson(_ranks(x[both]), _ranks(y[both]))


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(last - (counts - 1) / 2)[place]


def _pairwise(table: Floats, correlation: Callable[[Floats, Floats], float]) -> Floats:
    columns = list(table.T)
    return np.array([[correlation(x, y) for y in columns] for x in columns])


def _share(hits: Floats, among: Floats) -> float:
    return float(hits[among].mean()) if among.any() else math.nan


def effective_weights(scores: Floats, group: Ints, weights: Floats) -> Floats:
    """|w_k| mean_group_std_k / their sum [K]: each column's say in a sum of scores; NaN where none has any spread.

    Of the rows of one group, this is that prompt's.
    """
    stds = [mean(group_stds(column, group)) for column in finite(scores).T]
    say = np.abs(weights) * np.nan_to_num(stds)
    return np.asarray(say / say.sum() if say.sum() else np.full(len(say), np.nan))


class Decisions(NamedTuple):
    """Who decides the order within groups, over all pairs of rows of a group that both have a total."""

    ties: float  # share of groups whose totals have a tie, or no spread
    flips: float  # share of pairs whose order changes when a weight changes by 10 % or a column is left out
    by_secondary: float  # share of pairs that the first column leaves tied and the total orders


def decisions(scores: Floats, group: Ints, weights: Floats, *, change: float = 0.1) -> Decisions:
    """How fragile the order is under the composite sum_k w_k S_k; the first column is the primary one.

    A pair flips when any one weight, times 1 - change, 1 + change or 0, reverses it. Missing entries are left out of
    the sums. NaN where there are no groups or pairs.
    """
    scores = finite(scores)
    weights = np.asarray(weights, dtype=np.float64)
    factors = [1 - change, 1 + change, 0.0]
    changed = [weights * np.where(np.arange(len(weights)) == k, f, 1.0) for k in range(len(weights)) for f in factors]
    total, others = _total(scores, weights), [_total(scores, w) for w in changed]
    ties, flips, secondary = [], [], []
    for rows in rows_of(group):
        rows = rows[np.isfinite(total[rows])]
        i, j = (rows[index] for index in np.triu_indices(len(rows), 1))
        order, primary = np.sign(total[i] - total[j]), np.sign(scores[i, 0] - scores[j, 0])
        ties.append(float((order == 0).any() or len(rows) < 2))
        flips += np.any([np.sign(o[i] - o[j]) * order < 0 for o in others], axis=0).tolist()
        secondary += ((primary == 0) & (order != 0)).tolist()
    return Decisions(*(mean(np.array(found, dtype=np.float64)) for found in (ties, flips, secondary)))


def _total(scores: Floats, weights: Floats) -> Floats:
    there = np.isfinite(scores)
    return np.where(there.any(axis=1), np.where(there, scores, 0.0) @ weights, np.nan)


class Alarm(NamedTuple):
    """Where a held-out gold score peaked, and where the proxy was seen to be overoptimised."""

    peak_index: int
    proxy_at_peak: float  # smoothed, as is the next
    gold_at_peak: float
    alarm_index: int | None  # none: no alarm


def overoptimization(proxy: Floats, gold: Floats, *, window: int = 1, margin: float = 0.0) -> Alarm:
    """The alarm of a run's evaluations [T], on trailing means of `window` (ours).

    The peak is the first maximum of smoothed gold. The alarm is at the first later evaluation where gold has dropped by
    more than `margin` while the proxy is above its value at the peak. Raises ValueError without any gold score.
    """
    smooth_proxy, smooth_gold = (_trailing(finite(values), window) for values in (proxy, gold))
    if not np.isfinite(smooth_gold).any():
        raise ValueError("overoptimization: there is no gold score")
    peak = int(np.nanargmax(smooth_gold))
    worse = (smooth_gold < smooth_gold[peak] - margin) & (smooth_proxy > smooth_proxy[peak])
    alarms = [t for t in np.flatnonzero(worse).tolist() if t > peak]
    return Alarm(peak, float(smooth_proxy[peak]), float(smooth_gold[peak]), alarms[0] if alarms else None)


def _trailing(values: Floats, window: int) -> Floats:
    return np.array([mean(values[max(0, t + 1 - window) : t + 1]) for t in range(len(values))])


class Peak(NamedTuple):
    """R = d (alpha - beta d) or d (alpha - beta ln d), and the d at which it is highest, if beta > 0."""

    alpha: float
    beta: float
    peak_d: float


def gao_fit(d: Floats, gold: Floats, *, kind: Literal["bon", "rl"]) -> Peak:
    """Least squares of gold scores over d = sqrt(KL): where overoptimisation will begin, before it has.

    bon: R = d (alpha - beta d), peak alpha / (2 beta). rl: R = d (alpha - beta ln d), peak exp(alpha / beta - 1).
    """
    d, gold = np.asarray(d, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    falling = d**2 if kind == "bon" else d * np.log(np.where(d > 0, d, 1.0))
    alpha, beta = np.linalg.lstsq(np.column_stack([d, -falling]), gold, rcond=None)[0].tolist()
    if beta == 0:
        return Peak(alpha, beta, math.inf)
    return Peak(alpha, beta, alpha / (2 * beta) if kind == "bon" else math.exp(alpha / beta - 1))
