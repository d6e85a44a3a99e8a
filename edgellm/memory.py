"""How much memory this machine can give, how much this process took, and how much a model will need.

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
from typing import TYPE_CHECKING

from edgellm.control_groups import control_groups
from edgellm.formats.errors import MemoryWouldExceedError
from edgellm.kv_cache import pool_blocks, pool_nbytes

if TYPE_CHECKING:
    from edgellm.kernels.program import Program

PROCESS_NBYTES = 180 << 20  # the interpreter, numpy, numba and LLVM once the kernels are loaded
GIB = 1 << 30


@dataclass(frozen=True)
class SystemMemory:
    """Bytes of memory that this process may use at most, and that are free for it now."""

    total: int
    available: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a loaded model takes when its context is full.

    weights   the mapped file; the system can drop these pages and read them again
    kv        keys and values of all contexts
    work      the buffers of one step
    process   what the program itself takes
    """

    weights: int
    kv: int
    work: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.work + self.process


def estimate(
    program: Program, weights_nbytes: int, n_ctx: int, max_tokens: int = 512, n_parallel: int = 1
) -> MemoryNeed:
    """What ``program`` needs for ``n_parallel`` contexts of ``n_ctx`` tokens and steps of at most ``max_tokens``."""
    blocks = pool_blocks(program.windows, n_ctx, max_tokens, n_parallel)
    kv = pool_nbytes(program.kv_layers, program.windows, blocks)
    rows = {"tokens": max_tokens, "outputs": 1}
    work = sum(4 * buffer.width * rows[buffer.rows] for buffer in program.buffers.values())
    return MemoryNeed(weights_nbytes, kv, work, PROCESS_NBYTES)


def check_fits(need: MemoryNeed, memory: SystemMemory | None = None) -> None:
    """Raise MemoryWouldExceedError when the model does not fit the memory that is free now."""
    memory = memory or system_memory()
    if need.total > memory.available:
        gib = [f"{n / GIB:.2f} GiB" for n in (need.total, need.weights, need.kv, memory.available)]
        raise MemoryWouldExceedError(
            f"the model needs {gib[0]} (weights {gib[1]}, context {gib[2]}) and {gib[3]} are free. "
            "Take a smaller context (-c), a smaller model, or close other programs."
        )


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
