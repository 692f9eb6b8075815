"""The report's sections on how rewards are weighed: weights, constraints and their multipliers, and the Pareto plot.

Pure functions of `RunFiles`; nothing measured, no section.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from alignlab.markup import Markup, Text, join, number, tag
from alignlab.plots import Bound, Line, Path, Point, Side, line_plot, path_plot
from alignlab.report_curves import Curve, by_name, colour_of, grid, panel, row, run_dash, steps_of
from alignlab.run_files import RunFiles, at_steps, common_steps, mapping, mean, union
from rewards.dynamic import pareto_front

PAIRS = 16  # Pareto plots at most
MOMENTS = 40  # points of a path through the means of steps
BROKEN: dict[str, Side] = {">=": "below", "<=": "above"}
SENSES = {"mu": ">=", "xi": "=", "all": "<=", "projected": ">="}  # of the kinds of rewards.constrained


# ---------------------------------------------------------------- weights, constraints, multipliers
def weighting(runs: Sequence[RunFiles]) -> Markup:
    """The weights in use; each constraint's mean against its bound with the multiplier's path beneath; what is left."""
    kinds = ("weighting/measured/", "weighting/multiplier/")
    constraints = union(name for run in runs for kind in kinds for name in run.names(kind))
    shown = ("weight/", "multiplier/", "measured/", "threshold/")
    rest = union(n for run in runs for n in run.names("weighting/") if not n.startswith(shown))
    pictures = [_weights(run, f": {run.label}" if len(runs) > 1 else "") for run in runs]
    pictures += [_constraint(runs, name) for name in constraints]
    curves = [Curve(name, "", (f"weighting/{name}",)) for name in rest]
    still = [tag("p", told, class_="note") for run in runs if (told := fixed_weights(run))]
    return join((grid(runs, curves, smooth=False, first=pictures), *still))


def _weights(run: RunFiles, suffix: str) -> Markup | None:
    """The weights of a run over steps; none where they never changed, which is one line of text."""
    if fixed_weights(run):
        return None
    return by_name(run, "weighting/weight/", f"weights in use{suffix}", "weight", smooth=False)


def fixed_weights(run: RunFiles) -> str:
    """The weights of a run that never changed, in words; "" where one did, or where there are none."""
    values = {name: {y for _, y in run.metrics[f"weighting/weight/{name}"]} for name in run.names("weighting/weight/")}
    if not values or any(len(own) > 1 for own in values.values()):
        return ""
    told = ", ".join(f"{name} {number(value)}" for name, own in values.items() for value in own)
    return f"{run.label}: fixed weights, {told}."


def _constraint(runs: Sequence[RunFiles], name: str) -> Markup:
    """Measured against the bound; beneath it, over the same steps, the multiplier."""
    measured, multipliers, bounds = (
        [(i, run.metrics[full]) for i, run in enumerate(runs) if (full := f"weighting/{kind}/{name}") in run.metrics]
        for kind in ("measured", "multiplier", "threshold")
    )
    senses, steps = [sense_of(run, name) for run in runs], steps_of(runs)
    dashed = [
        Bound(points, None if j else BROKEN.get(senses[i]), "#333" if len(runs) == 1 else colour_of(i))
        for j, (i, points) in enumerate(bounds)
    ]
    pictures = []
    if measured:
        lines = [Line(points, colour_of(i), dash=run_dash(i)) for i, points in measured]
        pictures.append(
            line_plot(lines, unit="measured", x=steps, bounds=dashed, x_label="" if multipliers else "step")
        )
    if multipliers:
        lines = [Line(points, colour_of(i), dash=run_dash(i), smooth=False) for i, points in multipliers]
        pictures.append(line_plot(lines, unit="multiplier", x=steps, zero=True, height=160.0))
    words = [_kept(run, name, sense, named=len(runs) > 1) for run, sense in zip(runs, senses, strict=True)]
    return panel(name, join(pictures), below=join(tag("div", word) for word in words if word))


def _kept(run: RunFiles, name: str, sense: str, *, named: bool) -> str:
    """Where the mean stands to its bound over the last tenth of the steps, and how often it was broken, in words."""
    bound = dict(run.metrics.get(f"weighting/threshold/{name}", ()))
    pairs = [(y, bound[x]) for x, y in run.metrics.get(f"weighting/measured/{name}", ()) if x in bound]
    if not pairs:
        return ""
    measured, asked = (mean(values) for values in zip(*pairs[-max(1, round(len(pairs) / 10)) :], strict=True))
    sign = {">=": "≥", "<=": "≤", "=": "="}.get(sense, "")
    text = f"{run.label}: " if named else ""
    text += f"at the end {number(measured)}, asked {sign} {number(asked)}".replace("  ", " ")
    if sense in BROKEN:
        broken = [y < b if sense == ">=" else y > b for y, b in pairs]
        text += f", broken in {sum(broken) / len(broken):.0%} of the steps"
    return text


def sense_of(run: RunFiles, name: str) -> str:
    """Which side of its bound a constraint asks for, as the config says it: >=, <=, = or, unknown, nothing."""
    specs = [*_mappings(run.rewards.get("weighting"))]
    for spec in specs:
        senses = spec.get("senses")
        if isinstance(senses, Mapping) and senses.get(name) in BROKEN:
            return str(senses[name])
    kinds = [str(spec["kind"]) for spec in specs if "kind" in spec]
    default = ["xi" for spec in specs if spec.get("policy") == "lagrange"]
    return SENSES.get(next(iter(kinds + default), ""), "")


def _mappings(tree: Any) -> Iterator[Mapping[str, Any]]:
    """A mapping and all below it."""
    if isinstance(tree, Mapping):
        yield tree
        for value in tree.values():
            yield from _mappings(value)


# ---------------------------------------------------------------- Pareto
class Moments(NamedTuple):
    """A run's means at some moments: component -> one value each, and what each moment is."""

    means: Mapping[str, Sequence[float]]
    names: Sequence[str]


