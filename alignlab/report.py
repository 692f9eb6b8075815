"""The verb `report`: one HTML file about one run or several, made from their files only.

It needs no network, no script and no other file, reads on a screen and on paper, and shows what there is: a section
whose numbers a run does not have is left out. The sections are functions of `alignlab.run_files.RunFiles`, in
report_headline, report_curves, report_weighting, report_rewards and report_rollouts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from alignlab.markup import Markup, join, tag
from alignlab.plan import shown
from alignlab.report_curves import bottleneck, legend, other_curves, policy_curves, reward_curves
from alignlab.report_headline import benchmarks, environment, facts, options
from alignlab.report_rewards import agreement, overoptimization, statuses, warnings
from alignlab.report_rollouts import rollouts
from alignlab.report_weighting import pareto, weighting
from alignlab.run_dir import write_atomically
from alignlab.run_files import RunFiles, read_run
from core.errors import UserError


class Section(NamedTuple):
    """A part of the page. `overlaid`: runs share its pictures, one colour each."""

    title: str
    make: Callable[[Sequence[RunFiles]], Markup]
    intro: str = ""
    overlaid: bool = False


SECTIONS = (
    Section(
        "Benchmarks",
        benchmarks,
        "Share of right completions [95 % interval, clustered by problem]; hollow: before, filled: after. The gain is "
        "the mean change over the same problems.",
    ),
    Section("Warnings", warnings),
    Section("Reward", reward_curves, "Means over a step's completions; the total has the weights of its step.", True),
    Section("Policy and time", policy_curves, overlaid=True),
    Section("Which pool is the bottleneck", bottleneck),
    Section(
        "Weights, constraints and multipliers",
        weighting,
        "A constraint's measured mean against its bound (dashed, the wrong side shaded), its multiplier beneath.",
        True,
    ),
    Section(
        "Pareto plot",
        pareto,
        "Each run's way through the means of two components, light at the start, dark at the end: of evaluations where "
        "they score components, else of stretches of steps. Ringed: on the front of all points. Dashed: bounds.",
        True,
    ),
    Section(
        "Over-optimisation",
        overoptimization,
        "The proxy is what is trained on, the gold component is only watched. Proxy up and gold down is a reward that "
        "is being gamed.",
    ),
    Section("Agreement of the components", agreement),
    Section("Scores that failed", statuses, "A completion without a score is left out of the means and counted here."),
    Section(
        "Rollouts",
        rollouts,
        "The best and the worst completion of the groups whose totals are farthest apart, from the first, the middle "
        "and the last step. Blue: advantage above 0, orange: below.",
    ),
    Section("All other metrics", other_curves, overlaid=True),
    Section("Options that differ from their defaults", options),
    Section("Environment", environment),
)

STYLE = """
body { font: 14px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1200px; margin: 0 auto; padding: 16px; }
h1 { font-size: 26px; margin: 8px 0; } h2 { font-size: 19px; margin: 32px 0 6px; border-bottom: 1px solid #ddd; }
h3 { font-size: 15px; margin: 16px 0 6px; }
nav { font-size: 13px; margin: 12px 0; display: flex; flex-wrap: wrap; gap: 2px 14px; }
nav a { color: #0072b2; text-decoration: none; }
p { margin: 6px 0; max-width: 900px; } .note { color: #666; font-size: 12px; }
table { border-collapse: collapse; margin: 8px 0; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0; border-bottom: 1px solid #eee; }
td { overflow-wrap: anywhere; } th { font-weight: 600; }
thead th { color: #666; font-weight: normal; } .wide { overflow-x: auto; }
.wide td { min-width: 70px; }
.benchmarks td, .benchmarks th { vertical-align: middle; } .number { white-space: nowrap; }
.options td, .options th { font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace; }
.matrix td { padding: 2px; min-width: 64px; } .matrix td div { padding: 4px 8px; text-align: right; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 0 20px; margin: 10px 0; }
.small { grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
.large { grid-column: span 2; grid-row: span 4; } .large > div { grid-row: 2 / span 3; }
figure { margin: 0 0 14px; break-inside: avoid; display: grid; grid-row: span 2; grid-template-rows: subgrid; }
figcaption { font-size: 13px; padding-bottom: 2px; } figcaption > div:first-child { display: flex; flex-wrap: wrap;
  justify-content: space-between; column-gap: 10px; } .ends { color: #444; padding-right: 12px; }
svg { width: 100%; height: auto; display: block; } svg.intervals { width: 220px; }
.key span { margin-right: 10px; white-space: nowrap; } .key svg.swatch { display: inline-block; width: 22px;
  height: 10px; margin-right: 4px; }
text { font: 10px system-ui, Helvetica, Arial, sans-serif; } .tick { fill: #777; } .axis { fill: #555; }
.grid-line { stroke: #e6e6e6; } polyline { fill: none; stroke-linejoin: round; } .broken { fill: #d55e00; opacity: .1; }
.mark { stroke: #a00; stroke-dasharray: 3 2; } .front { fill: none; stroke: #111; stroke-width: 1.2; }
.rollout { margin: 12px 0; padding: 8px 0; border-top: 1px solid #ddd; break-inside: avoid; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 10px; }
.pair > div { padding: 8px; border-radius: 4px; } .scores span { margin-left: 10px; font-size: 12px; color: #444; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace;
  margin: 6px 0; max-height: 420px; overflow: auto; } .prompt { color: #555; }
@page { size: A4; margin: 12mm; }
@media print { body { font-size: 11px; max-width: none; padding: 0; -webkit-print-color-adjust: exact;
  print-color-adjust: exact; } nav { display: none; } pre { max-height: none; } h2 { break-after: avoid; }
  .grid { grid-template-columns: 1fr 1fr; } .small { grid-template-columns: 1fr 1fr 1fr; } }
"""


def report(arguments: argparse.Namespace) -> int:
    """`alignlab report RUN... [--out FILE]`. Raises UserError."""
    folders = [Path(run).expanduser() for run in arguments.runs]
    first = folders[0] if len(folders) == 1 else folders[0].parent
    out = Path(arguments.out).expanduser() if arguments.out else first / "report.html"
    write_report(folders, out)
    print(f"report: {shown(out.absolute())}")
    return 0


def write_report(folders: Sequence[Path], out: Path) -> None:
    """One file about the runs in `folders`. Raises UserError where a folder holds no run or `out` cannot be written."""
    page = render([read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}; name a file that you may write") from None


def render(runs: Sequence[RunFiles]) -> Markup:
    """The page."""
    contents = [(section, content) for section in SECTIONS if (content := section.make(runs))]
    title = " and ".join(run.label for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    links = [tag("a", section.title, href=f"#section-{i}") for i, (section, _) in enumerate(contents)]
    body = join(
        (
            tag("h1", title),
            facts(runs),
            *(tag("p", note) for note in notes),
            tag("nav", *links),
            *(_section(runs, i, section, content) for i, (section, content) in enumerate(contents)),
        )
    )
    head = tag("head", tag("meta", charset="utf-8"), tag("title", title), tag("style", Markup(STYLE)))
    return Markup(f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n")


def _section(runs: Sequence[RunFiles], i: int, section: Section, content: Markup) -> Markup:
    return tag(
        "section",
        tag("h2", section.title, id=f"section-{i}"),
        tag("p", section.intro, class_="note") if section.intro else None,
        legend(runs) if section.overlaid else None,
        content,
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with the folder above where two are called alike."""
    names = [folder.resolve().name for folder in folders]
    often = Counter(names)
    return [n if often[n] == 1 else f"{f.resolve().parent.name}/{n}" for n, f in zip(names, folders, strict=True)]
