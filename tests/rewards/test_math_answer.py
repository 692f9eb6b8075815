"""The answer check: right, wrong and hostile answers, each decided within a bounded time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.answers import number, too_complex
from rewards.math_answer import boxed_answer, extract_answer, grade, last_boxed, last_number

RIGHT = [
    # (inside the box, right answer)
    ("72", "72"),
    ("72.0", "72"),
    (r"\$72", "72"),
    ("$72$", "72"),
    (" 1,234 ", "1234"),
    ("1{,}234", "1234"),
    ("007", "7"),
    ("-5", "−5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"1\frac{4}{5}", "9/5"),
    ("14/5", "2.8"),
    ("0.333333", r"\frac{1}{3}"),
    (r"50\%", "50"),
    (r"50\%", r"\frac{1}{2}"),
    (r"4.5 \times 10^{3}", "4500"),
    ("12 pears", "12"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"15\mbox{ cm}^2", "15"),
    ("90", r"90^\circ"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("-5i+6", "6 - 5i"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=3+2x", "y = 2x + 3"),
    ("-2, 1", "1,-2"),
    (r"\{2,1\}", "1, 2"),
    (r"5 \pm 2", "3, 7"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"(2,\infty)", "x > 2"),
    ("1 < x < 2", "(1,2)"),
    (r"\begin{pmatrix} 1 \\ 3/2 \end{pmatrix}", r"\begin{pmatrix}1\\1.5\end{pmatrix}"),
    (r"\text{evelyn}", r"\text{Evelyn}"),
    ("C", r"\text{(C)}"),
    ("the 60th caller", "The 60th caller."),
    ("12:50", "12:50"),
    ("4343_{6}", "4343_6"),
    (".5", "0.5"),
    ("9:30 PM", "9:30 p.m."),
    ("1, 2, 2", "2, 1, 2"),
    (r"\varnothing", r"\emptyset"),
    (r"5 \text{ million}", "5,000,000"),
    ("1.2 million dollars", "1200000"),
    ("2 dozen eggs", "24"),
    ("2 hr", r"2 \text{ hours}"),
    (r"12\text{ inches}", "12 in."),
    (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^nk"),
]
WRONG = [
    ("71", "72"),
    ("3.14", r"\pi"),
    ("0.33", r"\frac{1}{3}"),
    ("1e-8", "1.24e-8"),
    ("1234568", "1234567.0"),
    ("2x", "2"),
    ("3 pi", "3"),
    ("(2,1)", "(1,2)"),
    (r"[2,\infty)", r"(2,\infty)"),
    (r"-\infty", r"\infty"),
    ("x > 5", "5"),
    (r"x \ne 5", "5"),
    (r"\pm 5", "5"),
    ("2 or 3", "3"),
    ("1, 2, 3", "2"),
    ("5 6", "6"),
    ("4343_7", "4343_6"),
    ("D", r"\text{(C)}"),
    ("purple", "red"),
    ("purple", "5"),
    ("10:12", "5:6"),
    ("The answer is 5", "5"),
    ("", "5"),
    (".5", "5"),
    ("5 million", "5"),
    (r"7 \text{ thousand dollars}", "7"),
    ("2 dozen", "2"),
    (r"12 \text{ cm}", r"12 \text{ m}"),
    ("5 dollars", "5 cents"),
    ("1, 1, 2", "1, 2, 2"),
    (r"\{1, 2\}", "(1, 2)"),
    ("-3:4", "3:4"),
    ("15:2", "1.5:2"),
    (r"\sum_{k=1}^{3} k", "6"),  # left to the reader
]
HOSTILE = [
    r"10^{10^{10}}",
    "10**10**10",
    r"5^{5^{5^{5^{5}}}}",
    r"\frac{5^{5^{5^5}}}{5^{5^{5^5}}}",
    r"(((9^{99})^{99})^{99})^{99}",
    "99999999!",
    "((9!)!)!",
    r"\binom{100000000}{50000000}",
    r"2^{999999999}",
    "1e999999999",
    r"\frac{1}{0}",
    r"\sum_{i=1}^{10000000} \sin(i)",
    r"\sum_{n=1}^{3000} n!",
    r"\int_0^1 e^{x^2} \sin(x^3) \log(x+1) dx",
    r"{10}^{{10}^{{10}}}",
    r"10^{10 \cdot 10^{9}}",
    "10^{1000+1000+9999999}",
    r"3^{\frac{9999999999}{7}}",
    "e^{e^{e^{e^{e}}}}",
    r"\Gamma(99999999)",
    r"\sin(\cos(\tan(\sin(\cos(\tan(1))))))",
    r"\frac{1}{1+" * 24 + "1" + "}" * 24,
    "9" * 299,
    "9" * 100_000,
    "(" * 299,
    r"\{" * 149,
    "1+" * 149 + "1",
    "1" + " " * 100_000 + "2",
    r"\sqrt{" * 40 + "2" + "}" * 40,
    "٣",  # Arabic three
    "\ud800",  # half of a surrogate pair
]


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_a_right_answer_earns_one_in_whatever_form(answer: str, gold: str) -> None:
    assert grade(rf"So the answer is \boxed{{{answer}}}.", gold).value == 1.0


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_a_wrong_answer_earns_nothing(answer: str, gold: str) -> None:
    score = grade(rf"So the answer is \boxed{{{answer}}}.", gold)
    assert (score.status, score.value) == ("ok", 0.0)


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_within_seconds(answer: str) -> None:
    grade(r"\boxed{x+1}", "x+2")  # the import of sympy is not what is timed
    started = time.perf_counter()
    score = grade(rf"\boxed{{{answer}}}", "5")
    assert (score.status, score.value) == ("ok", 0.0)
    assert time.perf_counter() - started < 10.0


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 15_000,
        r"\boxed{" * 12_000 + "}" * 12_000,
        r"\boxed{1} " * 10_000,
        "".join(rf"\boxed{{{i}}}, " for i in range(10_000)),
        "{" * 100_000 + r"\boxed{4}",
        "#" * 100_000,
        "#### 1\n" * 15_000,
        "</think>" * 12_000,
        "\\" * 100_000,
        "-.,1" * 25_000,
        "\ud800" * 100_000,
    ],
    ids=range(11),
)
def test_long_completions_are_read_within_seconds(text: str) -> None:
    started = time.perf_counter()
    assert grade(text, "5", extract="any").value == 0.0
    assert time.perf_counter() - started < 10.0


@pytest.mark.parametrize(
    ("text", "gold", "earned"),
    [
        (r"It is \boxed{1}. No, wait: it is \boxed{2}.", "2", 1.0),  # the last box counts ...
        (r"It is \boxed{2}. No, wait: it is \boxed{1}.", "2", 0.0),
        (r"\boxed{1}, \boxed{2}, \boxed{3}", "3", 0.0),  # ... but a listing names no answer
        (r"\boxed{1} or \boxed{3}", "3", 0.0),
        (r"$\boxed{1}$ $\boxed{3}$", "3", 0.0),
        (r"$\boxed{1}$ and $\boxed{-2}$", "-2, 1", 1.0),  # except where the answer is that list
        (r"\boxed{3} \boxed{3.} \boxed{3}", "3", 1.0),  # the same answer again is one answer
        (r"\boxed{\boxed{3}}", "3", 1.0),
        (r"\boxed{1} \boxed{3", "1", 0.0),  # cut off: the answer was not given
        (r"\boxed{3}</think> So \boxed{4}", "4", 1.0),
        (r"<think>\boxed{4}</think> So \boxed{3}", "4", 0.0),
        (r"\boxed{5} </think> I do not know", "5", 0.0),
        (r"\fbox{3}", "3", 1.0),
    ],
)
def test_the_last_box_after_the_thinking_counts_and_listings_do_not(text: str, gold: str, earned: float) -> None:
    assert grade(text, gold).value == earned


@pytest.mark.parametrize(
    ("text", "boxed", "marked", "last"),
    [
        (r"\boxed{3} and then 4", "3", "3", "3"),
        ("so 3 + 4 = 7.\n#### 7", None, "7", "7"),
        ("#### 1,234\n\nDone 5", None, "1,234", "1,234"),
        ("#### 3 then\n#### $4", None, "$4", "$4"),
        ("7 - 2 = 5", None, None, "5"),
        ("it falls to -3", None, None, "-3"),
        ("the total is $1,234.50.", None, None, "$1,234.50"),
        ("x-3", None, None, "3"),
        ("no number", None, None, None),
        (r"unclosed \boxed{3", None, None, None),
    ],
)
def test_where_an_answer_may_stand(text: str, boxed: str | None, marked: str | None, last: str | None) -> None:
    assert [extract_answer(text, how) for how in ("boxed", "marked", "any")] == [boxed, marked, last]


def test_the_last_number_is_looked_for_at_the_end_only() -> None:
    assert last_number("9" + "x" * 300) is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a_{b}} tail }", "a_{b}"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\boxed{3", None),
    ],
)
def test_boxes_end_at_their_own_brace(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


def test_a_run_of_more_boxes_than_any_answer_has_is_cut() -> None:
    assert len((boxed_answer("".join(rf"\boxed{{{i}}}" for i in range(1000))) or "").split(",")) < 60


def test_too_complex_works_out_powers_from_the_inside() -> None:
    assert not too_complex("2^{3^{4}}")  # 2^81
    assert not too_complex("2017^{1000}")  # 3305 digits
    assert too_complex("2017^{2000}")  # 6610 digits
    assert not too_complex("x^{100000} + (x+3^2)^{50}")
    assert not too_complex("2^{1005+1006}")  # 2^2011, 606 digits
    assert too_complex(r"2^{1005 \cdot 1006}")  # 2^1011030
    assert not too_complex("e^{x^{y^{z}}}") and too_complex("e^{x^{y^{z^{w}}}}")


def test_exact_numbers() -> None:
    assert number("1 4/5") == number(r"\frac{9}{5}") and number("14/5") == number("2.8")
    assert number("1/0") is None and number("2x") is None and number("1e9999") is None


@pytest.mark.parametrize("gold", [None, "", "  ", [], {}, True, "$$"])
def test_without_a_right_answer_it_abstains(gold: object) -> None:
    assert grade(r"\boxed{5}", gold).status == "abstain"


def test_a_right_answer_that_cannot_be_read_abstains_unless_met_literally() -> None:
    gold = r"\text{if }\div"
    assert grade(r"\boxed{5}", gold).status == "abstain"
    assert grade(rf"\boxed{{{gold}}}", gold).value == 1.0


@pytest.mark.parametrize("gold", [72, 72.0, "She sold 48/2 = 24.\n#### 72", r"... so \boxed{72}."])
def test_the_right_answer_may_be_a_number_or_a_whole_solution(gold: object) -> None:
    assert grade(r"\boxed{72}", gold).value == 1.0


def test_easy_answers_need_no_algebra_and_well_below_a_millisecond() -> None:
    code = r"""