def pareto(runs: Sequence[RunFiles]) -> Markup:
    """Each pair of components in a plane: the way of each run, light to dark, and the front over all runs."""
    names = union(name for run in runs for name in run.components)
    moments = [moments_of(run, names) for run in runs]
    known = [name for name in names if any(name in each.means for each in moments)]
    planes = [plane for pair in combinations(known, 2) if (plane := _plane(runs, moments, pair))][:PAIRS]
    large = 640.0, 540.0 if len(planes) > 2 else 440.0  # as high as the two beside it
    pictures = [
        panel(title, path_plot(paths, **about, size=(380.0, 320.0) if i else large),
              below=better, class_="" if i else "large")
        for i, (title, better, paths, about) in enumerate(planes)
    ]  # fmt: skip
    return row(pictures, "grid pareto") or Markup("")


def moments_of(run: RunFiles, names: Sequence[str]) -> Moments:
    """The means of the evaluations where those score components, else means over stretches of steps."""
    for benchmark in union(name.partition("/reward/")[0] for name in run.names("eval/") if "/reward/" in name):
        series = {n: run.metrics[full] for n in names if (full := f"eval/{benchmark}/reward/{n}") in run.metrics}
        if len(series) > 1:
            steps = common_steps([*series.values()])
            means = {name: at_steps(points, steps) for name, points in series.items()}
            return Moments(means, [f"{benchmark} after step {step:g}" for step in steps])
    series = {name: run.metrics[f"reward/{name}"] for name in names if f"reward/{name}" in run.metrics}
    steps = common_steps([*series.values()])
    blocks = stretches(len(steps))
    means = {n: [mean(at_steps(points, steps[block])) for block in blocks] for n, points in series.items()}
    return Moments(means, [f"steps {steps[block][0]:g} to {steps[block][-1]:g}" for block in blocks])


def stretches(count: int, most: int = MOMENTS) -> list[slice]:
    """`count` steps as at most `most` equal stretches, the last one shorter.

    >>> stretches(5, 3)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    size = max(1, -(-count // most))
    return [slice(i, i + size) for i in range(0, count, size)]


def _plane(
    runs: Sequence[RunFiles], moments: Sequence[Moments], pair: tuple[str, str]
) -> tuple[str, Text, list[Path], dict[str, Any]] | None:
    """(title, which way is better, paths, axes and bounds) of a pair; none with fewer than two points."""
    points: list[list[Point]] = [
        [*zip(each.means[pair[0]], each.means[pair[1]], strict=True)] if {*pair} <= {*each.means} else []
        for each in moments
    ]
    everything = [point for own in points for point in own]
    if len(everything) < 2:
        return None
    up = [all(_more_is_better(run, name) for run in runs) for name in pair]
    front, seen, paths = set(pareto_front(np.array(everything), up)), 0, []
    for i, (run, own, each) in enumerate(zip(runs, points, moments, strict=True)):
        on_front = [j for j in range(len(own)) if seen + j in front]
        paths.append(Path(own, each.names, colour_of(i), run.label if len(runs) > 1 else "", on_front))
        seen += len(own)
    bounds = [[b[-1][1] for run in runs if (b := run.metrics.get(f"weighting/threshold/{n}"))][:1] for n in pair]
    better = f"better: {'right' if up[0] else 'left'} and {'up' if up[1] else 'down'}"
    about = {"x_label": pair[0], "y_label": pair[1], "x_bounds": bounds[0], "y_bounds": bounds[1]}
    return f"{pair[1]} against {pair[0]}", better, [path for path in paths if path.points], about


def _more_is_better(run: RunFiles, name: str) -> bool:
    """Not where the config gives the component a negative weight, or asks it to stay below a bound."""
    components = mapping(run.rewards.get("components"))
    weight = mapping(components.get(name, components.get(name.partition("/")[0]))).get("weight", 1.0)
    bounded = f"weighting/threshold/{name}" in run.metrics and sense_of(run, name) == "<="
    return not bounded and (not isinstance(weight, int | float) or weight >= 0)
