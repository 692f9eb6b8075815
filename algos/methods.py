"""The table of methods (signatures; being filled in)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A row of parts."""

    name: str

    @property
    def needs(self) -> frozenset[str]:
        """What the learner and the actors must supply (names of the vocabulary below).

        old: batch.old_logprobs. early_old: already for `advantages`; without it, a step that is a single update may
        leave old_logprobs None. rollout, ref, values: the fields of that name. entropy: batch.entropy, for
        `advantages`. entropy_grad: the argument `entropy` of `loss`. late: `late` must be called. demonstrations:
        train on given completions. components: rewards [B, R]. greedy, answers, token_scores, sum_pi_sq, baselines,
        bootstrap, versions, given: the fields of that name.
        """
        raise NotImplementedError


methods: dict[str, Method] = {}


def resolve(
    spec: str | Mapping[str, Any], where: str = "method", context: Mapping[str, float] | None = None
) -> Method:
    """The method of a spec: a row's name, {row: NAME, piece: choice, modifiers: [...]}, or pieces alone.

    `context` fills symbols of rows: {"max_tokens": longest completion}. Raises UserError with the nearest name.
    """
    raise NotImplementedError
