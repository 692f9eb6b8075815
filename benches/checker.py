r"""Is the check of mathematics right, next to plain math-verify, and does it always come back?

    python benches/checker.py --data FOLDER [--rows N]

FOLDER holds JSONL files whose rows have an `answer`. Four tables, as markdown:

1. right answers against themselves, in several styles; and wrong ones: another row's answer, a digit changed, the sign
   flipped, numerator and denominator swapped, one element more
2. false accepts and false rejects by category, of `math_answer` and of math-verify's `parse` and `verify` as they come,
   on the same completions: those of `checker_cases`, and answers of FOLDER in boxes, after ####, in sentences, listed
3. the cases where either is wrong
4. hostile completions: what became of them, and the slowest calls

Everything runs where it can be killed. The exit code is 1 when a right answer is not equal to itself, when a wrong pair
is accepted, when a hostile completion earns anything, or when a call takes longer than the deadline and a kill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.schema import Score

COUNT, TIMEOUT, MEMORY_GIB = 2, 3.0, 2.0
KILL = 1.0  # seconds that a kill and the news of it may take
Group = tuple[str, list[str]]  # a right answer, and completions


# --- in the scoring processes ---


def ours(completion: str, answer: str) -> Score:
    """The reward, as it comes."""
    from rewards.math_answer import grade

    return grade(completion, answer)


def lenient(completion: str, answer: str) -> Score:
    """The reward, taking the last number too."""
    from rewards.math_answer import grade

    return grade(completion, answer, extract="any")


def plain(completion: str, answer: str) -> float:
    """math-verify, as it comes; the right answer in dollars, as its own examples have it."""
    from math_verify import parse, verify

    return float(verify(parse(f"${answer.strip('$')}$"), parse(completion)))


def load() -> None:
    """What is loaded once in a process."""
    ours(r"\boxed{3+x}", "x+3")
    plain(r"\boxed{3+x}", "x+3")


ours.prepare = lenient.prepare = plain.prepare = load  # type: ignore[attr-defined]


async def _score(function: str, groups: Sequence[Group]) -> tuple[list[list[Score]], list[float]]:
    from rewards.reward import Samples
    from rewards.workers import Workers

    workers = Workers(
        {function: {"fn": f"{Path(__file__).resolve()}:{function}", "options": {}}}, COUNT, TIMEOUT, MEMORY_GIB
    )

    async def one(group: Group) -> tuple[list[Score], list[float]]:
        samples = Samples("", {"answer": group[0]}, group[1], [[] for _ in group[1]], [False] * len(group[1]))
        scored = await workers.score(function, samples, batch=False)
        return [s.scores for s in scored if not isinstance(s.scores, dict)], [s.seconds for s in scored]

    try:
        found = await asyncio.gather(*map(one, groups))
        return [scores for scores, _ in found], [seconds for _, times in found for seconds in times]
    finally:
        await workers.close()


def score(function: str, groups: Sequence[Group]) -> tuple[list[list[Score]], list[float]]:
    """(scores of each group's completions, seconds of each completion in order)."""
    return asyncio.run(_score(function, groups))


# --- 1. the answers of the data ---


def styles(gold: str) -> dict[str, str]:
    """Completions that give the right answer."""
    bare = gold.strip("$")
    return {
        "boxed": rf"So it is \boxed{{{bare}}}.",
        "marked": f"So it is\n#### {bare}",
        "restyled": rf"<think>\boxed{{1}}</think> So it is $\boxed{{ {restyled(bare)} }}$.",
    }


def restyled(gold: str) -> str:
    """The same answer written another way."""
    if re.fullmatch(r"-?\d+", gold):
        return f"{int(gold):,}.0"
    if re.fullmatch(r"-?\d+\.\d+", gold):
        return gold + "0"
    text = gold.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", "")
    return re.sub(r"(?<=[\w})]) ?([-+,=]) ?(?=[\w\\({])", r" \1 ", text) if "{," not in text else text


def wrong(gold: str, other: str) -> dict[str, str]:
    """Answers that are not the right one, by how they were made."""
    bare, found = gold.strip("$"), {"another row's": other.strip("$")}
    if (digits := list(re.finditer(r"\d", bare))) and "=" not in bare:  # x^2 = 0 and x^3 = 0 say the same
        at = digits[0].start()
        found["digit changed"] = f"{bare[:at]}{int(bare[at]) % 9 + 1}{bare[at + 1 :]}"
    if (
        not re.search(r",|[=<>]|\\(?:pm|cup|text|in|le|ge|infty)|[a-zA-Z]{3,}(?<!frac)(?<!sqrt)", bare)
        and value(bare) != 0
    ):
        found["sign flipped"] = (
            bare[1:] if re.fullmatch(r"-[\d.]+", bare) else f"-({bare})" if re.search("[-+]", bare) else f"-{bare}"
        )
    if (match := re.fullmatch(r"(-?\\frac)\{([^{}]+)\}\{([^{}]+)\}", bare)) and match[2].strip("-") != match[3]:
        found["fraction swapped"] = f"{match[1]}{{{match[3]}}}{{{match[2]}}}"
    found["one element more"] = f"{bare}, 7919"
    return {how: text for how, text in found.items() if value(text) is None or value(text) != value(bare)}


def value(text: str) -> Fraction | None:
    """The number that a plain answer is; on purpose not the checker's own reading."""
    plain = re.sub(r"[,$\s]", "", re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}", r"\1/\2", text))
    try:
        return Fraction(plain) if re.fullmatch(r"[-+]?[\d./]+", plain) else None
    except (ValueError, ZeroDivisionError):
        return None


def same(a: str, b: str) -> bool:
    """Whether two answers of the data are the same, as far as it takes no algebra; 5 and x = 5 are."""
    a, b = (re.sub(r"^\$?[a-z]\s*=", "", text) for text in (a, b))
    return a.strip() == b.strip() or (value(a) is not None and value(a) == value(b))


@dataclass
class Tally:
    """Of one file: calls and failures by kind."""

    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def cell(self, kind: str) -> str:
        """Failures of calls."""
        return f"{len(self.failures[kind])} / {self.calls[kind]}" if self.calls[kind] else "-"


def check_file(answers: list[str]) -> Tally:
    """All answers of a file against themselves and against wrong ones."""
    groups, labels = [], []
    for i, gold in enumerate(answers):
        other = next((a for a in answers[i + 1 :] + answers[:i] if not same(a, gold)), "no other")
        right, bad = styles(gold), wrong(gold, other)
        groups.append((gold, [*right.values(), *(rf"So it is \boxed{{{text}}}." for text in bad.values())]))
        labels.append([*right, *bad])
    tally = Tally()
    for (gold, texts), kinds, scores in zip(groups, labels, score("ours", groups)[0], strict=True):
        for text, kind, one in zip(texts, kinds, scores, strict=True):
            tally.calls[kind] += 1
            earned = one.value == 1.0
            if earned != (kind in STYLES):
                tally.failures[kind].append(
                    f"`{gold}` {'accepts' if earned else 'rejects'} `{text[-80:]}` {one.status} {one.detail}"
                )
    return tally


STYLES = ("boxed", "marked", "restyled")
WAYS = ("another row's", "digit changed", "sign flipped", "fraction swapped", "one element more")


def golds(files: Sequence[Path], rows: int) -> Iterator[str]:
    """Table 1; yields the failures."""
    print("| file | rows | " + " | ".join([*STYLES, *WAYS]) + " |\n" + "|---" * (2 + len(STYLES + WAYS)) + "|")
    whole: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for file in files:
        answers = read(file)[:rows]
        tally = check_file(answers)
        print(
            f"| {file.stem} | {len(answers)} | " + " | ".join(tally.cell(kind) for kind in STYLES + WAYS) + " |",
            flush=True,
        )
        for kind in STYLES + WAYS:
            whole[kind][0] += len(tally.failures[kind])
            whole[kind][1] += tally.calls[kind]
            yield from (f"{file.stem}, {kind}: {line}" for line in tally.failures[kind])
    print("| all | | " + " | ".join(f"{bad} / {calls}" for bad, calls in whole.values()) + " |")


def read(file: Path) -> list[str]:
    """The answers of a file; none of one that has none."""
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    return [row["answer"] for row in rows if isinstance(row.get("answer"), str)]


# --- 2. next to math-verify ---


@dataclass(frozen=True)
class Case:
    """A completion with the verdict it should get."""

    category: str
    completion: str
    gold: str
    right: bool


def cases(answers: list[str]) -> list[Case]:
    """Those written by hand, and `answers` in all the places where an answer may stand."""
    from checker_cases import LISTED, RIGHT, SENTENCES, WRONG

    found = []
    for table, right in ((RIGHT, True), (WRONG, False)):
        for category, lines in table.items():
            for line in lines.strip().splitlines():
                given, gold = line.strip().split(" | ")
                found.append(Case(category, rf"So it is \boxed{{{given}}}.", gold, right))
    for i, gold in enumerate(answers):
        other = next(a for a in answers[i + 1 :] + answers[:i] if not same(a, gold))
        bare, off = gold.strip("$"), other.strip("$")
        sentence, listed = SENTENCES[i % len(SENTENCES)], LISTED[i % len(LISTED)]
        for text, right in ((bare, True), (off, False)):
            found.append(Case("in a box", rf"Thus \boxed{{{text}}}.", gold, right))
            found.append(Case("after ####", f"Thus\n#### {text}", gold, right))
            found.append(Case("in a sentence", sentence.format(text), gold, right))
        found.append(Case("box after a wrong box", rf"Is it \boxed{{{off}}}? No, it is \boxed{{{bare}}}.", gold, True))
        found.append(Case("box after a wrong box", rf"Is it \boxed{{{bare}}}? No, it is \boxed{{{off}}}.", gold, False))
        if "," not in bare + off:
            found.append(Case("listed", listed.format(off, bare), gold, False))
            found.append(Case("listed", listed.format(bare, off), gold, False))
    return found


CHECKERS = ("ours", "lenient", "plain")


def compare(found: list[Case]) -> Iterator[str]:
    """Table 2; yields the lines of table 3."""
    groups = [(case.gold, [case.completion]) for case in found]
    said = {name: [scores[0] for scores in score(name, groups)[0]] for name in CHECKERS}
    heads = " | ".join(
        f"{name}: {what}" for name in CHECKERS for what in ("false accepts", "false rejects", "no verdict")
    )
    print(f"| category | right | wrong | {heads} |\n" + "|---" * (3 + 3 * len(CHECKERS)) + "|")
    for category in [*dict.fromkeys(case.category for case in found), "all"]:
        own = [i for i, case in enumerate(found) if category in (case.category, "all")]
        right = sum(found[i].right for i in own)
        cells = " | ".join(counts([(found[i].right, said[name][i]) for i in own]) for name in CHECKERS)
        print(f"| {category} | {right} | {len(own) - right} | {cells} |")
    for i, case in enumerate(found):
        verdicts = {name: said[name][i] for name in CHECKERS}
        if case.category in HAND and any((v.value == 1.0) != case.right for v in verdicts.values()):
            shown = " | ".join(f"{v.value:g}" if v.status == "ok" else v.status for v in verdicts.values())
            yield f"| {case.category} | `{case.completion[16:-2]}` | `{case.gold}` | {int(case.right)} | {shown} |"


HAND = ("equal forms", "sets", "intervals", "tuples", "matrices", "units", "text")


def counts(pairs: list[tuple[bool, Score]]) -> str:
    """Wrong ones that earn, right ones that are judged and earn nothing, those without a verdict."""
    accepts = sum(score.value == 1.0 and not right for right, score in pairs)
    rejects = sum(score.value == 0.0 and right for right, score in pairs)
    return f"{accepts} | {rejects} | {sum(score.status != 'ok' for _, score in pairs)}"


# --- 4. hostile completions ---


def hostile() -> Iterator[str]:
    """Table 4; yields what is past a limit or earns anything."""
    from checker_cases import GOLDS, nasty

    names = [(name, gold) for name in nasty() for gold in GOLDS]
    groups = [(gold, [nasty()[name]]) for name, gold in names]
    started = time.monotonic()
    found, seconds = score("lenient", groups)
    took = time.monotonic() - started
    rows = sorted(zip(seconds, names, found, strict=True), reverse=True, key=lambda row: row[0])
    statuses = [scores[0].status for scores in found]
    print(
        f"{len(nasty())} completions, {len(groups)} calls in {took:.0f} s: {statuses.count('ok')} judged wrong, "
        f"{statuses.count('timeout')} ended at {TIMEOUT:g} s, {statuses.count('error')} died or ran out of memory. "
        f"Worst call: {1000 * rows[0][0]:.0f} ms; median {1000 * rows[len(rows) // 2][0]:.1f} ms.\n"
    )
    print("| completion | right answer | verdict | ms |\n|---|---|---|---|")
    for taken, (name, gold), scores in rows:
        one = scores[0]
        if taken > 0.5:
            verdict = f"{one.status}: {one.detail[:50]}" if one.detail else one.status
            print(f"| {name} | `{gold}` | {verdict} | {1000 * taken:.0f} |")
        if one.value == 1.0:
            yield f"{name} earns with {gold}"
        if taken > TIMEOUT + KILL:
            yield f"{name} takes {taken:.2f} s; {TIMEOUT + KILL:g} s are allowed"


def main() -> int:
    """Print the tables and what fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10**9, help="of each file")
    options = parser.parse_args()
    files = [file for file in sorted(options.data.glob("*.jsonl")) if read(file)]
    if not files:
        parser.error(f"{options.data} holds no JSONL file with answers")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    print("## Right and wrong answers of the data: failures / calls\n")
    failed = list(golds(files, options.rows))
    print("\n".join(["", *failed[:100], "", "## Next to math-verify", ""]))
    sample = [answer for file in files for answer in dict.fromkeys(read(file)[:: max(1, len(read(file)) // 12)][:12])]
    lines = list(compare(cases(sample)))
    print(
        "\n## Cases that one of them gets wrong\n\n| category | answer | right answer | should be | "
        + " | ".join(CHECKERS)
        + " |"
    )
    print("\n".join(["|---" * (4 + len(CHECKERS)) + "|", *lines, "", "## Hostile completions", ""]))
    failed += hostile()
    print("\n".join(["", "Failed:", *failed] if failed else ["", "All is well."]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
