"""N learner ranks as Ray workers: place, connect, call all, notice a dead one.

    pool = await LearnerPool.start(config, run_dir / "skipped")
    result = await pool.step(groups, version)
    answer = await pool.export(visit)     # visit is sent to rank 0 and runs there
    await pool.save(folder); await pool.load(folder); await pool.close()

Ray must be initialised. Every call has the deadline `learner.timeout`; a rank that dies or stays silent is a
`LearnerLost` that names it and carries its last words. After that the pool can only be closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from core.config import RunConfig
from core.schema import Group
from learner.learner import StepResult

Result = TypeVar("Result")


class LearnerLost(RuntimeError):
    """A rank died, failed or missed its deadline; the message says which, in what, and its last words."""


class LearnerPool:
    """Handles of the ranks. All methods are coroutines and must not overlap (the ranks run collectives)."""

    @classmethod
    async def start(cls, config: RunConfig, skipped: Path) -> LearnerPool:
        """Place `learner.ranks` workers, connect them, load the model. UserError for the user's mistakes."""
        raise NotImplementedError

    async def step(self, groups: Sequence[Group], version: int) -> StepResult:
        """`Learner.step` on all ranks; the groups travel once, through Ray's object store."""
        raise NotImplementedError

    async def export(self, visit: Callable[[Iterator[tuple[str, Tensor]]], Result]) -> Result:
        """`Learner.export` on all ranks; `visit` runs on rank 0 and its result comes back."""
        raise NotImplementedError

    async def save(self, folder: Path) -> None:
        """`Learner.save` on all ranks."""
        raise NotImplementedError

    async def load(self, folder: Path) -> int:
        """`Learner.load` on all ranks; returns the steps done."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the workers and free their place. Never raises for a worker that is already gone."""
        raise NotImplementedError
