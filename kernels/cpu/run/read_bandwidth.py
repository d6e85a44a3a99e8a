"""How fast this machine reads memory: the best of several orders, in large pages where there are any.

A loop in one order lies: one that a first-level prefetch slows down hides what the kernels could have.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from edgellm.formats.large_pages import LARGE_PAGE_NBYTES
from edgellm.kernels.cpu.compile import isa, jit
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache, default_folder
from edgellm.kernels.cpu.compile.kernel_table import STREAM
from edgellm.kernels.cpu.lib.layout import STREAM_ORDERS
from edgellm.kernels.cpu.run.threads import aligned_zeros

STREAM_NBYTES = 512 << 20  # far more than any last-level cache
STREAM_PASSES = 5


def read_bandwidth(n_threads: int, nbytes: int = STREAM_NBYTES, passes: int = STREAM_PASSES) -> float:
    """Bytes per second that ``n_threads`` threads read from memory together, the best of all orders and passes."""
    cache, code = KernelCache(isa.detect(), default_folder()), jit.CodeMemory()
    stream = jit.KERNEL(code.load(STREAM, cache.objects([STREAM])[STREAM]))
    memory = np.ones(nbytes + LARGE_PAGE_NBYTES, np.uint8)  # numpy asks for large pages itself
    start = memory.ctypes.data + -memory.ctypes.data % LARGE_PAGE_NBYTES
    share = nbytes // n_threads // 4096 * 4096
    sums = aligned_zeros(64 * n_threads)
    best = float("inf")
    for order in STREAM_ORDERS:
        for _ in range(passes):
            calls = [(start + i * share, share, order, sums.ctypes.data + i * 64) for i in range(n_threads)]
            threads = [threading.Thread(target=stream, args=call) for call in calls[1:]]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            stream(*calls[0])
            for thread in threads:
                thread.join()
            best = min(best, time.perf_counter() - started)
    return share * n_threads / best
