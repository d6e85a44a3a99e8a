"""A rotation that spreads what is far out in one dimension over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


@dataclass(frozen=True)
class Hadamard(Op):
    """Each ``size`` numbers of x, a power of two, times the orthogonal Walsh-Hadamard matrix, in place.

    The matrix is its own inverse: applied twice it changes nothing.
    """

    name, reads, writes, by_row = "hadamard", ("x",), ("x",), True

    x: str
    size: int

    def reference(self, step: Step) -> None:
        x = step[self.x]
        spread, half = x.reshape(*x.shape[:-1], -1, self.size), 1
        while half < self.size:
            pairs = spread.reshape(*x.shape[:-1], -1, 2, half)
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            spread, half = np.stack([first + second, first - second], axis=-2), 2 * half
        x[...] = spread.reshape(x.shape) * np.float32(self.size**-0.5)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for groups, size in ((3, 32), (1, 64), (2, 256)):
            s.emit(f"groups={groups} size={size}", Hadamard(s.input(groups * size), size))
