"""A part: a registered function with its options, called with the fields of a batch that its parameters name.

    @surrogates
    def reinforce(logprobs, advantages): ...

The positional parameters say what the part reads, so what a method needs from the learner is read off its parts;
the keyword-only parameters are its config.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from algos.batch import Batch

Length = float | Literal["max_tokens"]
"""A number of tokens; "max_tokens" is the longest completion of the run, filled in by `methods.resolve`."""


def tokens(length: Length) -> float:
    """The number; raises ValueError for "max_tokens", which only a run can fill in."""
    if length == "max_tokens":
        raise ValueError("max_tokens is not known here: give resolve(..., context={'max_tokens': N})")
    return length


@dataclass(frozen=True)
class Part:
    """One choice of one piece of a method."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that it reads."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)

    def option(self, name: str, missing: Any = None) -> Any:
        """An option's value, set or default; `missing` if the part has no such option."""
        parameter = inspect.signature(self.function).parameters.get(name)
        return self.options.get(name, missing if parameter is None else parameter.default)

    def __call__(self, batch: Batch, **given: Any) -> Any:
        """Call it on fields of `batch`; `given` goes before. Raises ValueError when a field is missing."""
        read = {name: given[name] if name in given else getattr(batch, name, None) for name in self.inputs}
        absent = [name for name, value in read.items() if value is None]
        if absent:
            raise ValueError(f"part '{self.name}' reads {', '.join(absent)}, which this batch does not carry")
        return self.function(**read, **self.options)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={_short(value)}" for name, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def supply(function: Callable[..., Any], available: Mapping[str, Any]) -> Any:
    """Call `function` with those of the `available` values that its parameters name."""
    return function(**{name: available[name] for name in inspect.signature(function).parameters})


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
