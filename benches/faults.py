r"""Scoring survives anything: rewards that hang, die, lie, fork, fill memory and pipes; answers that are bombs.

    python benches/faults.py [--calls 120] [--kinds sleep,segfault] [--rates 0.01,0.05,0.2]

Each run sends groups of completions through `rewards.workers.Workers`; a share of the calls misbehaves, spread evenly.
Five promises, checked for every kind of fault and every rate; a broken one makes the exit code 1:

    ends        the run ends before its deadline, and every completion has a score
    named       a faulty completion has the status that its fault should have, and never a value
    alone       healthy completions have the scores they have without any fault, and bit for bit the advantages that
                their group gets when the completions without a value are not in it
    clean       no process is left: none with the mark that the bench's environment gives, none that announced itself
    pace        seconds <= healthy seconds + seconds of the faults / workers (+ the longest group of faults, which can
                come last, when nobody is left to share the work), within 15 %

The seconds of the faults are measured: from the start of a faulty call to the death of its process, and starting and
loading the process that takes its place. `ratio` is seconds / (healthy seconds + seconds of the faults / workers).
Each run is compared with a healthy one right before it. Where a machine that is busy with other things upsets the pace,
or keeps five milliseconds of work waiting past the deadline, both are repeated, twice at most, and `tries` says so. Two
quiet cores take about three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import itertools
import math
import os
import random
import subprocess
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.schema import Score
    from rewards.workers import Scored

HEADS = (
    "| fault | rate | calls | ok | abstain | timeout | error | processes | children | left "
    "| seconds | healthy | ratio | tries |"
)
MARK, HOME = "ALIGNLAB_FAULTS_MARK", "ALIGNLAB_FAULTS_HOME"  # environment: whose process it is, where it takes notes
KINDS = {
    # kind of fault: the function that commits it, statuses that are right for it
    "sleep": ("one", {"timeout"}),
    "raise": ("one", {"error"}),
    "none": ("one", {"abstain"}),
    "nan": ("one", {"error"}),
    "inf": ("one", {"error"}),
    "sys.exit": ("one", {"error"}),
    "os._exit": ("one", {"error"}),
    "segfault": ("one", {"error"}),
    "memory": ("one", {"error"}),
    "fork": ("one", {"abstain", "timeout", "error"}),  # by what the parent does next
    "print": ("one", {"abstain", "timeout"}),  # by how fast the machine is
    "length": ("group", {"error"}),
    "bomb": ("answer", {"ok", "timeout"}),  # ok is a 0: no right answer
}
COUNT, TIMEOUT, MEMORY_GIB, GROUP = 2, 1.0, 1.0, 8
BOMBS = (  # what `rewards.answers.too_complex` refuses, and every other one what it lets through and the deadline ends
    r"9^{9^{9^{9}}}",
    "(x+y+z)^{3000}",
    "((99!)!)!",
    r"\begin{vmatrix}" + r"\\".join("&".join("abcdefghijklmnopq"[i : i + 8]) for i in range(8)) + r"\end{vmatrix}",
    r"\frac{1}{1+" * 2000 + "1" + "}" * 2000,
    "(a+b+c+d)^{900}",
    r"\sin(\cos(\tan(\sin(\cos(\tan(1))))))",
    r"\sqrt{2+" * 14 + "x" + "}" * 14 + "^{999}",
)
FORKS = ("return", "hang", "exit")  # what the parent does next


# --- the reward functions, in the scoring processes ---


def one(completion: str) -> float | None:
    """A completion "fine N" gets a number that depends on N; any other is the name of a fault."""
    kind, _, number = completion.partition(" ")
    if kind == "fine":
        return work(int(number))
    return commit(kind, int(number))


def group(completions: list[str]) -> list[float]:
    """The same for whole groups; a group with a fault in it gets a number too few."""
    scores = [work(int(c.partition(" ")[2])) for c in completions]
    return scores[1:] if any(not c.startswith("fine") for c in completions) else scores


def answer(completion: str) -> float:
    """Algebra: whether the box is x + 3."""
    from rewards.math_answer import grade

    return grade(completion, "x+3").value


def work(number: int) -> float:
    """Five milliseconds of a processor, then a value that rounds differently in sums of different order."""
    end = time.process_time() + 0.005
    while time.process_time() < end:
        pass
    return math.sin(number)


def commit(kind: str, number: int) -> float | None:
    """One fault."""
    match kind:
        case "sleep":
            time.sleep(10**6)
        case "raise":
            raise RuntimeError("a bug")
        case "nan" | "inf":
            return float(kind)
        case "sys.exit":
            sys.exit(3)
        case "os._exit":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
        case "memory":
            bytearray(2 * 2**30)
        case "fork":
            fork(FORKS[number % len(FORKS)])
        case "print":
            for _ in range(1000):
                print("x" * 10**6)
    return None  # "none", and what goes on after its fault


def fork(then: str) -> None:
    """A child, a grandchild, one that leaves the session, one that keeps nothing of us, one that comes back here."""
    for steps in ((), ("fork",), ("setsid",), ("setsid", "fork")):
        if os.fork() == 0:
            for step in steps:
                if step == "setsid":
                    os.setsid()
                elif os.fork():
                    os._exit(0)
            announce(os.getpid())
            time.sleep(10**6)
    announce(subprocess.Popen(["sleep", "1000000"], env={}, start_new_session=True).pid)
    if os.fork() == 0:
        announce(os.getpid())
        return
    if then == "hang":
        time.sleep(10**6)
    if then == "exit":
        os._exit(3)


def announce(pid: int) -> None:
    """Note that this process was started."""
    (Path(os.environ[HOME]) / f"{pid}.pid").touch()


def load() -> None:
    """Load sympy before the first completion, as the registered reward does."""
    from rewards.math_answer import grade

    grade(r"\boxed{3+x}", "x+3")


answer.prepare = load  # type: ignore[attr-defined]


# --- the bench ---


@dataclass(frozen=True)
class Call:
    """A group of completions for one of the functions above, and which of them are faulty."""

    function: str
    texts: list[str]
    faulty: list[bool]


def plain(one: Scored) -> Score:
    """The score of a function that returns no mapping."""
    assert not isinstance(one.scores, dict)
    return one.scores


@dataclass(frozen=True)
class Run:
    """What one run took and gave."""

    calls: list[Call]
    scored: list[list[Scored]]
    seconds: float
    processes: int  # scoring processes started
    starting: float  # seconds of starting processes and loading functions in them
    children: int  # processes that the faults started, at least
    left: int  # processes of ours or theirs left behind

    def statuses(self) -> Counter[str]:
        """Of the faulty completions."""
        pairs = [
            (plain(one).status, bad)
            for call, part in zip(self.calls, self.scored, strict=True)
            for one, bad in zip(part, call.faulty, strict=True)
        ]
        return Counter(status for status, bad in pairs if bad)

    def fault_seconds(self) -> list[float]:
        """Of each group: its faulty calls, the killing of their processes included."""
        found = []
        for call, part in zip(self.calls, self.scored, strict=True):
            own = [one.seconds for one, bad in zip(part, call.faulty, strict=True) if bad]
            found.append(max(own, default=0.0) if call.function == "group" else sum(own))
        return found


def calls_of(kinds: Sequence[str], rate: float, count: int) -> list[Call]:
    """`count` calls per function, half as many of whole groups; `rate` of them faulty, evenly spread, kinds in turn."""
    calls = []
    for function in dict.fromkeys(KINDS[kind][0] for kind in kinds):
        own = [kind for kind in kinds if KINDS[kind][0] == function]
        units = count // 2 if function == "group" else count
        faults = max(1, round(rate * units)) if rate else 0
        hits = {int((i + 0.5) * units / faults): i for i in range(faults)}
        if function == "group":
            for unit in range(units):
                texts = [text(function, own, 4 * unit + i, hits.get(unit) if i == 0 else None) for i in range(4)]
                calls.append(Call(function, texts, [unit in hits] * 4))
        else:
            for first in range(0, units, GROUP):
                numbers = range(first, min(first + GROUP, units))
                texts = [text(function, own, n, hits.get(n)) for n in numbers]
                calls.append(Call(function, texts, [n in hits for n in numbers]))
    random.Random(0).shuffle(calls)
    return calls


def text(function: str, kinds: Sequence[str], number: int, hit: int | None) -> str:
    """A completion: the fault number `hit`, or a healthy one."""
    if function == "answer":
        healthy = "3+x" if number % 3 else rf"x+{number}"
        return rf"So it is \boxed{{{healthy if hit is None else BOMBS[hit % len(BOMBS)]}}}."
    return f"fine {number}" if hit is None else f"{kinds[hit % len(kinds)]} {hit // len(kinds)}"


@contextlib.contextmanager
def stopwatch() -> Iterator[list[tuple[str, float]]]:
    """("start", seconds) of each start of a scoring process, ("load", seconds) of each load of a function in one."""
    from rewards.workers import _Process

    taken: list[tuple[str, float]] = []
    start, receive = _Process.start.__func__, _Process.receive  # type: ignore[attr-defined]

    async def timed_start(cls: Any, hello: Any) -> Any:
        started = time.monotonic()
        process = await start(cls, hello)
        taken.append(("start", time.monotonic() - started))
        return process

    async def timed_receive(self: Any, seconds: float) -> Any:
        started = time.monotonic()
        answer = await receive(self, seconds)
        if "loaded" in answer:
            taken.append(("load", time.monotonic() - started))
        return answer

    _Process.start, _Process.receive = classmethod(timed_start), timed_receive  # type: ignore[method-assign, assignment]
    try:
        yield taken
    finally:
        _Process.start, _Process.receive = classmethod(start), receive  # type: ignore[method-assign, assignment]


async def score(calls: list[Call], deadline: float) -> tuple[list[list[Scored]], float]:
    """Scores and seconds of a run through fresh scoring processes."""
    from rewards.reward import Samples
    from rewards.workers import Workers

    functions = {f: {"fn": f"{Path(__file__).resolve()}:{f}", "options": {}} for f, _ in KINDS.values()}
    workers = Workers(functions, COUNT, TIMEOUT, MEMORY_GIB)
    started = time.monotonic()
    try:
        jobs = []
        for call in calls:
            samples = Samples("Q?", {}, call.texts, [[] for _ in call.texts], [False] * len(call.texts))
            jobs.append(workers.score(call.function, samples, batch=call.function == "group"))
        found = await asyncio.wait_for(asyncio.gather(*jobs), deadline)
        return found, time.monotonic() - started
    finally:
        await workers.close()


def run(calls: list[Call], deadline: float = 120.0) -> Run:
    """One run. Raises TimeoutError past its deadline."""
    with TemporaryDirectory() as home, stopwatch() as taken:
        mark = uuid.uuid4().hex
        os.environ |= {MARK: mark, HOME: home}
        try:
            scored, seconds = asyncio.run(score(calls, deadline))
        finally:
            del os.environ[MARK], os.environ[HOME]
        children = {int(path.stem) for path in Path(home).glob("*.pid")}
        left = len(marked(mark) | living(children))
    processes = [what for what, _ in taken].count("start")
    return Run(calls, scored, seconds, processes, sum(took for _, took in taken), len(children), left)


def marked(mark: str) -> set[int]:
    """Processes that were started, by whomever, with our mark in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:  # it has just ended, or is not ours
            continue
    return living(found) - {os.getpid()}


