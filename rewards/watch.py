"""The alarm against reward hacking: a gold component, kept out of the reward, falls while the reward rises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rewards.diagnostics import overoptimization


class Watch:
    """The means of reward and gold of every step so far. State: both lists."""

    def __init__(self, window: int, margin: float) -> None:
        self.window, self.margin = window, margin
        self.proxy: list[float] = []
        self.gold: list[float] = []

    def push(self, proxy: float, gold: float) -> dict[str, float]:
        """Take in a step's means; overoptimization/alarm is 1 from the step on at which the alarm went off.

        overoptimization/drop: how far the smoothed gold mean is below its peak.
        """
        self.proxy.append(proxy)
        self.gold.append(gold)
        known = np.isfinite(self.gold)
        if not known.any():
            return {}
        found = overoptimization(np.array(self.proxy), np.array(self.gold), window=self.window, margin=self.margin)
        recent = np.array(self.gold[-self.window :])
        drop = found.gold_at_peak - float(np.nanmean(recent)) if np.isfinite(recent).any() else 0.0
        return {
            "overoptimization/alarm": float(found.alarm_index is not None),
            "overoptimization/drop": max(0.0, drop),
            "overoptimization/gold": gold,
            "overoptimization/proxy": proxy,
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON has no NaN: a missing mean is null."""
        return {name: [v if np.isfinite(v) else None for v in getattr(self, name)] for name in ("proxy", "gold")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.proxy, self.gold = ([np.nan if v is None else v for v in state[name]] for name in ("proxy", "gold"))
