"""Statistics over the rows of a group, in float64, with unscorable rows (NaN) left out.

B rows, P groups. Rows of a group need not be adjacent and groups may differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algos.batch import select


@dataclass(frozen=True)
class Groups:
    """The groups of a batch and which rows count in their statistics.

    >>> g = Groups.of(torch.tensor([5, 7, 5]), torch.tensor([1.0, 0.0, 2.0]).double())
    >>> g.mean(torch.tensor([1.0, 0.0, 2.0]).double()).tolist()
    [1.5, 0.0]
    """

    index: Tensor  # [B] int64 in 0 .. P-1, by increasing group id
    member: Tensor  # [B] bool, rows that count
    count: int  # P

    @classmethod
    def of(cls, group: Tensor, rewards: Tensor) -> Groups:
        """Groups of rows with ids `group` [B]; rows whose reward [B] is NaN do not count."""
        ids, index = torch.unique(group, return_inverse=True)
        return cls(index, ~torch.isnan(rewards), len(ids))

    @property
    def size(self) -> Tensor:
        """Rows that count, [P] float64."""
        return self.sum(torch.ones_like(self.index, dtype=torch.float64))

    @property
    def present(self) -> Tensor:
        """Groups with a row that counts, [P] bool."""
        return self.size > 0

    def sum(self, values: Tensor) -> Tensor:
        """[B] -> [P]."""
        return torch.zeros(self.count, dtype=values.dtype, device=values.device).index_add(
            0, self.index, select(self.member, values)
        )

    def smallest(self, values: Tensor) -> Tensor:
        """[B] -> [P]; +inf for a group without rows."""
        return self._extreme(values, "amin", torch.inf)

    def largest(self, values: Tensor) -> Tensor:
        """[B] -> [P]; -inf for a group without rows."""
        return self._extreme(values, "amax", -torch.inf)

    def constant(self, values: Tensor) -> Tensor:
        """[P] bool: all values equal. By max == min: a rounded mean would leave a spurious spread."""
        return self.smallest(values) >= self.largest(values)

    def mean(self, values: Tensor) -> Tensor:
        """[B] -> [P]; exactly the common value of a constant group, 0 for a group without rows."""
        mean = self.sum(values) / self.size.clamp(min=1)
        return torch.where(self.constant(values) & self.present, self.largest(values), mean)

    def std(self, values: Tensor, ddof: int = 1) -> Tensor:
        """[B] -> [P]; 0 where fewer than ddof + 1 rows count."""
        squares = (values - self.spread(self.mean(values))) ** 2
        return (self.sum(squares) / (self.size - ddof).clamp(min=1)).sqrt()

    def spread(self, per_group: Tensor) -> Tensor:
        """[P] -> [B]."""
        return per_group[self.index]

    def _extreme(self, values: Tensor, reduce: str, start: float) -> Tensor:
        empty = torch.full((self.count,), start, dtype=values.dtype, device=values.device)
        inert = torch.where(self.member, values, torch.full_like(values, start))
        return empty.scatter_reduce(0, self.index, inert, reduce)


def mean_std(values: Tensor, member: Tensor, ddof: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the members of any shape; exactly (value, 0) if all are equal, (0, 0) if none."""
    chosen = values[member]
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    if not len(chosen):
        return zero, zero
    if chosen.min() == chosen.max():
        return chosen[0], zero
    mean = chosen.mean()
    return mean, (((chosen - mean) ** 2).sum() / max(len(chosen) - ddof, 1)).sqrt()
