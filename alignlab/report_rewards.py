"""The report's sections on whether rewards can be trusted: over-optimisation, agreement of the components, statuses,
warnings. Pure functions of `RunFiles`; nothing measured, no section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from alignlab.markup import Markup, Text, join, number, table, tag
from alignlab.plots import Line, Path, line_plot, path_plot
from alignlab.report_curves import Curve, by_name, colour_of, grid, panel, row, steps_of
from alignlab.report_weighting import stretches
from alignlab.run_files import RunFiles, Series, at_steps, common_steps, last_mean, mean, union

PROXY, GOLD = colour_of(0), colour_of(4)


# ---------------------------------------------------------------- over-optimisation
def overoptimization(runs: Sequence[RunFiles]) -> Markup:
    """The gold component beside the proxy that is trained on: over steps, and over the distance travelled."""
    return join(_overoptimization(run, f": {run.label}" if len(runs) > 1 else "") for run in runs)


def _overoptimization(run: RunFiles, suffix: str) -> Markup | None:
    found = proxy_and_gold(run)
    if found is None:
        return None
    proxy, gold, name = found
    marks = [(step, "alarm") for step, value in run.metrics.get("overoptimization/alarm", ()) if value > 0][:1]
    steps = steps_of([run])
    pictures = (
        line_plot([Line(proxy, PROXY)], unit="proxy", x=steps, x_label="", marks=marks),
        line_plot([Line(gold, GOLD)], unit=f"gold: {name}", x=steps, marks=marks),
    )
    said = "no alarm"
    if marks:
        said = f"alarm after step {marks[0][0]:g}: gold has fallen below its peak, the proxy is above its value there"
    figures = [panel(f"proxy and gold{suffix}", join(pictures), below=said), _by_distance(run, proxy, gold, name)]
    if drop := run.metrics.get("overoptimization/drop"):
        line = Line(drop, GOLD)
        figures.append(panel("gold below its peak", line_plot([line], unit="drop", x=steps, zero=True), ends=line))
    return row(figures)


def proxy_and_gold(run: RunFiles) -> tuple[Series, Series, str] | None:
    """(proxy, gold, its name) over steps: what the alarm compared, else the total and the component rewards.gold."""
    name = str(run.rewards.get("gold") or "gold")
    proxy = run.metrics.get("overoptimization/proxy") or run.metrics.get("reward/total")
    gold = run.metrics.get("overoptimization/gold") or run.metrics.get(f"reward/{name}")
    return (proxy, gold, name) if proxy and gold else None


def _by_distance(run: RunFiles, proxy: Series, gold: Series, name: str) -> Markup | None:
    """Proxy and gold over the root of the KL to the reference, as in Gao et al., arXiv 2210.10760."""
    distances = [metric for metric in run.metrics if metric.startswith("policy/kl_ref")]
    if not distances:
        return None
    kl = run.metrics[distances[0]]
    steps = common_steps([kl, proxy, gold])
    blocks = stretches(len(steps))
    if len(blocks) < 2:
        return None
    moments = [f"steps {steps[b][0]:g} to {steps[b][-1]:g}" for b in blocks]
    root = [sqrt(max(0.0, mean(at_steps(kl, steps[b])))) for b in blocks]
    pictures = []
    for series, label, colour, axis in (
        (proxy, "proxy", PROXY, ""),
        (gold, f"gold: {name}", GOLD, f"√ {distances[0]}"),
    ):
        heights = [mean(at_steps(series, steps[b])) for b in blocks]
        way = Path([*zip(root, heights, strict=True)], moments, colour)
        pictures.append(path_plot([way], x_label=axis, y_label=label, size=(380.0, 220.0)))
    return panel("over the distance from the reference", join(pictures), below="light: early, dark: late")


# ---------------------------------------------------------------- agreement of components
KINDS = {  # diagnostics/<kind>/<component>: title, unit
    "say": ("say in the total: |weight| × spread", "share"),
    "saturated": ("saturated: at the highest value", "share"),
    "spreadless": ("groups without spread", "share"),
    "length_correlation": ("correlation with length in groups", "correlation"),
    "disagreement": ("disagreement of an ensemble's members", "variance"),
}


def agreement(runs: Sequence[RunFiles]) -> Markup:
    """Correlations within groups, each component's say, saturation, groups without spread."""
    return join(_agreement(run, run.label if len(runs) > 1 else None) for run in runs)


