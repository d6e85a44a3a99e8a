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
    values      (k,) float32, their logits
    log_sum     log of the sum of exp(logit) over the whole vocabulary, when it was asked for
    """

    positions: np.ndarray
    values: np.ndarray
    log_sum: float | None


class VocabularyKernel:
    """The kernel behind Python's calling convention; any number of threads may call it."""

    def __init__(self, address: int, keep_alive: object) -> None:
        self._function: Callable[..., None] = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
        self._keep_alive = keep_alive
        self._arguments = _Arguments()

    def __call__(self, logits: np.ndarray, k: int, with_sum: bool = False) -> Likeliest | None:
        """``logits`` is contiguous float32 (n,) with 0 < k <= n; None when there is a NaN or no largest one."""
        assert logits.dtype == np.float32 and logits.flags.c_contiguous and 0 < k <= min(len(logits), MAX_K)
        given = self._arguments
        given.record[:3] = logits.__array_interface__["data"][0], len(logits), k
        given.record[5] = with_sum
        self._function(given.address, 0, 0, 1)
        sum_of_exp, plain_sum = given.sums.tolist()
        values = given.values[:k].copy()
        if not plain_sum < math.inf or values[0] == -math.inf:
            return None
        log_sum = float(values[0]) + math.log(sum_of_exp) if with_sum else None
        return Likeliest(given.positions[:k].copy(), values, log_sum)


class _Arguments(threading.local):
    """Made once for each thread: making them takes longer than the kernel."""

    def __init__(self) -> None:
        self.positions, self.values = np.empty(MAX_K, np.int64), np.empty(MAX_K, np.float32)
        self.record = np.array([0, 0, 0, self.positions.ctypes.data, self.values.ctypes.data, 0, 0, 0], np.int64)
        self.sums = self.record[6:].view(np.float64)
        self.address = self.record.ctypes.data


_kernel: VocabularyKernel | None = None


def use(kernel: VocabularyKernel | None) -> None:
    """Let all samplers of this process call ``kernel``; None: none."""
    global _kernel
    _kernel = kernel


def likeliest(logits: np.ndarray, k: int, with_sum: bool = False) -> Likeliest | None:
    """The head of a vocabulary, or None where there is no kernel for these logits, or they are no sound ones."""
    if _kernel is None or not 0 < k <= min(len(logits), MAX_K) or logits.dtype != np.float32:
        return None
    return _kernel(np.ascontiguousarray(logits), k, with_sum)
