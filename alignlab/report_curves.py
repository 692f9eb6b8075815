"""The report's curves over steps: reward and its components, evaluations, the policy's health, where the time went.

Pure functions of `RunFiles`. Several runs share each picture, one colour a run. What no run has measured is left out,
what never changed is one line of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from alignlab.balance import balance, said
from alignlab.markup import Markup, Text, join, number, tag
from alignlab.plots import COLOURS, DASHES, Line, area_plot, line_plot, span, window
from alignlab.run_files import RunFiles, union
from alignlab.timeline import PARTS
from learner.profiling import PHASES


class Curve(NamedTuple):
    """One picture: metrics with one unit. `zero`: the axis shows 0."""

    title: str
    unit: str
    names: tuple[str, ...]
    zero: bool = False


POLICY = (
    Curve("length", "tokens", ("completion/length_mean",)),
    Curve("truncated", "share", ("completion/truncated",), True),
    Curve("entropy", "nats per token", ("policy/entropy",), True),
    Curve("KL to the reference", "nats per token", ("policy/kl_ref",), True),
    Curve("KL of a step's updates", "nats per token", ("policy/kl_old",), True),
    Curve("mismatch of engine and learner (KL)", "nats per token", ("policy/mismatch_kl",), True),
    Curve("clipped tokens", "share", ("policy/clip_low", "policy/clip_high"), True),
    Curve("staleness", "updates", ("rollout/staleness", "rollout/staleness_max"), True),
    Curve("gradient norm", "norm", ("optim/grad_norm",), True),
    Curve("groups without signal", "share", ("reward/equal_groups", "reward/unscorable"), True),
    Curve("loss", "loss", ("policy/loss",)),
    Curve("speed", "tokens per second", ("rollout/tokens_per_second",), True),
    Curve("actors at work, and what the learner reaches of its device", "share", ("rollout/busy", "learner/mfu"), True),
)
# Seconds of a step and of its part in the learner, by what they went for; what the parts leave is `other`.
STEP = tuple(f"time/{part}" for part in reversed(PARTS))
LEARNER = tuple(f"time/learner_{phase}" for phase in PHASES)
SPLITS = {"time of a step": ("time/step", STEP), "time of the learner": ("time/learner", LEARNER)}
SEEN = 0.005  # a part with a smaller share is in `other`
ELSEWHERE = r"weighting/|diagnostics/|overoptimization/|reward/|eval/[^ ]*/(accuracy|low|high)$|time/(step|learner)$"


# ---------------------------------------------------------------- sections
def reward_curves(runs: Sequence[RunFiles]) -> Markup:
    """Evaluations with their intervals, the total, each component."""
    benchmarks = union(name.removesuffix("/accuracy") for r in runs for name in r.names("eval/") if _accuracy(name))
    names = union(name for run in runs for name in run.components)
    curves = [Curve("total", "reward", ("reward/total",))]
    curves += [Curve(name, "reward", (f"reward/{name}", f"reward/{name}_shaped")) for name in names]
    return smoothing(runs, grid(runs, curves, first=[_evaluation(runs, name) for name in benchmarks]))


def policy_curves(runs: Sequence[RunFiles]) -> Markup:
    """Lengths, entropy, divergences, clipping, staleness, gradient, and the time of each run's steps."""
    return smoothing(
        runs, grid(runs, POLICY, last=[_split(run, title, len(runs) > 1) for run in runs for title in SPLITS])
    )


def other_curves(runs: Sequence[RunFiles]) -> Markup:
    """Small pictures of every metric that no other section shows."""
    drawn = {name for curve in POLICY for name in curve.names} | {*STEP, *LEARNER}
    names = union(n for run in runs for n in run.metrics if n not in drawn and not re.match(ELSEWHERE, n))
    return grid(runs, [Curve(name, "", (name,)) for name in sorted(names)], class_="grid small")


