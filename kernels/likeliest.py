"""What a sampler asks of a vocabulary's logits first, from the kernel in ``vocabulary.py`` once an executor has it.

Without it (another executor, a sampler on its own) ``likeliest`` gives None and numpy does the work.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_K = 128  # each insertion moves up to so many


class Likeliest(NamedTuple):
    """The head of a vocabulary.

    positions   (k,) int64 by falling logit, ties by rising position
    log_sum     log of the sum of exp(logit) over the whole vocabulary, when it was asked for
    """

    positions: np.ndarray
    log_sum: float | None


class VocabularyKernel:
    """The kernel behind Python's calling convention; any number of threads may call it. NaN has no defined place."""

    def __init__(self, address: int, keep_alive: object) -> None:
        self._function: Callable[..., None] = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
        self._keep_alive = keep_alive
        self._arguments = _Arguments()

    def __call__(self, logits: np.ndarray, k: int, with_sum: bool = False) -> Likeliest:
        """``logits`` is contiguous float32 (n,) with 0 < k <= n."""
        assert logits.dtype == np.float32 and logits.flags.c_contiguous and 0 < k <= min(len(logits), MAX_K)
        given = self._arguments
        given.record[:3] = logits.__array_interface__["data"][0], len(logits), k
        given.record[5] = with_sum
        self._function(given.address, 0, 0, 1)
        log_sum = float(given.values[0]) + math.log(given.record[6:].view(np.float64)[0]) if with_sum else None
        return Likeliest(given.positions[:k].copy(), log_sum)


class _Arguments(threading.local):
    """Made once for each thread: making them takes longer than the kernel."""

    def __init__(self) -> None:
        self.positions, self.values = np.empty(MAX_K, np.int64), np.empty(MAX_K, np.float32)
        self.record = np.array([0, 0, 0, self.positions.ctypes.data, self.values.ctypes.data, 0, 0], np.int64)
        self.address = self.record.ctypes.data


_kernel: VocabularyKernel | None = None


def use(kernel: VocabularyKernel | None) -> None:
    """Let all samplers of this process call ``kernel``; None: none."""
    global _kernel
    _kernel = kernel


def likeliest(logits: np.ndarray, k: int, with_sum: bool = False) -> Likeliest | None:
    """The head of a vocabulary, or None where there is no kernel for these logits."""
    if _kernel is None or not 0 < k <= min(len(logits), MAX_K) or logits.dtype != np.float32:
        return None
    return _kernel(np.ascontiguousarray(logits), k, with_sum)
