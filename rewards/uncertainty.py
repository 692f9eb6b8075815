"""Ctrl-U for text: a score counts less where two scorings of the same completion disagree.

"Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward Modeling", arXiv 2410.11236. The authors' code
is for images; the text form is ours [rebuilt]. Score each completion twice by something that should not matter: two
judge samples, a paraphrased template, dropout, two reward models. No state.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from rewards.numeric import Floats, Ints, finite, group_means


class Weighed(NamedTuple):
    """All [B]."""

    uncertainty: Floats  # u = |a - b|; NaN where one scoring is missing
    weight: Floats  # rho = exp(-scale u); 1 where u is unknown
    reward: Floats  # NaN where both scorings are missing


def uncertainty(
    a: Floats, b: Floats, group: Ints, *, mode: Literal["shrink", "multiply"] = "shrink", scale: float = 1.0
) -> Weighed:
    """One reward [B] of two scorings a, b [B], with m their mean (or the one there is) and rho = exp(-scale |a - b|).

    shrink: mean of m over the group + rho (m - that mean), so an uncertain score neither helps nor hurts. multiply:
    rho m, the literal form, which drags uncertain positive scores down and negative ones up. scale 1 is for scores of
    unit size.
    """
    a, b = finite(a), finite(b)
    u = np.abs(a - b)
    rho = np.where(np.isnan(u), 1.0, np.exp(-scale * np.nan_to_num(u)))
    m = np.where(np.isnan(a), b, np.where(np.isnan(b), a, (a + b) / 2))
    if mode == "multiply":
        return Weighed(u, rho, rho * m)
    middle = group_means(m, group)
    return Weighed(u, rho, middle + rho * (m - middle))
