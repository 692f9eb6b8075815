"""Groups to tensors: the rectangle [B, T] that `algos` computes on, and packed rows [1, N] that the model reads.

    batch, sequences = collate(groups)                    # the whole step, on every rank
    shares = split(sequences, hidden, budget, ranks)      # which rows make a micro-batch
    micro = Micro.of(sequences, shares[i], device)        # one packed row

A packed row holds prompts and completions end to end without padding; the rows of a group share their prompt. The last
token of a completion is predicted but never read, so it is not in the row.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from algos.batch import Batch
from core.schema import Group
from learner.attention import Packing, packing


@dataclass(frozen=True)
class Sequences:
    """The tokens of a step, ragged: row i of the batch is `prompts[i]` followed by `completions[i]`.

    Rows of the same `groups[i]` have the same prompt.
    """

    prompts: list[tuple[int, ...]]
    completions: list[tuple[int, ...]]
    groups: list[int]

    def rows(self, index: Sequence[int]) -> Sequences:
        """The sequences of some rows."""
        prompts, completions = [self.prompts[i] for i in index], [self.completions[i] for i in index]
        return Sequences(prompts, completions, [self.groups[i] for i in index])

    def only(self, wanted: Sequence[bool]) -> Sequences:
        """The same rows, those that are not wanted without completion: no micro-batch will hold them."""
        kept = [c if w else () for c, w in zip(self.completions, wanted, strict=True)]
        return Sequences(self.prompts, kept, self.groups)

    def length(self, rows: Sequence[int]) -> int:
        """Tokens that the model reads for rows of one group: the prompt once, of each completion all but the last."""
        return len(self.prompts[rows[0]]) + sum(len(self.completions[r]) - 1 for r in rows)

    def cost(self, rows: Sequence[int], hidden: int) -> int:
        """Work on rows of one group, in units of 2 * hidden operations per layer.

        Per token the matrices of a block do about 24 * hidden^2 operations; attention does 4 * hidden for each pair of
        a token and one that it sees: half of prompt^2, once, and of each completion half of its square and its prompt.
        """
        prompt = len(self.prompts[rows[0]])
        pairs = sum((prompt + len(self.completions[r])) ** 2 - prompt**2 for r in rows)
        return 12 * hidden * self.length(rows) + prompt**2 + pairs

    def units(self, most: int, share: bool) -> list[list[int]]:
        """Rows that are packed together: those of a group (each its own without `share`), cut at `most` tokens.

        A single row may be longer. Empty completions are in no unit: they have nothing to predict.
        """
        units: dict[int, list[list[int]]] = {}
        for row, completion in enumerate(self.completions):
            if not completion:
                continue
            parts = units.setdefault(self.groups[row] if share else row, [[]])
            if parts[-1] and self.length(parts[-1]) + len(completion) - 1 > most:
                parts.append([])
            parts[-1].append(row)
        return [part for parts in units.values() for part in parts]


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
    def of(cls, sequences: Sequences, rows: Sequence[int], device: torch.device, share: bool = True) -> Micro:
        """Pack the given rows, none of them empty; with `share` the rows of a group read their prompt once.

        Without rows: a stand-in of one token, for a rank without work.
        """
        if not rows:
            zero, none = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(0, device=device).long()
            return cls([], zero[None], zero[None], zero, zero, none, none, packing([(0, 1)], [(1, 0)], device))
        tokens: list[int] = []
        positions: list[int] = []
        predict: list[int] = []
        prompts: dict[int, tuple[int, int]] = {}  # of each group: first token, number of tokens
        spans: list[tuple[int, int]] = []
        keys = [sequences.groups[r] if share else r for r in rows]
        for r, key in zip(rows, keys, strict=True):
            prompt, read = sequences.prompts[r], sequences.completions[r][:-1]
            if key not in prompts:
                prompts[key] = (len(tokens), len(prompt))
                tokens += prompt
                positions += range(len(prompt))
            predict.append(sum(prompts[key]) - 1)  # the last prompt token predicts the first target
            predict += range(len(tokens), len(tokens) + len(read))
            spans.append((len(tokens), len(read)))
            tokens += read
            positions += range(len(prompt), len(prompt) + len(read))
        counts = [len(sequences.completions[r]) for r in rows]
        targets = [t for r in rows for t in sequences.completions[r]]
        row = [i for i, count in enumerate(counts) for _ in range(count)]
        step = [t for count in counts for t in range(count)]
        of = partial(torch.tensor, dtype=torch.int64, device=device)
        packed = packing([prompts[k] for k in keys], spans, device)
        return cls(list(rows), of([tokens]), of([positions]), of(predict), of(targets), of(row), of(step), packed)

    def rectangle(self, values: Tensor, width: int) -> Tensor:
        """[M] values laid out as [len(rows), width]; zero where nothing was predicted. Differentiable."""
        out = values.new_zeros(len(self.rows), width)
        return out.index_put((self.row, self.step), values)


def collate(
    groups: Sequence[Group],
    device: torch.device | str = "cpu",
    apart: bool = False,
    baseline_column: str | None = None,
    accuracy: str | None = None,
) -> tuple[Batch, Sequences]:
    """The whole step as one batch, group after group, completion after completion.

    `rewards` are the totals [B]; or, `apart`, the columns [B, R] with their weights. `baselines` are read from a column
    of the data; `accuracy` is the component that filters judge. Demonstrations bring neither log-probs nor
    versions nor totals: then `rollout_logprobs` and `versions` are None and `rewards` NaN.
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

    from_engine = sampled == {True}
    numbers = [n for n, g in enumerate(groups) for _ in g.completions]
    prompt_names = [_name(g.prompt.token_ids) for g in groups]
    batch = Batch(
        mask=rectangle([(True,) * len(c.token_ids) for c in completions], torch.bool),
        group=column(numbers, torch.int64),
        rewards=column([g.totals[i] if g.totals else math.nan for g, i in rows], torch.float64),
        truncated=column([c.truncated for c in completions], torch.bool),
        versions=rectangle([c.versions for c in completions], torch.int64) if from_engine else None,
        rollout_logprobs=rectangle([c.rollout_logprobs for c in completions], torch.float32) if from_engine else None,
        prompts=tuple(name for name, g in zip(prompt_names, groups, strict=True) for _ in g.completions),
    )
    if names := objectives(groups) if apart else []:
        values = [[g.columns[n][i] for n in names] for g, i in rows]
        weights = [[g.weights[n][i] for n in names] for g, i in rows]
        batch = replace(batch, rewards=column(values, torch.float64), reward_weights=column(weights, torch.float64))
    if accuracy is not None:
        batch = replace(batch, accuracy=column([g.components[accuracy][i].value for g, i in rows], torch.float64))
    batch = replace(batch, **_beside_rewards(rows, baseline_column, column))
    prompts = [g.prompt.token_ids for g, _ in rows]
    return batch, Sequences(prompts, [c.token_ids for c in completions], numbers)