def bottleneck(runs: Sequence[RunFiles]) -> Markup:
    """Which pool each run waits for, and what split of its devices would be best; nothing where it was not measured."""
    found = [(run, balance(run.path)) for run in runs]
    lines = [(run.label if len(runs) > 1 else "", line) for run, each in found if each for line in said(each)]
    return join(tag("p", f"{label}: " if label else None, line) for label, line in lines)


def legend(runs: Sequence[RunFiles]) -> Markup | None:
    """Which colour is which run; nothing to tell of one run."""
    return None if len(runs) < 2 else key([(run.label, colour_of(i), run_dash(i)) for i, run in enumerate(runs)])


# ---------------------------------------------------------------- pictures
def grid(
    runs: Sequence[RunFiles],
    curves: Iterable[Curve],
    class_: str = "grid",
    smooth: bool = True,
    first: Sequence[Markup | None] = (),
    last: Sequence[Markup | None] = (),
) -> Markup:
    """A picture of each curve that a run has, between `first` and `last`; those that never changed as text below."""
    pictures, constants = [], []
    for curve in curves:
        if not any(name in run.metrics for run in runs for name in curve.names):
            continue
        if (still := _constant(runs, curve)) is None:
            pictures.append(curve_panel(runs, curve, smooth=smooth))
        else:
            constants.append(still)
    text = tag("p", "Never changed: ", join(constants, "; "), ".", class_="note") if constants else None
    return join((row([*first, *pictures, *last], class_), text))


def row(pictures: Iterable[Markup | None], class_: str = "grid") -> Markup | None:
    """The pictures that there are, side by side."""
    there = [picture for picture in pictures if picture is not None]
    return tag("div", *there, class_=class_) if there else None


def curve_panel(runs: Sequence[RunFiles], curve: Curve, *, smooth: bool = True) -> Markup:
    """One curve of every run that has it; several metrics differ in dashes, and in colour where those are not runs."""
    lines = []
    for i, run in enumerate(runs):
        for j, name in enumerate(curve.names):
            if points := run.metrics.get(name):
                colour, dash = (
                    (colour_of(j), dash_of(j)) if len(runs) == 1 else (colour_of(i), dash_of(j) or run_dash(i))
                )
                lines.append(Line(points, colour, _short(name), dash, smooth=smooth))
    unique = {line.label: line for line in lines}.values()
    names = key([(each.label, each.colour if len(runs) == 1 else "#333", each.dash) for each in unique])
    picture = line_plot(lines, unit=curve.unit, zero=curve.zero, x=steps_of(runs))
    ends = lines[0] if len(lines) == 1 else None
    return panel(curve.title, picture, ends=ends, below=names if len(unique) > 1 else None)


def by_name(run: RunFiles, prefix: str, title: str, unit: str = "", *, smooth: bool = True) -> Markup | None:
    """All metrics of a run below a prefix in one picture; dashes show curves that lie upon each other."""
    lines = [
        Line(run.metrics[prefix + name], colour_of(i), name, dash_of(i), smooth=smooth)
        for i, name in enumerate(run.names(prefix))
    ]  # fmt: skip
    if not lines:
        return None
    picture = line_plot(lines, unit=unit or "value", x=steps_of([run]), zero=unit in ("share", "weight"))
    return panel(title, picture, below=key([(line.label, line.colour, line.dash) for line in lines]))


def panel(title: str, picture: Markup, *, ends: Line | None = None, below: Text = None, class_: str = "") -> Markup:
    """A picture with its title; `ends`: the curve whose first and last value are named, `below`: a line of text."""
    values = tag("span", " → ".join(number(value) for value in ends.ends()), class_="ends") if ends else None
    caption = tag(
        "figcaption", tag("div", tag("b", title), values), tag("div", below, class_="note") if below else None
    )
    return tag("figure", caption, tag("div", picture), class_=class_ or None)


def key(entries: Iterable[tuple[str, str, str | None]]) -> Markup:
    """A legend: (name, colour, dash) of each curve."""
    drawn = [
        tag(
            "span",
            tag("svg", tag("line", x1=0.0, x2=22.0, y1=5.0, y2=5.0, stroke=colour, stroke_width=3.0,
                           stroke_dasharray=dash), viewBox="0 0 22 10", class_="swatch"),
            name,
        )
        for name, colour, dash in entries
    ]  # fmt: skip
    return tag("span", *drawn, class_="key")


