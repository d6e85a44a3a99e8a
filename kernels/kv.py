"""The memory of the paged KV cache: for every layer a pool of blocks of 32 positions, and nothing about who owns them.

Block tables, reference counts and prefix reuse live in ``edgellm.engine.cache``. Keys lie transposed inside a block, so
that one vector register holds the same dimension of neighbouring positions and q.k needs no horizontal sum:

    k[layer]   (n_blocks, n_kv_heads, head_dim_k, 32)
    v[layer]   (n_blocks, n_kv_heads, 32, head_dim_v)

Memory is anonymous and zero; the system commits a page when it is first written, so a large context costs nothing
until it is used.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_TOKENS = 32


@dataclass(frozen=True)
class KVLayer:
    """Shape of one layer's cache. ``window`` is the number of positions a query sees, itself included; 0 means all."""

    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    window: int = 0

    def block_nbytes(self, dtype: np.dtype) -> int:
        """Bytes of one block of keys and values."""
        return self.n_kv_heads * (self.head_dim_k + self.head_dim_v) * BLOCK_TOKENS * dtype.itemsize


class KVPool:
    """The blocks of all layers. ``n_blocks[g]`` blocks for the layers whose window is ``windows[g]``."""

    def __init__(
        self, layers: Sequence[KVLayer], windows: Sequence[int], n_blocks: Sequence[int], dtype: str = "float16"
    ) -> None:
        self.layers = tuple(layers)
        self.windows = tuple(windows)
        self.n_blocks = tuple(n_blocks)
        self.dtype = np.dtype(dtype)
        self.k: list[np.ndarray] = []
        self.v: list[np.ndarray] = []
        for layer in layers:
            n = self.n_blocks[self.windows.index(layer.window)]
            self.k.append(_zeros((n, layer.n_kv_heads, layer.head_dim_k, BLOCK_TOKENS), self.dtype))
            self.v.append(_zeros((n, layer.n_kv_heads, BLOCK_TOKENS, layer.head_dim_v), self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes the cache takes when every block is in use."""
        return sum(a.nbytes for a in self.k) + sum(a.nbytes for a in self.v)

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy one block of every layer whose window is ``windows[group]`` (copy on write)."""
        for layer, k, v in zip(self.layers, self.k, self.v, strict=True):
            if layer.window == self.windows[group]:
                k[target] = k[source]
                v[target] = v[source]


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A zero array on pages of its own, committed when touched, with 64 readable bytes behind it for wide loads."""
    nbytes = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, nbytes + 64), dtype, count=nbytes // dtype.itemsize).reshape(shape)