def _agreement(run: RunFiles, heading: str | None) -> Markup | None:
    names = run.names("diagnostics/")
    pairs = {
        pair: run.metrics[f"diagnostics/correlation/{name}"]
        for name in run.names("diagnostics/correlation/")
        if (pair := pair_of(name, run.components))
    }
    kinds = union(name.partition("/")[0] for name in names if "/" in name and not name.startswith("correlation/"))
    alone = [
        Curve(name.replace("_", " "), "share", (f"diagnostics/{name}",), True) for name in names if "/" not in name
    ]
    pictures = [by_name(run, f"diagnostics/{kind}/", *KINDS.get(kind, (kind.replace("_", " "), ""))) for kind in kinds]
    curves = [_correlation(run, pair, points) for pair, points in pairs.items()]
    if not names:
        return None
    return join(
        (tag("h3", heading) if heading else None, grid([run], alone, first=pictures), _matrix(pairs), row(curves))
    )


def _correlation(run: RunFiles, pair: tuple[str, str], points: Series) -> Markup:
    line = Line(points)
    return panel(" and ".join(pair), line_plot([line], unit="correlation", x=steps_of([run]), zero=True), ends=line)


def _matrix(pairs: Mapping[tuple[str, str], Series]) -> Markup | None:
    """The correlations at the end of the run, tinted by size and sign."""
    if not pairs:
        return None
    names = union(name for pair in pairs for name in pair)
    ends = {pair: last_mean(points) for pair, points in pairs.items()}
    ends |= {(b, a): value for (a, b), value in ends.items()}
    rows = [[name, *(_tinted(ends.get((name, other))) for other in names)] for name in names]
    caption = tag("p", "Correlation within groups, mean over the last tenth of the steps:", class_="note")
    return join((caption, table(["", *names], rows, class_="matrix")))


def _tinted(value: float | None) -> Text:
    if value is None:
        return ""
    colour = "0,114,178" if value >= 0 else "213,94,0"
    tint = f"background:rgba({colour},{min(1.0, abs(value)) * 0.6:.2f})"
    return tag("div", f"{value:+.2f}".replace("-", "−"), style=tint)


def pair_of(name: str, components: Sequence[str]) -> tuple[str, str] | None:
    """`a/b` as two components, whose own names may hold a slash; none if it is no pair.

    >>> pair_of("style/short/right", ["right", "style/short"])
    ('style/short', 'right')
    """
    words = name.split("/")
    splits = [("/".join(words[:i]), "/".join(words[i:])) for i in range(1, len(words))]
    known = [pair for pair in splits if {*pair} <= {*components}]
    return next(iter(known or splits), None)


# ---------------------------------------------------------------- statuses, warnings
def statuses(runs: Sequence[RunFiles]) -> Markup:
    """How often each component had no score, how long it takes, how far its scores spread within groups."""
    rows, named = [], len(runs) > 1
    for run in runs:
        for name in run.components:
            columns = [run.metrics.get(f"reward/{name}_{what}") for what in ("failed", "abstained", "seconds", "std")]
            if any(columns):
                told = [_share(columns[0]), _share(columns[1]), _seconds(columns[2]), _ends(columns[3])]
                rows.append([f"{run.label}: {name}" if named else name, *told])
    if not rows:
        return Markup("")
    head = ["component", "failed (most in a step)", "abstained (most)", "seconds a completion (most)"]
    curves = []
    for name in union(name for run in runs for name in run.components):
        metrics = (f"reward/{name}_failed", f"reward/{name}_abstained")
        if any(value for run in runs for metric in metrics for _, value in run.metrics.get(metric, ())):
            curves.append(Curve(f"{name}: no score", "share", metrics, True))
    return join((table([*head, "spread within groups"], rows), grid(runs, curves)))


def warnings(runs: Sequence[RunFiles]) -> Markup:
    """What the run warned of, each kind once with its first and last step."""
    rows = []
    for run in runs:
        kinds: dict[tuple[str, str], list[Mapping[str, Text]]] = {}
        for warning in run.warnings:
            kinds.setdefault((str(warning.get("name", "")), str(warning.get("advice", ""))), []).append(warning)
        for (name, advice), found in kinds.items():
            first, last = found[0].get("step"), found[-1].get("step")
            when = f"step {first}" if len(found) == 1 else f"{len(found)} times, steps {first} to {last}"
            rows.append(
                [f"{run.label}: {name}" if len(runs) > 1 else name, when, str(found[-1].get("text", "")), advice]
            )
    return table(["warning", "when", "last said", "what to do"], rows) if rows else Markup("")


def _share(points: Series | None) -> str:
    if not points:
        return "–"
    values = [value for _, value in points]
    return f"{mean(values):.1%} ({max(values):.1%})"


def _seconds(points: Series | None) -> str:
    if not points:
        return "–"
    values = [value for _, value in points]
    return f"{number(mean(values), 2)} ({number(max(values), 2)})"


def _ends(points: Series | None) -> str:
    return " → ".join(number(value) for value in Line(points).ends()) if points else "–"
