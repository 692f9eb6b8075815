"""Demonstrations in the place of actors: the same face as `actors.pool`, with completions read instead of sampled.

So a supervised warm start is a run like any other: the same coordinator, the same loop, the same learner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.actor import Failure, Poll
from core.config import RunConfig
from core.errors import UserError
from core.schema import Completion, Group, GroupRequest


class Demonstrations:
    """Answers a request with the demonstration of its prompt, ended by the end-of-sequence token; or with a pair.

    The completion that was chosen comes first and has reward 1, the rejected one has 0.
    """

    names = ("demonstrations",)

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        column = config.data.completion_column
        if column is None:
            raise UserError("the method learns from demonstrations: name their column with data.completion_column=...")
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.path {config.model.path}: its tokenizer has no end-of-sequence token (eos_token)")
        self._columns = [name for name in (column, config.data.rejected_column) if name is not None]
        self._tokenizer, self._longest = tokenizer, config.rollout.max_tokens
        self.incarnations = dict.fromkeys(self.names, 0)
        self._done: asyncio.Queue[Group | Failure] = asyncio.Queue()

    suspects: frozenset[str] = frozenset()

    def present(self) -> dict[str, int]:
        """There is always one."""
        return dict(self.incarnations)

    async def submit(self, name: str, requests: Sequence[GroupRequest]) -> None:
        """Queue the demonstrations of these prompts."""
        for request in requests:
            self._done.put_nowait(self._read(request))

    async def poll(self, name: str, timeout: float = 1.0) -> Poll:
        """What was queued since the last poll; waits up to `timeout` seconds for something."""
        try:
            found = [await asyncio.wait_for(self._done.get(), timeout)]
        except TimeoutError:
            return Poll((), (), None, 0)
        while not self._done.empty():
            found.append(self._done.get_nowait())
        groups = tuple(x for x in found if isinstance(x, Group))
        return Poll(groups, tuple(x for x in found if isinstance(x, Failure)), None, 0)

    async def abort(self, name: str, ids: Sequence[str]) -> None:
        """Nothing is on its way here for longer than a moment."""

    def processes(self) -> dict[str, tuple[int, str, None]]:
        """There are none."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Nothing is sampled here."""
        return {}

    def _read(self, request: GroupRequest) -> Group | Failure:
        texts = [request.prompt.columns[name] for name in self._columns]
        plain = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [(*tokens, self._tokenizer.eos_token_id) for tokens in plain]
        if max(map(len, ids)) > self._longest:
            return Failure(request.id, request.attempt, f"demonstration longer than rollout.max_tokens {self._longest}")
        given = tuple(Completion(tokens, (), (), text, "stop") for tokens, text in zip(ids, texts, strict=True))
        totals = (1.0, 0.0) if len(given) == 2 else ()
        return Group(request.id, request.prompt, given, actor=self.names[0], totals=totals)
