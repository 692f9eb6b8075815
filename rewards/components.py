"""The entries of `rewards.components`, checked before anything starts.

    math_answer: {}                                                  a registered reward under its own name
    polite: {fn: my_rewards.py:polite, weight: 0.2, bonus: 0.5}      a function or class of the user's
    helpful: {fn: reward_model, path: rm, shape: [{par: {k: 1}}], references: answers}
    both: {fn: ensemble, members: [rm_a, rm_b]}                      derived from other components

An objective is what a weighting policy weighs: a component, or each `name/key` of one that returns a mapping. Members
of others and `rewards.gold` are components without being objectives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import RewardsConfig
from core.errors import UserError, nearest
from core.registry import check_options, options_of
from rewards.derived import derived
from rewards.reward import Reward, bind, rewards
from rewards.shaping import Chain, chain

SETTINGS = ("weight", "fn", "shape", "bounds", "keys", "references", "members")
"""What the config keeps for itself of an entry; everything else is an option of the function."""


@dataclass(frozen=True)
class Component:
    """One entry, checked. Either `reward` scores it, or it is `derived` from the columns of `members`."""

    name: str
    fn: str  # a registered name, or an absolute path and a function
    options: Mapping[str, Any]
    reward: Reward | None
    weight: float | None = None  # none where it is not written
    members: tuple[str, ...] = ()
    shape: tuple[Any, ...] = ()
    bounds: tuple[float, float] | None = None  # lowest and highest value, for the report of saturation
    keys: tuple[str, ...] = ()  # of the mapping that the function returns
    references: str | None = None  # column with reference answers to the prompt, or with their scores

    def record(self) -> dict[str, Any]:
        """What a run writes down of it: the function, its options, and which code or model stands behind the name."""
        found = {"fn": self.fn, "options": dict(self.options), "members": list(self.members), "shape": list(self.shape)}
        file = Path(self.fn.rpartition(":")[0])
        if file.is_file():
            found["file_hash"] = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        if self.reward is not None and hasattr(self.reward.function, "manifest"):
            found["manifest"] = self.reward.function.manifest()
        return found

    def derive(self) -> Callable[..., Any]:
        """The function of the members' columns."""
        return derived.bind(self.fn, self.options, self.name)

    def shaper(self, where: str = "shape") -> Chain:
        """New shapers for one of its columns."""
        return chain(self.shape, where)

    def columns(self, known: Collection[str]) -> list[str]:
        """Names of its columns: declared, or those among `known`, or its own."""
        if self.keys:
            return [f"{self.name}/{key}" for key in self.keys]
        return [column for column in known if column.startswith(f"{self.name}/")] or [self.name]


def check_components(config: RewardsConfig, where: str = "rewards.components") -> dict[str, Component]:
    """The components of a config, members before what is derived from them.

    Raises UserError (place, problem, what is allowed); starts no process. A user's file is loaded here, so that a
    mistake in it is found before anything slow.
    """
    found = {name: _component(name, entry, f"{where}.{name}") for name, entry in config.components.items()}
    for component in found.values():
        for member in component.members:
            others = [column for c in found.values() if not c.members for column in c.columns(())]
            if member not in others:
                raise UserError(
                    f"{where}.{component.name}.members: '{member}' is no scored component; {nearest(member, others)}"
                )
    if config.gold is not None and config.gold not in found:
        raise UserError(f"rewards.gold: there is no component '{config.gold}'; {nearest(config.gold, found)}")
    for name in {member for c in found.values() for member in c.members} | {config.gold or ""}:
        if name in found and found[name].weight is not None:
            raise UserError(
                f"{where}.{name}.weight: it is no objective (a member of another, or rewards.gold); drop it"
            )
    _check_gold(found, config.gold)
    for component in found.values():
        compares = any(shaper.compares for _, shaper in component.shaper().shapers)
        if compares and (component.references is None or component.reward is None):
            raise UserError(
                f"{where}.{component.name}.shape: it compares with reference answers; name the column that holds them "
                "(or their scores): references: COLUMN"
            )
    return dict(sorted(found.items(), key=lambda item: bool(item[1].members)))


def _check_gold(found: Mapping[str, Component], gold: str | None) -> None:
    """What is only watched must be one number, must not be rewarded through another, and something must be rewarded."""
    if gold is None:
        return
    if any(member.partition("/")[0] == gold for c in found.values() for member in c.members):
        raise UserError(f"rewards.gold: '{gold}' is a member of another component, so it would be rewarded through it")
    if found[gold].keys:
        raise UserError(f"rewards.gold: '{gold}' returns a mapping, and the alarm needs one number")
    if len(found) == 1:
        raise UserError("rewards.gold: no other component is left to reward; add one to rewards.components")


