"""How much memory this machine can give, and how much this process took.

The free memory is the smaller of the machine's and of every control group above the process: inside a container the
machine's own figure is a promise that the kernel does not keep.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.machine.control_groups import control_groups


@dataclass(frozen=True)
class SystemMemory:
    """Bytes of memory that this process may use at most, and that are free for it now."""

    total: int
    available: int


def system_memory() -> SystemMemory:
    """The machine's memory, or the container's where that is less."""
    if sys.platform == "darwin":
        memory = _macos()
    elif sys.platform == "win32":
        memory = _windows()
    else:
        memory = _linux()
    for limit, used in _group_limits():
        memory = SystemMemory(min(memory.total, limit), min(memory.available, max(limit - used, 0)))
    return memory


def peak_rss() -> int:
    """Most bytes of this process that were in memory at once, mapped file pages included; 0 where unknown."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _linux() -> SystemMemory:
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    return SystemMemory(fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"]))


def _macos() -> SystemMemory:
    total = int(subprocess.check_output(["sysctl", "-n", "hw.memsize"]))
    lines = subprocess.check_output(["vm_stat"], text=True).splitlines()
    page = int("".join(filter(str.isdigit, lines[0])))
    pages = {name: int(value.strip(" .")) for name, _, value in (line.partition(":") for line in lines[1:]) if value}
    free = sum(pages.get(name, 0) for name in ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable"))
    return SystemMemory(total, free * page)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows interface."""

    _fields_ = (
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        ("total", ctypes.c_ulonglong),
        ("available", ctypes.c_ulonglong),
        ("rest", ctypes.c_ulonglong * 5),
    )


def _windows() -> SystemMemory:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return SystemMemory(status.total, status.available)


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of every control group that has a limit."""
    for group, is_v2 in control_groups("memory"):
        names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((group / name).read_text()) for name in names)
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            droppable = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
            if limit < 1 << 60:  # version 1 writes a huge number for "no limit"
                yield limit, max(used - droppable, 0)
