"""New weights, from the learner to every actor, verified. The one place that knows both pools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PutSnapshot:
    """Runs on learner rank 0: packs the tensors and leaves them in Ray's object store, which feeds every actor."""

    version: int
    dtype: str

    def __call__(self, tensors: Iterator[tuple[str, Any]]) -> tuple[list[Any], str, int]:
        """([reference], digest, bytes). The list keeps Ray from fetching the bytes to the driver."""
        import ray

        from actors.weights import snapshot

        weights = snapshot(tensors, self.version, self.dtype)
        return [ray.put(weights)], weights.digest, weights.buffer.nbytes
