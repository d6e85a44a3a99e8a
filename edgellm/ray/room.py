"""Whether a cluster has the CPUs that are wanted: Ray itself waits for them for ever, and says nothing."""

from __future__ import annotations

import time

import ray

PATIENCE_S = 10.0  # for what has just been let go of: Ray counts it as taken for some seconds


def cpus_wanting(wanted: float) -> str | None:
    """What is free of what there is, where that is less than ``wanted`` and stays so; else None."""
    until = time.monotonic() + PATIENCE_S
    while True:
        there, free = (found.get("CPU", 0) for found in (ray.cluster_resources(), ray.available_resources()))
        if wanted <= free:
            return None
        if wanted > there or time.monotonic() > until:
            return f"{free:g} of the cluster's {there:g} are free"
        time.sleep(0.2)
