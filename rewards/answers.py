r"""Comparing two short answers without algebra: as text, as exact numbers, as words.

`compare` says True or False where it can know, and None where only algebra can tell. Units after a number and the
currency before it are ignored unless both have one and they differ, as is a percent sign (50\% is 50 as well as 0.5);
scales (5 million) are not, nor are digits: 3.14 is not pi.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

_DROP = re.compile(
    r"\\(?:left|right|displaystyle|limits|bigl|bigr|big)(?![a-zA-Z])|(?<!\\)\\[!,;: ]|\\\$|\$|~"
    r"|°|\^\s*\\circ(?![a-z])|\^\s*\{\s*\\circ\s*\}"
)
_FRAC = re.compile(r"\\[dtc]frac(?![a-z])")
_EMPTY_SET = re.compile(r"\\varnothing(?![a-z])|\\\{\s*\\\}")
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12
}  # fmt: skip
_SCALE = rf"(?:{'|'.join(_SCALES)})\b"
_SCALED = re.compile(rf"(.*[\d}}])((?:\s*{_SCALE})+)(?:\s+[A-Za-z. ]+)?")
_UNIT_MACRO = re.compile(
    rf"(?<=[\d}})])\s*\\(?:text|mbox|mathrm|textrm|operatorname)\s*\{{(?!\s*{_SCALE})[^{{}}]*\}}"
    r"(?:\s*\^\s*(?:\d|\{\s*\d\s*\}))?\s*$"
)
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|bf|rm)\s*\{([^{}]*)\}")
_SINGLE = re.compile(r"([_^])\s*\{\s*(\w)\s*\}")
_OUTER = re.compile(r"^(?:\\\(|\\\[|\*\*|`)\s*|\s*(?:\\\)|\\\]|\*\*|`|[.:;,]\s*)$")

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"[-+]?{_UNSIGNED}")
_FRACTION = re.compile(
    rf"([-+]?)(?:(\d+)(?:\s*(?=\\frac)|\s+(?=\d+\s*/)))?"  # a whole number before the fraction: 1\frac{4}{5}, 1 4/5
    rf"(?:\\frac\s*(?:\{{\s*([-+]?{_UNSIGNED})\s*\}}|(\d))\s*(?:\{{\s*([-+]?{_UNSIGNED})\s*\}}|(\d))"
    rf"|({_UNSIGNED})\s*/\s*({_UNSIGNED}))"
)
_SCIENTIFIC = re.compile(
    rf"([-+]?{_UNSIGNED})\s*(?:[eE]|(?:\\times|\\cdot|\*|×)\s*10\s*(?:\^|\*\*))\s*\{{?\s*([-+]?\d{{1,3}})\s*\}}?"
)
# Units that a right answer may differ by from a wrong one, each with its other names.
_UNITS = {
    name: unit[0]
    for unit in map(
        str.split,
        (
            "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
            "in inch inches", "ft foot feet", "yd yard", "mi mile", "s sec second", "min minute", "h hr hour", "day",
            "week", "month", "year", "mg", "g gram", "kg kilogram", "oz ounce", "lb pound", "cent", "dollar",
            "degree", "rad radian",
        ),
    )
    for name in unit
}  # fmt: skip
_UNIT = re.compile(r"[\d})]\s*(?:\\(?:text|mbox|mathrm|textrm)\s*\{)?[\s~]*([A-Za-z]+)[\s.}$]*")
# Words after a number are its unit, unless they do mathematics: "12 pears", "5 cm^2", but not "3 pi" or "2 or 3".
_UNIT_WORDS = re.compile(
    r"(?<=[\d})%])\s+(?!(?:pi|sqrt|sin|cos|tan|log|ln|exp|or|and|to|mod|over|times|plus|minus|of)\b)"
    r"[A-Za-z]{2,}[A-Za-z. ]*(?:\^?[23])?$"
)
_NOT_WORDS = re.compile(r"[\\=^_+*/<>{}\[\]|]")
_LOOKS_LIKE_WORDS = re.compile(r"[^\W\d_]{3}|\d:\d|\d(?:st|nd|rd|th)\b")
_BASED = re.compile(r"(\w+)_\{?(\d+)\}?")
_LIST = re.compile(r"(\\\{|[(\[]|)([^()\[\]]*,[^()\[\]]*?)(?:\\\}|[)\]]|)")
_PUNCTUATION = re.compile(r"(?!(?<!\w)-\d|(?<=\d)[.,]\d)[^\w\s:]")  # but signs, and points within numbers
_CHOICE = re.compile(r"\(?([A-Z])\)?")

# A number or a closed group, raised to a number, a sum of products of numbers, or a fraction of one. As a look-ahead,
# so that the powers of a tower are all found.
_POWER = re.compile(
    r"(?<!\d)(?=(?P<base>\d+)\s*(?P<group>[)}\]][)}\]\s]*)?(?P<hat>\^|\*\*)(?:[({\[\s]|\\frac)*[-+]?"
    r"(?P<exponent>\d+(?:\s*(?:\\cdot|\\times|[*+])\s*\d+)*))"
)
_BRACED = re.compile(r"[({]\s*(\d+)\s*[)}](?=\s*(?:\^|\*\*))")
_HUGE = re.compile(r"\d{4,}[)}\]\s]*!|![)}\]\s]*!|(?:binom|Gamma)[\s({]*\d{4,}|\d{400}")
_FUNCTIONS = re.compile(r"(?:\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp)[\s({]*){4}")
_UNFINISHED = re.compile(r"\\(?:sum|prod|int|lim)(?![a-z])")
DIGITS_LIMIT = 4000  # digits of a number that algebra is asked to work out
DEPTH_LIMIT = 16  # brackets within each other; in the benchmarks' answers they are 4 deep
TOWER_LIMIT = 3  # exponents within each other


def clean(answer: str) -> str:
    r"""An answer without decoration: dollars, \left, spacing, units after a number, \text around words, a final stop.

    >>> clean(r"$\dfrac{1}{2}\text{ cm}$."), clean(r"\text{(C)}")
    ('\\frac{1}{2}', '(C)')
    """
    text = _DROP.sub("", _OUTER.sub("", _OUTER.sub("", answer.strip())))
    text = _FRAC.sub(r"\\frac", text).replace("\\%", "%").replace("{,}", ",").replace("−", "-").strip()
    text = _TEXT_MACRO.sub(r"\1", _UNIT_MACRO.sub("", text))
    text = _EMPTY_SET.sub(r"\\emptyset", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(" .")


def compare(answer: str, right: str) -> bool | None:
    """Whether two answers are the same, or none where that takes algebra."""
    units = _unit(answer), _unit(right)
    answer, right = clean(answer), clean(right)
    if not answer or (None not in units and units[0] != units[1]):
        return False
    if _key(answer) == _key(right):
        return True
    numbers = number(answer), number(right)
    if numbers[0] is not None and numbers[1] is not None:
        rounded = "." in answer or "." in right
        return any(_close(a, b, rounded) for a, b in _readings(numbers[0], answer, numbers[1], right))
    if _unlike(_list(answer), _list(right)):
        return False
    choice, chosen = _CHOICE.fullmatch(right), _CHOICE.fullmatch(answer)
    if choice and chosen:
        return choice[1] == chosen[1]
    if _BASED.fullmatch(right) and _BASED.fullmatch(answer):
        return False  # 4343_6 and 4343_7: algebra would drop the base
    if numbers[1] is None and _is_words(right):
        return words(answer) == words(right)
    if numbers[1] is not None and _is_words(answer) and not re.search(r"\d", answer):
        return False
    return None


def _unit(answer: str) -> str | None:
    """The unit after the number, by its short name; none where it is none of those known, or there is none."""
    match = _UNIT.search(answer[-40:])
    word = match[1].casefold() if match and match.end() == len(answer[-40:]) else ""
    return _UNITS.get(word, _UNITS.get(word.removesuffix("s")))


def _key(text: str) -> str:
    return _SINGLE.sub(r"\1\2", text).replace(" ", "")


def _list(text: str) -> tuple[str, list[Fraction]] | None:
    """(opening bracket, numbers) of a list of plain numbers; none of anything else."""
    match = _LIST.fullmatch(text)
    values = [number(part.strip()) for part in match[2].split(",")] if match else []
    known = [value for value in values if value is not None]
    return (match[1], known) if match and len(known) == len(values) else None


def _unlike(given: tuple[str, list[Fraction]] | None, right: tuple[str, list[Fraction]] | None) -> bool:
    """What algebra overlooks: 1, 1, 2 is not 1, 2, 2, and a set is no pair."""
    if given is None or right is None:
        return False
    repeated = (
        set(given[1]) == set(right[1]) and len(given[1]) == len(right[1]) and sorted(given[1]) != sorted(right[1])
    )
    return repeated or (given[0] == r"\{" and right[0] == "(")


def _is_words(text: str) -> bool:
    """Prose, names, times of day, ratios, ordinals: nothing that algebra could read."""
    return not _NOT_WORDS.search(text) and _LOOKS_LIKE_WORDS.search(text) is not None


def number(text: str) -> Fraction | None:
    r"""The exact value of a cleaned number: 1,234.5, 3/4, \frac{3}{4}, 1\frac{4}{5}, 4.5e33, 50%, 12 pears, 5 million.

    >>> number("1,200"), number(r"-\frac{3}{6}"), number("2x")
    (Fraction(1200, 1), Fraction(-1, 2), None)
    """
    if len(text) > 300:
        return None
    if match := _SCALED.fullmatch(text):
        scaled = number(match[1])
        return None if scaled is None else scaled * math.prod(_SCALES[word] for word in match[2].split())
    text = _UNIT_WORDS.sub("", text).strip(" €£%") if not _PLAIN.fullmatch(text) else text
    if _PLAIN.fullmatch(text):
        return _exact(text)
    if match := _SCIENTIFIC.fullmatch(text):
        return _exact(match[1]) * Fraction(10) ** int(match[2])
    if match := _FRACTION.fullmatch(text):
        sign, whole, *parts = match.groups()
        above, below = (_exact(part) for part in parts if part)
        if below == 0:
            return None
        return (-1 if sign == "-" else 1) * (int(whole or 0) + above / below)
    return None


def _exact(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")


def _readings(a: Fraction, written_a: str, b: Fraction, written_b: str) -> list[tuple[Fraction, Fraction]]:
    """A percent sign may be meant or left out: 50% is 50 and 0.5. Pairs that may be equal."""
    pairs = [(a, b)]
    if ("%" in written_a) != ("%" in written_b):
        pairs.append((a / 100, b) if "%" in written_a else (a, b / 100))
    return pairs


def _close(a: Fraction, b: Fraction, rounded: bool) -> bool:
    """Equal; or, where one is written as a decimal, equal to six decimals, and to five digits where b is small."""
    return a == b or (rounded and abs(a - b) <= min(Fraction(1, 2_000_000), abs(b) / 100_000))


def words(text: str) -> str:
    """Words without case, punctuation and article: "The 60th caller." -> "60th caller"."""
    bare = _PUNCTUATION.sub("", text.casefold())
    return re.sub(r"^(?:the|a|an)\s+", "", re.sub(r"\s+", " ", bare).strip())


def too_complex(text: str) -> bool:
    r"""Whether working the text out is no one's idea of an answer: numbers of 4,000 digits (10^{10^{10}}, (9!)!), 16
    brackets or 3 exponents or functions within each other.

    An estimate from the written numbers: the last power is the innermost of a tower, so powers are replaced by their
    values from the right; exponents of groups are multiplied. What escapes it, the scoring process's deadline ends.
    """
    text = _BRACED.sub(r"\1", clean(text))
    if _HUGE.search(text) or _FUNCTIONS.search(text) or _depth(text) > DEPTH_LIMIT or _tower(text) > TOWER_LIMIT:
        return True
    group_exponents = 1
    while powers := list(_POWER.finditer(text)):
        last = powers[-1]
        if max(len(last["base"]), len(last["exponent"])) > DIGITS_LIMIT:
            return True
        base, exponent = int(last["base"]), _sum_of_products(last["exponent"])
        if last["group"]:
            group_exponents *= max(exponent, 1)
            text = f"{text[: last.start('hat')]} {text[last.end('exponent') :]}"
        else:
            if base > 1 and (exponent > 4 * DIGITS_LIMIT or exponent * math.log10(base) > DIGITS_LIMIT):
                return True
            text = f"{text[: last.start()]}{base**exponent}{text[last.end('exponent') :]}"
        if group_exponents > DIGITS_LIMIT:
            return True
    return False


def unfinished(answer: str, right: str) -> bool:
    """Whether the answer leaves a sum, product, integral or limit to the reader, and the right one does not."""
    return bool(_UNFINISHED.search(answer)) and not _UNFINISHED.search(right)


def _sum_of_products(text: str) -> int:
    products = (re.findall(r"\d+", product) for product in text.split("+"))
    return sum(math.prod(int(factor) for factor in factors) for factors in products)


def _tower(text: str) -> int:
    """How many exponents are within each other."""
    groups: list[bool] = []  # of each open bracket: whether it is an exponent
    deepest, text = 0, text.replace(" ", "")
    for before, character in zip(" " + text, text, strict=False):
        if character in "({[":
            groups.append(before == "^")
            deepest = max(deepest, sum(groups))
        elif character in ")}]" and groups:
            groups.pop()
    return deepest


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