def living(pids: set[int]) -> set[int]:
    """Those of `pids` that run; a dead one whose parent has not looked yet does not."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found |= {pid} if state != "Z" else set()
    return found


def unequal(faulty: Run, healthy: Run) -> Iterator[str]:
    """Where a healthy completion's score, or its advantage, is not what it is without the faults."""
    values = defaultdict(list)
    for call, part, other in zip(faulty.calls, faulty.scored, healthy.scored, strict=True):
        values[call.function].append([plain(one).value for one in part])
        for said, bad, found, expected in zip(call.texts, call.faulty, part, other, strict=True):
            if not bad and found.scores != expected.scores:
                yield f"{said}: {found.scores} instead of {expected.scores}"
    for function, order in itertools.product(values, ORDERS):
        if not advantages_agree(values[function], order):
            yield f"advantages of {function}, {order}"


def misnamed(faulty: Run) -> Iterator[str]:
    """Faulty completions whose status is none of those of their fault, or that earned something."""
    for call, part in zip(faulty.calls, faulty.scored, strict=True):
        kinds = [said.split(" ")[0] for said, bad in zip(call.texts, call.faulty, strict=True) if bad]
        own = next((kind for kind in kinds if kind != "fine"), "")  # of a group, which has one
        for said, bad, one in zip(call.texts, call.faulty, part, strict=True):
            kind = {"answer": "bomb", "group": own}.get(call.function, said.split(" ")[0])
            if bad and (plain(one).status not in KINDS[kind][1] or plain(one).value > 0):
                yield f"{said[:60]}: {one.scores}"