def objectives(components: Mapping[str, Component], gold: str | None, known: Collection[str] = ()) -> tuple[str, ...]:
    """The names of the objectives, as far as the columns are `known` or declared."""
    members = {member for c in components.values() for member in c.members}
    columns = [(name, column) for name, c in components.items() if name != gold for column in c.columns(known)]
    return tuple(column for name, column in columns if not members & {name, column})


def check_data(
    components: Mapping[str, Component], columns: Collection[str], where: str = "rewards.components"
) -> None:
    """Refuse data that lacks a column which a component reads; raises UserError with the nearest name."""
    for component in components.values():
        read = component.reward.columns if component.reward else ()
        for name in (*read, *filter(None, [component.references])):
            if name not in columns:
                raise UserError(
                    f"{where}.{component.name}: it reads the column '{name}', which the data has not; "
                    f"{nearest(name, columns)}"
                )


def _component(name: str, entry: Mapping[str, Any], where: str) -> Component:
    if "/" in name or not name:
        raise UserError(f"{where}: a component's name has no '/'; it separates the name from what a function returns")
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {entry!r} is not a mapping; write {name}: {{weight: 1.0, fn: {name}, ...}}")
    settings = {key: entry[key] for key in SETTINGS if key in entry}
    options = {key: value for key, value in entry.items() if key not in SETTINGS}
    fn = settings.pop("fn", name)
    if not isinstance(fn, str):
        raise UserError(f"{where}.fn: {fn!r} is not a name; give a reward of `alignlab ls rewards` or file.py:function")
    checked = _Settings(where).read(settings)
    if fn in derived:
        if not checked.get("members"):
            raise UserError(f"{where}.members: '{fn}' is made of other components; name them: members: [a, b]")
        if fn in ("uncertain", "weighted_mean") and len(checked["members"]) != 2:
            raise UserError(f"{where}.members: '{fn}' is made of two, not of {len(checked['members'])}")
        return Component(name, fn, check_options(derived[fn], options, where), None, **checked)
    if "members" in settings:
        raise UserError(f"{where}.members: '{fn}' scores completions itself; only {', '.join(derived)} have members")
    if ":" not in fn and fn not in rewards:
        raise UserError(f"{where}: there is no reward '{fn}'; {nearest(fn, [*rewards, *derived])}")
    reward = bind(fn, options, where, beside=SETTINGS)
    if reward.keeper is not None and "references" in checked:
        raise UserError(f"{where}.references: a reward with state cannot be compared with reference answers")
    if ":" in fn:
        file, _, function = fn.rpartition(":")
        fn = f"{Path(file).expanduser().resolve()}:{function}"  # scoring processes need not share our directory
    return Component(name, fn, _absolute(fn, options), reward, **checked)


def _absolute(fn: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with absolute paths of folders that lie here: other processes have other working directories."""
    kinds = {name: p.annotation for name, p in options_of(rewards[fn]).items()} if fn in rewards else {}
    folders = {n: Path(v).expanduser() for n, v in options.items() if kinds.get(n) in ("Folder", "reward.Folder")}
    return {**options, **{n: str(path.resolve()) for n, path in folders.items() if path.exists()}}


class _Settings:
    """Reads the settings of one entry; every mistake names its place."""

    def __init__(self, where: str) -> None:
        self.where = where

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that are given, checked."""
        return {key: getattr(self, f"_{key}")(value) for key, value in given.items()}

    def _weight(self, value: Any) -> float:
        if not _number(value):
            raise UserError(
                f"{self.where}.weight: {value!r} is not a number; a weight is a finite number, 1 if left out"
            )
        return float(value)

    def _shape(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{self.where}.shape: {value!r} is not a list; write shape: [clip, {{par: {{k: 1.0}}}}]")
        chain(value, f"{self.where}.shape")
        return tuple(value)

    def _bounds(self, value: Any) -> tuple[float, float]:
        if not (
            isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value)) and value[0] < value[1]
        ):
            raise UserError(f"{self.where}.bounds: {value!r} is no [lowest, highest]; for instance bounds: [0, 1]")
        return float(value[0]), float(value[1])

    def _keys(self, value: Any) -> tuple[str, ...]:
        return self._names("keys", value)

    def _members(self, value: Any) -> tuple[str, ...]:
        return self._names("members", value)

    def _names(self, key: str, value: Any) -> tuple[str, ...]:
        if not (isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value)):
            raise UserError(f"{self.where}.{key}: {value!r} is no list of names; write {key}: [a, b]")
        return tuple(value)

    def _references(self, value: Any) -> str:
        if not isinstance(value, str):
            raise UserError(f"{self.where}.references: {value!r} is not the name of a column of the data")
        return value


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
