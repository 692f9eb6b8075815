"""Values of a dataset's row as JSON, and back to the same values.

JSON's own are as they are. The others that datasets hold are marked: {"$": ["date", "2024-05-01"]}.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from core.errors import UserError

MARK = "$"
ALLOWED = "texts, numbers, lists, tuples, mappings, bytes, dates and times, Decimal, UUID, numpy values"

# Exact types only: a subclass may hold more (pandas' Timestamp counts nanoseconds).
_TO: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("bytes", lambda value: base64.b64encode(value).decode()),
    datetime: ("datetime", lambda value: [value.isoformat(), value.fold]),
    date: ("date", date.isoformat),
    time: ("time", lambda value: [value.isoformat(), value.fold]),
    timedelta: ("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    Decimal: ("decimal", str),
    UUID: ("uuid", str),
}
_FROM: dict[str, Callable[[Any], Any]] = {
    "bytes": base64.b64decode,
    "datetime": lambda kept: datetime.fromisoformat(kept[0]).replace(fold=kept[1]),
    "date": date.fromisoformat,
    "time": lambda kept: time.fromisoformat(kept[0]).replace(fold=kept[1]),
    "timedelta": lambda kept: timedelta(*kept),
    "decimal": Decimal,
    "uuid": UUID,
    "tuple": lambda kept: tuple(restored(item) for item in kept),
    "mapping": lambda kept: {restored(key): restored(value) for key, value in kept},
    "array": lambda kept: _array(*kept),
    "scalar": lambda kept: _array(*kept)[()],
}


def plain(value: Any, where: str) -> Any:
    """`value` as JSON that `restored` makes equal to it. Raises UserError, with `where` the value is.

    >>> plain({"answer": 5, "when": date(2024, 5, 1)}, "row")
    {'answer': 5, 'when': {'$': ['date', '2024-05-01']}}
    """
    if isinstance(value, np.ndarray | np.generic):  # first: float64 is a float, and str_ a str
        return _numpy(value, where)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {MARK: ["tuple", [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]]}
    if isinstance(value, Mapping):
        return _mapping(value, where)
    if type(value) in _TO:
        name, keep = _TO[type(value)]
        return {MARK: [name, keep(value)]}
    raise _refused(value, where)


def restored(kept: Any) -> Any:
    """What `plain` was given; a tuple's or mapping's own type becomes tuple or dict."""
    if isinstance(kept, list):
        return [restored(item) for item in kept]
    if not isinstance(kept, dict):
        return kept
    if MARK in kept:
        name, value = kept[MARK]
        return _FROM[name](value)
    return {key: restored(value) for key, value in kept.items()}


def _mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    if MARK not in value and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    return {MARK: ["mapping", [[plain(k, where), plain(item, f"{where}.{k}")] for k, item in value.items()]]}


def _numpy(value: np.ndarray | np.generic, where: str) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.kind in "OV":  # objects and records
        raise _refused(value, f"{where} (numpy {array.dtype})")
    kind = "array" if isinstance(value, np.ndarray) else "scalar"
    return {MARK: [kind, [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]]}


def _array(dtype: str, shape: list[int], data: str) -> np.ndarray:
    return np.ndarray(tuple(shape), np.dtype(dtype), base64.b64decode(data)).copy()


def _refused(value: Any, where: str) -> UserError:
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return UserError(
        f"{where} is of type {kind}, which a run cannot keep; allowed: {ALLOWED}. "
        "Convert it when the dataset is made, or leave the column out"
    )
