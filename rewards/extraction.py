"""Answers as other libraries extract them, for comparisons with their numbers. `math_answer.extract_answer` is ours.

[code: verl 0.9, open-instruct]
"""

from __future__ import annotations

import re

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_RUN = re.compile(r"-?[0-9.,]+")
_NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+)")


def gsm8k_strict(text: str, *, tail: int = 300) -> str | None:
    """The number after the last "#### " of the last `tail` characters, commas removed; none if there is none.

    >>> gsm8k_strict("so 3 + 4 = 7. #### 1,234"), gsm8k_strict("#### $5"), gsm8k_strict("####6")
    ('1234', None, None)
    """
    found = _STRICT.findall(text[-tail:])
    return found[-1].replace(",", "") if found else None


def gsm8k_flexible(text: str, *, tail: int = 300) -> str | None:
    """The last run of digits, points and commas of the last `tail` characters that is more than a point; none if none.

    As written, so "12." and "1,234" want a clean-up before they are compared.

    >>> gsm8k_flexible("it costs $1,234."), gsm8k_flexible("no number")
    ('1,234.', None)
    """
    return next((run for run in reversed(_RUN.findall(text[-tail:])) if run != "."), None)


def last_number(text: str) -> str | None:
    """The last number, with its sign, after commas between digits are removed; none if there is none.

    Beware of "7 - 2 = 5" and of units after the number. As in open-instruct, a comma goes with the digits around it, so
    of "1,2,3" only the first comma does.

    >>> last_number("1,000,000 people"), last_number("-3 and +4")
    ('1000000', '+4')
    """
    found = _NUMBER.findall(re.sub(r"(\d),(\d)", r"\1\2", text))
    return found[-1] if found else None
