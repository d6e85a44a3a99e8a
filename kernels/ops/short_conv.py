"""Short convolutions along the tokens of a sequence: gated on both sides in LFM2, before a delta rule in Qwen 3.5 and a
state space in Mamba-2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops.elementwise import silu
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
        b, c, x = np.split(step[self.bcx], 3, axis=1)
        step[self.out] = c * _convolve(step, b * x, self.weight, self.layer)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, n_taps in ((64, 3), (40, 4), (7, 2)):
            layer, weight = s.layer(StateLayer((n_taps - 1) * width)), s.tensor("F32", (width, n_taps))
            s.emit(f"width={width} taps={n_taps}", ShortConv(s.input(3 * width), weight, s.buffer(width), layer))


@dataclass(frozen=True)
class CausalConv(Op):
    """out = silu(conv(x) + bias), conv as in ``ShortConv``; ``layer`` has the last n_taps - 1 rows of x."""

    name, reads, writes, weights, cache = "causal_conv", ("x",), ("out",), ("weight", "bias"), "update"

    x: str
    weight: str
    out: str
    layer: int
    bias: str | None = None

    def reference(self, step: Step) -> None:
        conv = _convolve(step, step[self.x], self.weight, self.layer)
        step[self.out] = silu(conv if self.bias is None else conv + step.weight(self.bias))

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, n_taps in ((64, 4), (40, 3), (7, 2)):
            layer, weight = s.layer(StateLayer((n_taps - 1) * width)), s.tensor("F32", (width, n_taps))
            bias = None if width == 40 else s.tensor("F32", (width,))
            s.emit(f"width={width} taps={n_taps}", CausalConv(s.input(width), weight, s.buffer(width), layer, bias))


def _convolve(step: Step, x: np.ndarray, name: str, layer: int) -> np.ndarray:
    """The convolution of all rows, each sequence after what its state holds."""
    weight, (states,) = step.weight(name), step.pool.arrays[layer]
    n_before, out = weight.shape[1] - 1, np.empty_like(x)
    for segment in step.segments:
        read, written = step.table(layer)[segment.row]
        before = np.zeros((n_before, x.shape[1]), np.float32)
        if segment.first_position:
            before[...] = states[read].reshape(before.shape)
        u = np.concatenate([before, x[segment.rows]])
        taps = np.lib.stride_tricks.sliding_window_view(u, n_before + 1, axis=0)  # (n, width, n_taps)
        out[segment.rows] = np.einsum("tik,ik->ti", taps, weight)
        states[written] = u[len(u) - n_before :].reshape(-1)
    return out
