"""HTML and SVG as text that escapes by itself: what is not `Markup` is escaped, so no text of a run can become a tag.

>>> tag("p", "1 < 2 ", tag("b", "bold"), class_="note")
'<p class="note">1 &lt; 2 <b>bold</b></p>'
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

EMPTY = ("circle", "line", "link", "meta", "path", "polygon", "polyline", "rect", "br")  # elements without an end tag


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Text = str | float | None  # none is nothing


def tag(name: str, *children: Text, **attributes: Text) -> Markup:
    """An element. `class_` is the attribute class, `stroke_width` stroke-width; one that is None is left out."""
    inside = join(children)
    named = "".join(f' {_attribute(key)}="{_escaped(value)}"' for key, value in attributes.items() if value is not None)
    if name in EMPTY and not inside:
        return Markup(f"<{name}{named}/>")
    return Markup(f"<{name}{named}>{inside}</{name}>")


def join(parts: Iterable[Text], between: str = "") -> Markup:
    """The parts one after another, escaped where they are not `Markup`."""
    return Markup(_escaped(between).join(_escaped(part) for part in parts if part is not None))


def table(head: Sequence[Text], rows: Iterable[Sequence[Text]], **attributes: Text) -> Markup:
    """A table; the first cell of a row is its heading."""
    body = [
        tag("tr", *(tag("td" if i else "th", cell, scope=None if i else "row") for i, cell in enumerate(row)))
        for row in rows
    ]
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))) if any(head) else None
    return tag("table", top, tag("tbody", *body), **attributes)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: so many significant digits, thousands apart, none is a dash.

    >>> number(0.57812), number(12345.6), number(4.2e-14), number(None)
    ('0.578', '12,346', '4.2e-14', '–')
    """
    if value is None:
        return "–"
    value += 0.0  # no negative zero
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("-", "−", 1) if value < 0 else f"{value:.{digits}g}"


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _escaped(value: Text) -> str:
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return html.escape(str(value))
