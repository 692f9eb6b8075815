"""Which groups make the next batch.

Oldest first, by the version that was served when a group was admitted, then by ordinal. A batch may leave unfinished
groups behind, as long as each of them can still be trained within `window` versions of its admission.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice


@dataclass
class Backlog:
    """Groups that wait for their batch, scored or not. `prompts` is P. They enter in the order of their ordinals.

    in_order: a batch holds the P first groups of all, and waits until each of them is scored.
    """

    prompts: int
    window: int
    in_order: bool = False
    scored: int = 0
    _version: dict[int, int] = field(default_factory=dict)  # ordinal -> version, of all that wait
    _count: Counter[int] = field(default_factory=Counter)  # version -> groups that wait
    _ready: dict[int, list[int]] = field(default_factory=dict)  # version -> heap of its scored ordinals
    _scored: set[int] = field(default_factory=set)  # all of these
    _awaited: int = -1  # in order: the group that the batch was last found to wait for

    def enter(self, ordinal: int, version: int) -> None:
        """A group is admitted under `version`."""
        self._version[ordinal] = version
        self._count[version] += 1

    def leave(self, ordinal: int) -> None:
        """A group that is not scored leaves for good."""
        self._count[self._version.pop(ordinal)] -= 1

    def ready(self, ordinal: int) -> None:
        """A group is scored."""
        heapq.heappush(self._ready.setdefault(self._version[ordinal], []), ordinal)
        self._scored.add(ordinal)
        self.scored += 1

    def take(self, trained: int) -> list[int]:
        """The ordinals of the batch for step `trained`, in order; empty when there is none yet."""
        if self.scored < self.prompts:
            return []
        batch = self._first() if self.in_order else self._oldest(trained)
        for ordinal in batch:
            self.leave(ordinal)
        self._scored.difference_update(batch)
        self.scored -= len(batch)
        self._count = +self._count
        self._ready = {version: heap for version, heap in self._ready.items() if heap}
        return sorted(batch)

    def _first(self) -> list[int]:
        if self._awaited in self._version and self._awaited not in self._scored:
            return []
        first = list(islice(self._version, self.prompts))
        self._awaited = next((ordinal for ordinal in first if ordinal not in self._scored), -1)
        if self._awaited >= 0 or len(first) < self.prompts:
            return []
        taken = set(first)
        for version, heap in self._ready.items():
            self._ready[version] = [ordinal for ordinal in heap if ordinal not in taken]
            heapq.heapify(self._ready[version])
        return first

    def _oldest(self, trained: int) -> list[int]:
        taken: dict[int, int] = {}
        missing = self.prompts
        for version in sorted(self._ready):
            taken[version] = min(missing, len(self._ready[version]))
            missing -= taken[version]
        if not self._in_time(taken, trained):
            return []
        return [heapq.heappop(self._ready[version]) for version, n in taken.items() for _ in range(n)]

    def _in_time(self, taken: Mapping[int, int], trained: int) -> bool:
        """Whether the groups left can all be trained within the window of their admission, P in each later step."""
        left = 0
        for version in sorted(self._count):
            left += self._count[version] - taken.get(version, 0)
            if left > (version + self.window - trained) * self.prompts:
                return False
        return True
