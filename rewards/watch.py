"""The alarm against reward hacking: a gold component, kept out of the reward, falls while the reward rises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rewards.diagnostics import overoptimization
from rewards.numeric import mean


class Watch:
    """The means of reward and gold of every step so far. State: both lists."""

    def __init__(self, window: int, margin: float) -> None:
        self.window, self.margin = window, margin
        self.proxy: list[float] = []
        self.gold: list[float] = []

    def push(self, proxy: float, gold: float) -> dict[str, float]:
        """Take in a step's means; overoptimization/alarm is 1 from the step on at which the alarm went off.

        overoptimization/drop: how far the smoothed gold mean is below its peak. Only whole windows count: a mean of
        fewer steps would make a peak of noise. NaN is a missing mean.
        """
        self.proxy.append(proxy)
        self.gold.append(gold)
        found = {"overoptimization/gold": gold, "overoptimization/proxy": proxy}
        smooth = [_smoothed(column, self.window) for column in (self.proxy, self.gold)]
        if not np.isfinite(smooth[1]).any():
            return found
        alarm = overoptimization(*smooth, margin=self.margin)
        drop = alarm.gold_at_peak - smooth[1][-1]
        return found | {
            "overoptimization/alarm": float(alarm.alarm_index is not None),
            "overoptimization/drop": max(0.0, drop) if np.isfinite(drop) else np.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON has no NaN: a missing mean is null."""
        return {name: [v if np.isfinite(v) else None for v in getattr(self, name)] for name in ("proxy", "gold")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.proxy, self.gold = ([np.nan if v is None else v for v in state[name]] for name in ("proxy", "gold"))


def _smoothed(values: list[float], window: int) -> np.ndarray:
    """Means of every whole window, oldest first."""
    return np.array([mean(np.array(values[end - window : end])) for end in range(window, len(values) + 1)])
