"""From columns of scores to one advantage a completion: `compose(batch, mix)`, a pure function.

    columns = scores, with the column -kl in front where `mix.task` is not 0
    sum_then_normalize:  A = group-normalise(reduce(columns, weights))
    normalize_then_sum:  A = whiten(reduce(group-normalise(each column), weights))
    A <- mix.scale A, and 0 for a row whose every reward is missing

Summing first is GRPO with several rewards: a weight is a weight on spread, column k counts by about w_k std_k.
Normalising first is GDPO (arXiv 2601.05242): a weight means what it says, and a column that is nearly constant in its
group is blown up to unit size. Missing (NaN, infinity) is never 0: it leaves means, spreads and sums.

B rows, K objectives. Numbers carry no gradient. Read from the code of TRL and GDPO; the soft minimum's weights and what
becomes of missing entries are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rewards.numeric import Floats, Ints, finite, group_means, group_normalised, mean, rows_of, std

Order = Literal["sum_then_normalize", "normalize_then_sum"]
Scale = Literal["group", "batch", "none"]
Reduce = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """What a weighting policy may look at: one optimiser step's completions, flattened, over all workers.

    >>> StepBatch(names=("right",), raw=np.ones((2, 1)), scores=np.ones((2, 1)), group=np.zeros(2, int),
    ...           lengths=np.ones(2, int)).means()
    {'right': 1.0}
    """

    names: tuple[str, ...]  # of the K objectives
    raw: Floats  # [B, K] before shaping, NaN = missing
    scores: Floats  # [B, K] after shaping
    group: Ints  # [B] prompt of each row
    lengths: Ints  # [B] tokens, the end-of-sequence token included
    source: tuple[str, ...] = ()  # [B] prompt source of each row
    kl: Floats | None = None  # [B] sum over tokens of log pi - log pi_ref
    step: int = 0
    total_steps: int = 1
    lr: float = 0.0  # the actor's current learning rate
    validation: Mapping[str, float] | None = None  # only on steps that evaluated
    gram: Floats | None = None  # [K, K] inner products of the objectives' policy gradients

    def column(self, name: str) -> Floats:
        """The shaped scores of one objective [B]."""
        return finite(self.scores)[:, self.names.index(name)]

    def means(self) -> dict[str, float]:
        """Mean shaped score of each objective over the rows that have it; NaN where none has."""
        return {name: mean(column) for name, column in zip(self.names, finite(self.scores).T, strict=True)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """How to mix a batch: what a weighting policy decides."""

    weights: Floats  # [K] or [B, K], in the order of the batch's names
    task: float = 0.0  # weight of an extra column, -kl
    kl_mean: bool = False  # the extra column is -kl / length
    scale: float = 1.0  # factor of the finished advantages; one of the reward would cancel in the division
    order: Order = "sum_then_normalize"
    whiten: bool = True  # normalize_then_sum only
    by_std: bool = True  # normalize_then_sum only: False subtracts the group's mean and divides by nothing
    reduce: Literal["sum", "softmin", "tchebycheff"] = "sum"
    sharpness: float = 0.0  # softmin only
    ideal: Floats | None = None  # [K], tchebycheff only
    kl_coef: float | None = None  # coefficient of the KL in the loss, where the policy decides it


class Composed(NamedTuple):
    """The stages of one composition. NaN = missing; advantages have none."""

    columns: Floats  # [B, K] the columns that were reduced
    total: Floats  # [B] their reduction
    advantages: Floats  # [B]


def weighted_sum(columns: Floats, weights: Floats, *, renormalize_missing: bool = False) -> Floats:
    """sum_k w_bk S_bk over what is there [B]; NaN where nothing is.

    renormalize_missing (ours): times sum of all weights / sum of those used; as it is where the latter is 0.
    """
    there = np.isfinite(columns)
    weights = np.broadcast_to(weights, columns.shape)
    total = np.where(there, weights * np.where(there, columns, 0.0), 0.0).sum(axis=1)
    if renormalize_missing:
        used = np.where(there, weights, 0.0).sum(axis=1)
        total = total * np.where(used == 0, 1.0, weights.sum(axis=1) / np.where(used == 0, 1.0, used))
    return np.where(there.any(axis=1), total, np.nan)


def soft_min(columns: Floats, weights: Floats | float = 1.0, *, sharpness: float) -> Floats:
    """-(1/k) log mean_k exp(-k Z_k) over what is there [B]; k = `sharpness`: 0 the mean, large the minimum; none: 0.

    The mean is weighted (ours; equal weights are the published form). RVPO, arXiv 2605.05750 [rebuilt]. Raises
    ValueError for a negative sharpness or weight.
    """
    used = np.where(np.isfinite(columns), np.broadcast_to(np.asarray(weights, dtype=np.float64), columns.shape), 0.0)
    if sharpness < 0 or (used < 0).any():
        raise ValueError("the soft minimum takes no negative sharpness and no negative weights")
    counts = used > 0
    share = used / np.where(counts.any(axis=1), used.sum(axis=1), 1.0)[:, None]
    if sharpness == 0:
        return np.asarray((share * np.where(counts, columns, 0.0)).sum(axis=1))
    least = np.where(counts, columns, np.inf).min(axis=1, initial=np.inf)
    least = np.where(np.isfinite(least), least, 0.0)
    # From the smallest on, so that no exponential overflows.
    inner = (share * np.exp(np.where(counts, -sharpness * (columns - least[:, None]), -np.inf))).sum(axis=1)
    return np.where(counts.any(axis=1), least - np.log(np.where(inner > 0, inner, 1.0)) / sharpness, 0.0)


def tchebycheff(columns: Floats, weights: Floats, *, ideal: Floats) -> Floats:
    """-max_k w_k (z_k - S_bk) over what is there [B], z the `ideal` [K]; NaN where nothing is.

    The worst objective decides. arXiv 2602.06869's repository [code].
    """
    gaps = weights * (ideal - columns)
    worst = np.where(np.isfinite(gaps), gaps, -np.inf).max(axis=1, initial=-np.inf)
    return np.where(np.isfinite(worst), -worst, np.nan)


def compose(
    batch: StepBatch, mix: Mix, *, eps: float = 1e-4, scale: Scale = "group", renormalize_missing: bool = False
) -> tuple[Floats, dict[str, float]]:
    """Advantages [B] of a batch under a mix, and metrics.

    eps: added to standard deviations (TRL 1e-4). scale: what sum_then_normalize divides by. renormalize_missing: a row
    with missing entries is scaled by sum of all weights / sum of those used. Raises ValueError for a mix that makes no
    sense (tchebycheff beside another column or after normalisation) and for a task weight without KL.
    """
    scores = finite(batch.scores)
    weights = np.broadcast_to(np.asarray(mix.weights, dtype=np.float64), scores.shape)
    reduce = _reduction(mix, renormalize_missing)
    columns, all_weights = with_task(scores, weights, batch, mix) if mix.task != 0 else (scores, weights)
    if mix.order == "sum_then_normalize":
        done = sum_then_normalize(columns, all_weights, batch.group, eps=eps, scale=scale, reduce=reduce)
    else:
        options = {"whiten": mix.whiten, "by_std": mix.by_std}
        done = normalize_then_sum(columns, all_weights, batch.group, eps=eps, reduce=reduce, **options)
    advantages = mix.scale * done.advantages
    return advantages, _metrics(batch, weights, done.total, advantages)


def with_task(scores: Floats, weights: Floats, batch: StepBatch, mix: Mix) -> tuple[Floats, Floats]:
    """Columns and weights [B, 1 + K] with the task column -kl in front.

    A row whose every reward is missing has no KL column either: it must not be trained on its KL alone (ours).
    """
    if batch.kl is None:
        raise ValueError("this weighting needs the KL to the reference of every completion, and the batch has none")
    task = -finite(batch.kl) / (np.maximum(batch.lengths, 1) if mix.kl_mean else 1)
    task[~np.isfinite(scores).any(axis=1)] = np.nan
    return np.column_stack([task, scores]), np.column_stack([np.full(len(task), mix.task), weights])


def sum_then_normalize(
    columns: Floats,
    weights: Floats,
    group: Ints,
    *,
    eps: float = 1e-4,
    scale: Scale = "group",
    reduce: Reduce = weighted_sum,
) -> Composed:
    """total_b = reduce_k(w_bk S_bk) over what is there; A = (total - group mean) / (std + eps).

    std (n - 1) is the group's, the batch's, or there is no division (`none`, as in Dr. GRPO). [code: TRL]
    """
    columns = finite(columns)
    total = _reduced(columns, weights, reduce)
    if scale == "group":
        advantages = group_normalised(total, group, eps=eps)
    else:
        advantages = (total - group_means(total, group)) / ((std(total) + eps if scale == "batch" else 0.0) or 1.0)
    return Composed(columns, total, np.nan_to_num(advantages))


def normalize_then_sum(
    columns: Floats,
    weights: Floats,
    group: Ints,
    *,
    eps: float = 1e-4,
    whiten: bool = True,
    by_std: bool = True,
    reduce: Reduce = weighted_sum,
) -> Composed:
    """Z_bk = (S_bk - group mean_k) / (group std_k + eps); z_b = reduce_k(w_k Z_bk); A = (z - mean) / (std + eps) or z.

    Whitening is over the rows of the batch and keeps the size of A independent of K. A column with one value in a
    group is 0 there. GDPO, arXiv 2601.05242 [code: TRL].
    """
    z = np.column_stack([group_normalised(c, group, eps=eps, by_std=by_std) for c in finite(columns).T])
    total = _reduced(z, weights, reduce)
    advantages = (total - mean(total)) / (std(total) + eps or 1.0) if whiten else total
    return Composed(z, total, np.nan_to_num(advantages))


def _reduction(mix: Mix, renormalize_missing: bool) -> Reduce:
    if mix.reduce == "softmin":
        return functools.partial(soft_min, sharpness=mix.sharpness)
    if mix.reduce == "tchebycheff":
        # The ideal is a score of each objective, so columns must be scores.
        if mix.ideal is None or mix.task != 0 or mix.order != "sum_then_normalize":
            raise ValueError("tchebycheff reduces scores by their ideal: it takes no task column and sums first")
        return functools.partial(tchebycheff, ideal=np.asarray(mix.ideal, dtype=np.float64))
    return functools.partial(weighted_sum, renormalize_missing=renormalize_missing)


def _reduced(columns: Floats, weights: Floats, reduce: Reduce) -> Floats:
    return np.where(np.isfinite(columns).any(axis=1), reduce(columns, weights), np.nan)


def _metrics(batch: StepBatch, weights: Floats, total: Floats, advantages: Floats) -> dict[str, float]:
    """mix/weight/NAME: mean over rows; mix/invalid: infinite scores; mix/unscorable, mix/equal_groups: shares."""
    found = {f"mix/weight/{name}": mean(column) for name, column in zip(batch.names, weights.T, strict=True)}
    groups = [total[rows] for rows in rows_of(batch.group)]
    found["mix/invalid"] = float(np.isinf(batch.raw).sum())
    if len(total):
        found["mix/unscorable"] = float(np.isnan(total).mean())
        found["mix/equal_groups"] = float(np.mean([std(own) == 0 for own in groups]))
        found["mix/advantage_std"] = std(advantages)
    return found


def in_order(values: Mapping[str, float], names: Sequence[str]) -> Floats:
    """The values of `names` as a vector."""
    return np.array([values[name] for name in names], dtype=np.float64)
