"""How tokens are drawn from logits, for kernels: a sampler's chain as numbers, and room for what comes of it.

The record is drawn in vocabulary_layout.py. A sampler makes one of these and keeps it; a kernel fills a row for
each token, one after the other, up to ``MAX_STEPS`` between two looks of Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from edgellm.kernels import vocabulary_layout as at

MAX_STEPS = 16
N_UNIFORMS = 64  # random numbers drawn together


class Link(NamedTuple):
    """One sampler of a chain: its kind and amount as in vocabulary_layout.py, and how many stay at least."""

    kind: int
    amount: float
    min_keep: int = 1


class Drawn(NamedTuple):
    """One token that was drawn, and what it was drawn from.

    place        of the token in ``positions``
    positions    token ids by falling logit
    values       their logits
    sum          of exp(logit - the largest) over the whole vocabulary, when it was wanted
    shaped       what the chain made of the first logits; ``left[-1]`` of them stayed
    left         how many each link left
    shaped_sum   of exp(shaped - the first) over those
    """

    token: int
    place: int
    positions: list[int]
    values: list[float]
    sum: float
    shaped: list[float]
    left: list[int]
    shaped_sum: float


class TokenDraw:
    """``links`` cut the ``n_candidates`` largest logits down; ``k`` of the vocabulary are reported, no fewer.

    Not shared between threads. ``rng`` belongs to it from now on: numbers are drawn from it ahead,
    from the first use on.
    """

    def __init__(
        self, links: Sequence[Link], n_candidates: int, k: int, wants_sum: bool, rng: np.random.Generator
    ) -> None:
        assert 0 < n_candidates <= k
        self._links = np.array(links, np.float64)
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
        self._first_uniform = self._uniforms.ctypes.data
        self._record[at.UNIFORMS // 8] = self._first_uniform + self._uniforms.nbytes  # none yet
        self._results = np.array([array.ctypes.data for array in results])
        self.k, self.address = k, self._record.ctypes.data

    def __reduce__(self) -> Any:
        raise TypeError("A sampler holds addresses for kernels and cannot be copied. Make another from its parameters.")

    def begin(self, logits: int, n_logits: int) -> int:
        """Address of the record; the next row is the first one, from logits at that address."""
        assert n_logits >= self.k
        used = (int(self._record[at.UNIFORMS // 8]) - self._first_uniform) // 8
        if used > N_UNIFORMS - MAX_STEPS:
            self._uniforms[:-used] = self._uniforms[used:]
            self._uniforms[-used:] = self._rng.random(used)
            self._record[at.UNIFORMS // 8] = self._first_uniform
        self._record[:2] = logits, n_logits
        self._record[at.ROW // 8 :] = self._results
        return self.address

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
