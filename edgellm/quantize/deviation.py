"""How far values stand from those that they are to be: sums over a tensor, whose rows may come in pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Deviation:
    """Sums over n weights, of their squares and of the squares of what was added to them; the largest addition."""

    n: int = 0
    squares: float = 0.0
    error_squares: float = 0.0
    largest: float = 0.0

    def add(self, rows: np.ndarray, back: np.ndarray) -> None:
        """float32 weights and what stands in their place, in one shape."""
        difference = back - rows
        self.n += rows.size
        self.squares += float(np.square(rows, dtype=np.float64).sum())
        self.error_squares += float(np.square(difference, dtype=np.float64).sum())
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0)))

    def merge(self, other: Deviation) -> None:
        """The sums of other rows too."""
        self.n += other.n
        self.squares += other.squares
        self.error_squares += other.error_squares
        self.largest = max(self.largest, other.largest)

    @property
    def nmse(self) -> float:
        """The squares of the error by those of the weights: 0 for equal ones."""
        return self.error_squares / self.squares if self.squares else (math.inf if self.error_squares else 0.0)

    @property
    def rmse(self) -> float:
        """Root mean square error."""
        return math.sqrt(self.error_squares / max(self.n, 1))

    @property
    def relative(self) -> float:
        """The same by the weights' own size."""
        return math.sqrt(self.nmse)
