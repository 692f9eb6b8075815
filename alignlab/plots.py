"""Plots as inline SVG: lines over steps, stacked areas, paths in a plane, intervals. Numbers in, text out; no files.

A plot has a frame (`Frame`: data -> pixels), a light grid with round numbers, and its curves. Points are (x, y) pairs
in the order of x; what is missing is not among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from alignlab.markup import Markup, join, number, tag

Point = tuple[float, float]
Points = Sequence[Point]
Side = Literal["above", "below"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5d3a9b", "#444444")  # colour-blind-safe
DASHES = (None, "6 3", "2 2", "8 3 2 3")
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 8, 34  # margins, pixels
BESIDE = 46  # margin where the curves end in numbers
NAMED = 12  # curves whose last values are written beside a plot; more would cover each other
MOST = 800  # points of a curve; more are not seen at this size
SMOOTH_FROM = 30  # shorter series are drawn as they are


@dataclass(frozen=True)
class Line:
    """One curve. `intervals`: (low, high) of each point, drawn as bars; `smooth`: thin raw, thick smoothed."""

    points: Points
    colour: str = COLOURS[0]
    label: str = ""
    dash: str | None = None
    intervals: Points = ()
    smooth: bool = True

    def ends(self) -> tuple[float, float]:
        """The first and the last value as drawn thick."""
        thick = smoothed(self.points) if self.smooth else self.points
        return thick[0][1], thick[-1][1]


@dataclass(frozen=True)
class Bound:
    """A bound over steps; the side that breaks it is shaded where it is known."""

    points: Points
    broken: Side | None = None
    colour: str = "#333"


@dataclass(frozen=True)
class Frame:
    """Where data lie in a picture of `width` x `height` pixels: x range, y range -> the area inside the margins."""

    x: Point
    y: Point
    width: float = 380.0
    height: float = 220.0
    beside: float = RIGHT

    def at(self, point: Point) -> Point:
        """Pixels of a point."""
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    left = float(LEFT)
    top = float(TOP)

    @property
    def right(self) -> float:
        return self.width - self.beside

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM


@dataclass(frozen=True)
class Path:
    """A way through a plane: one point a moment (`moments`: what the point is, for a reader), light to dark."""

    points: Points
    moments: Sequence[str]
    colour: str = COLOURS[0]
    label: str = ""
    front: Sequence[int] = field(default=())  # indices of points on the front


# ---------------------------------------------------------------- numbers
def window(count: int) -> int:
    """Steps that a smoothed value averages, odd; 1 draws a series as it is.

    >>> window(10), window(60), window(600)
    (1, 5, 41)
    """
    return 1 if count < SMOOTH_FROM else count // 30 * 2 + 1


def smoothed(points: Points) -> list[Point]:
    """Centred means over `window` points, fewer at the ends."""
    half = window(len(points)) // 2
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    reach = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(points[i][0], (sums[end] - sums[start]) / (end - start)) for i, (start, end) in enumerate(reach)]


def thinned(points: Points, most: int = MOST) -> Points:
    """At most about `most` points that look the same: the first, the last, lowest and highest of equal stretches."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def tick_step(low: float, high: float, count: int = 4) -> float:
    """The distance of about `count` round numbers between low and high.

    >>> tick_step(0, 1), tick_step(0, 60)
    (0.5, 20.0)
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high."""
    step = tick_step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def round_range(values: Sequence[float], *, zero: bool = False) -> Point:
    """A range that ends on round numbers and holds all values; `zero`: and 0."""
    low, high = min(values), max(values)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.5 or 1.0
        low, high = (low - room, high + room) if low < 0 or not zero else (low, high + room)
    for _ in range(2):  # a wider range may have wider steps
        step = tick_step(low, high)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


# ---------------------------------------------------------------- plots
def line_plot(
    lines: Sequence[Line],
    *,
    unit: str = "",
    x_label: str = "step",
    x: Point | None = None,
    zero: bool = False,
    bounds: Sequence[Bound] = (),
    marks: Sequence[tuple[float, str]] = (),
    height: float = 220.0,
) -> Markup:
    """Curves over a common x; `x` fixes its range, `marks` are vertical lines with a word, `zero` shows 0 on y."""
    points = [p for line in lines for p in line.points] + [p for bound in bounds for p in bound.points]
    several = 1 < len(lines) <= NAMED
    values = [y for _, y in points] + [y for line in lines for pair in line.intervals for y in pair]
    frame = Frame(
        x or span([p[0] for p in points]),
        round_range(values, zero=zero),
        height=height,
        beside=BESIDE if several else RIGHT,
    )
    parts = [_bound(frame, bound) for bound in bounds] + [_curve(frame, line) for line in lines]
    parts += [_mark(frame, at, word) for at, word in marks]
    if several:
        parts.append(_end_labels(frame, lines))
    name = f"{unit or 'value'} over {x_label}"
    return _svg(frame, name, _axes(frame, x_label, unit), *parts)