ORDERS = ("sum_then_normalize", "normalize_then_sum")


def advantages_agree(values: list[list[float]], order: Any) -> bool:
    """Whether a batch's advantages are bit for bit those of the batch without the rows that have no value."""
    import numpy as np

    from rewards.mixing import Mix, StepBatch, compose

    column = np.array([v for row in values for v in row])
    group = np.repeat(np.arange(len(values)), [len(row) for row in values])

    def advantages(rows: Any) -> Any:
        scores, ones = column[rows, None], np.ones(len(column[rows]), int)
        batch = StepBatch(names=("c",), raw=scores, scores=scores, group=group[rows], lengths=ones)
        return compose(batch, Mix(weights=np.ones(1), order=order))[0]

    known = np.isfinite(column)
    every = advantages(slice(None))
    return every[known].tobytes() == advantages(known).tobytes() and not every[~known].any()


def judge(faulty: Run, healthy: Run) -> tuple[float, list[str]]:
    """(ratio, promises that are broken)."""
    own = faulty.fault_seconds()
    replacing = max(0.0, faulty.starting - healthy.starting)
    share = healthy.seconds + (sum(own) + replacing) / COUNT
    broken = [f"named: {what}" for what in misnamed(faulty)] + [f"alone: {what}" for what in unequal(faulty, healthy)]
    if faulty.left:
        broken.append(f"clean: {faulty.left} processes are left")
    if faulty.seconds > 1.15 * share + max(own):
        broken.append(f"pace: {faulty.seconds:.2f} s, and {share:.2f} s and {max(own):.2f} s for the last are allowed")
    return faulty.seconds / share, broken


