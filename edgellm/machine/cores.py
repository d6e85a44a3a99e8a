"""How many threads are worth starting: the physical cores that this process may use.

Two hyperthreads of a core share its arithmetic and its caches; a second one only makes the others wait at a barrier.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

from edgellm.machine.control_groups import control_groups


def default_threads() -> int:
    """Physical cores of this process's CPU set, no more than its control group pays for; at least 1."""
    if sys.platform == "linux":
        cpus = os.sched_getaffinity(0)
        return max(1, min(_physical(cpus), _quota()))
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            return max(1, int(subprocess.check_output(["sysctl", "-n", "hw.physicalcpu"])))
    return os.cpu_count() or 1


def _physical(cpus: set[int]) -> int:
    """CPUs of the set, counting each core once."""
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _quota() -> int:
    """Whole CPUs that the control groups of this process allow; a large number without a limit."""
    least = min((_group_quota(group, is_v2) for group, is_v2 in control_groups("cpu")), default=math.inf)
    return 1 << 16 if math.isinf(least) else math.ceil(least)


def _group_quota(group: Path, is_v2: bool) -> float:
    """CPUs that one group allows, infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):
        if is_v2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        if quota not in ("max", "-1"):
            return int(quota) / int(period)
    return math.inf
