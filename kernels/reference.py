"""The judge of the other executors: the same program in plain numpy float32, one small function per op.

Nothing here is fast and nothing is clever. Weights are dequantized whole on first use and kept. The cache is read and
written through the pool's own layout, so a float16 pool rounds keys and values exactly as the fast executors do; pass
a float32 pool to judge the model itself. Long sums are taken in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.formats.errors import NumericError, ParameterError
from edgellm.kernels.kv import BLOCK_TOKENS, KVPool
from edgellm.kernels.program import (
    Add,
    ApplyRope,
    Attention,
    Batch,
    Embed,
    GatedUnit,
    Hook,
    Matmul,
    Program,
    RMSNorm,
    SelectOutputs,
    StoreKV,
)

DEFAULT_POOL_TOKENS = 32768  # positions of the pool made when none is given; pages are committed when touched


@dataclass(frozen=True)
class Segment:
    """The tokens [start, stop) of a batch that belong to one sequence; ``row`` is its row of the block tables."""

    start: int
    stop: int
    row: int
    first_position: int

    @property
    def rows(self) -> slice:
        """Its rows in a buffer."""
        return slice(self.start, self.stop)

    @property
    def end_position(self) -> int:
        """One past its last position."""
        return self.first_position + self.stop - self.start


def segments(batch: Batch) -> list[Segment]:
    """The sequences of a batch, in order."""
    if not len(batch):
        return []
    starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1))
    stops = [*starts[1:], len(batch)]
    return [
        Segment(int(a), int(b), int(batch.sequences[a]), int(batch.positions[a]))
        for a, b in zip(starts, stops, strict=True)
    ]


class Step:
    """One run of a batch: its buffers by name, and what the ops look up."""

    def __init__(self, executor: ReferenceExecutor, batch: Batch) -> None:
        self.program = executor.program
        self.pool = executor.pool
        self.weight = executor.weight
        self.batch = batch
        self.segments = segments(batch)
        n_rows = {"tokens": len(batch), "outputs": int(np.count_nonzero(batch.outputs))}
        self.buffers = {
            name: np.zeros((n_rows[buffer.rows], buffer.width), np.float32)
            for name, buffer in executor.program.buffers.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self.buffers[name]

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        assert value.shape == self.buffers[name].shape, f"{name}: {value.shape}, declared {self.buffers[name].shape}"
        self.buffers[name][...] = value

    def table(self, layer: int) -> np.ndarray:
        """The block tables (n_sequences, max_blocks) of the layer's group."""
        return self.batch.tables[self.program.windows.index(self.program.kv_layers[layer].window)]


def embed(step: Step, op: Embed) -> None:
    """out[t] = scale * weight[token[t]]"""
    step[op.out] = step.weight(op.weight)[step.batch.tokens] * np.float32(op.scale)


