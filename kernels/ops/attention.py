"""Keys and values into the cache, and attention over what stands there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgellm.kernels.cache_types import DEFAULT, PACKED, QUANTIZED, CacheType, numbers_of, stored
from edgellm.kernels.kv import BLOCK_TOKENS, CachePool, KVLayer
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Segment, Step
from edgellm.kernels.program import Op


@dataclass(frozen=True)
class StoreKV(Op):
    """Write k and v of every token of the batch to the cache of ``layer``, at the token's position.

    v   None where the layer is latent: keys have their values in them
    """

    name, reads, cache = "store_kv", ("k", "v"), "write"

    k: str
    v: str | None
    layer: int

    def reference(self, step: Step) -> None:
        layer = step.program.kv_layer(self.layer)
        positions = step.batch.positions
        blocks = step.table(self.layer)[step.batch.sequences, positions // BLOCK_TOKENS]
        assert (blocks >= 0).all(), f"layer {self.layer}: a token has no block to be stored in"
        k = step[self.k].reshape(len(positions), layer.n_kv_heads, layer.head_dim_k)
        if self.v is None:  # advanced indices around a slice: both sides are (n, n_kv_heads, head_dim)
            step.pool.arrays[self.layer][0][blocks, :, positions % BLOCK_TOKENS, :] = k
            return
        v = step[self.v].reshape(len(positions), layer.n_kv_heads, layer.head_dim_v)
        for values, x, name, array in zip(
            (False, True), (k, v), (layer.type_k, layer.type_v), step.pool.arrays[self.layer][:2], strict=True
        ):
            if name in QUANTIZED:
                _store_quantized(array, QUANTIZED[name], x, blocks, positions % BLOCK_TOKENS, values=values)
            else:
                x = x if name == DEFAULT else stored(x, name)
                where = positions % BLOCK_TOKENS
                array[(blocks, slice(None), where) if values else (blocks, slice(None), slice(None), where)] = x

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        shapes = ((1, 64, 64, 0), (3, 40, 24, 0), (2, 17, 33, 40))
        if variant:  # groups of 32
            shapes = ((1, 64, 64, 0), (3, 32, 96, 0), (2, 128, 32, 40))
        for heads, dim_k, dim_v, window in shapes:
            layer = s.layer(KVLayer(heads, dim_k, dim_v, window, False, *_types(variant)))
            shape = f"heads={heads} head_dim={dim_k}/{dim_v}"
            s.emit(shape, StoreKV(s.input(heads * dim_k), s.input(heads * dim_v), layer))
        latent = s.layer(KVLayer(1, 48, 32, latent=True))
        s.emit("latent head_dim=48/32", StoreKV(s.input(48), None, latent))


@dataclass(frozen=True)
class Attention(Op):
    """out = softmax(scale * q k^T + mask) v over the cache of ``layer``; grouped queries.

    A token sees the positions from the start of its window, ``position - window + 1``, to its own or ``Batch.sees``.

    softcap   scores are cap * tanh(score / cap); 0 leaves them as they are
    sinks     (n_heads,): a score of each head that stands in the softmax's sum and has no value
    chosen    of layers with ``n_chosen``: the blocks that each token reads, as ChooseBlocks gives them. A token that
              has no more blocks than that reads them all
    newest    of a packed layer: the layer that has the first block, and those from the token's own run on, in 16 bits
    """

    name, reads, writes, weights, cache = "attention", ("q", "chosen"), ("out",), ("sinks",), "read"

    q: str
    out: str
    layer: int
    n_heads: int
    scale: float
    softcap: float = 0.0
    sinks: str | None = None
    chosen: str | None = None
    newest: int | None = None

    def read_layers(self) -> tuple[int, ...]:
        return (self.layer,) if self.newest is None else (self.layer, self.newest)

    def reference(self, step: Step) -> None:
        for segment in self._segments(step):
            if self.chosen is not None and segment.first_position // BLOCK_TOKENS >= self._layer(step).n_chosen:
                self._attend_chosen(step, segment)
            else:
                self._attend(step, segment)

    def _layer(self, step: Step) -> KVLayer:
        return step.program.kv_layer(self.layer)

    def _segments(self, step: Step) -> Iterator[Segment]:
        """Tokens that read the same blocks: of one sequence, where it matters of one block, or each by itself."""
        for whole in step.segments:
            at = whole.start
            while at < whole.stop:
                position, n = whole.first_position + at - whole.start, whole.stop - at
                if self.chosen is not None and position // BLOCK_TOKENS >= self._layer(step).n_chosen:
                    n = 1
                elif self.chosen is not None or self.newest is not None:
                    n = min(n, BLOCK_TOKENS - position % BLOCK_TOKENS)
                yield Segment(at, at + n, whole.row, position)
                at += n

    def _last(self, step: Step, segment: Segment) -> np.ndarray:
        """The last position that each token of a segment sees."""
        if step.batch.sees is None:
            return np.arange(segment.first_position, segment.end_position)
        return step.batch.sees[segment.rows]

    def _attend_chosen(self, step: Step, segment: Segment) -> None:
        """One token, over the blocks that it chose, head of the cache by head."""
        layer, t = self._layer(step), segment.start
        group, last = self.n_heads // layer.n_kv_heads, int(self._last(step, segment)[0])
        seen = (layer.n_chosen - 1) * BLOCK_TOKENS + last % BLOCK_TOKENS + 1
        chosen = step[str(self.chosen)].reshape(-1, layer.n_kv_heads, layer.n_chosen)[t]
        q = step[self.q][t].reshape(layer.n_kv_heads, group, layer.head_dim_k)
        out = step[self.out][t].reshape(layer.n_kv_heads, group, layer.head_dim_v)
        for head in range(layer.n_kv_heads):
            keys, values = _read(step, self, segment, chosen[head])
            for row in range(group):
                scores = q[head, row : row + 1] @ keys[head, :, :seen] * np.float32(self.scale)
                out[head, row] = self._weighed(step, head * group + row, scores, values[head, :seen])

    def _attend(self, step: Step, segment: Segment) -> None:
        """Tokens of one sequence, over all that they see."""
        layer = self._layer(step)
        group = self.n_heads // layer.n_kv_heads  # query heads that share a key
        q = step[self.q].reshape(-1, self.n_heads, layer.head_dim_k)
        out = step[self.out].reshape(-1, self.n_heads, layer.head_dim_v)
        query_positions = np.arange(segment.first_position, segment.end_position)
        last = self._last(step, segment)
        first, end = max(0, segment.first_position - layer.window + 1) if layer.window else 0, int(last[-1]) + 1
        first_block = first // BLOCK_TOKENS
        keys, values = _read(step, self, segment, np.arange(first_block, (end - 1) // BLOCK_TOKENS + 1))
        seen = slice(first - first_block * BLOCK_TOKENS, end - first_block * BLOCK_TOKENS)
        keys, values, key_positions = keys[:, :, seen], values[:, seen], np.arange(first, end)
        hidden = key_positions[None, :] > last[:, None]
        if layer.window:
            hidden |= key_positions[None, :] <= query_positions[:, None] - layer.window
        for head in range(self.n_heads):
            scores = (q[segment.rows, head] @ keys[head // group]) * np.float32(self.scale)
            out[segment.rows, head] = self._weighed(step, head, scores, values[head // group], hidden)

    def _weighed(
        self, step: Step, head: int, scores: np.ndarray, values: np.ndarray, hidden: np.ndarray | bool = False
    ) -> np.ndarray:
        """What a head makes of scores (n, n_positions)."""
        if self.softcap:
            scores = np.tanh(scores / np.float32(self.softcap)) * np.float32(self.softcap)
        scores[hidden] = -np.inf
        sink = float(step.weight(self.sinks)[head]) if self.sinks is not None else -np.inf
        return _softmax(scores, sink) @ values

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        shapes = ((1, 2, 64, 64, 0), (3, 3, 40, 24, 0), (4, 1, 17, 33, 100), (8, 1, 64, 64, 33))
        if variant == "latent":
            shapes = ((1, 2, 64, 64, 0), (5, 3, 48, 32, 0), (20, 1, 576, 512, 0), (35, 1, 32, 16, 33))
        elif variant:
            shapes = ((1, 2, 64, 64, 0), (3, 3, 96, 32, 0), (4, 1, 32, 96, 100), (8, 1, 64, 64, 33))
        forms = ((0.0, False), (20.0, True), (0.0, True), (50.0, False))
        for (group, heads, dim_k, dim_v, window), (softcap, has_sinks) in zip(shapes, forms, strict=True):
            layer = s.layer(KVLayer(heads, dim_k, dim_v, window, variant == "latent", *_types(variant)))
            n_heads = group * heads
            q, out = s.input(n_heads * dim_k), s.buffer(n_heads * dim_v)
            shape = f"heads={n_heads}/{heads} head_dim={dim_k}/{dim_v} window={window} softcap={softcap}"
            sinks = s.tensor("F32", (n_heads,)) if has_sinks else None
            newest = s.layer(KVLayer(heads, dim_k, dim_v, newest=True)) if variant in PACKED else None
            s.emit(shape, Attention(q, out, layer, n_heads, dim_k**-0.5, softcap, sinks, None, newest))
        if variant != "latent":
            _trial_of_chosen(s, variant)


def _trial_of_chosen(s: Sketch, variant: str) -> None:
    """Eight blocks of those that every trial's long sequence has."""
    for group, heads in ((3, 2), (9, 1)):
        layer, newest, n = s.layer(KVLayer(heads, 64, 32, 0, False, *_types(variant), 8)), None, group * heads
        if variant in PACKED:
            newest = s.layer(KVLayer(heads, 64, 32, newest=True))
        q, out, chosen = s.input(n * 64), s.buffer(n * 32), s.buffer(heads * 8, "int32")
        s.inputs[chosen] = np.stack([s.rng.permutation(8) for _ in range(s.max_tokens * heads)]).astype(np.int32)
        s.inputs[chosen] = s.inputs[chosen].reshape(s.max_tokens, heads * 8)
        s.emit(f"heads={n}/{heads} chosen", Attention(q, out, layer, n, 0.125, 0.0, None, chosen, newest))


