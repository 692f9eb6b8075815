"""From per-token values [B, T] to a scalar. A mode is the weight that one token of each row has, [B].

The weights come from the counts of a whole optimiser step, so the parts of micro-batches and ranks are summed and the
result does not depend on the split. (Average gradients over W ranks? Multiply each rank's loss by W.)

M valid tokens, L_i those of row i, V rows with tokens, N rows counted (`rows`: valid = V, all = every row of the step),
P prompts, M_g tokens of group g, C a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from algos.batch import select
from algos.parts import Length
from algos.parts import tokens as number
from core.registry import Registry

aggregations = Registry("aggregation")
partitions = Registry("partition")

Rows = Literal["valid", "all"]


@dataclass(frozen=True)
class Counts:
    """What denominators are made of; all float64."""

    lengths: Tensor  # [B]
    group_tokens: Tensor  # [B] tokens of the row's group
    tokens: Tensor  # []
    valid: Tensor  # [] rows with tokens
    all: Tensor  # [] every row
    prompts: Tensor  # [] groups, one without tokens included

    def rows(self, which: Rows) -> Tensor:
        """N, at least 1."""
        return (self.valid if which == "valid" else self.all).clamp(min=1)

    @classmethod
    def of(cls, mask: Tensor, group: Tensor, member: Tensor | None = None) -> Counts:
        """Counts of mask [B, T] and group [B]; rows outside `member` [B] are not part of the step."""
        member = torch.ones_like(group, dtype=torch.bool) if member is None else member
        lengths = (mask & member[:, None]).sum(1).double()
        _, index = torch.unique(group, return_inverse=True)
        per_group = torch.zeros_like(lengths).index_add(0, index, lengths)
        return cls(
            lengths=lengths,
            group_tokens=per_group[index],
            tokens=lengths.sum(),
            valid=(lengths > 0).sum().double(),
            all=member.sum().double(),
            prompts=torch.tensor(float(len(torch.unique(group[member]))), dtype=torch.float64, device=mask.device),
        )


@aggregations
def token_mean(counts: Counts) -> Tensor:
    """Every token of the step weighs the same: 1 / M."""
    return torch.ones_like(counts.lengths) / counts.tokens.clamp(min=1)


@aggregations
def token_sum(counts: Counts) -> Tensor:
    """1 per token."""
    return torch.ones_like(counts.lengths)


@aggregations
def token_sum_constant(counts: Counts, *, length_constant: Length) -> Tensor:
    """1 / C per token."""
    return torch.ones_like(counts.lengths) / number(length_constant)


@aggregations
def seq_mean_token_mean(counts: Counts, *, rows: Rows = "valid") -> Tensor:
    """Every completion weighs the same: 1 / (N L_i)."""
    return 1 / (counts.rows(rows) * counts.lengths.clamp(min=1))


@aggregations
def seq_mean_token_sum(counts: Counts, *, rows: Rows = "valid") -> Tensor:
    """1 / N per token: a completion is one action."""
    return torch.ones_like(counts.lengths) / counts.rows(rows)


@aggregations
def seq_mean_token_sum_norm(counts: Counts, *, length_constant: Length, rows: Rows = "valid") -> Tensor:
    """1 / (N C) per token: no length bias, and a step size that does not grow with the budget."""
    return torch.ones_like(counts.lengths) / (counts.rows(rows) * number(length_constant))


@aggregations
def prompt_mean(counts: Counts) -> Tensor:
    """Every prompt weighs the same: 1 / (P M_g)."""
    return 1 / (counts.prompts.clamp(min=1) * counts.group_tokens.clamp(min=1))


@partitions
def sign(positive: Tensor, *, pos_factor: float = 1.0, neg_factor: float = 1.0) -> list[tuple[Tensor, float]]:
    """Rows with R > 0 and the others, each with its own denominators and factor. Source: OREAL, arXiv 2502.06781."""
    return [(positive, pos_factor), (~positive, neg_factor)]


def weighted_sum(values: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """sum over valid cells of scale_i x_it: the part of the rows given. Without valid cells 0, still on the graph."""
    return (select(mask, values) * scale[:, None].to(values.dtype)).sum()
