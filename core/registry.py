"""A dict of functions that explains itself.

    surrogates = Registry("surrogate")

    @surrogates
    def cispo(ratio, advantage, *, low: float | None = None, high: float = 4.0): ...

The key is the function's name, its keyword-only arguments are its options (type, default), the first line of its
docstring is its description. So a member is added by writing one function, and listings are never out of date.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from core.errors import UserError, nearest


class Registry(dict[str, Callable[..., Any]]):
    """Functions of one kind by name. Calling the registry registers; it works as a decorator."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.rstrip("_")  # a trailing underscore keeps clear of Python's own names
        if name in self:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self[name] = function
        return function

    def find(self, name: str, where: str) -> Callable[..., Any]:
        """The function called `name`; raises UserError with the nearest name. `where` is where it is written."""
        if name not in self:
            raise UserError(f"{where}: there is no {self.kind} '{name}'; {nearest(name, self)}")
        return self[name]

    def bind(self, name: str, options: Mapping[str, Any], where: str) -> Callable[..., Any]:
        """The function with its options filled in and checked; raises UserError for an unknown or ill-typed option."""
        function = self.find(name, where)
        return functools.partial(function, **check_options(function, options, where))

    def describe(self) -> list[tuple[str, str, str]]:
        """Rows (name, options, first line of the docstring), in order of registration."""
        return [(name, options_text(f), (inspect.getdoc(f) or "").split("\n")[0]) for name, f in self.items()]


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function: what a config may set."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def options_text(function: Callable[..., Any]) -> str:
    """Options with defaults, as a listing shows them: "low=0.2, high=0.2" ("name" alone where one is required)."""
    return ", ".join(
        name if p.default is p.empty else f"{name}={p.default}" for name, p in options_of(function).items()
    )


def check_options(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`options` checked against the annotations of `function`; raises UserError naming `where`.option."""
    allowed = options_of(function)
    for name in options:
        if name not in allowed:
            known = nearest(name, allowed) if allowed else "it takes no options"
            raise UserError(f"{where}.{name}: unknown option of '{_name(function)}'; {known}")
    try:
        # JSON mode: strict about types, yet a YAML list may fill a tuple.
        model = _options_model(function, where).model_validate_json(json.dumps(dict(options), default=str))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *map(str, first["loc"])])
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise UserError(f"{path}: {first['msg'].lower()}{got}; options: {options_text(function)}") from None
    return {name: getattr(model, name) for name in options}


def _options_model(function: Callable[..., Any], where: str) -> type[pydantic.BaseModel]:
    config = pydantic.ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    try:
        hints = _hints(function)
        fields: dict[str, Any] = {
            name: (hints.get(name, Any), ... if p.default is p.empty else p.default)
            for name, p in options_of(function).items()
        }
        return pydantic.create_model(f"{_name(function)}_options", __config__=config, **fields)
    except Exception as error:  # a user's annotation may say anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{where}: the types of the options of '{_name(function)}' cannot be read ({reason}); annotate what comes "
            "after the * with types that exist when the file runs, such as int, float, str, bool, list[str]"
        ) from None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The options' types. The inputs' are left alone: they may name what exists for a type checker only."""
    written = {name: p.annotation for name, p in options_of(function).items() if p.annotation is not p.empty}
    plain = inspect.unwrap(function)
    names = getattr(plain, "__globals__", None) or getattr(plain.__call__, "__globals__", {})
    return typing.get_type_hints(types.SimpleNamespace(__annotations__=written), names, include_extras=True)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__).rstrip("_")
