"""Numbers of a whole minibatch that a part reads token by token. Whatever needs them has a companion that makes them:

    @prepares(surrogates["kl_cov"])
    def kl_cov_tokens_of_batch(logprobs, advantages, mask, *, fraction): return {"selected": ...}

A companion reads detached current log-probabilities of all rows of a minibatch, so its part is late. It takes those of
its part's options that it names (with **options: all) and returns fields of the batch. So the loss does not depend on
the split into micro-batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from algos.parts import Part
from core.registry import options_of

Companion = Callable[..., dict[str, Any]]

companions: dict[Callable[..., Any], Companion] = {}


def prepares(function: Callable[..., Any]) -> Callable[[Companion], Companion]:
    """Register the companion of a part's function; works as a decorator."""

    def register(companion: Companion) -> Companion:
        companions[function] = companion
        return companion

    return register


def companion(part: Part | None) -> Part | None:
    """The companion of a part, with the part's options; None if it has none."""
    function = companions.get(part.function) if part else None
    if part is None or function is None:
        return None
    parameters = inspect.signature(function).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    chosen = [name for name in options_of(part.function) if everything or name in parameters]
    return Part(part.name, function, {name: part.option(name) for name in chosen})
