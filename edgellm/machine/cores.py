"""How many threads are worth starting: the physical cores that this process may use.

Two hyperthreads of a core share its arithmetic and its caches; a second one only makes the others wait at a barrier.
Slow cores count like others: they take fewer parts of a prompt, and decoding leaves them out where that is faster
(kernels/cpu/run/decode_threads.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgellm.machine.control_groups import control_groups


def default_threads() -> int:
    """Physical cores of this process's CPU set, no more than its control group pays for; at least 1."""
    if sys.platform == "linux":
        cpus = os.sched_getaffinity(0)
        return max(1, min(_physical(cpus), _quota()))
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            return max(1, int(subprocess.check_output(["sysctl", "-n", "hw.physicalcpu"])))
        if sys.platform == "win32":
            return max(1, _windows_cores(ctypes.windll.kernel32))
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


def _windows_cores(kernel32: Any) -> int:
    """Cores of this process's CPU set on Windows, whose library is given."""
    length, ours, all_of_them = ctypes.c_ulong(), ctypes.c_size_t(), ctypes.c_size_t()
    cores = 0  # RelationProcessorCore
    kernel32.GetLogicalProcessorInformationEx(cores, None, ctypes.byref(length))
    records = ctypes.create_string_buffer(length.value)
    if not kernel32.GetLogicalProcessorInformationEx(cores, records, ctypes.byref(length)):
        raise OSError("the system does not say which cores there are")
    this_process = ctypes.c_void_p(-1)
    if not kernel32.GetProcessAffinityMask(this_process, ctypes.byref(ours), ctypes.byref(all_of_them)):
        raise OSError("the system does not say which CPUs are ours")
    return _cores_of_mask(records.raw[: length.value], ours.value)


def _cores_of_mask(records: bytes, mask: int) -> int:
    """How many cores have a CPU of the mask; all, where it is 0, as for a process with CPUs of several groups of 64.

    A SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX is uint32 kind, uint32 bytes, 24 bytes, and the core's uint64 mask first
    of others.
    """
    n = start = 0
    while start + 40 <= len(records):
        _, nbytes, cpus = struct.unpack_from("<II24xQ", records, start)
        n += not mask or bool(cpus & mask)
        start += max(nbytes, 40)
    return n


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