def colour_of(index: int) -> str:
    """The colour of the run (or the curve) with this place."""
    return COLOURS[index % len(COLOURS)]


def dash_of(index: int) -> str | None:
    """The dashes of the curve with this place; the first is solid."""
    return DASHES[index % len(DASHES)]


def run_dash(index: int) -> str | None:
    """The dashes of the run with this place: those beyond the colours have the colours again, and dashes."""
    return dash_of(index // len(COLOURS))


def steps_of(runs: Sequence[RunFiles]) -> tuple[float, float]:
    """The range of steps of all runs."""
    low, high = span([points[i][0] for run in runs for points in run.metrics.values() for i in (0, -1)] or [0.0, 1.0])
    return (0.0 if low <= 1 else low), high


def smoothing(runs: Sequence[RunFiles], pictures: Markup) -> Markup:
    """The pictures, if there are any, below a word on how their curves are smoothed."""
    widths = sorted({window(max(map(len, run.metrics.values()))) for run in runs if run.metrics})
    if not pictures or widths == [1]:
        return pictures
    told = f"Thin: each step; thick: mean over {' or '.join(map(str, widths))} steps around it."
    return join((tag("p", told, class_="note"), pictures))


def _evaluation(runs: Sequence[RunFiles], benchmark: str) -> Markup:
    """Accuracy over steps, with its 95 % intervals."""
    lines = []
    for i, run in enumerate(runs):
        accuracy, low, high = (run.metrics.get(f"eval/{benchmark}/{n}", []) for n in ("accuracy", "low", "high"))
        ends = [(y[1], z[1]) for y, z in zip(low, high, strict=False)]
        if accuracy:
            lines.append(
                Line(
                    accuracy,
                    colour_of(i),
                    dash=run_dash(i),
                    intervals=ends if len(ends) == len(accuracy) else (),
                    smooth=False,
                )
            )
    picture = line_plot(lines, unit="accuracy", x=steps_of(runs))
    return panel(f"{benchmark}: accuracy", picture, ends=lines[0] if len(lines) == 1 else None)


def _split(run: RunFiles, title: str, named: bool) -> Markup | None:
    """Seconds of each step, by what they went for; only steps that have all parts."""
    whole, names = dict(run.metrics.get(SPLITS[title][0], ())), SPLITS[title][1]
    parts = {name: dict(run.metrics[name]) for name in names if name in run.metrics}
    steps = [step for step in whole if all(step in values for values in parts.values())]
    if not parts or len(steps) < 2:
        return None
    total = sum(whole[step] for step in steps) or 1.0
    seen = [name for name in parts if sum(parts[name][step] for step in steps) >= SEEN * total]
    layers = [(colour_of(names.index(name)), [parts[name][step] for step in steps]) for name in seen]
    layers.append(("#999999", [max(0.0, whole[s] - sum(parts[name][s] for name in seen)) for s in steps]))
    told = [*(_short(name).removeprefix("learner ") for name in seen), "other"]
    shares = [(f"{n} {sum(values) / total:.0%}", c, None) for n, (c, values) in zip(told, layers, strict=True)]
    caption = title + (f": {run.label}" if named else "")
    return panel(caption, area_plot(layers, steps, unit="seconds"), below=key(shares))


def _constant(runs: Sequence[RunFiles], curve: Curve) -> str | None:
    """The one value of each metric of the curve, in words; none if one changed, or there is one step only."""
    found = []
    for name in curve.names:
        values = [y for run in runs for _, y in run.metrics.get(name, ())]
        if len(set(values)) > 1:
            return None
        if values:
            found.append(f"{name} {number(values[0])}")
    return ", ".join(found)


def _accuracy(name: str) -> bool:
    return name.endswith("/accuracy")


def _short(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")