class _Beside(TypedDict, total=False):
    """What rewards are compared with, each [B]."""

    greedy_rewards: Tensor
    answers: Tensor
    baselines: Tensor


def _beside_rewards(
    rows: Sequence[tuple[Group, int]], baseline_column: str | None, column: Callable[[list, torch.dtype], Tensor]
) -> _Beside:
    """As much of it as the groups bring."""
    found: _Beside = {}
    greedy = [g.greedy for g, _ in rows if g.greedy is not None]
    if len(greedy) == len(rows):
        found["greedy_rewards"] = column([g.totals[0] for g in greedy], torch.float64)
    if all(g.answers for g, _ in rows):
        classes = {answer: number for number, answer in enumerate(sorted({g.answers[i] for g, i in rows}))}
        found["answers"] = column([classes[g.answers[i]] for g, i in rows], torch.int64)
    if baseline_column is not None:
        found["baselines"] = column([float(g.prompt.columns[baseline_column]) for g, _ in rows], torch.float64)
    return found


def objectives(groups: Sequence[Group]) -> list[str]:
    """The columns that weigh, in their order: the same in all groups of a step."""
    return list(groups[0].weights) if groups else []


def _name(token_ids: tuple[int, ...]) -> str:
    """A short name of a prompt, the same in every pass over the data."""
    return hashlib.blake2b(repr(token_ids).encode(), digest_size=8).hexdigest()


def split(
    sequences: Sequences, hidden: int, token_budget: int, ranks: int, share: bool = True, whole_groups: bool = False
) -> list[list[int]]:
    """Rows of each micro-batch, a multiple of `ranks`; rank r takes those at r, r + ranks, ... See `pack`.

    whole_groups: the rows of a group stay together, however long they are.
    """
    whole = sequences.units(sys.maxsize if whole_groups else token_budget, share or whole_groups)
    # A group goes to one rank, so that its prompt is read once, unless there are too few groups for all ranks.
    most = min(token_budget, -(-sum(map(sequences.length, whole)) // ranks)) if whole else token_budget
    units = whole if whole_groups else sequences.units(most, share)
    bins = pack([sequences.length(u) for u in units], [sequences.cost(u, hidden) for u in units], token_budget, ranks)
    return [[row for u in members for row in units[u]] for members in bins]


def pack(lengths: Sequence[int], costs: Sequence[int], token_budget: int, ranks: int) -> list[list[int]]:
    """Indices of the units in each micro-batch; their number is a multiple of `ranks`, so it may hold empty ones.

    Longest processing time first: the costliest unit left goes to the cheapest micro-batch that has room. A unit longer
    than the budget has a micro-batch to itself. Deterministic. Micro-batches come out costliest first,
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
    """Units placed into `count` micro-batches, or None where one finds no room."""
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