import sys, time
from rewards.math_answer import grade
def best(text, gold):
    times = []
    for _ in range(200):
        start = time.perf_counter(); grade(text, gold); times.append(time.perf_counter() - start)
    return min(times)
assert best(r"48 / 2 = 24. 48 + 24 = 72. The answer is \boxed{72}.", "72") < 5e-4
assert best(r"48 / 2 = 24. 48 + 24 = 72. The answer is \boxed{71}.", "72") < 5e-4
assert best("#### 1,200", "1200") < 5e-4
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


ODD = [
    r"\left( 3, \frac{\pi}{2} \right)",
    r"(-\infty, 2) \cup (3, \infty)",
    r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
    r"\{1\pm\sqrt{5},-2\}",
    r"$m n-\lfloor m / 2\rfloor$",
    r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}",
    "np.arcsin(10/13)",
    "11:55 p.m. on 24 December 2014.",
    "SRAC=LRAC",
    "$352146,362145,452136,562134$",
    r"-\tfrac32",
    "2.88e-19",
    "-",
]


@pytest.mark.parametrize("gold", ODD)
def test_answers_of_every_kind_in_the_benchmarks_are_right_when_repeated(gold: str) -> None:
    assert grade(rf"\boxed{{{gold.strip('$')}}}", gold).value == 1.0
    assert grade(r"\boxed{\frac{987}{654}}", gold).value != 1.0


DATA = os.environ.get("ALIGNLAB_DATA", "")


@pytest.mark.skipif(not DATA, reason="ALIGNLAB_DATA names no folder of JSONL files")
def test_every_right_answer_of_the_data_files_is_right() -> None:
    files = sorted(Path(DATA).glob("*.jsonl"))
    assert files
    for file in files:
        rows = [json.loads(line) for line in file.open(encoding="utf-8")]
        answers = [row["answer"] for row in rows if "answer" in row]
        assert [a for a in answers if grade(rf"\boxed{{{a.strip('$')}}}", a).value != 1.0] == []
