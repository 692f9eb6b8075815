"""Inside a scoring process: `python -m rewards.worker`, started and explained by `rewards.workers`.

Reads one JSON line per (component, group) and answers one line per completion. Only this module writes to the pipe that
the driver reads: what reward functions print, or child processes of theirs, goes to the error stream.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from core.schema import Score
from rewards.reward import DETAIL_LIMIT, Reward, Samples, Scores, bind, describe_error


def main() -> None:
    """Serve until the driver closes the pipe."""
    requests, replies = _own_the_pipes()
    hello = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_AS, (hello["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _die_with_the_driver()
    _send(replies, {"ready": True})
    loaded: dict[str, Reward] = {}
    for line in requests:
        request = json.loads(line)
        name = request["component"]
        try:
            if name not in loaded:
                loaded[name] = _load(name, hello["components"][name])
        except BaseException as error:
            _send(replies, {"failed": describe_error(error)})
            continue
        _send(replies, {"loaded": name})
        for scores, seconds in _score(loaded[name], Samples(**request["samples"]), request["todo"]):
            _send(replies, {"scores": encode(scores), "seconds": seconds})


def _score(reward: Reward, samples: Samples, todo: list[int]) -> Iterator[tuple[Scores, float]]:
    """(scores, seconds) of each completion in `todo`; a batch function is called once, for all of them."""
    started = time.perf_counter()
    if reward.batch:
        every = reward.score_all(samples)
        share = (time.perf_counter() - started) / max(1, len(every))
        yield from ((every[i], share) for i in todo)
        return
    for index in todo:
        started = time.perf_counter()
        scores = reward.score_one(samples, index)
        yield scores, time.perf_counter() - started


def _load(name: str, component: Mapping[str, Any]) -> Reward:
    reward = bind(component["fn"], component["options"], name)
    if reward.prepare is not None:
        reward.prepare()
    return reward


def _own_the_pipes() -> tuple[TextIO, TextIO]:
    """(requests, replies) on descriptors of their own; 0 is empty and 1 is the error stream for everybody else."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _die_with_the_driver() -> None:
    """Ask the kernel to kill this process when the driver dies: busy in user code, it would not see the pipe close."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def _send(replies: TextIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def encode(scores: Scores) -> Any:
    """JSON has no NaN, so a missing value travels as null."""
    if isinstance(scores, Score):
        return [scores.status, scores.value if scores.status == "ok" else None, scores.detail[:DETAIL_LIMIT]]
    return {key: encode(score) for key, score in scores.items()}


def decode(data: Any) -> Scores:
    """The inverse of `encode`. Raises ValueError for anything else."""
    if isinstance(data, dict):
        return {key: _decode_one(score) for key, score in data.items()}
    return _decode_one(data)


def _decode_one(data: Any) -> Score:
    status, value, detail = data
    return Score(status, math.nan if value is None else value, detail)


if __name__ == "__main__":
    main()
