"""From scores to columns: what is derived from other components, and every column shaped. Runs on the driver.

    columns = Columns(components)
    table = columns(groups, learn=True)      # table.shaped: {"math_answer": [B], "helpful": [B], ...}, NaN = missing

Rows are the completions of the groups, one group after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError
from core.schema import Group
from rewards.components import Component
from rewards.numeric import Floats, Ints
from rewards.shaping import Chain, Context


class Table(NamedTuple):
    """All columns [B] of some groups by name."""

    raw: dict[str, Floats]
    shaped: dict[str, Floats]

    def matrix(self, names: Sequence[str], *, raw: bool = False) -> Floats:
        """The columns `names` side by side [B, K]; NaN where one does not exist."""
        chosen = self.raw if raw else self.shaped
        size = len(next(iter(self.raw.values()), ()))
        return np.array([chosen.get(n, np.full(size, np.nan)) for n in names], dtype=np.float64).reshape(-1, size).T


class Columns:
    """The columns of the components, with the running statistics of their shapers."""

    def __init__(self, components: Mapping[str, Component]) -> None:
        self.components = components
        self._derive = {c.name: c.derive() for c in components.values() if c.members}
        self._shapers: dict[str, Chain] = {}  # by column: that of a key is made when the key is first seen

    def __call__(self, groups: Sequence[Group], *, learn: bool) -> Table:
        """Every column, derived and shaped; shapers take the groups in only where they are to `learn`."""
        known = dict.fromkeys(name for group in groups for name in group.components)
        raw, shaped = {name: _scores(groups, name) for name in known}, dict[str, Floats]()
        numbers, lengths = group_index(groups), _lengths(groups)
        for component in self.components.values():  # members come before what is made of them
            context = Context(lengths, _references(groups, component.name))
            for name in component.columns(known):
                if component.members:
                    nothing = np.full(len(numbers), np.nan)
                    members = np.stack([shaped.get(m, nothing) for m in component.members])
                    raw[name] = self._derive[name](members, numbers)
                if name in raw:
                    shaper = self._shaper(name, component)
                    shaped[name] = (shaper if learn else shaper.frozen())(raw[name], context)
        return Table(raw, shaped)

    def disagreement(self, table: Table) -> dict[str, float]:
        """Mean over completions of the members' variance, of each derived component: it rises off the data."""
        found = {}
        for component in self.components.values():
            if component.members:
                members = table.matrix(component.members)
                there = np.isfinite(members).all(axis=1)
                found[component.name] = float(members[there].var(axis=1).mean()) if there.any() else math.nan
        return found

    def bounds(self, name: str) -> tuple[float, float] | None:
        """The declared bounds of a column's component."""
        return self.components[name.partition("/")[0]].bounds

    def _shaper(self, name: str, component: Component) -> Chain:
        if name not in self._shapers:
            self._shapers[name] = component.shaper(f"rewards.components.{component.name}.shape")
        return self._shapers[name]

    def state_dict(self) -> dict[str, Any]:
        """The shapers' running statistics by column."""
        return {name: shaper.state_dict() for name, shaper in self._shapers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises UserError where a column's component is gone."""
        for name, saved in state.items():
            component = self.components.get(name.partition("/")[0])
            if component is None:
                raise UserError(f"rewards.components: the checkpoint has statistics of '{name}', the config has none")
            self._shaper(name, component).load_state_dict(saved)


def group_index(groups: Sequence[Group]) -> Ints:
    """The number of each row's group [B]."""
    return np.repeat(np.arange(len(groups)), [len(g.completions) for g in groups]).astype(np.int64)


def per_group(values: Sequence[float], groups: Sequence[Group]) -> list[tuple[float, ...]]:
    """A column [B] cut into the groups' rows."""
    rest = iter(values)
    return [tuple(next(rest) for _ in group.completions) for group in groups]


def _scores(groups: Sequence[Group], name: str) -> Floats:
    values = [
        group.components[name][i].value if name in group.components else math.nan
        for group in groups
        for i in range(len(group.completions))
    ]
    return np.array(values, dtype=np.float64)


def _lengths(groups: Sequence[Group]) -> Ints:
    return np.array([len(c.token_ids) for g in groups for c in g.completions], dtype=np.int64)


def _references(groups: Sequence[Group], name: str) -> Floats | None:
    """Scores of the reference answers [B, M], NaN where a prompt has fewer; none where the component has none."""
    if not any(name in group.references for group in groups):
        return None
    width = max(len(group.references.get(name, ())) for group in groups)
    rows = [(*own, *[math.nan] * (width - len(own))) for own in (g.references.get(name, ()) for g in groups)]
    return np.repeat(
        np.array(rows, dtype=np.float64).reshape(len(rows), width), [len(g.completions) for g in groups], 0
    )
