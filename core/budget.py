"""Batches by a budget of tokens: what fits into memory is tokens, and texts of one length waste none of them."""

from __future__ import annotations

from collections.abc import Sequence


def by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches, the longest first, so that count * longest stays within `budget` tokens in each.

    That is what a batch costs once it is padded. A text that is longer than the budget is a batch of its own.

    >>> by_budget([3, 9, 2, 3], 9)
    [[1], [0, 3, 2]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches
