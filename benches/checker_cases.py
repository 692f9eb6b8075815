r"""Answers with what a person says of them, and inputs that hurt: the cases of `benches/checker.py`.

`RIGHT` and `WRONG` hold, by category, "answer | right answer". `SENTENCES` and `LISTED` say where an answer may stand.
`nasty` makes hostile completions; each is compared with every one of `GOLDS`.
"""

from __future__ import annotations

RIGHT = {
    "equal forms": r"""
        0.5 | 1/2
        \frac12 | 1/2
        \frac{1}{2} | 0.5
        \dfrac{1}{2} | \frac12
        \tfrac{3}{6} | 0.5
        1/2 | \frac{1}{2}
        50\% | 0.5
        50\% | \frac{1}{2}
        50\% | 50
        0.50 | \frac{1}{2}
        .5 | 0.5
        1\frac{1}{2} | \frac{3}{2}
        1.5 | \frac32
        1{,}000 | 1000
        1,000,000 | 1000000
        1\,000 | 1000
        5.0 | 5
        +5 | 5
        007 | 7
        -\frac{1}{2} | \frac{-1}{2}
        \frac{1}{-2} | -\frac{1}{2}
        2\sqrt{2} | \sqrt{8}
        \frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
        \sqrt{3}/2 | \frac{\sqrt 3}{2}
        2^{10} | 1024
        10^{-3} | 0.001
        1.2 \times 10^{3} | 1200
        3e8 | 300000000
        x^2+2x+1 | (x+1)^2
        (x-1)(x+1) | x^2-1
        2(x+3) | 2x+6
        \frac{x}{2}+1 | \frac{x+2}{2}
        6-5i | -5i+6
        e^{i\pi} | -1
        \log_{2} 8 | 3
        \sin(\pi/6) | \frac12
        3! | 6
        \binom{5}{2} | 10
        x=5 | 5
        5 | x = 5
        y=3+2x | y=2x+3
        2x+3=y | y=2x+3
        \pi/2 | \frac{\pi}{2}
        0.333333 | \frac{1}{3}
        5 \text{ million} | 5000000
        \sqrt[3]{8} | 2
        |-5| | 5
        \lfloor 3.7 \rfloor | 3""",
    "sets": r"""
        2, 1 | 1, 2
        \{2,1\} | \{1,2\}
        \{1,2\} | 1, 2
        3, 1, 2 | 1,2,3
        -2,1 | \{1,-2\}
        \left\{1, 2\right\} | \{2, 1\}
        \frac12, 2 | 2, 0.5
        \pm 5 | 5, -5
        5 \pm 2 | 3, 7
        x=1, x=2 | 2, 1
        1 \text{ and } 2 | 2, 1
        \{0,\sqrt{2}\} | \{\sqrt 2, 0\}
        1 \text{ or } 2 | 1,2
        \emptyset | \varnothing
        \{-3,3\} | \pm 3""",
    "intervals": r"""
        (2,\infty) | (2, \infty)
        (2,+\infty) | (2, \infty)
        x > 2 | (2,\infty)
        (1,2) | 1 < x < 2
        [1,2] | 1 \le x \le 2
        1 \leq x \leq 2 | [1, 2]
        \left[ -\frac12, 3 \right) | [-0.5, 3)
        (-\infty,0)\cup(1,\infty) | (-\infty, 0) \cup (1, \infty)
        (1,\infty)\cup(-\infty,0) | (-\infty,0)\cup(1,\infty)
        x \in [1,2] | [1,2]
        2 < x | x > 2
        (-\infty, 5] | x \leq 5
        [0, 1)\cup(1, 2] | [0,1) \cup (1,2]
        x \ge 3 | [3,\infty)""",
    "tuples": r"""
        (1,2) | (1, 2)
        \left(1, 2\right) | (1,2)
        (0.5,2) | \left(\frac12, 2\right)
        (3,\frac{\pi}{2}) | \left(3, \pi/2\right)
        (1,2),(3,4) | (3,4),(1,2)
        (\sqrt{4},1) | (2,1)
        (1,-2,3) | \left(1,-2,3\right)
        (x,y)=(1,2) | (1,2)
        (1, 2) | x=1, y=2
        (a, b) | (a,b)""",
    "matrices": r"""
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix}
        \begin{bmatrix}1&2\\3&4\end{bmatrix} | \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}
        \begin{pmatrix}0.5\\2\end{pmatrix} | \begin{pmatrix}\frac12\\2\end{pmatrix}
        \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{pmatrix}-1&0\\0&-1\end{pmatrix}
        \begin{pmatrix}\sqrt{4}&0\\0&1\end{pmatrix} | \begin{pmatrix}2&0\\0&1\end{pmatrix}
        \left(\begin{array}{c}1\\2\end{array}\right) | \begin{pmatrix}1\\2\end{pmatrix}
        \begin{vmatrix}1&2\\3&4\end{vmatrix} | -2""",
    "units": r"""
        12 | 12 \text{ cm}
        12 \text{ cm} | 12
        12\text{ cm}^2 | 12
        12 cm | 12
        \$12 | 12
        12 \text{ dollars} | 12
        \$12.50 | 12.5
        90^\circ | 90
        90 | 90^{\circ}
        90^\circ | 90 \text{ degrees}
        5.4\mathrm{~m} | 5.4
        30 \text{ mph} | 30
        12 pears | 12
        12 apples | 12
        7\ \text{days} | 7
        3 \times 10^8 \text{ m/s} | 300000000
        25 \text{ square units} | 25
        \frac{3}{4}\text{ mile} | 0.75
        15\text{ km/h} | 15
        50 \% | 50
        100 kg | 100 \text{ kg}
        6\sqrt{2}\text{ cm} | 6\sqrt2
        2\pi \text{ cm} | 2\pi""",
    "text": r"""
        \text{Evelyn} | Evelyn
        evelyn | \text{Evelyn}
        C | \text{(C)}
        (C) | C
        \textbf{(C)} | C
        \text{C} | (C)
        east | \text{east}
        \text{even} | even
        Yes | yes
        the 60th caller | 60th caller
        \text{Monday} | Monday
        \text{two hundred} | two hundred
        12:50 | 12:50
        \text{odd function} | Odd function
        3:4 | 3:4
        4343_6 | 4343_{6}""",
}
WRONG = {
    "equal forms": r"""
        0.49 | 1/2
        0.33 | \frac{1}{3}
        0.3334 | \frac13
        3.14 | \pi
        3.1416 | \pi
        1.41 | \sqrt{2}
        1/3 | \frac{1}{2}
        \frac{2}{1} | \frac{1}{2}
        12 | \frac{1}{2}
        0.05 | 50\%
        5\% | 0.5
        500\% | 0.5
        -5 | 5
        5 | -5
        1,0 | 10
        1000 | 10000
        1.2 \times 10^{4} | 1200
        12e2 | 120
        2\sqrt{3} | \sqrt{8}
        x^2+2x+2 | (x+1)^2
        x+1 | (x+1)^2
        2x | 2
        x | 2x
        y=2x+4 | y=2x+3
        2x+3 | 2x+3y
        6+5i | 6-5i
        i | -i
        \log_{2} 8 | 2
        3! | 3
        2^{10} | 210
        5! | 5
        x=5 | 6
        x=5, y=6 | 5
        \pi | 2\pi
        3 \pi | 3
        2^{2} | 22
        1\frac{1}{2} | \frac{1}{2}
        1\frac{1}{2} | \frac{11}{2}
        \sqrt{16} | 16
        \frac{0}{0} | 0
        \infty | 5
        -\infty | \infty
        0 | \infty
        1e-8 | 1.24e-8
        1234568 | 1234567.0
        100000001 | 100000000
        0.1 | 0.01
        e | 2.7
        \text{ } | 5
        ? | 5
        x | 5
        \text{none} | 0
        5.5.5 | 5.5
        .5 | 5
        -0.5 | 0.5""",
    "sets": r"""
        1 | 1, 2
        1, 2, 3 | 1, 2
        1, 2 | 1
        \{1,2,3\} | \{1,2\}
        1, 3 | 1, 2
        \pm 5 | 5
        5 | \pm 5
        -5 | \pm 5
        1 \text{ or } 2 | 2
        1, 2, 3, 4, 5, 6, 7, 8, 9 | 7
        \{0\} | \emptyset
        \emptyset | 0
        1, 1, 2 | 1, 2, 2
        \{1, 2\} | (1, 2)
        12 | 1, 2""",
    "intervals": r"""
        (2,\infty) | [2,\infty)
        [1,2] | (1,2)
        [1,2) | (1,2]
        (1,3) | (1,2)
        x > 2 | x \ge 2
        x > 2 | x < 2
        x < 2 | (2,\infty)
        (-\infty,2) | (2,\infty)
        x \ne 5 | 5
        x > 5 | 5
        5 | x > 5
        (-\infty,\infty) | (0,\infty)
        (0,1) | (0,1)\cup(2,3)
        (-\infty,0)\cup(1,\infty) | (-\infty,0]\cup(1,\infty)
        [1,2] | \{1,2\}""",
    "tuples": r"""
        (2,1) | (1,2)
        (1,2) | (1,3)
        (1,2,3) | (1,2)
        2, 1 | (1,2)
        3, 2, 1 | (1,2,3)
        (1,2) | 3
        (-1,2) | (1,2)
        (1,2) | 12
        (1,2),(3,4) | (1,2),(4,3)
        (1,2) | (1,2),(3,4)
        x=2, y=1 | (1,2)
        (5,6) | \frac{5}{6}""",
    "matrices": r"""
        \begin{pmatrix}2\\1\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&5\end{pmatrix}
        \begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}1\\2\\3\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        1, 2 | \begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}1&0\\0&1\end{pmatrix} | 1
        2 | \begin{pmatrix}2&0\\0&2\end{pmatrix}""",
    "units": r"""
        13 \text{ cm} | 12
        12 \text{ cm} | 12 \text{ m}
        12 \text{ inches} | 12 \text{ feet}
        12x | 12
        12 \text{ cm} | 12x
        90^\circ | 90\pi
        12 \text{ or } 13 | 12
        12 or 13 | 13
        12 pears and 3 apples | 12
        12 | 12 \%, 13 \%
        100 \text{ to } 1 | 100
        5 \text{ million} | 5
        3 \text{ hundred} | 3
        7 \text{ thousand dollars} | 7
        2 \text{ dozen} | 2""",
    "text": r"""
        \text{Eve} | \text{Evelyn}
        \text{west} | \text{east}
        D | \text{(C)}
        C, D | C
        \text{A, B, C, D} | C
        purple | red
        purple | 5
        not even | even
        12:51 | 12:50
        \text{The answer is 5} | 5
        4343_7 | 4343_6
        \text{Yes and no} | yes
        3:4 | 4:3
        \text{Monday or Tuesday} | Monday
        5 | five
        C | 100""",
}