def _read(step: Step, op: Attention, segment: Segment, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n_kv_heads, head_dim, n) and values (n_kv_heads, n, head_dim) of blocks of a sequence, by their numbers.

    Of a packed layer the first block is in 16 bits, and so are those from the first token's own run on.
    """
    parts = [(op.layer, numbers)]
    if op.newest is not None:
        own = step.program.kv_layer(op.newest).group.first_read(segment.first_position)
        runs = np.split(numbers, np.flatnonzero(np.diff((numbers > 0) & (numbers < own))) + 1)
        parts = [(op.layer if 0 < run[0] < own else op.newest, run) for run in runs]
    read = list[tuple[np.ndarray, np.ndarray]]()
    for index, of_part in parts:
        blocks = step.table(index)[segment.row, of_part]
        assert (blocks >= 0).all(), f"layer {index}: a position that must be seen has no block"
        read.append(read_blocks(step.pool, index, step.program.kv_layer(index), blocks))
    return np.concatenate([k for k, _ in read], axis=2), np.concatenate([v for _, v in read], axis=1)


def read_blocks(pool: CachePool, index: int, layer: KVLayer, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n_kv_heads, head_dim, n) and values (n_kv_heads, n, head_dim) of blocks of the pool, float32."""
    if layer.latent:
        v = pool.arrays[index][0][blocks].astype(np.float32)
        k, v = v.swapaxes(2, 3), v[..., : layer.head_dim_v]
    else:
        k = _numbers(pool.arrays[index][0][blocks], layer.type_k, layer.head_dim_k, values=False)
        v = _numbers(pool.arrays[index][1][blocks], layer.type_v, layer.head_dim_v, values=True)
    keys = k.transpose(1, 2, 0, 3).reshape(layer.n_kv_heads, layer.head_dim_k, -1)
    return keys, v.transpose(1, 0, 2, 3).reshape(layer.n_kv_heads, -1, layer.head_dim_v)


