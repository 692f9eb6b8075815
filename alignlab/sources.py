"""Prompts of several sources, drawn with probabilities that move during the run: the same face as a `PromptStream`.

    prompts = MixedPrompts(streams, mixer, seed)      # streams: one PromptStream a source
    prompts[ordinal]                                  # a pure function of (seed, ordinal, the probabilities in force)
    prompts.mix(signal, coordinator.next_ordinal)     # new probabilities, for prompts that are not yet admitted

Which source a position has is decided by a hash of (seed, position) and the probabilities in force; which prompt, by
how many of that source came before. Probabilities are kept with the position at which they began, so a resumed run, or
a second actor, sees the same prompts.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alignlab.prompts import PromptStream, Row, check_column
from core.config import DataConfig, SourcesConfig
from core.errors import UserError, nearest
from core.schema import Group, Prompt
from rewards.sources import SourceMixer, mixers

SOURCE = ("a name", lambda value: isinstance(value, str) and bool(value))


def prompt_stream(config: DataConfig, tokenizer: Any, seed: int, rows: Sequence[Row]) -> PromptStream | MixedPrompts:
    """The prompts of a run: one stream, or one a source where `data.sources` says so. Raises UserError."""
    if config.sources is None:
        return PromptStream(config, tokenizer, seed, rows)
    names = check_sources(config, rows)
    column = config.sources.column
    streams = {name: PromptStream(config, tokenizer, seed, [r for r in rows if r[column] == name]) for name in names}
    return MixedPrompts(streams, make_mixer(config.sources, names), seed)


def check_sources(config: DataConfig, rows: Sequence[Row]) -> list[str]:
    """The names of the sources, sorted. Raises UserError for rows without one, or a target that is none."""
    assert config.sources is not None
    sources = config.sources
    check_column(rows, config.path, "data.sources.column", sources.column, SOURCE)
    names = sorted({row[sources.column] for row in rows})
    if sources.target is not None and sources.target not in names:
        raise UserError(f"data.sources.target: there is no source '{sources.target}'; {nearest(sources.target, names)}")
    make_mixer(sources, names)
    return names


def make_mixer(sources: SourcesConfig, names: Sequence[str]) -> SourceMixer:
    """The mixer of the config. Raises UserError."""
    options = dict(sources.mixer)
    name = str(options.pop("name", "dga"))
    mixer: SourceMixer = mixers.bind(name, options, "data.sources.mixer")(tuple(names))
    return mixer


class MixedPrompts:
    """Position n -> Prompt, of a source drawn with the probabilities in force when n was admitted."""

    def __init__(self, streams: Mapping[str, PromptStream], mixer: SourceMixer, seed: int) -> None:
        self.streams, self.mixer, self.seed = dict(streams), mixer, seed
        self.names = sorted(streams)
        self.too_long = sum(stream.too_long for stream in streams.values())
        self._since = [0]  # positions at which the probabilities changed
        self._shares = [dict(mixer.probabilities)]
        self._places: list[tuple[str, int]] = []  # of each position: source, and how many of it came before
        self._taken: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self.streams.values()))

    def __getitem__(self, ordinal: int) -> Prompt:
        while len(self._places) <= ordinal:
            source = self._draw(len(self._places))
            self._places.append((source, self._taken[source]))
            self._taken[source] += 1
        source, position = self._places[ordinal]
        prompt = self.streams[source][position]
        return replace(prompt, ordinal=ordinal, columns={**prompt.columns, "source": source})

    def _draw(self, ordinal: int) -> str:
        digest = hashlib.blake2b(f"source/{self.seed}/{ordinal}".encode(), digest_size=8).digest()
        shares = self._shares[bisect.bisect_right(self._since, ordinal) - 1]
        edges = np.cumsum([shares[name] for name in self.names])
        place = int.from_bytes(digest, "big") / 2**64 * edges[-1]
        return self.names[min(int(np.searchsorted(edges, place, side="right")), len(self.names) - 1)]

    def mix(self, signal: Mapping[str, float], next_ordinal: int) -> dict[str, float]:
        """Let the mixer learn from one number a source; counts from `next_ordinal` on. Returns its metrics."""
        metrics = self.mixer.update(signal)
        if dict(self.mixer.probabilities) != self._shares[-1]:
            self._since.append(max(next_ordinal, len(self._places)))
            self._shares.append(dict(self.mixer.probabilities))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The mixer's state and the probabilities so far, as plain JSON."""
        return {"mixer": self.mixer.state_dict(), "since": list(self._since), "shares": [dict(s) for s in self._shares]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError if it is of other sources."""
        self.mixer.load_state_dict(state["mixer"])
        self._since, self._shares = list(state["since"]), [dict(shares) for shares in state["shares"]]
        self._places, self._taken = [], Counter()


def advantage_signal(groups: Sequence[Group], advantages: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean |A| of each source's completions: how much there is to learn from it (ours)."""
    found: dict[str, list[float]] = {}
    for group, row in zip(groups, advantages, strict=True):
        found.setdefault(group.prompt.columns["source"], []).extend(abs(a) for a in row if np.isfinite(a))
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def by_source(groups: Sequence[Group]) -> list[Group]:
    """The groups with one column a source in place of the objectives: the totals of its own groups, else missing.

    The gradients of these columns, which `Learner.gram` compares, are those of the sources.
    """
    names = sorted({group.prompt.columns["source"] for group in groups})

    def apart(group: Group) -> Group:
        ones, missing = ((value,) * len(group.completions) for value in (1.0, math.nan))
        columns = {n: group.totals if group.prompt.columns["source"] == n else missing for n in names}
        return replace(group, columns=columns, weights=dict.fromkeys(names, ones))

    return list(map(apart, groups))


def alignment_signal(groups: Sequence[Group], gram: Sequence[Sequence[float]], target: str | None) -> dict[str, float]:
    """<g_d, g_target> of each source in the step, g its mean gradient; without a target, that of all together."""
    sources = [group.prompt.columns["source"] for group in groups]
    names, table = sorted(set(sources)), np.array(gram, dtype=np.float64)
    share = np.array([len(sources) / sources.count(name) for name in names])
    if target is None:
        return dict(zip(names, (share * table.sum(axis=1)).tolist(), strict=True))
    if target not in names:
        return {}  # no prompt of the target in this step: nothing to align with
    t = names.index(target)
    return dict(zip(names, (share * share[t] * table[:, t]).tolist(), strict=True))
