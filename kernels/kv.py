"""The memory of the cache: for every layer a pool of blocks of 32 positions, or of states, and nothing about who owns
them.

Block tables, reference counts and prefix reuse live in ``edgellm.engine.cache``. Keys lie transposed inside a block, so
that one vector register holds the same dimension of neighbouring positions and q.k needs no horizontal sum:

    keys     (n_blocks, n_kv_heads, head_dim_k, 32)
    values   (n_blocks, n_kv_heads, 32, head_dim_v)
    latent   (n_blocks, n_kv_heads, 32, head_dim_k): keys that begin with their values, row by row
    states   (n_slots, width) float32: all that a recurrent layer remembers of a sequence at one position

Those of fewer bits are (n_blocks, n_kv_heads, nbytes) uint8, as cache_types.py lays them out. Where queries choose
among the blocks there are behind them

    bounds   (n_blocks, n_kv_heads, 2, head_dim_k padded to 16) float16: least and largest number of each dimension
             of the keys of a full block

Memory is anonymous and zero; the system commits a page when it is first written, so a large context costs nothing
until it is used.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgellm.kernels.cache_types import DEFAULT, FLOATS, PACKED, QUANTIZED

BLOCK_TOKENS = 32
NEWEST_BLOCKS = 4  # of a run: a query's own is in 16 bits where those before it are packed


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share a block table of every sequence, because they need the same positions of it.

    all      every position, in blocks of 32
    window   the last ``window`` positions, the query's own included, in blocks of 32
    newest   the run of ``window`` positions that the query's own is in, and the text's first block
    state    one state, in place of positions: a step reads one slot and writes another
    """

    kind: Literal["all", "window", "newest", "state"] = "all"
    window: int = 0

    def held(self, first: int, end: int) -> list[int]:
        """The numbers of the blocks of a text that are held from ``first`` on, up to ``end``; none from beyond it."""
        beginning = [0] if self.kind == "newest" and 0 < first <= end else []
        return [*beginning, *range(first, end)]

    def first_read(self, position: Any) -> Any:
        """The first block that a query reads, by its position, or of many; of the newest ones number 0, too."""
        if self.kind == "newest":
            return position // self.window * (self.window // BLOCK_TOKENS)
        return np.maximum(position - self.window + 1, 0) // BLOCK_TOKENS if self.window else position * 0

    @property
    def order(self) -> tuple[bool, int, bool]:
        """Where it stands among the groups of a program."""
        return self.kind == "state", self.window, self.kind == "newest"


