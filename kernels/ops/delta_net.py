"""The gated delta rule: a recurrent layer that corrects what it remembers under a key (https://arxiv.org/abs/2412.06464).

The state of a head is a matrix S, (key dimension, value dimension). For each token it fades, is asked for the token's
key, and moves towards the token's value by a part of what it is off:

    S = decay S;   delta = rate (v - S^T k);   S = S + k delta^T;   out = S^T q / sqrt(head_dim)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops.elementwise import sigmoid
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


@dataclass(frozen=True)
class DeltaGates(Op):
    """decay = e^(a softplus(alpha + dt_bias)) and rate = sigmoid(beta), a number for each head; a is below 0."""

    name, reads, writes = "delta_gates", ("alpha", "beta"), ("decay", "rate")
    weights, by_row = ("a", "dt_bias"), True

    alpha: str
    beta: str
    a: str
    dt_bias: str
    decay: str
    rate: str

    def reference(self, step: Step) -> None:
        softplus = np.logaddexp(np.float32(0.0), step[self.alpha] + step.weight(self.dt_bias))
        step[self.decay] = np.exp(step.weight(self.a) * softplus)
        step[self.rate] = sigmoid(step[self.beta])

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for heads in (1, 5, 16, 33):
            a, dt_bias = s.tensor("F32", (heads,)), s.tensor("F32", (heads,))
            numbers = s.tensors[a].data.view(np.float32)
            numbers[:] = -np.abs(numbers)
            op = DeltaGates(s.input(heads), s.input(heads), a, dt_bias, s.buffer(heads), s.buffer(heads))
            s.emit(f"heads={heads}", op)


@dataclass(frozen=True)
class DeltaRule(Op):
    """The rule above for every value head; q and k are first brought to length 1.

    qkv     rows [q | k | v]: n_k_heads, n_k_heads and n_v_heads heads of one size
    tiled   value head h belongs to key head h % n_k_heads, else to h // (n_v_heads / n_k_heads)
    eps     is added to the squares of q and of k
    """

    name, reads, writes, cache = "delta_rule", ("qkv", "decay", "rate"), ("out",), "update"

    qkv: str
    decay: str
    rate: str
    out: str
    layer: int
    n_k_heads: int
    n_v_heads: int
    tiled: bool
    eps: float = 1e-6

    def reference(self, step: Step) -> None:
        dim, (states,) = step[self.out].shape[1] // self.n_v_heads, step.pool.arrays[self.layer]
        n_k, n_v = self.n_k_heads, self.n_v_heads
        of = np.arange(n_v) % n_k if self.tiled else np.arange(n_v) // (n_v // n_k)
        heads = step[self.qkv].reshape(len(step[self.qkv]), 2 * n_k + n_v, dim)
        squares = np.square(heads[:, : 2 * n_k], dtype=np.float64).sum(axis=-1, keepdims=True)
        unit = (heads[:, : 2 * n_k] / np.sqrt(squares + self.eps)).astype(np.float32)
        q, k, v = unit[:, of], unit[:, n_k + of], heads[:, 2 * n_k :]
        decay, rate = step[self.decay], step[self.rate]
        out = step[self.out].reshape(-1, n_v, dim)
        for segment in step.segments:
            read, written = step.table(self.layer)[segment.row]
            state = np.zeros((n_v, dim, dim), np.float32)
            if segment.first_position:
                state[...] = states[read].reshape(state.shape)
            for t in range(segment.start, segment.stop):
                state *= decay[t, :, None, None]
                delta = rate[t, :, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], state))
                state += k[t, :, :, None] * delta[:, None, :]
                out[t] = np.einsum("hk,hkv->hv", q[t], state) / np.float32(np.sqrt(dim))
            states[written] = state.reshape(-1)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for n_k, n_v, dim, tiled in ((1, 1, 16, False), (2, 6, 32, True), (2, 6, 48, False), (2, 2, 128, True)):
            qkv, layer = s.input((2 * n_k + n_v) * dim), s.layer(StateLayer(n_v * dim * dim))
            decay, rate = s.input(n_v), s.input(n_v)
            for name in (decay, rate):
                s.inputs[name] = sigmoid(s.inputs[name])
            op = DeltaRule(qkv, decay, rate, s.buffer(n_v * dim), layer, n_k, n_v, tiled)
            s.emit(f"heads={n_v}/{n_k} head_dim={dim} tiled={tiled}", op)
