"""Arithmetic on columns with missing entries: NaN is missing, and every mean and spread skips it.

A constant column has its value as mean and 0 as spread exactly, whatever the rounding of sums would say; so a group
without spread has advantage 0, not noise divided by epsilon. All float64, on the host.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def finite(values: ArrayLike) -> Floats:
    """A float64 copy in which infinities are NaN too: neither is a value."""
    array = np.array(values, dtype=np.float64)
    array[~np.isfinite(array)] = np.nan
    return array


def mean(values: Floats) -> float:
    """Mean of what is there; NaN of nothing."""
    known = values[np.isfinite(values)]
    if not known.size:
        return float("nan")
    low, high = known.min(), known.max()
    return float(low if low == high else known.mean())


def variance(values: Floats, ddof: int = 1) -> float:
    """Variance of what is there, divided by n - ddof; 0 of fewer than two values."""
    known = values[np.isfinite(values)]
    if known.size < 2 or known.min() == known.max():
        return 0.0
    return float(known.var(ddof=ddof))


def std(values: Floats, ddof: int = 1) -> float:
    """Standard deviation of what is there, the root of `variance`."""
    return math.sqrt(variance(values, ddof))


def rows_of(group: Ints) -> list[Ints]:
    """The rows of each group [B], by increasing id; rows of a group need not be adjacent."""
    ids, place = np.unique(group, return_inverse=True)
    return [np.flatnonzero(place == index) for index in range(len(ids))]


def group_means(values: Floats, group: Ints) -> Floats:
    """Each row's mean of its group [B]; NaN where the group has no value."""
    means = np.full(len(values), np.nan)
    for rows in rows_of(group):
        means[rows] = mean(values[rows])
    return means


def group_normalised(values: Floats, group: Ints, *, eps: float, by_std: bool = True) -> Floats:
    """(x - group mean) / (group std + eps) [B], or x - group mean; NaN stays NaN, a group of one value gives 0."""
    out = np.full(len(values), np.nan)
    for rows in rows_of(group):
        own = values[rows]
        out[rows] = (own - mean(own)) / ((std(own) + eps if by_std else 0.0) or 1.0)
    return out


def sigmoid(values: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    x = np.asarray(values, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1.0 + small))


def log_sigmoid(values: ArrayLike) -> Floats:
    """log(1 / (1 + exp(-x))) without overflow."""
    with np.errstate(invalid="ignore"):  # NaN comes out as NaN
        return np.asarray(-np.logaddexp(0.0, -np.asarray(values, dtype=np.float64)))


def softmax(logits: Floats) -> Floats:
    """exp(x) / sum exp(x) without overflow; -inf gives 0."""
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())
