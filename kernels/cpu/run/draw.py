"""The top-k kernel behind Python's calling convention, and the records that it reads (lib/draw_layout.py).

The kernel fills a row for each token, one after the other, up to ``MAX_STEPS`` between two looks of Python.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from edgellm.kernels.cpu.lib import draw_layout as at
from edgellm.kernels.draw import Drawn, DrawSpec, TopLogits

_RESULTS = slice(at.ROW // 8, at.LEFT // 8 + 1)

MAX_STEPS = 16
N_UNIFORMS = 64  # random numbers drawn together


class CPUDraw:
    """The ``Draw`` of a CPU executor. ``address`` is the kernel's, in memory that ``keep_alive`` holds."""

    max_k = 128  # each insertion moves up to so many
    bans = True

    def __init__(self, address: int, keep_alive: object) -> None:
        self.address = address
        self._function: Callable[..., None] = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
        self._keep_alive = keep_alive
        self._arguments = _Arguments()

    def __reduce__(self) -> Any:
        raise TypeError("A sampler holds addresses for kernels and cannot be copied. Make another from its parameters.")

    def top_k(self, logits: np.ndarray, k: int, with_sum: bool = False) -> TopLogits | None:
        """See ``Draw``."""
        if not 0 < k <= min(len(logits), self.max_k) or logits.dtype != np.float32:
            return None
        given, logits = self._arguments, np.ascontiguousarray(logits)
        given.record[:4] = _address(logits), len(logits), k, with_sum
        given.record[_RESULTS] = given.results
        self._function(given.address, 0, 0, 1)
        plain_sum, sum_of_exp = given.row.tolist()
        values = given.values[:k].copy()
        if not plain_sum < math.inf or values[0] == -math.inf:
            return None
        log_sum = float(values[0]) + math.log(sum_of_exp) if with_sum else None
        return TopLogits(given.positions[:k].copy(), values, log_sum)

    def open(self, spec: DrawSpec, rng: np.random.Generator) -> CPUTokenDraw:
        """See ``Draw``."""
        return CPUTokenDraw(spec, rng, self._function)


class _Arguments(threading.local):
    """Made once for each thread: making them takes longer than the kernel."""

    def __init__(self) -> None:
        self.positions, self.values = np.empty(CPUDraw.max_k, np.int64), np.empty(CPUDraw.max_k, np.float32)
        self.row = np.empty(2)
        self.record = np.zeros(at.FIELDS, np.int64)
        self.results = [array.ctypes.data for array in (self.row, self.positions, self.values)] + [0, 0]
        self.address = self.record.ctypes.data


class CPUTokenDraw:
    """The ``TokenDraw`` of a CPU executor: a spec as a record, and room for the rows of some tokens."""

    def __init__(self, spec: DrawSpec, rng: np.random.Generator, function: Callable[..., None]) -> None:
        links, n_candidates, k, wants_sum, banned = spec
        assert 0 < n_candidates <= k - len(banned) <= k <= CPUDraw.max_k, "a spec beyond what Draw promises"
        self._links = np.array([(at.LINKS_BY_NAME[name], *amounts) for name, *amounts in links], np.float64)
        self._positions = np.empty((MAX_STEPS, k), np.int64)
        self._values = np.empty((MAX_STEPS, k), np.float32)
        self._shaped = np.empty((MAX_STEPS, n_candidates), np.float64)
        self._left = np.empty((MAX_STEPS, len(links)), np.int64)
        self._rows = np.empty((MAX_STEPS, at.ROW_FIELDS), np.float64)
        self._numbers = self._rows.view(np.int64)
        self._rng, self._uniforms = rng, np.empty(N_UNIFORMS)
        results = (self._rows, self._positions, self._values, self._shaped, self._left)
        self._record = np.zeros(at.FIELDS, np.int64)
        self._record[at.K // 8 : at.UNIFORMS // 8] = k, wants_sum, self._links.ctypes.data, len(links), n_candidates
        self._banned = np.array(banned, np.int64)
        self._record[at.BANNED // 8 :] = self._banned.ctypes.data, len(banned)
        self._first_uniform = self._uniforms.ctypes.data
        self._record[at.UNIFORMS // 8] = self._first_uniform + self._uniforms.nbytes  # none yet
        self._results = np.array([array.ctypes.data for array in results])
        self._k, self._address, self._function = k, self._record.ctypes.data, function

    def begin(self, logits: int, n_logits: int) -> int:
        """Address of the record; the next row is the first one, from logits at that address."""
        assert n_logits >= self._k
        self.uniforms(MAX_STEPS)
        self._record[:2] = logits, n_logits
        self._record[_RESULTS] = self._results
        return self._address

    def uniforms(self, n: int) -> np.ndarray:
        """The next uniform numbers, MAX_STEPS or fewer; they are used when tokens are drawn."""
        used = (int(self._record[at.UNIFORMS // 8]) - self._first_uniform) // 8
        if used > N_UNIFORMS - MAX_STEPS:
            self._uniforms[:-used] = self._uniforms[used:]
            self._uniforms[-used:] = self._rng.random(used)
            self._record[at.UNIFORMS // 8] = self._first_uniform
            used = 0
        return self._uniforms[used : used + n]

    def draw(self, logits: np.ndarray) -> bool:
        """See ``TokenDraw``."""
        logits = np.ascontiguousarray(logits)
        self._function(self.begin(_address(logits), len(logits)), 0, 0, 1)
        return self.tokens(1)[0] >= 0

    def tokens(self, n: int) -> list[int]:
        """Those of the first n rows; -1 where a logit was not finite."""
        return self._numbers[:n, at.TOKEN // 8].tolist()

    def drawn(self, n: int) -> list[Drawn]:
        """The first n rows."""
        columns = (
            self._numbers[:n, at.TOKEN // 8], self._numbers[:n, at.PLACE // 8], self._positions[:n], self._values[:n],
            self._rows[:n, at.SUM // 8], self._shaped[:n], self._left[:n], self._rows[:n, at.SHAPED_SUM // 8],
        )  # fmt: skip
        return [Drawn(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _address(logits: np.ndarray) -> int:
    assert logits.dtype == np.float32 and logits.flags.c_contiguous
    return int(logits.__array_interface__["data"][0])
