"""The Ray cluster of a run: one started here on loopback, or one that is already running."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from core.config import RunConfig
from core.errors import UserError


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Ray, connected for the length of the block. Raises UserError when a named cluster cannot be reached."""
    import ray

    address = config.cluster.address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would give a worker's every thread pool all cores; each pool of ours sets its own threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # More processes than cores is a choice (two actors and two ranks on a laptop), not an error.
        wanted = config.actors.count * config.actors.threads + config.learner.ranks * config.learner.threads
        options |= {
            "num_cpus": max(os.cpu_count() or 1, wanted),
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cluster.address {address}: cannot reach a Ray cluster there: {error}; start one with `ray start --head`, "
            "or leave cluster.address out to run on this machine alone"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
