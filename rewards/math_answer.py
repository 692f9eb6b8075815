r"""Is the answer right? THE check of mathematics, for training and for evaluation alike.

    grade("... so it is \boxed{\frac{1}{2}}.", "0.5")  ->  Score("ok", 1.0)

1. Cut the text to what follows the last </think>.
2. Extract: the last \boxed{...}; else what follows the last ####; else, with `extract: any`, the last number.
   Boxes with nothing but punctuation between them are one listing, hence one answer that is a list: naming many
   candidates earns only where the right answer is that list.
3. Compare as text, as exact numbers, as words (`rewards.answers`): this decides nearly all answers in microseconds.
4. Else math-verify compares the two as expressions, sets, intervals, equations. It loads sympy, takes milliseconds, and
   on hostile input can run for ever inside C code, where no alarm reaches it. So answers that cannot be meant are
   refused first (length, nesting, towers of powers, large factorials), and rewards run where a process can be killed.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any, Literal

from core.schema import Score
from rewards.answers import clean, compare, number, too_complex, unfinished
from rewards.reward import Column, rewards

Extract = Literal["boxed", "marked", "any"]
"""Where an answer may stand: in a box; also after ####; also as the last number of the text."""

ANSWER_LIMIT = 300  # characters; longer answers are refused (unless the right one is longer)
_TAIL = 300  # characters in which the last number is looked for
_ANSWER_TAIL = 5000  # characters in which the final answer is looked for where nobody can kill the search

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"(?:[\s,;.$&]|\\[()\[\],;!:]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b)*")
_LAST_NUMBER = re.compile(r"(?<![\w.^{])[-+]?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")


@rewards
def math_answer(
    completion: str, *, gold_column: Column = "answer", extract: Extract = "marked", **columns: Any
) -> Score:
    r"""1 if the last \boxed{} (or `####`) answer equals the right one in `gold_column`, else 0.

    extract: boxed takes boxes only, marked also what follows `####`, any also the last number of the text.
    Abstains where the row has no right answer, or one that cannot be compared with.
    """
    return grade(completion, columns.get(gold_column), extract=extract)


def grade(completion: str, gold: object, *, extract: Extract = "marked") -> Score:
    r"""ok 1 or 0; abstain when the right answer is missing or unusable. `gold`: a string, int or float.

    A gold may be a whole solution: then its last box, or what follows its ####, counts. Raises nothing; runs in
    microseconds to milliseconds, but is to be called where it can be killed when completions are not trusted.
    """
    right = _gold(gold)
    if right is None:
        return Score("abstain", detail=f"no right answer: {type(gold).__name__} {str(gold)[:60]!r}")
    answer = extract_answer(completion, extract)
    if answer is None:
        return Score("ok", 0.0, "no answer found")
    if len(answer) > max(ANSWER_LIMIT, 2 * len(right)):
        return Score("ok", 0.0, "answer too long to be one")
    equal = compare(answer, right)
    if equal is None and too_complex(answer):
        return Score("ok", 0.0, "answer too complex to be one")
    if equal is None and unfinished(answer, right):
        return Score("ok", 0.0, "answer left to be worked out")
    return _verify(answer, right) if equal is None else Score("ok", float(equal))


def extract_answer(text: str, extract: Extract = "marked") -> str | None:
    """The answer a completion commits to, or none."""
    text = after_thinking(text)
    if _BOX.search(text):
        return boxed_answer(text)
    if extract != "boxed" and "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip() or None
    if extract == "any":
        return last_number(text)
    return None


def final_answer(text: str) -> str:
    r"""The answer of a completion, in the one form of equal answers, as text or number; "" where there is none.

    >>> final_answer(r"so it is \boxed{1{,}000}."), final_answer("I do not know")
    ('1000', '')
    """
    answer = clean(extract_answer(text[-_ANSWER_TAIL:]) or "")
    value = number(answer)
    return answer if value is None else str(value)


def after_thinking(text: str) -> str:
    """What follows the last </think>; everything where there is none."""
    return text.rpartition("</think>")[2]


def boxed_answer(text: str) -> str | None:
    r"""The last box; together with the boxes that precede it without words between, as "a, b, c".

    >>> boxed_answer(r"\boxed{1} is wrong, it is \boxed{2}."), boxed_answer(r"\boxed{1}, \boxed{2}")
    ('2', '1, 2')
    """
    boxes = _boxes(text)
    if not boxes or boxes[-1][1] < 0:
        return None
    answers: dict[str, str] = {}  # by cleaned form: the same answer twice is one answer
    after = None  # start of the box that follows
    for start, end in reversed(boxes):
        if end < 0 or len(answers) > 50:
            break
        if after is None or after > end:  # else a box inside this one counts in its place
            if after is not None and not _BETWEEN_BOXES.fullmatch(text, end + 1, after):
                break
            content = text[text.index("{", start) + 1 : end].strip()
            if content:
                answers.setdefault(clean(content) if len(content) <= ANSWER_LIMIT else content, content)
        after = start
    return ", ".join(reversed(answers.values())) or None


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} with balanced braces; none if there is none or it is never closed."""
    boxes = _boxes(text)
    if not boxes or boxes[-1][1] < 0:
        return None
    start, end = boxes[-1]
    return text[text.index("{", start) + 1 : end]


def _boxes(text: str) -> list[tuple[int, int]]:
    """(start, position of the closing brace or -1) of every box, in order of start; linear in the text."""
    boxes: list[tuple[int, int]] = []
    open_braces: list[int] = []  # index into boxes, or -1 for a plain brace
    first = _BOX.search(text)
    for match in _BRACE.finditer(text, first.start()) if first else ():
        if match[0] == "}":
            box = open_braces.pop() if open_braces else -1
            if box >= 0:
                boxes[box] = (boxes[box][0], match.start())
        elif match[0] == "{":
            open_braces.append(-1)
        elif match[0].endswith("{") and len(match[0]) > 2:
            open_braces.append(len(boxes))
            boxes.append((match.start(), -1))
    return boxes


def last_number(text: str) -> str | None:
    """The last number of the last 300 characters, with sign, thousands commas, fraction and percent sign."""
    numbers = _LAST_NUMBER.findall(text[-_TAIL:])
    return numbers[-1] if numbers else None


def _gold(gold: object) -> str | None:
    """The right answer as a string; none if the row has none."""
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        return None
    text = str(gold)
    marked = extract_answer(text, "marked")
    return (text if marked is None else marked).strip() or None


def _verify(answer: str, right: str) -> Score:
    """The comparison of expressions by math-verify."""
    expected = _parse(clean(right))
    if all(isinstance(part, str) for part in expected):
        return Score("abstain", detail=f"the right answer {right[:60]!r} is no expression that math-verify can read")
    from math_verify import verify

    given = _parse(clean(answer))
    # 1 < x < 2 is the interval (1, 2), whichever of the two the data happens to use.
    equal = verify(list(expected), list(given), allow_set_relation_comp=True, timeout_seconds=None)
    return Score("ok", float(equal))


@functools.lru_cache(maxsize=512)
def _parse(latex: str) -> tuple[Any, ...]:
    """Expressions read from the inside of a box, the text itself last; alone when it cannot be read."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own alarms are off, as they must be
    boxed = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    return tuple(parse(f"\\boxed{{{latex}}}", boxed, parsing_timeout=None)) or (latex,)


def _prepare() -> None:
    """Load sympy and math-verify, and the grammar that the first parse builds."""
    _parse("1")


math_answer.prepare = _prepare  # type: ignore[attr-defined]