def _numbers(blocks: np.ndarray, name: str, dim: int, *, values: bool) -> np.ndarray:
    """Keys as float32 (n_blocks, n_kv_heads, head_dim, 32), values (n_blocks, n_kv_heads, 32, head_dim)."""
    if name in PACKED:
        return PACKED[name].unpack(blocks, dim, values=values)
    if name not in QUANTIZED:
        return numbers_of(blocks, name)
    numbers = QUANTIZED[name].numbers(QUANTIZED[name].read(blocks, dim, values=values))
    return numbers if values else numbers.swapaxes(-1, -2)


def _store_quantized(
    array: np.ndarray, kind: CacheType, x: np.ndarray, blocks: np.ndarray, slots: np.ndarray, *, values: bool
) -> None:
    """Put tokens (n, n_kv_heads, head_dim) into slots of blocks; two tokens may share a byte."""
    touched, which = np.unique(blocks, return_inverse=True)
    held = kind.read(array[touched], x.shape[-1], values=values)
    for whole, token in zip(held, kind.quantize(x), strict=True):
        whole[which, :, slots] = token
    array[touched] = kind.write(held, values=values)


def _types(variant: str) -> tuple[str, str]:
    """Of keys and values, by the variant of a kernel's name; "typed" is the kernel that calls those of two types."""
    variant = "" if variant == "latent" else variant
    return ("q8_0", "q5_1") if variant == "typed" else (variant or DEFAULT, variant or DEFAULT)


def _softmax(scores: np.ndarray, sink: float) -> np.ndarray:
    largest = np.maximum(scores.max(axis=-1, keepdims=True), np.float32(sink))
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True, dtype=np.float64) + np.exp(np.float32(sink) - largest)
    return weights / total.astype(np.float32)