SENTENCES = ("The answer is {}.", "Therefore the final answer is ${}$.", "So we get {} in the end.")
LISTED = (
    r"\boxed{{{}}} or \boxed{{{}}}",
    r"It is \boxed{{{}}}, \boxed{{{}}}.",
    r"$\boxed{{{}}}$ and $\boxed{{{}}}$",
    r"\boxed{{{}, {}}}",
    r"\boxed{{{} \text{{ or }} {}}}",
)

GOLDS = ("5", r"x^2+\sqrt{2}")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def nasty() -> dict[str, str]:
    """Completions by name."""
    boxed = {
        "9^(9^9)": "9^{(9^9)}",
        "tower": "9^{9^{9^{9}}}",
        "tower of stars": "9**9**9**9",
        "tower in braces": r"{10}^{{10}^{{10}}}",
        "tower of x": "x^{x^{x^{x^{x^{x^x}}}}}",
        "tower of e": "e^{e^{e^{e^{e}}}}",
        "product in exponent": r"10^{10 \cdot 10^{9}}",
        "sum in exponent": "10^{1000+1000+9999999}",
        "fraction in exponent": r"3^{\frac{9999999999}{7}}",
        "negative tower": "2^{-2^{31}}",
        "float to a power": "1.0000001^{999999999}",
        "modulus of a tower": r"7^{7^{7}} \mod 10",
        "factorial": "99999999!",
        "factorial of factorial": "((9!)!)!",
        "factorial to a power": "(999!)^{999}",
        "factorials in a row": "3!!!!!!",
        "sum of factorials": r"\sum_{n=1}^{3000} n!",
        "product to a million": r"\prod_{k=1}^{1000000} (k^2+1)",
        "sum of ten million": r"\sum_{i=1}^{10000000} \sin(i)",
        "binomial": r"\binom{100000000}{50000000}",
        "power of a binomial": r"\binom{9999}{5000}^{500}",
        "gamma": r"\Gamma(99999999)",
        "trinomial": "(x+y+z)^{3000}",
        "binomial expansion": "(x+1)^{2000}(x-1)^{2000}",
        "45 factors": "".join(f"(x+{i})" for i in range(45)),
        "integral": r"\int_0^1 e^{x^2} \sin(x^3) \log(x+1) dx",
        "limit": r"\lim_{x\to 0} \frac{\sin(x^{100})}{x^{100}}",
        "trigonometry": r"\sin(\cos(\tan(\sin(\cos(\tan(1))))))",
        "roots in roots": r"\sqrt{2+" * 30 + "2" + "}" * 30,
        "cube roots": r"\sqrt[3]{2+\sqrt[3]{3+\sqrt[3]{5+\sqrt[3]{7}}}}",
        "sum of roots": "+".join(rf"\sqrt{{{i}}}" for i in range(2, 30)),
        "continued fraction": r"\frac{1}{1+" * 24 + "1" + "}" * 24,
        "fractions 2000 deep": r"\frac{1}{" * 2000 + "2" + "}" * 2000,
        "brackets": "(" * 299,
        "closed brackets": "(" * 140 + "1" + ")" * 140,
        "absolute values": "|" * 200 + "1" + "|" * 80,
        "matrix 100 x 100": r"\begin{pmatrix}" + r"\\".join("&".join("1" * 100) for _ in range(100)) + r"\end{pmatrix}",
        "matrix 10 x 10": r"\begin{pmatrix}" + r"\\".join("&".join("1234567890") for _ in range(10)) + r"\end{pmatrix}",
        "power of a matrix": r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{100000}",
        "determinant": r"\begin{vmatrix}"
        + r"\\".join("&".join(_LETTERS[i : i + 8]) for i in range(8))
        + r"\end{vmatrix}",
        "set of 90": r"\{" + ",".join(map(str, range(90))) + r"\}",
        "300 digits": "9" * 300,
        "10^6 digits": "9" * 10**6,
        "division by zero": r"\frac{1}{0}",
        "zero to zero": r"\frac{0}{0}^{\frac{0}{0}}",
        "1e999999999": "1e999999999",
        "nan": "nan",
        "null bytes": "5\0" * 20,
        "right-to-left": "\u202e5\u202c",
        "combining marks": "5" + "\u0301" * 200,
        "surrogates": "\ud800" * 200,
        "digits of all scripts": "٣५๗৪",
        "mathematical letters": "𝟓𝒙²½⅓∛∞",
        "emoji": "🧮" * 70,
        "chain of relations": "<".join(_LETTERS) + "<5",
        "system of equations": ", ".join(f"x_{i}+x_{i + 1}={i}" for i in range(25)),
        "unions": r"\cup".join(f"({i},{i + 1})" for i in range(40)),
        "macros": r"\text{" * 40 + "5" + "}" * 40,
        "unknown macros": r"\foo\bar\baz{5}" * 10,
        "environments": r"\begin{cases}" * 10 + "5" + r"\end{cases}" * 10,
        "code": "__import__('os').system('sleep 60')",
        "lambda": "(lambda f: f(f))(lambda f: f(f))",
    }
    return {name: rf"So \boxed{{{text}}}." for name, text in boxed.items()} | {
        "10^6 characters": "a" * 10**6 + r"\boxed{6}",
        "10^6 spaces in a box": r"\boxed{" + " " * 10**6 + "}",
        "10^5 boxes in boxes": r"\boxed{" * 10**5 + "6" + "}" * 10**5,
        "10^5 open boxes": r"\boxed{" * 10**5,
        "10^5 boxes in a row": r"\boxed{6} " * 10**5,
        "10^5 different boxes": "".join(rf"\boxed{{{i}}}, " for i in range(10**5)),
        "10^6 braces": "{" * 10**6 + r"\boxed{6}",
        "10^6 backslashes": "\\" * 10**6 + r"\boxed{6}",
        "10^6 hash marks": "#" * 10**6,
        "10^5 ends of thinking": "</think>" * 10**5 + r"\boxed{6}",
        "10^6 null bytes": "\0" * 10**6 + r"\boxed{6}",
        "10^6 line ends": "\n" * 10**6 + "#### 6",
        "fractions 2000 deep, no box": "#### " + r"\frac{1}{" * 2000 + "2" + "}" * 2000,
    }
