"""Answers that are letters: the options that a completion chose, of one or of several right ones."""

from __future__ import annotations

import re
from typing import Any, Literal

from core.schema import Score
from rewards import soft_credit
from rewards.answers import clean, compare
from rewards.math_answer import after_thinking, extract_answer
from rewards.reward import Column, rewards

Where = Literal["boxed", "marked", "tag", "whole"]
"""Where the choice stands: in a box; also after ####; inside the last <answer> tag; or it is all that is said."""

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BRACKETS = re.compile(r"[()\[\]{}]")


@rewards
def soft_multichoice(
    completion: str, *, gold_column: Column = "answer", extract: Where = "marked", **columns: Any
) -> Score:
    """Share of the right options that were chosen, 0 as soon as a wrong one is among them; "A,C" or "(A), (C)".

    Case matters. Abstains where the row has no right options. TW-GRPO, https://arxiv.org/abs/2505.24718; there, as
    here, an answer that is the right one as mathematics counts 1, and the format reward is added beside.
    """
    gold = columns.get(gold_column)
    right = ",".join(map(str, gold)) if isinstance(gold, list) else str(gold or "")
    if not right.strip():
        return Score("abstain", detail=f"no right options: {type(gold).__name__} {str(gold)[:60]!r}")
    answer = clean(_chosen(completion, extract) or "")
    if answer and compare(answer, clean(right)):
        return Score("ok", 1.0)
    return Score("ok", soft_credit.soft_multichoice(_BRACKETS.sub("", answer), _BRACKETS.sub("", right)))


def _chosen(completion: str, extract: Where) -> str | None:
    text = after_thinking(completion)
    if extract == "whole":
        return text
    if extract == "tag":
        found = _TAG.findall(text)
        return found[-1] if found else None
    return extract_answer(text, extract)
