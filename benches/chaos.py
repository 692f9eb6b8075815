"""Runs that are killed -9 in every part, again and again: nothing is lost, nothing trained twice, nothing left behind.

    python -m benches.chaos [--runs 200] [--jobs 2] [--seed 0] [--folder FOLDER]

A run is a driver process with 2-4 actors and 1-2 scorers in processes of their own (`benches.chaos_driver`). While it
works, its processes are killed with SIGKILL or stopped for a while, each time when the ledger has grown by a random
amount; a driver that was killed is started again with what it has left on disk, until the run is done. Every second run
is deterministic; max_staleness goes through 0 .. 3; engines refuse prompts, methods drop groups, learners are lost.

Then the files are counted again:

    lost         numbers of the prompt stream that were neither trained nor dropped
    twice        trained more than once: by the ledger's lineage, or by what the learner itself remembers
    unexplained  dropped, and neither the engine nor the filter nor the attempts in the ledger say why
    audit        runs of which `alignlab audit` is not green
    learner      runs whose learner is not where a new one comes to that is given what ledger and payloads say
    differs      deterministic runs that ended elsewhere than the same run without any harm
    unfinished   runs that did not come to their last step
    behind       processes that outlived their driver

Ends with 1 unless all are 0; then the folders of the runs concerned are kept, and named.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.audit import Audit, audit
from alignlab.ledger import read_ledger
from alignlab.payloads import Missing, Payloads, unpack_rollout, with_scores
from alignlab.replay import Lineage
from benches.chaos_driver import Case, drive, preload
from tests.rig import HashLearner, batches, refused

FAULTS = ("lost", "twice", "unexplained", "audit", "learner", "differs", "unfinished", "behind")
KINDS = ("driver", "actor", "scorer", "freeze", "pause")  # the first three are killed; an actor, the driver stopped
WEIGHTS = (25, 25, 20, 20, 10)
MARK = "ALIGNLAB_CHAOS"  # environment of all that a driver starts
RUN_SECONDS = 120.0  # of one run, all its drivers together
GONE_SECONDS = 10.0  # in which all processes of a killed driver are gone
STARTS = 40  # of one run's driver
GAP = 2000.0  # bytes of ledger between two strikes, mean: about 16 records
STILL = 3.0  # seconds without a record after which a strike does not wait for more


@dataclass
class Report:
    """What befell one run and what became of it; `details` are sentences about its faults, `notes` about the rest."""

    faults: Counter[str] = field(default_factory=Counter)
    strikes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fault(self, name: str, count: int, detail: str) -> None:
        """Count, where there is something to count."""
        if count:
            self.faults[name] += count
            self.details.append(f"{name}: {detail}")


def play(case: Case, home: Path) -> Report:
    """One case from its beginning to its audit, in `home`/case-N. This process must have no threads: it forks."""
    report, folder = Report(), home / f"case-{case.number:04d}"
    case.write(folder)
    chaos = Chaos(case, folder, report)
    try:
        if chaos.run():
            Check(case, folder, report).all()
            if case.deterministic:
                compare(case, folder, report)
    except Exception:
        report.fault("audit", 1, traceback.format_exc())
    return report


# ---------------------------------------------------------------- harm
class Chaos:
    """Starts the driver of one run again and again, and harms it meanwhile."""

    def __init__(self, case: Case, folder: Path, report: Report) -> None:
        self.case, self.folder, self.report = case, folder, report
        self._draw = random.Random(f"chaos/{case.seed}/{case.number}")
        self._mark = f"{os.getpid()}-{case.number}-{case.seed}"
        self._strikes = list(self._drawn())
        self._frozen: dict[int, float] = {}  # pid -> when it may go on
        self._end = time.monotonic() + RUN_SECONDS

    def _drawn(self) -> Iterator[tuple[str, float, float]]:
        """(kind, bytes by which the ledger has to grow first, seconds to wait then), at least one for the driver."""
        kinds = self._draw.choices(KINDS, WEIGHTS, k=self._draw.randint(4, 8))
        if "driver" not in kinds:
            kinds[self._draw.randrange(len(kinds))] = "driver"
        for kind in kinds:
            grown = 0.0 if self._draw.random() < 0.1 else self._draw.expovariate(1 / GAP)
            yield kind, grown, self._draw.uniform(0.0, 0.05 if grown else 1.0)

    def run(self) -> bool:
        """Whether the run came to its end, in bounded time."""
        for _ in range(STARTS):
            driver = fork(self.folder, self._mark)
            code = self._attend(driver)
            if behind := left_behind(self._mark, self._thaw):
                self.report.fault("behind", len(behind), f"processes {behind} outlived driver {driver}")
                return False
            if code == 0:
                return True
            if code > 0:
                self.report.notes.append(f"ended by itself: {last_line(self.folder / 'driver.log')}")
            self.report.events["ended by itself" if code > 0 else "killed and resumed"] += 1
            if time.monotonic() > self._end:
                break
        self.report.fault("unfinished", 1, f"after {RUN_SECONDS:g} s or {STARTS} starts; see driver.log")
        return False

    def _attend(self, driver: int) -> int:
        """Harm one driver and what belongs to it until it ends; its exit code, negative for a signal."""
        size, since = self._size(), time.monotonic()
        while True:
            pid, status = os.waitpid(driver, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self._thaw()
            now = time.monotonic()
            if now > self._end:
                os.kill(driver, signal.SIGKILL)
            elif self._strikes and self._due(size, now - since):
                time.sleep(self._strikes[0][2])
                self._strike(driver, self._strikes.pop(0)[0])
                size, since = self._size(), time.monotonic()
            time.sleep(0.004)

    def _due(self, size: int, seconds: float) -> bool:
        return self._size() - size >= self._strikes[0][1] or seconds > STILL

    def _strike(self, driver: int, kind: str) -> None:
        if kind in ("driver", "pause"):
            victims = [driver]
        else:
            known = family(driver)
            victims = known["scorer"] if kind == "scorer" else known["actor"]
        if not victims:
            self.report.strikes["missed"] += 1
            return
        self.report.strikes[kind] += 1
        victim = self._draw.choice(victims)
        stops = kind in ("freeze", "pause")
        send(victim, signal.SIGSTOP if stops else signal.SIGKILL)
        if stops:  # shorter than actors.suspect_timeout, longer, or longer than silence_timeout
            self._frozen[victim] = time.monotonic() + self._draw.choice((0.2, 1.0, 3.0))

    def _thaw(self) -> None:
        """Let those go on that were stopped for long enough."""
        for frozen in [pid for pid, until in self._frozen.items() if time.monotonic() >= until]:
            del self._frozen[frozen]
            send(frozen, signal.SIGCONT)

    def _size(self) -> int:
        with suppress(OSError):
            return (self.folder / "run" / "ledger.jsonl").stat().st_size
        return 0


def fork(folder: Path, mark: str, calm: bool = False) -> int:
    """A driver, in a process that has everything imported already; its pid. It prints into FOLDER/driver.log."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        os.environ[MARK] = mark
        log = os.open(folder / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        print(f"-- driver {os.getpid()}", flush=True)
        code = drive(folder, calm)
        sys.stdout.flush()
    finally:
        os._exit(code)


def last_line(log: Path) -> str:
    """Of what a driver has printed."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "nothing was printed"


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def family(driver: int) -> dict[str, list[int]]:
    """The processes of a driver that are worth killing: actors; scorers, each of which is watched by another."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found: dict[str, list[int]] = {"actor": [], "scorer": []}
    for pid in sorted(children.get(driver, [])):
        command = command_of(pid)
        if "actors.process_host" in command:
            found["actor"].append(pid)
        elif "rewards.worker" in command:
            found["scorer"] += [pid, *children.get(pid, [])]
    return found


def command_of(pid: int) -> str:
    """What a process was started with; empty where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def left_behind(mark: str, thaw: Callable[[], None]) -> list[str]:
    """Processes with this mark that are still there when they ought to be gone; they are ended then.

    One that was stopped before it could ask the kernel to end it with its parent goes once it is thawed.
    """
    wanted, until = f"{MARK}={mark}\0".encode(), time.monotonic() + GONE_SECONDS
    while True:
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if wanted in environ.read_bytes() + b"\0":
                    found.append(int(environ.parent.name))
        if not found or time.monotonic() > until:
            break
        thaw()
        time.sleep(0.02)
    named = [f"{pid} ({command_of(pid)})" for pid in found]
    for pid in found:
        send(pid, signal.SIGKILL)
    return named


# ---------------------------------------------------------------- counting again
class Check:
    """Counts one finished run from its files, and does not ask the audit how."""

    def __init__(self, case: Case, folder: Path, report: Report) -> None:
        self.case, self.folder, self.report, self.run = case, folder, report, folder / "run"
        self.payloads = Payloads(self.run / "payloads")
        self.records = lineage(self.run)
        newest = max((self.run / "checkpoints").glob("step-*"))
        self.learnt = json.loads((newest / "trainer" / "state.json").read_text())

    def all(self) -> None:
        """Every count."""
        found = audit(self.run)
        self.report.fault("audit", bool(found.problems), "; ".join(found.problems[:5]))
        self._events(found)
        self._once()
        self._drops()
        self._learner()

    def _events(self, found: Audit) -> None:
        wanted = ("retried", "refused", "reused", "done")
        self.report.events.update({name: found.results[name] for name in wanted})
        self.report.events["groups"] += found.groups["admitted"]
        self.report.events["dropped"] += found.groups["dropped"]
        self.report.events["undone records"] += found.records - found.surviving
        self.report.events["pruned payloads"] += found.payloads["pruned"]
        reasons = Counter(attempt.reason for attempt in found.attempts)
        self.report.events["learners lost"] += reasons["learner lost"]

    def _once(self) -> None:
        trained = [ordinal for _, groups in batches(self.run) for ordinal in groups]
        dropped = [record["group"] for record in self.records if record["kind"] == "dropped"]
        lost = set(range(max([*trained, *dropped]) + 1)) - {*trained, *dropped}
        self.report.fault("lost", len(lost), f"groups {sorted(lost)}")
        for who, groups in (("ledger", trained), ("learner", self.learnt["groups"])):
            again = [ordinal for ordinal, times in Counter(groups).items() if times > 1]
            self.report.fault("twice", len(again), f"groups {again} by the {who}")
        wrong = trained != self.learnt["groups"] or self.learnt["version"] != self.case.steps
        self.report.fault("learner", wrong, f"it remembers {self.learnt['groups']}, the ledger says {trained}")

    def _drops(self) -> None:
        """A reason has to follow from something else than the record that states it."""
        lives: dict[int, list[dict]] = {}
        for record in self.records:
            if record["kind"] == "admitted":
                lives[record["group"]] = []
            if "group" in record:
                lives.setdefault(record["group"], []).append(record)
        for ordinal, life in lives.items():
            for record in life:
                if record["kind"] == "dropped" and not self._explained(ordinal, record["reason"], life):
                    self.report.fault("unexplained", 1, f"group {ordinal}: {record['reason']}")

    def _explained(self, ordinal: int, reason: str, life: list[dict]) -> bool:
        if reason.startswith("failed: "):
            return refused(ordinal, self.case.refuse)
        if reason.startswith("retries: "):
            return sum(record["kind"] == "returned" for record in life) >= self.case.attempts
        if reason != "filter mixed" or not self.case.filtered:
            return False
        named = {record["kind"]: record["payload"] for record in life if "payload" in record}
        try:
            group = unpack_rollout(self.payloads.read(named.get("done") or named["reused"]))
            group = with_scores(group, self.payloads.read(named["scored"]))
        except Missing:
            return self.case.small  # it was pruned
        values = [score.value for score in group.components["tokens"] if math.isfinite(score.value)]
        return len(set(values)) < 2

    def _learner(self) -> None:
        """A new learner is given what ledger and payloads say, and comes to where the run's has come."""
        if self.case.small:
            return
        told, again = Lineage.read(self.run / "ledger.jsonl"), HashLearner(self.case.config(self.folder))
        for step in range(self.case.steps):
            asyncio.run(again.step(*told.batch(step, self.payloads)[:1], step, told.batch(step, self.payloads)[1]))
        wrong = again.hash != self.learnt["hash"]
        self.report.fault("learner", wrong, f"its hash is {self.learnt['hash'][:12]}, replayed {again.hash[:12]}")


def lineage(run: Path) -> list[dict]:
    """The records that count, in order."""
    kept: list[tuple[int, dict]] = []
    for at, record in read_ledger(run / "ledger.jsonl"):
        if record["kind"] == "begin":
            kept = [each for each in kept if each[0] < record["offset"]]
        kept.append((at, record))
    return [record for _, record in kept]


def compare(case: Case, folder: Path, report: Report) -> None:
    """The same run without any harm ends with the same learner, after the same batches."""
    calm = folder.with_name(f"{folder.name}-calm")
    case.write(calm)
    _, status = os.waitpid(fork(calm, "calm", calm=True), 0)
    if status:
        report.fault("unfinished", 1, f"the run without harm; see {calm}/driver.log")
        return
    ends = [Check(case, each, Report()) for each in (folder, calm)]
    hashes = [end.learnt["hash"] for end in ends]
    report.fault("differs", hashes[0] != hashes[1], f"{hashes[0][:12]}, without harm {hashes[1][:12]}")
    if not report.faults:
        shutil.rmtree(calm)


# ---------------------------------------------------------------- many of them
def work(numbers: list[int], seed: int, home: Path, pipe: int) -> None:
    """Play some cases; a line of JSON for each into the pipe."""
    for number in numbers:
        started = time.monotonic()
        report = play(Case.draw(number, seed), home)
        if not report.faults:
            shutil.rmtree(home / f"case-{number:04d}")
        parts = (report.faults, report.strikes, report.events)
        line = json.dumps([number, time.monotonic() - started, *map(dict, parts), report.details + report.notes])
        os.write(pipe, line.encode() + b"\n")


def start(numbers: list[int], seed: int, home: Path) -> tuple[int, int]:
    """(pid, pipe) of a process that plays these cases."""
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        return pid, ours
    try:
        work(numbers, seed, home, theirs)
    finally:
        os._exit(0)


def results(pipes: list[int]) -> Iterator[list]:
    """The lines of all pipes as they come."""
    import selectors

    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(os.fdopen(pipe, "rb", 0), selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                line = key.fileobj.readline()
                if line:
                    yield json.loads(line)
                else:
                    selector.unregister(key.fileobj)


def main() -> int:
    """Play all runs, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are made (a temporary folder)")
    arguments = parser.parse_args()
    home = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    os.environ["OMP_NUM_THREADS"] = "1"
    preload()
    began, shares = time.monotonic(), [list(range(arguments.runs))[j :: arguments.jobs] for j in range(arguments.jobs)]
    jobs = [start(share, arguments.seed, home) for share in shares]
    totals, done, seconds = [Counter(), Counter(), Counter()], 0, 0.0
    for number, took, *parts, details in results([pipe for _, pipe in jobs]):
        done, seconds = done + 1, seconds + took
        for total, part in zip(totals, parts, strict=True):
            total.update(part)
        for detail in details:
            print(f"case {number} ({home}/case-{number:04d}): {detail}", flush=True)
        if done % 10 == 0 or done == arguments.runs:
            print(f"{done} of {arguments.runs} runs, {time.monotonic() - began:.0f} s", flush=True)
    for pid, _ in jobs:
        os.waitpid(pid, 0)
    faults, strikes, events = totals
    faults["unfinished"] += arguments.runs - done
    print("strikes: " + ", ".join(f"{strikes[kind]} {kind}" for kind in (*KINDS, "missed")))
    print("events: " + ", ".join(f"{count} {name}" for name, count in sorted(events.items())))
    print(f"a run took {seconds / max(done, 1):.1f} s of a job")
    print("counts: " + ", ".join(f"{faults[name]} {name}" for name in FAULTS))
    if not faults.total() and arguments.folder is None:
        shutil.rmtree(home)
    return int(faults.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
