"""Normalisation of rows, or of the heads in a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


@dataclass(frozen=True)
class RMSNorm(Op):
    """out = x / sqrt(mean(x^2) + eps) * weight, over each group of len(weight) values of a row (a row, or a head)."""

    name, reads, writes, weights, by_row = "rms_norm", ("x",), ("out",), ("weight",), True

    x: str
    weight: str
    out: str
    eps: float

    def reference(self, step: Step) -> None:
        x, weight = step[self.x], step.weight(self.weight)
        groups = x.reshape(len(x), x.shape[1] // len(weight), len(weight))
        mean_square = np.mean(np.square(groups, dtype=np.float64), axis=-1, keepdims=True)
        normed = groups * (1.0 / np.sqrt(mean_square + self.eps)).astype(np.float32) * weight
        step[self.out] = normed.reshape(x.shape)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for groups, width in ((1, 576), (1, 33), (1, 7), (3, 40), (2, 64)):
            x, weight = s.input(groups * width), s.tensor("F32", (width,))
            s.emit(f"groups={groups} width={width}", RMSNorm(x, weight, s.buffer(groups * width), 1e-5))


@dataclass(frozen=True)
class LayerNorm(Op):
    """out = (x - mean(x)) / sqrt(var(x) + eps) * weight (+ bias), over each row."""

    name, reads, writes, weights, by_row = "layer_norm", ("x",), ("out",), ("weight", "bias"), True

    x: str
    weight: str
    out: str
    eps: float
    bias: str | None = None

    def reference(self, step: Step) -> None:
        x = step[self.x].astype(np.float64)
        x -= x.mean(axis=1, keepdims=True)
        scale = 1.0 / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + self.eps)
        normed = (x * scale).astype(np.float32) * step.weight(self.weight)
        step[self.out] = normed if self.bias is None else normed + step.weight(self.bias)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, has_bias in ((384, True), (33, False), (7, True), (64, False)):
            bias = s.tensor("F32", (width,)) if has_bias else None
            op = LayerNorm(s.input(width), s.tensor("F32", (width,)), s.buffer(width), 1e-12, bias)
            s.emit(f"width={width} bias={has_bias}", op)
