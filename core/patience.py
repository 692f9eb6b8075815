"""Deadlines that count only the time in which this process ran.

A process that was stopped (SIGSTOP, a debugger, a laptop asleep) finds on its return that all its deadlines are past,
and would blame its parts for its own absence. Here a wait is cut into slices, and a slice counts with no more than its
nominal length however long it took, so an absence costs at most one slice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Collection
from typing import Any, TypeVar

Result = TypeVar("Result")
Futures = set[asyncio.Future[Any]]

SLICES = 10  # of one deadline, so an absence costs a tenth of it
LONGEST = 1.0  # seconds of a slice


async def within(awaitable: Awaitable[Result], seconds: float) -> Result:
    """What `awaitable` returns or raises; TimeoutError when it has not after `seconds` in which this process ran.

    It is cancelled then, and when the caller is; one slice is waited for it to clean up, and no longer.
    """
    future = asyncio.ensure_future(awaitable)
    future.add_done_callback(lambda f: f.cancelled() or f.exception())  # else asyncio reports what comes too late
    try:
        done, _ = await settled([future], seconds)
        if done:
            return future.result()
    finally:
        if not future.done():
            future.cancel()
            await asyncio.wait([future], timeout=slice_of(seconds))
    if future.done() and not future.cancelled():
        return future.result()
    raise TimeoutError


async def settled(futures: Collection[asyncio.Future[Any]], seconds: float) -> tuple[Futures, Futures]:
    """(done, pending) when all are done, when one has raised, or after `seconds` in which this process ran."""
    left, late = seconds, False
    while True:
        length, started = max(0.0, min(left, slice_of(seconds))), time.monotonic()
        done, pending = await asyncio.wait(futures, timeout=length, return_when=asyncio.FIRST_EXCEPTION)
        if not pending or any(not future.cancelled() and future.exception() for future in done):
            return done, pending
        took = time.monotonic() - started
        left -= min(took, length)
        if left > 0:
            continue
        if late or took < length + slice_of(seconds):
            return done, pending
        left, late = slice_of(seconds), True  # back from an absence: what came meanwhile is read first


def slice_of(seconds: float) -> float:
    """The nominal length of the slices of a deadline of `seconds`."""
    return min(LONGEST, max(0.0, seconds) / SLICES)
