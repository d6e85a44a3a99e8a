"""What is done once a block of 32 positions is full, and what queries choose by it.

A block that is full never changes, so what is made of it is the same in any batch and any chunking: it is made in the
step that stores its last position. A query reads its own block as it was stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.kernels.cache_types import DEFAULT, PACKED, QUANTIZED, numbers_of
from edgellm.kernels.kv import BLOCK_TOKENS, KVLayer
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


def filled(step: Step, layer: int) -> np.ndarray:
    """The ids of a layer's blocks that the tokens of a step fill, (n_filled,)."""
    batch = step.batch
    last = batch.positions % BLOCK_TOKENS == BLOCK_TOKENS - 1
    return step.table(layer)[batch.sequences[last], batch.positions[last] // BLOCK_TOKENS]


@dataclass(frozen=True)
class PackKV(Op):
    """Pack the blocks of ``newest`` that the batch fills into those of ``layer``, in the layer's types."""

    name, cache = "pack_kv", "write"

    layer: int
    newest: int

    def read_layers(self) -> tuple[int, ...]:
        return (self.newest,)

    def reference(self, step: Step) -> None:
        kind = PACKED[step.program.kv_layer(self.layer).type_k]
        sources, targets = filled(step, self.newest), filled(step, self.layer)
        if not len(targets):
            return
        arrays = zip(step.pool.arrays[self.newest], step.pool.arrays[self.layer][:2], strict=True)
        for values, (source, target) in enumerate(arrays):
            target[targets] = kind.pack(source[sources], values=bool(values))

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for heads, dim_k, dim_v, window in ((1, 64, 64, 0), (3, 32, 96, 0), (2, 128, 32, 40)):
            layer, newest = packed_layers(s, heads, dim_k, dim_v, window)
            s.emit(f"heads={heads} head_dim={dim_k}/{dim_v}", PackKV(layer, newest))


def packed_layers(s: Sketch, heads: int, dim_k: int, dim_v: int, window: int, n_chosen: int = 0) -> tuple[int, int]:
    """A packed layer, and the one that its newest blocks are in."""
    layer = s.layer(KVLayer(heads, dim_k, dim_v, window, False, "kivi2", "kivi2", n_chosen))
    return layer, s.layer(KVLayer(heads, dim_k, dim_v, newest=True))


@dataclass(frozen=True)
class BoundKeys(Op):
    """The least and the largest number of every dimension of the keys in the blocks that the batch fills.

    newest   the layer that has the blocks of a packed one in 16 bits
    """

    name, cache = "bound_keys", "update"

    layer: int
    newest: int | None = None

    def read_layers(self) -> tuple[int, ...]:
        return (self.layer if self.newest is None else self.newest,)

    def reference(self, step: Step) -> None:
        source = self.read_layers()[0]
        layer, keys = step.program.kv_layer(source), step.pool.arrays[source][0][filled(step, source)]
        if not len(keys):
            return
        if layer.type_k in QUANTIZED:
            kind = QUANTIZED[layer.type_k]
            x = kind.numbers(kind.read(keys, layer.head_dim_k, values=False)).swapaxes(-1, -2)
        else:
            x = numbers_of(keys, layer.type_k)
        lost = np.abs(x).sum(axis=-1) * np.float32(0)  # a key that is no number has to be read
        bounds = step.pool.arrays[self.layer][-1]
        blocks = filled(step, self.layer)
        bounds[blocks, :, 0, : layer.head_dim_k] = x.min(axis=-1) + lost
        bounds[blocks, :, 1, : layer.head_dim_k] = x.max(axis=-1) + lost

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        kept = variant or DEFAULT
        shapes = ((1, 64), (3, 32), (2, 128)) if kept in QUANTIZED else ((1, 64), (3, 40), (2, 17))
        for heads, dim in shapes:
            layer = s.layer(KVLayer(heads, dim, dim, 0, False, kept, kept, 8))
            s.emit(f"heads={heads} head_dim={dim}", BoundKeys(layer))
        if kept == DEFAULT:
            s.emit("packed", BoundKeys(*packed_layers(s, 2, 64, 64, 0, 8)))


@dataclass(frozen=True)
class ChooseBlocks(Op):
    """The blocks that each token reads for each head of the cache: its own, and those whose keys can matter most.

    What a query times a key of a block can be at most follows from the block's bounds; of the query heads that share a
    head of the cache the largest counts. ``out`` is int32 (n_kv_heads x n_chosen) for each token, rising; those of a
    token that has no more blocks than that are simply the first.
    """

    name, reads, writes, cache = "choose_blocks", ("q",), ("out",), "read"

    q: str
    out: str
    layer: int
    n_heads: int

    def reference(self, step: Step) -> None:
        layer, batch, tables = step.program.kv_layer(self.layer), step.batch, step.table(self.layer)
        heads, n = layer.n_kv_heads, layer.n_chosen
        q = step[self.q].reshape(len(batch), heads, -1, layer.head_dim_k)
        out, bounds = step[self.out].reshape(len(batch), heads, n), step.pool.arrays[self.layer][-1]
        sees = batch.positions if batch.sees is None else batch.sees
        for t, (sequence, position, last) in enumerate(zip(batch.sequences, batch.positions, sees, strict=True)):
            own, end = position // BLOCK_TOKENS, last // BLOCK_TOKENS + 1
            n_far = max(0, n - (end - own))  # of the blocks before its own
            out[t] = np.arange(n)
            if own < n:
                continue
            low, high = np.moveaxis(bounds[tables[sequence, :own]].astype(np.float32)[..., : layer.head_dim_k], 2, 0)
            for head in range(heads):
                most = (low[:, head] @ np.minimum(q[t, head], 0).T + high[:, head] @ np.maximum(q[t, head], 0).T).max(1)
                most = np.where(np.isnan(most), np.inf, most)
                far = np.sort(np.argsort(-most, kind="stable")[:n_far])
                out[t, head] = [*far, *range(max(own, end - n), end)]

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for group, heads, dim in ((3, 2, 64), (1, 3, 40), (5, 1, 17)):
            layer = s.layer(KVLayer(heads, dim, dim, n_chosen=8))
            q, out = s.input(group * heads * dim), s.buffer(heads * 8, "int32")
            s.emit(f"heads={group * heads}/{heads} head_dim={dim}", ChooseBlocks(q, out, layer, group * heads))
