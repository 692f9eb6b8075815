"""One reward of several reward models, pessimistic where they disagree; and best-of-n as its test bench.

"Reward Model Ensembles Help Mitigate Overoptimization", arXiv 2310.02743 [authors' code]. WCO and UWO remove
overoptimisation under best-of-n, and under RL together with a small KL penalty (0.01); the mean alone helps less. Log
the variance: it rises as the policy leaves the data. E members, B completions.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from rewards.numeric import Floats, finite, mean, variance

Mode = Literal["mean", "wco", "uwo", "median", "uwo_std"]


class Combined(NamedTuple):
    """NaN where no member has a score."""

    reward: Floats  # [B]
    variance: Floats  # [B] the members' disagreement; 0 of one member


def combine(scores: Floats, *, mode: Mode = "uwo", coef: float = 0.5, ddof: int = 0) -> Combined:
    """One reward a completion from the members' scores [E, B], over the members that have one.

    mean; wco: the minimum; uwo: mean - coef var; ours: median; uwo_std: mean - coef std, in the reward's own unit. var
    divides by E - ddof: the paper and its best-of-n code by E, its PPO code by E - 1. coef 0.5 for best-of-n, 0.1 for
    PPO there; 0 is 0.
    """
    columns = finite(scores).T
    known = [column[np.isfinite(column)] for column in columns]
    spread = np.array([variance(column, ddof) if column.size else np.nan for column in known])
    if mode in ("wco", "median"):
        pick = np.min if mode == "wco" else np.median
        return Combined(np.array([pick(column) if column.size else np.nan for column in known]), spread)
    penalty = {"mean": 0.0, "uwo": coef * spread, "uwo_std": coef * np.sqrt(spread)}[mode]
    return Combined(np.array([mean(column) for column in known]) - penalty, spread)


def best_of_n(proxy: Floats, gold: Floats, n: int) -> tuple[float, float]:
    """Expected (proxy, gold) score of the proxy-best of n of each prompt's N answers [P, N], averaged over prompts.

    Unbiased: drawn without replacement, sum over j = n .. N of C(j - 1, n - 1) / C(N, n) x score of the j-th by proxy,
    ascending; ties in the order given. NaN for a prompt with fewer than n answers that have both scores, which leaves
    the average.
    """
    means = [_best_of_n(finite(p), finite(g), n) for p, g in zip(proxy, gold, strict=True)]
    first, second = np.array(means, dtype=np.float64).reshape(-1, 2).T
    return mean(first), mean(second)


def _best_of_n(proxy: Floats, gold: Floats, n: int) -> tuple[float, float]:
    both = np.isfinite(proxy) & np.isfinite(gold)
    proxy, gold = proxy[both], gold[both]
    total = len(proxy)
    if not 1 <= n <= total:
        return math.nan, math.nan
    coefficient = np.zeros(total)
    coefficient[-1] = n / total
    for j in range(total - 1, n - 1, -1):  # the binomials themselves overflow for large N
        coefficient[j - 1] = coefficient[j] * (j - n + 1) / j
    order = np.argsort(proxy, kind="stable")
    return float(coefficient @ proxy[order]), float(coefficient @ gold[order])


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy it draws from: log n - (n - 1) / n, in nats."""
    return math.log(n) - (n - 1) / n
