"""What a sampler asks of a vocabulary's logits, the largest or a whole draw: from the kernel in ``cpu/vocabulary.py``,
once an executor has it.

Without it (another executor, a sampler on its own) ``likeliest`` gives None and numpy does the work.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edgellm.kernels import vocabulary_layout as at
from edgellm.kernels.token_draw import TokenDraw

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
        given = self._arguments
        given.record[:4] = _address(logits, k), len(logits), k, with_sum
        given.record[at.ROW // 8 :] = given.results
        self._function(given.address, 0, 0, 1)
        plain_sum, sum_of_exp = given.row.tolist()
        values = given.values[:k].copy()
        if not plain_sum < math.inf or values[0] == -math.inf:
            return None
        log_sum = float(values[0]) + math.log(sum_of_exp) if with_sum else None
        return Likeliest(given.positions[:k].copy(), values, log_sum)

    def draw(self, logits: np.ndarray, how: TokenDraw) -> bool:
        """Draw one token; False when a logit is not finite."""
        self._function(how.begin(_address(logits, how.k), len(logits)), 0, 0, 1)
        return how.tokens(1)[0] >= 0


def _address(logits: np.ndarray, k: int) -> int:
    assert logits.dtype == np.float32 and logits.flags.c_contiguous and 0 < k <= min(len(logits), MAX_K)
    return int(logits.__array_interface__["data"][0])


class _Arguments(threading.local):
    """Made once for each thread: making them takes longer than the kernel."""

    def __init__(self) -> None:
        self.positions, self.values = np.empty(MAX_K, np.int64), np.empty(MAX_K, np.float32)
        self.row = np.empty(2)
        self.record = np.zeros(at.FIELDS, np.int64)
        self.results = [array.ctypes.data for array in (self.row, self.positions, self.values)] + [0, 0]
        self.address = self.record.ctypes.data


_kernel: VocabularyKernel | None = None


def use(kernel: VocabularyKernel | None) -> None:
    """Let all samplers of this process call ``kernel``; None: none."""
    global _kernel
    _kernel = kernel


def ready() -> bool:
    """Whether there is a kernel."""
    return _kernel is not None


def likeliest(logits: np.ndarray, k: int, with_sum: bool = False) -> Likeliest | None:
    """The head of a vocabulary, or None where there is no kernel for these logits, or they are no sound ones."""
    if _kernel is None or not 0 < k <= min(len(logits), MAX_K) or logits.dtype != np.float32:
        return None
    return _kernel(np.ascontiguousarray(logits), k, with_sum)


def draw(logits: np.ndarray, how: TokenDraw) -> bool:
    """Draw one token from float32 logits (n,), n >= ``how.k``; False where there is no kernel, or no sound logits."""
    return _kernel is not None and _kernel.draw(np.ascontiguousarray(logits), how)
