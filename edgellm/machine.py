"""The machine under us: the name of its CPU, and how fast it reads memory."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

STREAM_NBYTES = 512 << 20  # far more than any last-level cache
STREAM_PASSES = 5


@functools.cache
def cpu_name() -> str:
    """The CPU as its maker calls it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    return platform.processor() or platform.machine()


@functools.cache
def _stream_sum() -> Callable[[np.ndarray], int]:
    """A plain loop over memory: an integer sum, which LLVM turns into vector loads and adds. Compiles in 0.3 s."""
    import numba

    @numba.njit("int64(int64[::1])", nogil=True)
    def stream_sum(x):  # type: ignore[no-untyped-def]
        total = 0
        for i in range(len(x)):
            total += x[i]
        return total

    summing: Callable[[np.ndarray], int] = stream_sum
    return summing


def read_bandwidth(n_threads: int, nbytes: int = STREAM_NBYTES, passes: int = STREAM_PASSES) -> float:
    """Bytes per second that ``n_threads`` threads read from memory together in a plain loop, the best of all passes."""
    memory = np.ones(nbytes // 8, np.int64)
    shares = np.array_split(memory, n_threads)
    stream_sum = _stream_sum()
    best = float("inf")
    for _ in range(passes):
        threads = [threading.Thread(target=stream_sum, args=(share,)) for share in shares[1:]]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        stream_sum(shares[0])
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - started)
    return memory.nbytes / best
