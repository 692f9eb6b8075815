"""docs/weights.svg: the weight W(rho, sign A) of every row of the table, one panel for all rows of the same curve.

It is measured on single tokens through the composed objective, so the picture shows what runs. Of a method only ratio
and surrogate are kept: the picture is of its trust-region rule. Numbers are rounded before they are compared or drawn,
and no sample falls on a round ratio, where many rules jump: the text is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from textwrap import wrap
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from algos.batch import Batch
from algos.loss import advantages, late, loss, normalise
from algos.method import Method
from algos.methods import ROWS, resolve
from algos.parts import Part
from core.registry import options_of

OLD = 0.25  # the token's probability before it moved: rules that compare probabilities depend on it
SPANS = (1.001, 1.005, 16.0)  # a panel reaches from 1 / span to span, the narrowest of these that shows a bound
SAMPLES = 160

COLUMNS, WIDTH, HEIGHT, GAP, LINE = 4, 210, 110, 34, 14
LOWEST, HIGHEST, WEIGHTS = -1.1, 18.0, (-1, 0, 1, 2, 5, 10)  # of the axis of W, which all panels share
STYLES = (("A > 0", "#56b4e9", 4.5), ("A < 0", "#d55e00", 1.6))  # colour-blind-safe; thin over thick where equal
_HEAD = f"""\
<style>text {{ fill: #000 }} .title {{ font-weight: bold }} .tick {{ fill: #777; font-size: 9px }}
path {{ fill: none }} .grid {{ stroke: #e4e4e4 }} .axis {{ stroke: #aaa }}</style>
<rect width="100%" height="100%" fill="#fff"/>
<text class="title" x="{GAP}" y="24">Weight W over the ratio rho: the gradient of a token's loss is -A W(rho, sign A)\
</text><text x="{GAP + 150}" y="44">Axes: log rho, log(1 + |W|). Pass rate 1/2, |A| = 1, a token of old probability \
{OLD:g}: rules that compare probabilities end where it is 1, rules that pick tokens pick it.</text>"""

_PLAIN = resolve({"advantage": "given", "surrogate": "reinforce", "aggregation": "token_sum"})


@dataclass(frozen=True)
class Rule:
    """W at the middles of equal cells of log rho, from 1 / span to span."""

    span: float
    up: tuple[float, ...]  # A > 0
    down: tuple[float, ...]  # A < 0


def weight(method: Method, rho: float, sign: float) -> float:
    """W of one token that has moved by the ratio rho, with advantage `sign`: its gradient is -sign W."""
    return weights(method, [rho], sign)[0]


def weights(method: Method, ratios: Sequence[float], sign: float) -> list[float]:
    """W at each ratio. A rule that reads a whole minibatch is given one token at a time."""
    rule = replace(_PLAIN, ratio=method.ratio, surrogate=method.surrogate)
    old = torch.full((len(ratios), 1), math.log(OLD), dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64)[:, None].log()).requires_grad_()
    step = advantages(rule, _tokens(old, sign))
    total = torch.zeros((), dtype=torch.float64)
    alone = "late" in rule.needs
    for rows in [slice(i, i + 1) for i in range(len(ratios))] if alone else [slice(None)]:
        batch, current = step.rows(rows), logprobs[rows]
        batch = late(rule, batch, current) if alone else normalise(rule, batch)
        total = total + loss(rule, batch, current).loss
    return [-sign * g for g in torch.autograd.grad(total, logprobs)[0].flatten().tolist()]


def _tokens(old: Tensor, sign: float) -> Batch:
    """Completions of one token, one per prompt, pass rate 1/2; whatever else a rule may read is 1."""
    one, optional = torch.ones_like(old), [f.name for f in fields(Batch) if f.type == "Tensor | None"]
    known: dict[str, Any] = {name: old if name.endswith("logprobs") else one for name in optional}
    known |= {"given_advantages": sign * one}
    return Batch(mask=one.bool(), group=torch.arange(len(old)), rewards=one[:, 0] / 2, **known)


def measure(method: Method) -> Rule:
    """Both curves, on the narrowest span where W jumps anywhere but at 1, else on the widest."""
    tried = (Rule(span, *(_curve(method, span, sign) for sign in (1.0, -1.0))) for span in SPANS)
    return next(rule for rule in tried if rule.span == SPANS[-1] or _jumps(rule.up) or _jumps(rule.down))


def _curve(method: Method, span: float, sign: float) -> tuple[float, ...]:
    ratios = [span ** ((2 * i + 1) / SAMPLES - 1) for i in range(SAMPLES)]
    if "anchor_logprobs" in method.surrogate.inputs:  # it compares probabilities, which end at 1
        ratios = [rho for rho in ratios if rho * OLD <= 1]
    return tuple(round(w, 3) + 0.0 for w in weights(method, ratios, sign))  # + 0.0: no negative zero


def _jumps(curve: tuple[float, ...]) -> bool:
    return any(abs(b - a) > 0.1 for i, (a, b) in enumerate(pairwise(curve), 1) if i != SAMPLES // 2)


def rules() -> dict[Rule, list[Method]]:
    """The distinct rules of the table with the methods that have them, rules of many methods first."""
    measured: dict[str, Rule] = {}
    found: dict[Rule, list[Method]] = {}
    for name in ROWS:
        method = resolve(name, context={"max_tokens": 8})
        key = f"{method.ratio} {method.surrogate}"
        measured[key] = measured.get(key) or measure(method)
        found.setdefault(measured[key], []).append(method)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def svg() -> str:
    """The picture: a legend, then lines of panels; a line is as high as its longest texts."""
    panels, y, body = list(rules().items()), 62, [_HEAD, *_legend()]
    for start in range(0, len(panels), COLUMNS):
        line = panels[start : start + COLUMNS]
        titles = [wrap(" or ".join(dict.fromkeys(_title(m.surrogate) for m in methods)), 38) for _, methods in line]
        names = [wrap(", ".join(m.name for m in methods), 40) for _, methods in line]
        y += LINE * max(map(len, titles))
        for i, (rule, _) in enumerate(line):
            x = GAP + i * (WIDTH + GAP)
            body += [_text(x, y - 7 - LINE * (len(titles[i]) - 1), titles[i], "title"), *_panel(x, y, rule)]
            body += [_text(x, y + HEIGHT + 34, names[i], "rows")]
        y += HEIGHT + 34 + LINE * (max(map(len, names)) + 1)
    width = GAP + COLUMNS * (WIDTH + GAP)
    size = f'viewBox="0 0 {width} {y}" width="{width}" height="{y}" font-family="Helvetica, Arial, sans-serif"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="11">', *body, "</svg>\n"])


def _legend() -> Iterator[str]:
    for x, (name, colour, width) in zip((GAP, GAP + 70), STYLES, strict=True):
        yield f'<path d="M{x} 40h22" stroke="{colour}" stroke-width="{width}"/>' + _text(x + 28, 44, [name], "sign")


def _panel(x: int, y: int, rule: Rule) -> Iterator[str]:
    """A nested svg cuts the curves at its frame; the numbers stand outside."""
    for w in WEIGHTS:
        at = y + _height(w)
        yield f'<path class="{"grid" if w else "axis"}" d="M{x} {at:.1f}h{WIDTH}"/>'
        yield f'<text class="tick" x="{x - 4}" y="{at + 3:.1f}" text-anchor="end">{w}</text>'
    for i in range(5):
        at, rho = x + i * WIDTH / 4, rule.span ** (i / 2 - 1)
        yield f'<path class="{"axis" if i == 2 else "grid"}" d="M{at:.1f} {y}v{HEIGHT}"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{y + HEIGHT + 14}" text-anchor="middle">{_number(rho)}</text>'
    yield f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}">'
    for curve, (_, colour, width) in zip((rule.up, rule.down), STYLES, strict=True):
        yield f'<path d="{_path(curve)}" stroke="{colour}" stroke-width="{width}"/>'
    yield "</svg>"


def _path(curve: tuple[float, ...]) -> str:
    """Through the samples, without those in the middle of a flat stretch."""
    points = [f"{(i + 0.5) * WIDTH / SAMPLES:.1f} {_height(w):.1f}" for i, w in enumerate(curve)]
    bends = [i for i in range(1, len(curve) - 1) if not curve[i - 1] == curve[i] == curve[i + 1]]
    return "M" + "L".join(points[i] for i in (0, *bends, len(curve) - 1))


def _height(w: float) -> float:
    """Pixels below the upper end of the axis: large weights fit in, and 0 and negative ones have a place."""
    top, bottom, here = (math.copysign(math.log2(1 + abs(v)), v) for v in (HIGHEST, LOWEST, w))
    return HEIGHT * (top - here) / (top - bottom)


def _title(part: Part) -> str:
    """The part with all its options, set or default, but those that are none."""
    options = {name: part.option(name) for name in options_of(part.function)}
    return str(replace(part, options={name: value for name, value in options.items() if value is not None}))


def _text(x: int, y: int, lines: list[str], kind: str) -> str:
    spans = (f'<tspan x="{x}" y="{y + LINE * i}">{escape(line)} </tspan>' for i, line in enumerate(lines))
    return f'<text class="{kind}">{"".join(spans)}</text>'


def _number(rho: float) -> str:
    return f"1/{1 / rho:g}" if rho <= 0.5 else f"{rho:.5g}" if rho >= 1 else f"{rho:.4g}"
