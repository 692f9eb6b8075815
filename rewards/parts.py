"""What parts with state share: how a class becomes a registered part, and the rule for states keyed by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from core.errors import UserError
from core.registry import Registry

Part = TypeVar("Part", bound=type)
Value = TypeVar("Value")


def part(registry: Registry, name: str) -> Callable[[Part], Part]:
    """Decorator: registers a class under `name`; the keyword-only arguments of its __init__ are its options."""

    def _register(cls: Part) -> Part:
        # A registry reads a function's options from its signature and its globals; of a class these are __init__'s.
        @functools.wraps(cls.__init__)  # type: ignore[misc]
        def make(*inputs: Any, **options: Any) -> Any:
            return cls(*inputs, **options)

        make.__name__, make.__doc__ = name, cls.__doc__
        registry(make)
        return cls

    return _register


def restored(
    saved: Mapping[str, Value], names: Sequence[str], *, allow_new_objectives: bool = False
) -> dict[str, Value]:
    """The saved values of `names`. Raises UserError where a checkpoint has other names, unless they may differ.

    With `allow_new_objectives` the values of names that both have are kept, and new names are left to start afresh.
    """
    if set(saved) != set(names) and not allow_new_objectives:
        raise UserError(
            f"the checkpoint has the objectives {_listed(saved)}, the run has {_listed(names)}; resume with the same "
            "objectives, or allow new ones"
        )
    return {name: saved[name] for name in names if name in saved}


def known(given: Mapping[str, Value] | Sequence[str], names: Sequence[str], option: str) -> None:
    """Raise UserError where `option` names an objective that is none of `names`."""
    if unknown := [name for name in given if name not in names]:
        raise UserError(f"{option}: there is no objective {_listed(unknown)}; the run has {_listed(names)}")


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(sorted(names)) or "none"
