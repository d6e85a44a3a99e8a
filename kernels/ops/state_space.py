"""Mamba-2's state space: a recurrent layer whose state fades by one number a head (https://arxiv.org/abs/2405.21060).

The state of a head is a matrix S, (state size, head dimension). For each token it fades, takes in the token's x under
its B, and is asked by its C:

    S = decay S + rate B x^T;   out = S^T C + d x
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
class SSMGates(Op):
    """rate = softplus(dt + dt_bias) and decay = e^(a rate), a number for each head; a is below 0."""

    name, reads, writes = "ssm_gates", ("dt",), ("decay", "rate")
    weights, by_row = ("a", "dt_bias"), True

    dt: str
    a: str
    dt_bias: str
    decay: str
    rate: str

    def reference(self, step: Step) -> None:
        rate = np.logaddexp(np.float32(0.0), step[self.dt] + step.weight(self.dt_bias))
        step[self.rate], step[self.decay] = rate, np.exp(step.weight(self.a).reshape(-1) * rate)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for heads in (1, 5, 16, 33):
            a, dt_bias = s.tensor("F32", (heads, 1)), s.tensor("F32", (heads,))
            numbers = s.tensors[a].data.view(np.float32)
            numbers[:] = -np.abs(numbers)
            s.emit(f"heads={heads}", SSMGates(s.input(heads), a, dt_bias, s.buffer(heads), s.buffer(heads)))


@dataclass(frozen=True)
class SSMScan(Op):
    """The rule above for every head.

    xbc   rows [x | B | C]: n_heads heads of x, then n_groups heads of B, and of C, of the state's size; head h belongs
          to group h // (n_heads / n_groups)
    d     (n_heads, 1)
    The state of ``layer`` is (n_heads, state size, head dimension).
    """

    name, reads, writes, cache = "ssm_scan", ("xbc", "decay", "rate"), ("out",), "update"
    weights = ("d",)

    xbc: str
    decay: str
    rate: str
    d: str
    out: str
    layer: int
    n_heads: int
    n_groups: int

    def reference(self, step: Step) -> None:
        xbc, (states,), n = step[self.xbc], step.pool.arrays[self.layer], len(step[self.xbc])
        inner, of = step[self.out].shape[1], np.arange(self.n_heads) // (self.n_heads // self.n_groups)
        size = (xbc.shape[1] - inner) // 2
        x = xbc[:, :inner].reshape(n, self.n_heads, inner // self.n_heads)
        in_groups = (n, self.n_groups, size // self.n_groups)
        b, c = (xbc[:, at : at + size].reshape(in_groups)[:, of] for at in (inner, inner + size))
        decay, rate, d = step[self.decay], step[self.rate], step.weight(self.d).reshape(-1, 1)
        out = step[self.out].reshape(x.shape)
        for segment in step.segments:
            read, written = step.table(self.layer)[segment.row]
            state = np.zeros((self.n_heads, b.shape[2], x.shape[2]), np.float32)
            if segment.first_position:
                state[...] = states[read].reshape(state.shape)
            for t in range(segment.start, segment.stop):
                state *= decay[t, :, None, None]
                state += b[t, :, :, None] * (rate[t, :, None] * x[t])[:, None, :]
                out[t] = np.einsum("hn,hnp->hp", c[t], state) + d * x[t]
            states[written] = state.reshape(-1)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for heads, groups, dim, size in ((1, 1, 16, 1), (6, 2, 32, 24), (4, 1, 80, 37), (4, 4, 64, 128)):
            inner, layer = heads * dim, s.layer(StateLayer(heads * dim * size))
            xbc, decay, rate = s.input(inner + 2 * groups * size), s.input(heads), s.input(heads)
            for name in (decay, rate):
                s.inputs[name] = 1 / (1 + np.exp(-s.inputs[name]))
            op = SSMScan(xbc, decay, rate, s.tensor("F32", (heads, 1)), s.buffer(inner), layer, heads, groups)
            s.emit(f"heads={heads}/{groups} head_dim={dim} state={size}", op)


@dataclass(frozen=True)
class GatedNorm(Op):
    """out = y / sqrt(mean(y^2) + eps) * weight of y = x * silu(gate), the mean over each of the weight's rows.

    weight   (n_groups, width / n_groups)
    """

    name, reads, writes, weights, by_row = "gated_norm", ("x", "gate"), ("out",), ("weight",), True

    x: str
    gate: str
    weight: str
    out: str
    eps: float

    def reference(self, step: Step) -> None:
        weight = step.weight(self.weight)
        gated = (step[self.x] * silu(step[self.gate])).reshape(-1, *weight.shape)
        mean_square = np.mean(np.square(gated, dtype=np.float64), axis=-1, keepdims=True)
        normed = gated * (1.0 / np.sqrt(mean_square + self.eps)).astype(np.float32) * weight
        step[self.out] = normed.reshape(step[self.out].shape)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for groups, width in ((1, 576), (1, 33), (2, 7), (3, 40), (8, 64)):
            x, gate, weight = s.input(groups * width), s.input(groups * width), s.tensor("F32", (groups, width))
            s.emit(f"groups={groups} width={width}", GatedNorm(x, gate, weight, s.buffer(groups * width), 1e-5))
