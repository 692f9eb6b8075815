"""Groups to tensors: the rectangle [B, T] that `algos` computes on, and packed rows [1, N] that the model reads.

    batch, sequences = collate(groups)                   # the whole step, on every rank
    bins = pack(costs, lengths, token_budget, ranks)     # which sequences share a micro-batch
    micro = Micro.of(sequences, bins[i], device)         # one packed row

A packed row holds prompts and completions end to end without padding. The last token of a completion is predicted but
never read, so it is not in the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from algos.batch import Batch
from core.schema import Group
from learner.attention import Packing, packing


@dataclass(frozen=True)
class Sequences:
    """The tokens of a step, ragged: row i of the batch is `prompts[i]` followed by `completions[i]`."""

    prompts: list[tuple[int, ...]]
    completions: list[tuple[int, ...]]

    def rows(self, index: Sequence[int]) -> Sequences:
        """The sequences of some rows."""
        return Sequences([self.prompts[i] for i in index], [self.completions[i] for i in index])

    def length(self, row: int) -> int:
        """Tokens that the model reads for a row; 0 for an empty completion, which has nothing to predict."""
        return len(self.prompts[row]) + len(self.completions[row]) - 1 if self.completions[row] else 0


@dataclass(frozen=True)
class Micro:
    """One packed row. N tokens are read, M tokens are predicted.

    rows: which rows of the step, in the order of the row. tokens, positions: [1, N]. predict: [M] places in the row
    whose next token is a target. targets: [M]. row, step: [M] cell of each target in a rectangle [len(rows), T].
    """

    rows: list[int]
    tokens: Tensor
    positions: Tensor
    predict: Tensor
    targets: Tensor
    row: Tensor
    step: Tensor
    packing: Packing

    @classmethod
    def of(cls, sequences: Sequences, rows: Sequence[int], device: torch.device) -> Micro:
        """Pack the given rows, none of them empty. Without rows: a stand-in of one token, for a rank without work."""
        if not rows:
            zero, none = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(0, device=device).long()
            return cls([], zero[None], zero[None], zero, zero, none, none, packing([1], device))
        tokens, positions, predict, targets, row, step = [], [], [], [], [], []
        for i, r in enumerate(rows):
            prompt, completion = sequences.prompts[r], sequences.completions[r]
            first = len(tokens) + len(prompt) - 1  # the last prompt token predicts the first target
            tokens += (prompt + completion)[:-1]
            positions += range(sequences.length(r))
            predict += range(first, len(tokens))
            targets += completion
            row += [i] * len(completion)
            step += range(len(completion))
        columns = (torch.tensor(x, dtype=torch.int64, device=device) for x in (predict, targets, row, step))
        read = (torch.tensor([x], dtype=torch.int64, device=device) for x in (tokens, positions))
        return cls(list(rows), *read, *columns, packing([sequences.length(r) for r in rows], device))

    def rectangle(self, values: Tensor, width: int) -> Tensor:
        """[M] values laid out as [len(rows), width]; zero where nothing was predicted. Differentiable."""
        out = values.new_zeros(len(self.rows), width)
        return out.index_put((self.row, self.step), values)


def collate(
    groups: Sequence[Group], device: torch.device | str = "cpu", components: Sequence[str] = ()
) -> tuple[Batch, Sequences]:
    """The whole step as one batch, group after group, completion after completion.

    `rewards` are the totals [B], or the named components [B, R]. Demonstrations bring neither log-probs nor versions
    nor totals: then `rollout_logprobs` and `versions` are None and `rewards` NaN.
    Raises ValueError when some completions bring log-probs and others do not, or a prompt is empty.
    """
    rows = [(g, i) for g in groups for i in range(len(g.completions))]
    completions = [g.completions[i] for g, i in rows]
    if not all(g.prompt.token_ids for g in groups):
        raise ValueError("collate: a prompt without tokens leaves the first token of its completions without context")
    sampled = {bool(c.rollout_logprobs) for c in completions if c.token_ids}
    if len(sampled) > 1:
        raise ValueError("collate: some completions bring rollout_logprobs and others do not")
    width = max((len(c.token_ids) for c in completions), default=0)

    def rectangle(ragged: list[tuple], dtype: torch.dtype) -> Tensor:
        out = torch.zeros(len(rows), width, dtype=dtype)
        for i, values in enumerate(ragged):
            out[i, : len(values)] = torch.tensor(values, dtype=dtype)
        return out.to(device)

    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def rewards(group: Group, i: int) -> float | list[float]:
        if components:
            return [group.components[name][i].value for name in components]
        return group.totals[i] if group.totals else math.nan

    from_engine = sampled == {True}
    numbers = [n for n, g in enumerate(groups) for _ in g.completions]
    batch = Batch(
        mask=rectangle([(True,) * len(c.token_ids) for c in completions], torch.bool),
        group=column(numbers, torch.int64),
        rewards=column([rewards(g, i) for g, i in rows], torch.float64),
        truncated=column([c.truncated for c in completions], torch.bool),
        versions=rectangle([c.versions for c in completions], torch.int64) if from_engine else None,
        rollout_logprobs=rectangle([c.rollout_logprobs for c in completions], torch.float32) if from_engine else None,
    )
    return batch, Sequences([g.prompt.token_ids for g, _ in rows], [c.token_ids for c in completions])


def cost(length: int, hidden: int) -> int:
    """Work of one sequence, in units of 2 * hidden operations per layer.

    Per token the matrices of a block do about 24 * hidden^2 operations and causal attention 2 * hidden * length.
    """
    return length * (12 * hidden + length)


def pack(lengths: Sequence[int], costs: Sequence[int], token_budget: int, ranks: int) -> list[list[int]]:
    """Indices of the sequences in each micro-batch; their number is a multiple of `ranks`, so it may hold empty ones.

    Longest processing time first: the costliest sequence left goes to the cheapest micro-batch that has room. A
    sequence longer than the budget has a micro-batch to itself. Deterministic. Micro-batches come out costliest first,
    so those that the ranks run side by side (0 .. ranks-1, ranks .. 2 ranks-1, ...) cost nearly the same.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-costs[i], i))
    count = ranks * max(1, math.ceil(sum(lengths) / (token_budget * ranks)))
    while (bins := _place(order, lengths, costs, token_budget, count)) is None:
        count += ranks
    bins.sort(key=lambda b: (-sum(costs[i] for i in b), b))
    return bins


def _place(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], budget: int, count: int
) -> list[list[int]] | None:
    """Sequences placed into `count` micro-batches, or None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, work = np.zeros(count), np.zeros(count)
    for i in order:
        room = (tokens + lengths[i] <= budget) | (tokens == 0)
        if not room.any():
            return None
        b = int(np.where(room, work, np.inf).argmin())
        bins[b].append(i)
        tokens[b] += lengths[i]
        work[b] += costs[i]
    return bins