def area_plot(layers: Sequence[tuple[str, Sequence[float]]], xs: Sequence[float], *, unit: str) -> Markup:
    """Layers (colour, values at xs), stacked from the bottom."""
    top = [sum(values) for values in zip(*(values for _, values in layers), strict=True)]
    frame = Frame(span(xs), round_range(top, zero=True))
    parts, below = [], [0.0] * len(xs)
    for colour, values in layers:
        above = [low + value for low, value in zip(below, values, strict=True)]
        edge = [*zip(xs, above, strict=True)], [*zip(xs, below, strict=True)][::-1]
        shape = _pixels(frame, [*thinned(edge[0]), *thinned(edge[1])])
        parts.append(tag("polygon", points=shape, fill=colour, fill_opacity=0.75))
        below = above
    return _svg(frame, f"{unit} over step, stacked", _axes(frame, "step", unit), *parts)


def path_plot(
    paths: Sequence[Path],
    *,
    x_label: str,
    y_label: str,
    size: Point = (380.0, 320.0),
    x_bounds: Sequence[float] = (),
    y_bounds: Sequence[float] = (),
) -> Markup:
    """Ways through a plane, light at the start and dark at the end; points on the front ringed, bounds dashed."""
    points = [p for path in paths for p in path.points]
    xs, ys = [*(p[0] for p in points), *x_bounds], [*(p[1] for p in points), *y_bounds]
    frame = Frame(round_range(xs), round_range(ys), *size)
    bounds = [((x, frame.y[0]), (x, frame.y[1])) for x in x_bounds]
    bounds += [((frame.x[0], y), (frame.x[1], y)) for y in y_bounds]
    parts = [_polyline(frame, ends, "#333", 1.2, "5 3") for ends in bounds]
    parts += [_way(frame, path) for path in paths]
    return _svg(frame, f"{y_label} against {x_label}", _axes(frame, x_label, y_label), *parts)


def intervals_plot(rows: Sequence[tuple[str, Point, float]], x: Point = (0.0, 1.0)) -> Markup:
    """Values with their intervals on one short axis: (colour, (low, high), value), first hollow, last filled."""
    width, height, edge = 220.0, 34.0, 8.0
    at = {v: edge + (v - x[0]) / (x[1] - x[0]) * (width - 2 * edge) for _, ends, value in rows for v in (*ends, value)}
    axis = [edge + share * (width - 2 * edge) for share in (0, 0.25, 0.5, 0.75, 1)]
    parts = [tag("line", x1=at_, x2=at_, y1=2.0, y2=height - 2, class_="grid-line") for at_ in axis]
    for i, (colour, (low, high), value) in enumerate(rows):
        y = height * (i + 1) / (len(rows) + 1)
        fill = colour if i == len(rows) - 1 else "#fff"
        parts.append(tag("line", x1=at[low], x2=at[high], y1=y, y2=y, stroke=colour, stroke_width=2.0))
        parts.append(tag("circle", cx=at[value], cy=y, r=4.0, fill=fill, stroke=colour, stroke_width=1.5))
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", class_="intervals", role="img")


def span(xs: Sequence[float]) -> Point:
    """The range of x, never empty."""
    low, high = min(xs), max(xs)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


# ---------------------------------------------------------------- pieces
def _svg(frame: Frame, name: str, *parts: Markup) -> Markup:
    box = f"0 0 {frame.width:g} {frame.height:g}"
    return tag("svg", tag("title", name), *parts, viewBox=box, role="img")


def _axes(frame: Frame, x_label: str, y_label: str) -> Markup:
    """Grid, numbers, names of both axes."""
    parts: list[Markup] = []
    steps = tick_step(*frame.x, 5), tick_step(*frame.y)
    for value in ticks(*frame.x, 5):
        at, _ = frame.at((value, frame.y[0]))
        parts.append(tag("line", x1=at, x2=at, y1=frame.top, y2=frame.bottom, class_="grid-line"))
        parts.append(_text(tick_text(value, steps[0]), at, frame.bottom + 13, "middle", "tick"))
    for value in ticks(*frame.y):
        _, at = frame.at((frame.x[0], value))
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=at, y2=at, class_="grid-line"))
        parts.append(_text(tick_text(value, steps[1]), frame.left - 5, at + 3.5, "end", "tick"))
    middle = (frame.top + frame.bottom) / 2
    parts.append(_text(x_label, (frame.left + frame.right) / 2, frame.height - 6, "middle", "axis"))
    parts.append(
        tag("text", y_label, text_anchor="middle", class_="axis", transform=f"translate(11 {middle:g}) rotate(-90)")
    )
    return join(parts)


def tick_text(value: float, step: float) -> str:
    """A number of an axis whose numbers are `step` apart.

    >>> tick_text(0.25, 0.05), tick_text(20000, 5000), tick_text(2e-6, 1e-6)
    ('0.25', '20k', '2e-06')
    """
    if abs(value) < step / 2:
        return "0"
    if step >= 500:
        return f"{value / 1e6:g}M" if step >= 5e5 else f"{value / 1e3:g}k"
    if step < 1e-4:
        return f"{value:.3g}".replace("-", "−", 1) if value < 0 else f"{value:.3g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "−")


