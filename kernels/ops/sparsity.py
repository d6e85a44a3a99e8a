"""Activations of which few are not 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


@dataclass(frozen=True)
class GaussianTopK(Op):
    """out = max(x - (mean(x) + factor * deviation(x)), 0) over each row: the largest of x, were they normal.

    The deviation is that of the row itself, sqrt(mean((x - mean(x))^2)).
    """

    name, reads, writes, by_row = "gaussian_top_k", ("x",), ("out",), True

    x: str
    out: str
    factor: float

    def reference(self, step: Step) -> None:
        x = step[self.x].astype(np.float64)
        mean = x.mean(axis=1, keepdims=True)
        deviation = np.sqrt(np.mean(np.square(x - mean), axis=1, keepdims=True))
        cutoff = (mean + self.factor * deviation).astype(np.float32)
        step[self.out] = np.maximum(step[self.x] - cutoff, np.float32(0.0))

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, factor in ((576, 1.6448533), (33, 0.5), (7, -0.3), (256, 1.0)):
            s.emit(f"width={width} factor={factor}", GaussianTopK(s.input(width), s.buffer(width), factor))
