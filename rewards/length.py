"""Rewards for the length of a completion, in tokens with the end-of-sequence token.

A length reward that also pays wrong answers teaches the policy to fail briefly. So those that depend on correctness
here (`cosine_length`, `l1_exact`, `l1_max`, `kimi_length`, `traac_length`) ask `math_answer.grade` themselves, and
abstain where it does; the others go beside `math_answer` with a small weight. `gold_column` names the one that holds
the right answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from core.errors import nearest
from rewards import length_rules
from rewards.math_answer import Extract, grade
from rewards.reward import Column, rewards
from rewards.templates import text_of

Tokens = Annotated[int, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]


@rewards
def tokens(completion_ids: Sequence[int], *, per: Tokens = 1) -> float:
    """The number of tokens, divided by `per`: a measure for a constrained policy to keep below a ceiling, no reward."""
    return len(completion_ids) / per


@rewards
def length(completion_ids: Sequence[int], *, target: Tokens, alpha: Amount | None = None) -> float:
    """-alpha * |target - tokens|: 0 at the target; alpha none is 1 / target, so -1 at none and at twice as many tokens.

    Beside `math_answer` this is L1's exact mode, 1[correct] - alpha * |target - tokens|, there with alpha 0.0003.
    Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks", https://arxiv.org/abs/2503.04697
    """
    return -(1 / target if alpha is None else alpha) * abs(target - len(completion_ids))


@rewards
def soft_overlong(completion_ids: Sequence[int], *, max_len: Tokens, cache: Tokens, factor: Amount = 1.0) -> float:
    """0 up to max_len - cache tokens, then falling linearly to -factor at max_len, -factor beyond.

    Yu et al., "DAPO", https://arxiv.org/abs/2503.14476, equation 13 (there factor = 1).
    """
    over = len(completion_ids) - (max_len - cache)
    return -factor * min(1.0, max(0.0, over / cache))


@rewards
def cosine_length(
    completion: str,
    completion_ids: Sequence[int],
    *,
    max_len: Tokens,
    min_wrong: float = -1.0,
    max_wrong: float = -0.5,
    min_correct: float = 0.5,
    max_correct: float = 1.0,
    gold_column: Column = "answer",
    extract: Extract = "marked",
    **columns: Any,
) -> float | None:
    """Correct: from max_correct when short to min_correct at max_len tokens. Wrong: from min_wrong up to max_wrong.

    low + (high - low) / 2 * (1 + cos(pi * min(1, tokens / max_len))).
    Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", https://arxiv.org/abs/2502.03373
    """
    correct = _correct(completion, columns.get(gold_column), extract)
    if correct is None:
        return None
    # Wrong answers run the other way round: the longer the better, since more thought may be what is lacking.
    short, long = (max_correct, min_correct) if correct else (min_wrong, max_wrong)
    return long + (short - long) / 2 * (1 + math.cos(math.pi * min(1.0, len(completion_ids) / max_len)))


@rewards
def l1_exact(
    completion: str,
    completion_ids: Sequence[int],
    *,
    target: Tokens | Column,
    alpha: Amount = 0.0003,
    gold_column: Column = "answer",
    extract: Extract = "marked",
    **columns: Any,
) -> float | None:
    """1[correct] - alpha * |target - tokens|; target: a number of tokens, or the column that holds each prompt's.

    Aggarwal and Welleck, "L1: Controlling How Long A Reasoning Model Thinks", https://arxiv.org/abs/2503.04697. There
    the prompt says the target ("Think for 1024 tokens"), another for each prompt.
    """
    if isinstance(target, str) and target not in columns:
        raise LookupError(f"the data has no column '{target}'; {nearest(target, columns)}")
    wanted = float(columns[target]) if isinstance(target, str) else target
    correct = _correct(completion, columns.get(gold_column), extract)
    return None if correct is None else length_rules.l1_exact(correct, len(completion_ids), wanted, alpha=alpha)


@rewards
def l1_max(
    completion: str,
    completion_ids: Sequence[int],
    *,
    budget: Tokens,
    alpha: Amount = 0.01,
    delta: float = 0.5,
    gold_column: Column = "answer",
    extract: Extract = "marked",
    **columns: Any,
) -> float | None:
    """1[correct] * clip(alpha * (budget - tokens) + delta, 0, 1): stay below the budget, no reward for being wrong.

    Aggarwal and Welleck, https://arxiv.org/abs/2503.04697, "L1-Max" (their released code has half the slope).
    """
    correct = _correct(completion, columns.get(gold_column), extract)
    if correct is None:
        return None
    return correct * min(1.0, max(0.0, alpha * (budget - len(completion_ids)) + delta))


@rewards
def kimi_length(
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    gold_column: Column = "answer",
    extract: Extract = "marked",
    **columns: Any,
) -> list[float | None]:
    """1/2 - (tokens - shortest) / (longest - shortest) within the group; wrong ones get at most 0; all equal: 0.

    Kimi Team, "Kimi k1.5", https://arxiv.org/abs/2501.12599, section 2.3.3.
    """
    lengths = [len(ids) for ids in completion_ids]
    shortest, spread = min(lengths, default=0), max(lengths, default=0) - min(lengths, default=0)
    golds = columns.get(gold_column) or [None] * len(lengths)
    values: list[float | None] = []
    for text, right, tokens in zip(completions, golds, lengths, strict=True):
        correct = _correct(text_of(text), right, extract)
        place = 0.5 - (tokens - shortest) / spread if spread else 0.0
        values.append(None if correct is None else place if correct else min(0.0, place))
    return values


@rewards
class traac_length:
    """d * max(linear, sigmoid) for a right answer, by the lengths of earlier right ones of its source and difficulty.

    d is 1, 0.75 or 0.5 by the group's pass rate (0.8 easy, 0.3 medium). Wrong answers and the first step get 0. Without
    `source_column` all prompts are one source. In TRAAC, arXiv 2510.01581, the total is 4 correct + 0.5 format + this.
    State: the lengths, of `window` steps.
    """

    def __init__(
        self,
        *,
        gold_column: Column = "answer",
        extract: Extract = "marked",
        source_column: str | None = None,
        window: Annotated[int, Field(gt=0)] = 10,
    ) -> None:
        self.gold_column, self.extract, self.source_column = gold_column, extract, source_column
        self.reads = () if source_column is None else (source_column,)
        self.past = length_rules.TraacLengths(window=window)
        self.step: int | None = None
        self.now: list[tuple[str, float, float]] = []  # this step's right ones: source, pass rate, tokens

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        step: int,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """The rewards of one prompt's completions; groups of one step do not see each other."""
        if step != self.step:
            if self.step is not None:
                self.past.add(self.now)
            self.step, self.now = step, []
        golds = columns.get(self.gold_column) or [None] * len(completions)
        correct = [_correct(text_of(c), gold, self.extract) for c, gold in zip(completions, golds, strict=True)]
        known = [right for right in correct if right is not None]
        if not known:
            return [None] * len(completions)
        source, pass_rate = self._source(columns), fmean(known)
        lengths = [len(ids) for ids in completion_ids]
        self.now += [(source, pass_rate, float(n)) for n, right in zip(lengths, correct, strict=True) if right]
        return [
            None if right is None else self.past.reward(tokens, right, source, pass_rate)
            for tokens, right in zip(lengths, correct, strict=True)
        ]

    def _source(self, columns: Mapping[str, Sequence[Any]]) -> str:
        if self.source_column is None:
            return ""
        if self.source_column not in columns:
            raise LookupError(f"the data has no column '{self.source_column}'; {nearest(self.source_column, columns)}")
        return str(columns[self.source_column][0])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "now": [list(row) for row in self.now], "past": self.past.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.now = [(source, pass_rate, tokens) for source, pass_rate, tokens in state["now"]]
        self.past.load_state_dict(state["past"])


@rewards
class conciseness:
    """1 if the completion is shorter than the mean length of all so far, its own group included, else 0.

    Right or wrong, so weigh it against correctness. "Learning to Optimize Multi-Objective Alignment Through Dynamic
    Reward Weighting", https://arxiv.org/abs/2509.11452. State: that mean and its count.
    """

    def __init__(self) -> None:
        self._rule = length_rules.Conciseness()
        self.state_dict = self._rule.state_dict
        self.load_state_dict = self._rule.load_state_dict

    def __call__(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return self._rule([len(ids) for ids in completion_ids])


def _correct(completion: str, gold: object, extract: Extract) -> bool | None:
    """Whether the answer is right; none where that cannot be known."""
    score = grade(completion, gold, extract=extract)
    return bool(score.value) if score.status == "ok" else None