def _text(text: str, x: float, y: float, anchor: str, class_: str, fill: str | None = None) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_, fill=fill)


def _pixels(frame: Frame, points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.at, points))


def _polyline(
    frame: Frame, points: Points, colour: str, width: float, dash: str | None = None, opacity: float | None = None
) -> Markup:
    style: dict[str, float | str | None] = {"stroke_width": width, "stroke_dasharray": dash, "stroke_opacity": opacity}
    return tag("polyline", points=_pixels(frame, points), stroke=colour, **style)


def _curve(frame: Frame, line: Line) -> Markup:
    """A curve, its dots where they are few, its intervals."""
    parts = []
    for point, (low, high) in zip(line.points, line.intervals, strict=False):
        ends = (point[0], low), (point[0], high)
        parts.append(_polyline(frame, ends, line.colour, 1.2))
    if line.smooth and window(len(line.points)) > 1:
        parts.append(_polyline(frame, thinned(line.points), line.colour, 1.0, opacity=0.4))
        parts.append(_polyline(frame, thinned(smoothed(line.points)), line.colour, 2.0, line.dash))
    else:
        parts.append(_polyline(frame, thinned(line.points), line.colour, 2.0, line.dash))
    if len(line.points) <= 12:
        parts += [tag("circle", cx=x, cy=y, r=2.5, fill=line.colour) for x, y in map(frame.at, line.points)]
    return join(parts)


def _end_labels(frame: Frame, lines: Sequence[Line]) -> Markup:
    """The last value of each curve beside it, moved apart where they would overlap."""
    ends: dict[str, tuple[float, str]] = {}
    for value, colour in ((line.ends()[1], line.colour) for line in lines):
        text = number(value) if abs(value) >= 1e-4 or not value else number(value, 2)
        ends.setdefault(text, (frame.at((frame.x[1], value))[1], colour))
    at = apart([y for y, _ in ends.values()], 10.0, frame.bottom)
    words = zip(at, ends.items(), strict=True)
    return join(_text(text, frame.right + 4, y + 3.5, "start", "end", colour) for y, (text, (_, colour)) in words)


def apart(places: Sequence[float], gap: float, most: float) -> list[float]:
    """The places moved so that each is `gap` from the next and none is beyond `most`, as little as is simple.

    >>> apart([10, 99, 98], 10, 100)
    [10, 99, 89]
    """
    found, last = list(places), most + gap
    for i in sorted(range(len(places)), key=lambda i: -places[i]):
        found[i] = last = min(places[i], last - gap)
    return found


def _bound(frame: Frame, bound: Bound) -> Markup:
    """A dashed bound over the whole width, as far as it is known; what breaks it is shaded."""
    points = [*bound.points]
    if len(points) == 1:
        points = [(frame.x[0], points[0][1]), (frame.x[1], points[0][1])]
    parts = []
    if bound.broken:
        edge = frame.y[1] if bound.broken == "above" else frame.y[0]
        area = [*points, (points[-1][0], edge), (points[0][0], edge)]
        parts.append(tag("polygon", points=_pixels(frame, area), class_="broken"))
    return join([*parts, _polyline(frame, thinned(points), bound.colour, 1.5, "5 3")])


def _mark(frame: Frame, x: float, word: str) -> Markup:
    at, _ = frame.at((x, frame.y[0]))
    anchor, beside = ("start", at + 4) if at < (frame.left + frame.right) / 2 else ("end", at - 4)
    line = tag("line", x1=at, x2=at, y1=frame.top, y2=frame.bottom, class_="mark")
    return join((line, _text(word, beside, frame.top + 10, anchor, "end", "#a00")))


def _way(frame: Frame, path: Path) -> Markup:
    """Segments and points from light to dark, the start hollow, the end large, the front ringed."""
    last = max(1, len(path.points) - 1)
    parts = [
        _polyline(frame, path.points[i : i + 2], shade(path.colour, (i + 1) / last), 1.5) for i in range(last)
    ]  # fmt: skip
    for i, (point, moment) in enumerate(zip(path.points, path.moments, strict=True)):
        x, y = frame.at(point)
        colour = shade(path.colour, i / last)
        name = tag("title", f"{path.label} {moment}: {number(point[0])}, {number(point[1])}".strip())
        radius = 5.0 if i == len(path.points) - 1 else 3.0
        parts.append(tag("circle", name, cx=x, cy=y, r=radius, fill=colour if i else "#fff", stroke=colour))
        if i in path.front:
            parts.append(tag("circle", cx=x, cy=y, r=radius + 3, class_="front"))
    return join(parts)


def shade(colour: str, share: float) -> str:
    """A colour from nearly white (0) to itself (1).

    >>> shade("#0072b2", 1), shade("#000000", 0)
    ('#0072b2', '#cccccc')
    """
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(255 - (255 - c) * (0.2 + 0.8 * min(1.0, max(0.0, share)))) for c in channels]
    return "#" + "".join(f"{c:02x}" for c in mixed)
