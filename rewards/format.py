"""Rewards for the form of a completion: a box, thinking tags, a pattern.

They are gamed at once by empty form (an empty box, empty thinking), so keep their weight at or below 0.2 of the
answer's, and stop paying when more than 95 % of the completions earn them.
"""

from __future__ import annotations

import re
from typing import Literal

from rewards.math_answer import after_thinking, last_boxed
from rewards.reward import rewards

_THINK = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*", re.DOTALL)
_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


@rewards
def boxed(completion: str) -> float:
    r"""1 if there is a closed, non-empty \boxed{...} after the thinking, else 0."""
    return float(bool((last_boxed(after_thinking(completion)) or "").strip()))


@rewards
def think_format(completion: str) -> float:
    """1 if the text starts with `<think>`, has no second one, and closes it with `</think>`; else 0.

    The same condition as TRL's `think_format_reward`.
    """
    # The look-ahead is quadratic only where "<think>" repeats; the count keeps hostile text out of it.
    return float(completion.count("<think>") == 1 and _THINK.fullmatch(completion) is not None)


@rewards
def tag_count(completion: str) -> float:
    """0.25 for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs exactly once, on a line of its own.

    As in open-r1's `tag_count_reward`: the first needs no line break before it, the last none after.
    """
    return sum(0.25 for tag in _TAGS if completion.count(tag) == 1)


@rewards
def regex(completion: str, *, pattern: re.Pattern[str], whole: bool = False) -> float:
    """1 if `pattern` (Python syntax) is found in the text, else 0; `whole` asks that it covers all of it."""
    return float((pattern.fullmatch(completion) if whole else pattern.search(completion)) is not None)


_FORMS = {"boxed": boxed, "think": think_format, "tags": tag_count}


@rewards
def format_(completion: str, *, form: Literal["boxed", "think", "tags"] = "boxed") -> float:
    """One of the forms by name: `boxed`, `think` (think_format) or `tags` (tag_count)."""
    return _FORMS[form](completion)