@dataclass(frozen=True)
class KVLayer:
    """Shape of one attention's cache. ``window`` is the number of positions a query sees, itself included; 0 means all.

    With ``latent`` the first ``head_dim_v`` dimensions of a key are its value, too, and no values are kept. ``type_k``
    and ``type_v`` are rows of cache_types.py; "f16" leaves it to the executor, whose judge keeps float32.

    n_chosen   blocks that a query reads at most, its own included, as it chooses by their bounds; 0 means all
    newest     keeps only the first block and the newest run, in 16 bits; another layer has those that are packed
    """

    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    window: int = 0
    latent: bool = False
    type_k: str = DEFAULT
    type_v: str = DEFAULT
    n_chosen: int = 0
    newest: bool = False

    @property
    def is_typed(self) -> bool:
        """Whether keys or values are kept as something else than an executor's own floats."""
        return (self.type_k, self.type_v) != (DEFAULT, DEFAULT)

    @property
    def group(self) -> CacheGroup:
        """What its block table stands for."""
        if self.newest:
            return CacheGroup("newest", NEWEST_BLOCKS * BLOCK_TOKENS)
        return CacheGroup("window", self.window) if self.window else CacheGroup()

    def seen_nbytes(self, n_cached: int, dtype: str = "float16") -> int:
        """Bytes that a query behind ``n_cached`` positions reads."""
        most = self.n_chosen * BLOCK_TOKENS or self.window or n_cached
        if self.newest:
            most = BLOCK_TOKENS + self.group.window // 2  # as much of its run is there in the mean
        nbytes = [math.prod(shape) * kept.itemsize for shape, kept in self.arrays(np.dtype(dtype))]
        bounds = nbytes.pop() if self.n_chosen else 0
        return (min(n_cached, most) * sum(nbytes) + n_cached * bounds) // BLOCK_TOKENS

    def shapes(self) -> list[tuple[int, ...]]:
        """Of one block: keys, then values."""
        if self.latent:
            return [(self.n_kv_heads, BLOCK_TOKENS, self.head_dim_k)]
        return [(self.n_kv_heads, self.head_dim_k, BLOCK_TOKENS), (self.n_kv_heads, BLOCK_TOKENS, self.head_dim_v)]

    def arrays(self, dtype: np.dtype) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and numpy type of one block of each array; ``dtype`` is an executor's own."""
        found: list[tuple[tuple[int, ...], np.dtype]] = []
        dims = (self.head_dim_k, self.head_dim_v)
        for values, (shape, name, dim) in enumerate(zip(self.shapes(), (self.type_k, self.type_v), dims, strict=False)):
            if kind := QUANTIZED.get(name) or PACKED.get(name):
                found.append(((self.n_kv_heads, kind.head_nbytes(dim, values=bool(values))), np.dtype(np.uint8)))
            else:
                found.append((shape, dtype if name == DEFAULT else FLOATS[name]))
        if self.n_chosen:
            found.append(((self.n_kv_heads, 2, -(-self.head_dim_k // 16) * 16), np.dtype(np.float16)))
        return found


@dataclass(frozen=True)
class StateLayer:
    """A recurrent layer: ``width`` float32 numbers for each sequence, zero before its first token."""

    width: int
    group = CacheGroup("state")

    def seen_nbytes(self, n_cached: int, dtype: str = "float16") -> int:
        """Bytes that a step reads."""
        return 4 * self.width

    def shapes(self) -> list[tuple[int, ...]]:
        """Of one slot."""
        return [(self.width,)]

    def arrays(self, dtype: np.dtype) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and numpy type of one slot."""
        return [((self.width,), np.dtype(np.float32))]


CacheLayer = KVLayer | StateLayer


def groups_of(layers: Iterable[CacheLayer]) -> tuple[CacheGroup, ...]:
    """The distinct groups, in the order that block tables have."""
    return tuple(sorted({layer.group for layer in layers}, key=lambda group: group.order))


class CachePool:
    """The blocks of all layers: ``n_blocks[g]`` of them for the layers of group g (slots, where its kind is state),
    or as many for every group.

    arrays   for each layer its keys and values, or both in one, or states; see the module
    """

    def __init__(self, layers: Sequence[CacheLayer], n_blocks: Sequence[int] | int, dtype: str = "float16") -> None:
        self.layers = tuple(layers)
        self.groups = groups_of(layers)
        self.n_blocks = (n_blocks,) * len(self.groups) if isinstance(n_blocks, int) else tuple(n_blocks)
        self.dtype = np.dtype(dtype)
        self.arrays: list[list[np.ndarray]] = []
        for layer in layers:
            n = self.n_blocks[self.groups.index(layer.group)]
            self.arrays.append([_zeros((n, *shape), kept) for shape, kept in layer.arrays(self.dtype)])

    @property
    def nbytes(self) -> int:
        """Bytes the cache takes when every block is in use."""
        return sum(array.nbytes for arrays in self.arrays for array in arrays)

    def of_group(self, group: int) -> list[np.ndarray]:
        """The arrays of the layers of one group."""
        owners = zip(self.layers, self.arrays, strict=True)
        return [array for layer, arrays in owners if layer.group == self.groups[group] for array in arrays]

    def block_nbytes(self, group: int) -> int:
        """Bytes of one block, or slot, of all layers of a group."""
        return sum(array[0].nbytes for array in self.of_group(group))

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy one block of every layer of a group (copy on write)."""
        for array in self.of_group(group):
            array[target] = array[source]

    def read_block(self, group: int, block: int) -> bytes:
        """One block of every layer of a group, layer after layer."""
        return b"".join(array[block].tobytes() for array in self.of_group(group))

    def write_block(self, group: int, block: int, data: bytes | memoryview) -> None:
        """What ``read_block`` gave, into another block."""
        start = 0
        for array in self.of_group(group):
            end = start + array[0].nbytes
            array[block] = np.frombuffer(data[start:end], array.dtype).reshape(array.shape[1:])
            start = end


def pool_nbytes(layers: Sequence[CacheLayer], n_blocks: Sequence[int], dtype: str = "float16") -> int:
    """What ``CachePool(...).nbytes`` would be."""
    groups, total = groups_of(layers), 0
    for layer in layers:
        block = sum(math.prod(shape) * kept.itemsize for shape, kept in layer.arrays(np.dtype(dtype)))
        total += n_blocks[groups.index(layer.group)] * block
    return total


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A zero array on pages of its own, committed when touched, with 64 readable bytes behind it for wide loads."""
    nbytes = math.prod(map(int, shape)) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, nbytes + 64), dtype, count=nbytes // dtype.itemsize).reshape(shape)
