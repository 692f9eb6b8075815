"""Derived components: one column made of the columns of others, on the driver, with nothing to run.

    helpful: {fn: ensemble, members: [rm_a, rm_b, rm_c], mode: uwo, coef: 0.5}

A component that is a member of another is no objective of its own. Members are taken as their own `shape` leaves them,
so `shape: [standardise]` puts reward models of different scales on one. E members, B completions.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from core.registry import Registry
from rewards.ensemble import Mode, combine
from rewards.numeric import Floats, Ints, finite
from rewards.soft_credit import weighted_means
from rewards.uncertainty import uncertainty

derived = Registry("derived reward")

Amount = Annotated[float, Field(ge=0)]


@derived
def ensemble(members: Floats, group: Ints, *, mode: Mode = "uwo", coef: Amount = 0.5, ddof: int = 0) -> Floats:
    """Mean, minimum (wco), median, or the mean less coef x variance (uwo) or deviation (uwo_std) of the members.

    "Reward Model Ensembles Help Mitigate Overoptimization", arXiv 2310.02743 (`rewards.ensemble.combine`).
    """
    return combine(members, mode=mode, coef=coef, ddof=ddof).reward


@derived
def uncertain(
    members: Floats, group: Ints, *, mode: Literal["shrink", "multiply"] = "shrink", scale: Amount = 1.0
) -> Floats:
    """Two scorings of the same thing: where they disagree, the score moves to its group's mean (Ctrl-U).

    "Ctrl-U", arXiv 2410.11236, the text form is ours (`rewards.uncertainty`). Raises ValueError unless there are two.
    """
    first, second = members
    return uncertainty(first, second, group, mode=mode, scale=scale).reward


@derived
def weighted_mean(
    members: Floats,
    group: Ints,
    *,
    mean: Literal["arithmetic", "geometric", "harmonic"] = "arithmetic",
    share: Annotated[float, Field(ge=0, le=1)] = 0.5,
) -> Floats:
    """share x the first + (1 - share) x the second, or their geometric or harmonic mean: 0 where either is 0.

    Machine feedback: appropriateness and similarity, arXiv 2406.03363. NaN where either is missing.
    """
    first, second = finite(members)
    both = zip(first.tolist(), second.tolist(), strict=True)
    found = [getattr(weighted_means(a, b, share, 1 - share), mean) for a, b in both]
    return np.where(np.isfinite(first) & np.isfinite(second), np.array(found, dtype=np.float64), np.nan)


@derived
def product(members: Floats, group: Ints) -> Floats:
    """The product of all members: the others count only where the first, say correctness, is not 0. NaN if one is.

    A secondary reward stays secondary under normalise-then-sum only when it is gated on the main one.
    """
    return np.asarray(finite(members).prod(axis=0))