def main() -> int:
    """Run all kinds at all rates, print the table, say which promises are broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=120, help="calls a run; half as many for whole groups")
    parser.add_argument("--kinds", default=",".join([*KINDS, "mixed"]))
    parser.add_argument("--rates", default="0.01,0.05,0.2")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    print(HEADS, "---".join("|" * (HEADS.count("|"))), sep="\n")
    broken = [line for kind in options.kinds.split(",") for line in check(kind, options.rates, options.calls)]
    print("\n".join(["", *broken]) if broken else "\nAll promises are kept.")
    return 1 if broken else 0


def check(kind: str, rates: str, count: int) -> list[str]:
    """Run one kind of fault, or all of them mixed, at all rates; print the rows; the promises that are broken."""
    kinds, broken = list(KINDS) if kind == "mixed" else [kind], []
    for rate in map(float, rates.split(",")):
        for tries in range(1, 4):
            try:
                healthy, faulty = run(calls_of(kinds, 0.0, count)), run(calls_of(kinds, rate, count))
            except TimeoutError:
                broken.append(f"{kind} at {rate:.0%}: ends: it did not end in time")
                break
            ratio, wrong = judge(faulty, healthy)
            if tries == 3 or not wrong or not all(busy(what) for what in wrong):
                broken += [f"{kind} at {rate:.0%}: {what}" for what in wrong]
                print(row(f"{kind} | {rate:.0%}", faulty, f"{healthy.seconds:.2f} | {ratio:.2f} | {tries}"), flush=True)
                break
    return broken


def busy(what: str) -> bool:
    """Whether a promise may be broken because the machine had other things to do."""
    return what.startswith("pace") or (what.startswith("alone") and "took longer than" in what)


def row(name: str, one: Run, times: str) -> str:
    """A row of the table; a call of a whole group counts once."""
    calls = sum(1 if call.function == "group" else len(call.texts) for call in one.calls)
    faults = " | ".join(str(one.statuses()[status]) for status in ("ok", "abstain", "timeout", "error"))
    return (
        f"| {name} | {calls} | {faults} | {one.processes} | {one.children} | {one.left} | {one.seconds:.2f} | {times} |"
    )


if __name__ == "__main__":
    sys.exit(main())