def rms_norm(step: Step, op: RMSNorm) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over groups of len(weight)."""
    x, weight = step[op.x], step.weight(op.weight)
    groups = x.reshape(len(x), x.shape[1] // len(weight), len(weight))
    mean_square = np.mean(np.square(groups, dtype=np.float64), axis=-1, keepdims=True)
    normed = groups * (1.0 / np.sqrt(mean_square + op.eps)).astype(np.float32) * weight
    step[op.out] = normed.reshape(x.shape)


def matmul(step: Step, op: Matmul) -> None:
    """out = x @ weight.T (+ bias)"""
    out = step[op.x] @ step.weight(op.weight).T
    step[op.out] = out if op.bias is None else out + step.weight(op.bias)


def apply_rope(step: Step, op: ApplyRope) -> None:
    """Rotate every head of x in place."""
    rope = step.program.ropes[op.rope]
    x = step[op.x]
    heads = x.reshape(len(x), x.shape[1] // op.head_dim, op.head_dim)  # a view: writes reach the buffer
    half = rope.n_dims // 2
    cos, sin = (t[:, None, :] for t in rope.table(step.batch.positions))  # (n, 1, half)
    if rope.adjacent:
        first, second = heads[:, :, 0 : rope.n_dims : 2], heads[:, :, 1 : rope.n_dims : 2]
    else:
        first, second = heads[:, :, :half], heads[:, :, half : rope.n_dims]
    rotated = first * cos - second * sin, second * cos + first * sin
    first[...], second[...] = rotated


def store_kv(step: Step, op: StoreKV) -> None:
    """Write k and v of every token to its place in the pool."""
    layer = step.program.kv_layers[op.layer]
    positions = step.batch.positions
    blocks = step.table(op.layer)[step.batch.sequences, positions // BLOCK_TOKENS]
    assert (blocks >= 0).all(), f"layer {op.layer}: a token has no block to be stored in"
    k = step[op.k].reshape(len(positions), layer.n_kv_heads, layer.head_dim_k)
    v = step[op.v].reshape(len(positions), layer.n_kv_heads, layer.head_dim_v)
    # advanced indices around a slice: both sides are (n, n_kv_heads, head_dim)
    step.pool.k[op.layer][blocks, :, :, positions % BLOCK_TOKENS] = k
    step.pool.v[op.layer][blocks, :, positions % BLOCK_TOKENS, :] = v


def attention(step: Step, op: Attention) -> None:
    """out = softmax(scale * q k^T + mask) v, sequence by sequence and head by head."""
    layer = step.program.kv_layers[op.layer]
    group = op.n_heads // layer.n_kv_heads  # query heads that share a key
    q = step[op.q].reshape(-1, op.n_heads, layer.head_dim_k)
    out = step[op.out].reshape(-1, op.n_heads, layer.head_dim_v)
    for segment in step.segments:
        query_positions = np.arange(segment.first_position, segment.end_position)
        first_key, keys, values = _visible(step, op.layer, segment)
        key_positions = np.arange(first_key, segment.end_position)
        hidden = key_positions[None, :] > query_positions[:, None]
        if layer.window:
            hidden |= key_positions[None, :] <= query_positions[:, None] - layer.window
        for head in range(op.n_heads):
            scores = (q[segment.rows, head] @ keys[head // group]) * np.float32(op.scale)
            scores[hidden] = -np.inf
            out[segment.rows, head] = _softmax(scores) @ values[head // group]


def _visible(step: Step, index: int, segment: Segment) -> tuple[int, np.ndarray, np.ndarray]:
    """First position, keys (n_kv_heads, head_dim, n) and values (n_kv_heads, n, head_dim) any query of it may see."""
    layer = step.program.kv_layers[index]
    first = max(0, segment.first_position - layer.window + 1) if layer.window else 0
    first_block = first // BLOCK_TOKENS
    last_block = (segment.end_position - 1) // BLOCK_TOKENS
    blocks = step.table(index)[segment.row, first_block : last_block + 1]
    assert (blocks >= 0).all(), f"layer {index}: a position that must be seen has no block"
    offset = first_block * BLOCK_TOKENS
    seen = slice(first - offset, segment.end_position - offset)
    k = step.pool.k[index][blocks].astype(np.float32)  # (n_blocks, n_kv_heads, head_dim, 32)
    v = step.pool.v[index][blocks].astype(np.float32)  # (n_blocks, n_kv_heads, 32, head_dim)
    keys = k.transpose(1, 2, 0, 3).reshape(layer.n_kv_heads, layer.head_dim_k, -1)[:, :, seen]
    values = v.transpose(1, 0, 2, 3).reshape(layer.n_kv_heads, -1, layer.head_dim_v)[:, seen]
    return first, keys, values


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)


def gated_unit(step: Step, op: GatedUnit) -> None:
    """out = activation(gate) * up"""
    step[op.out] = ACTIVATIONS[op.activation](step[op.gate]) * step[op.up]


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), by tanh, which does not overflow."""
    half = x * np.float32(0.5)
    return half + half * np.tanh(half)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU."""
    c = np.float32(np.sqrt(2.0 / np.pi))
    half = x * np.float32(0.5)
    return half + half * np.tanh(c * (x + np.float32(0.044715) * x * x * x))


def add(step: Step, op: Add) -> None:
    """out = x + y"""
    step[op.out] = step[op.x] + step[op.y]


def select_outputs(step: Step, op: SelectOutputs) -> None:
    """out = the rows of x whose token wants logits."""
    step[op.out] = step[op.x][step.batch.outputs]


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"silu": silu, "gelu": gelu}

OPS: dict[type, Callable[[Step, Any], None]] = {
    Embed: embed,
    RMSNorm: rms_norm,
    Matmul: matmul,
    ApplyRope: apply_rope,
    StoreKV: store_kv,
    Attention: attention,
    GatedUnit: gated_unit,
    Add: add,
    SelectOutputs: select_outputs,
}


class ReferenceExecutor:
    """Runs a program in numpy. Keeps the dequantized weights (4 bytes a weight) until ``close``."""

    def __init__(self, program: Program, pool: KVPool | None = None, max_tokens: int = 512) -> None:
        """With no pool it makes a float32 one for a single sequence of ``min(context_length, 32768)`` tokens."""
        self.program = program
        self.max_tokens = max_tokens
        if pool is None:
            n_blocks = -(-min(program.context_length, DEFAULT_POOL_TOKENS) // BLOCK_TOKENS)
            pool = KVPool(program.kv_layers, program.windows, [n_blocks] * len(program.windows), "float32")
        self.pool = pool
        self._weights: dict[str, np.ndarray] = {}

    def weight(self, name: str) -> np.ndarray:
        """A tensor of the program as float32 in its own shape, dequantized when first asked for."""
        if name not in self._weights:
            tensor = self.program.tensors[name]
            self._weights[name] = tensor.dequantize().reshape(tensor.shape)
        return self._weights[name]

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32 of the tokens that want them."""
        if len(batch) > self.max_tokens:
            raise ParameterError(
                f"A batch of {len(batch)} tokens was given to an executor made for {self.max_tokens}. "
                f"Split it, or make the executor with max_tokens={len(batch)}."
            )
        step = Step(self, batch)
        for index, op in enumerate(self.program.ops):
            OPS[type(op)](step, op)
            if hook is not None:
                hook(index, op, step.__getitem__)
        logits = step["logits"]
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise NumericError(
                f"The model computed NaN or infinity as a logit (output row {row}), where finite numbers were "
                "expected. The file may be damaged: run `edgellm verify` on it."
            )
        return logits

    def close(self) -> None:
        """Let go of the weights. May be called twice."""
        self._weights.clear()
