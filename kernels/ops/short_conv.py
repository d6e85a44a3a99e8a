"""A short convolution along the tokens of a sequence, gated on both sides: the recurrent layer of LFM2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


@dataclass(frozen=True)
class ShortConv(Op):
    """out = c * conv(b * x), where a row of ``bcx`` is [b | c | x], each as wide as ``out``.

    conv[t, i] = sum over k of weight[i, k] * (b * x)[t - n_taps + 1 + k, i], weight (width, n_taps), and zero before
    the first token. The state of ``layer`` holds the last n_taps - 1 rows of b * x, oldest first.
    """

    name, reads, writes, weights, cache = "short_conv", ("bcx",), ("out",), ("weight",), "update"

    bcx: str
    weight: str
    out: str
    layer: int

    def reference(self, step: Step) -> None:
        weight, (states,) = step.weight(self.weight), step.pool.arrays[self.layer]
        n_before, width = weight.shape[1] - 1, step[self.out].shape[1]
        for segment in step.segments:
            read, written = step.table(self.layer)[segment.row]
            b, c, x = np.split(step[self.bcx][segment.rows], 3, axis=1)
            before = np.zeros((n_before, width), np.float32)
            if segment.first_position:
                before[...] = states[read].reshape(before.shape)
            u = np.concatenate([before, b * x])
            taps = np.lib.stride_tricks.sliding_window_view(u, n_before + 1, axis=0)  # (n, width, n_taps)
            step[self.out][segment.rows] = c * np.einsum("tik,ik->ti", taps, weight)
            states[written] = u[len(u) - n_before :].reshape(-1)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, n_taps in ((64, 3), (40, 4), (7, 2)):
            layer, weight = s.layer(StateLayer((n_taps - 1) * width)), s.tensor("F32", (width, n_taps))
            s.emit(f"width={width} taps={n_taps}", ShortConv(s.input(3 * width), weight, s.buffer(width), layer))
