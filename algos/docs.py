"""docs/methods.md from the code: `python -m algos.docs` prints it, `python -m algos.docs docs/methods.md` writes it.

Beside it goes weights.svg, the picture of the trust-region rules.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from algos.advantages import advantages
from algos.baselines import baselines, scales
from algos.kl import estimators, gradients
from algos.method import PIECES, SETTINGS, Row
from algos.methods import MODIFIERS, ROWS, methods
from algos.metrics import METRICS
from algos.parts import Part
from algos.weight_plot import svg
from core.registry import Registry, options_text

_CHOSEN = {"baseline": baselines, "scale": scales, "estimator": estimators, "gradient": gradients}

_HEAD = """\
# Methods

<!-- Written by `python -m algos.docs docs/methods.md`; a test compares. -->

A method is a row of parts. `method: dapo` in a config takes a row; a mapping changes parts of it:

```yaml
method:
  row: dapo
  surrogate: {ppo_clip: {high: 0.3}}     # options of the row's own part are merged, another part replaces it
  kl: {coef: 0.001, estimator: k2}       # the name of the piece's plain part may be left out
  modifiers: [tis, {top_entropy: {fraction: 0.1}}]
```

    loss = aggregate( token_weight * correction * surrogate(ratio, advantage) ) + coef KL - coef entropy

Denominators are those of the whole update: the loss does not depend on micro-batches, ranks or padding. l is the
current log-probability of a token, old that of the learner before the step, rollout that of the engine that sampled
it, ref that of the reference; R a reward, A an advantage, rho a ratio, delta a difference of log-probabilities, sg
stop-gradient. Group statistics are float64; an unscorable completion is in no statistic and has advantage 0, and so
has a group whose rewards are all equal where peers are the baseline.

![The weight function of every row](weights.svg)

A panel is a trust-region rule, with its rows below it: the height W of a line says how strongly a token whose ratio has
become rho is still pushed, up where A > 0 (thick line) and down where A < 0 (thin line). At W = 1 it is plain policy
gradient and at W = rho the importance ratio; at W = 0 the token is clipped, and below 0 it is pushed the other way.

Confidence: **A** read from the authors' code, **B** from a widely used public trainer, **C** from papers or others;
**num**: numbers compared with that code; **adaptation**: an idea from elsewhere, the form for completions is ours.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_methods(), *_modifiers(), *_pieces(), *_metrics()]).rstrip() + "\n"


def _methods() -> Iterator[str]:
    yield "## The table\n"
    yield "| method | what it is | confidence | source |\n|---|---|---|---|"
    for name, row in ROWS.items():
        yield f"| [`{name}`](#{name}) | {row.about} | {row.confidence} | {row.source} |"
    yield ""
    for name, row in ROWS.items():
        yield from _row(name, row)


def _row(name: str, row: Row) -> Iterator[str]:
    method = methods[name]
    yield f"### {name}\n\n{row.about}\n"
    yield "| piece | choice | equation |\n|---|---|---|"
    for piece, text in method.pieces().items():
        chosen = getattr(method, piece)
        parts = chosen if isinstance(chosen, tuple) else (chosen,)
        lines = [line for part in parts if piece in PIECES for line in _equations(part)]
        yield f"| {piece} | `{text}` | {_cell(' '.join(lines))} |"
    needs = ", ".join(sorted(method.needs)) or "rewards only"
    yield f"\nReads: {needs}. Source: {row.source}. Confidence: {row.confidence}."
    if row.deviations:
        yield f"\nDeviations: {row.deviations}"
    yield ""


def _modifiers() -> Iterator[str]:
    yield "## Modifiers\n\nThey combine with every row above; several stack.\n"
    yield "| modifier | what it does | choice | confidence | source |\n|---|---|---|---|---|"
    for name, row in MODIFIERS.items():
        yield f"| `{name}` | {row.about} | `{_cell(str(dict(row.spec)))}` | {row.confidence} | {row.source} |"
    yield ""


def _pieces() -> Iterator[str]:
    yield "## The parts\n"
    for name, piece in PIECES.items():
        default = f" Default: {f'`{piece.default}`' if piece.default else 'none'}."
        default += f" Plain part: `{piece.plain}`." if piece.plain else ""
        yield f"### Piece `{name}`\n\n{piece.about[0].upper() + piece.about[1:]}.{default}\n"
        yield from _registry(piece.registry)
        if piece.registry is advantages:
            yield "Baselines and scales of `group`:\n"
            yield from _registry(baselines)
            yield from _registry(scales)
        if "in_loss" in piece.registry:
            yield "Estimators, then gradient modes, of `in_loss`:\n"
            yield from _registry(estimators)
            yield from _registry(gradients)
    yield "### Settings\n\n| setting | values (the first is the default) |\n|---|---|"
    yield from (f"| {name} | {', '.join(map(str, values))} |" for name, values in SETTINGS.items())
    yield ""


def _registry(registry: Registry) -> Iterator[str]:
    yield f"| {registry.kind} | options | equation |\n|---|---|---|"
    for name, function in sorted(registry.items()):  # the order of registration is that of imports, which may vary
        yield f"| `{name}` | {_cell(options_text(function))} | {_cell(inspect.getdoc(function) or '')} |"
    yield ""


def _metrics() -> Iterator[str]:
    yield "## Metrics\n\n| metric | meaning | healthy | otherwise |\n|---|---|---|---|"
    yield from (f"| `{name}` | {m.meaning} | {m.healthy} | {m.otherwise} |" for name, m in METRICS.items())


def _equations(part: Part) -> Iterator[str]:
    """The first paragraph of its docstring, and those of the named functions that its options choose."""
    yield _first(part.function)
    for option, registry in _CHOSEN.items():
        chosen = part.option(option)
        if chosen in registry:
            yield f"{option[0].upper() + option[1:]} {chosen}: {_first(registry[chosen])}"


def _first(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0].split("Source:")[0].strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.write_text(page(), encoding="utf-8")
        target.with_name("weights.svg").write_text(svg(), encoding="utf-8")
    else:
        print(page(), end="")
