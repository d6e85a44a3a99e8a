"""Deals out attention: which tokens go through the cache together, and who takes which part of their context.

A tile is a few neighbouring tokens of one sequence. Where tiles are few or one is much longer than the others, its
context is divided into parts of whole cuts, so that every thread has work (the parts' sums are kept until all are
there: attention.py). What a token computes does not depend on how it is dealt.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.kv import BLOCK_TOKENS, KVLayer
from edgellm.kernels.ops import Attention, ChooseBlocks, SelfAttention
from edgellm.kernels.program import Program

PARTS_PER_THREAD = 4
NEAR_HEAD_DIMS = 256
"""Heads x dimensions that go together: the keys and values of a cut, 256 KiB, are fetched a cut ahead."""
MAX_PARTIAL_NBYTES = 64 << 20
"""A tile whose kept sums would not fit is not divided."""


class AttentionShape(NamedTuple):
    """What the dealing of a layer's attention depends on."""

    window: int
    n_heads: int
    n_kv_heads: int
    head_dim_k: int
    n_chosen: int = 0
    by_block: bool = False

    @property
    def tiling(self) -> tuple[int, bool]:
        """What decides where tiles end: so many blocks are chosen, and none has tokens of two blocks."""
        return self.n_chosen, self.by_block


def attention_shape(op: Attention, layer: KVLayer) -> AttentionShape:
    """The shape of one layer's attention."""
    by_block = op.newest is not None
    return AttentionShape(layer.window, op.n_heads, layer.n_kv_heads, layer.head_dim_k, layer.n_chosen, by_block)


def attention_shapes(program: Program) -> list[AttentionShape]:
    """The shapes of a program; each has a list of parts in every step."""
    shapes = (attention_shape(op, program.kv_layer(op.layer)) for op in program.ops if isinstance(op, Attention))
    return list(dict.fromkeys(shapes))


def _group(program: Program) -> int:
    """Query heads that share a head of the cache, at most."""
    return max((s.n_heads // s.n_kv_heads for s in attention_shapes(program)), default=1)


def _head_dim(program: Program) -> int:
    return max((layer.head_dim_v for layer in program.cache_layers if isinstance(layer, KVLayer)), default=0)


def scratch_nbytes(program: Program) -> int:
    """Scratch that one thread needs for the attention of a program."""
    rows = max(layout.TILE_ROWS, _group(program) * layout.tile_tokens(_group(program)))
    nbytes = layout.attention_scratch_nbytes(rows, _head_dim(program))
    layers = [layer for layer in program.cache_layers if isinstance(layer, KVLayer) and layer.is_typed]
    typed = [layout.typed_scratch_nbytes(rows, layer.head_dim_k, layer.head_dim_v) for layer in layers]
    typed += [layout.packed_scratch_nbytes(max(layer.head_dim_k, layer.head_dim_v)) for layer in layers]
    choosing = [
        layout.choose_scratch_nbytes(op.n_heads // layer.n_kv_heads, layer.head_dim_k)
        for op in program.ops
        if isinstance(op, ChooseBlocks) and (layer := program.kv_layer(op.layer))
    ]
    whole_texts = [
        layout.self_attention_scratch_nbytes(program.buffers[op.q].width // op.n_heads, op.n_heads // op.n_kv_heads)
        for op in program.ops
        if isinstance(op, SelfAttention)
    ]
    return max([nbytes + max(typed, default=0), *choosing, *whole_texts])


class AttentionWork:
    """The parts of a step's attention, one list for each shape; kept while the next step would have the same."""

    def __init__(self, program: Program, n_threads: int) -> None:
        self._shapes, self._n_threads = attention_shapes(program), n_threads
        self._windows = [group.window for group in program.groups if group.kind != "state"]  # of the first tables
        self._tile_tokens = layout.tile_tokens(_group(program))
        n_heads = max((s.n_heads for s in self._shapes), default=1)
        self._partial_nbytes = n_heads * layout.attention_state_nbytes(_head_dim(program))  # of one token and cut
        self._partials = np.zeros(0, np.uint8)
        self._key: bytes | tuple[int, ...] | None = None
        self._alive: list[np.ndarray] = []

    def plan(
        self, positions: np.ndarray, sees: np.ndarray, starts: Sequence[int], sequences: np.ndarray
    ) -> dict[str, int]:
        """The step's fields for attention, none when they are those of the step before.

        ``starts`` are the first tokens of the sequences, and one past the last.
        """
        if len(positions) == 1:  # a text that grows: mostly as before, and the arithmetic below is 100 us
            one = (int(sequences[0]), *(n for w in self._windows for n in _visible_cuts_of(int(positions[0]), w)))
            if one == self._key:
                return {}
        else:
            one = None
        tiled = {}
        for shape in self._shapes:
            if shape.tiling not in tiled:
                tiled[shape.tiling] = self._tiles(starts, sequences, positions, *shape.tiling)
        cuts = {
            (tiling, window): _cuts_of(tiles, positions, sees, window, tiling[0])
            for tiling, tiles in tiled.items()
            for window in self._windows
        }
        key = one or b"".join(a.tobytes() for a in (*tiled.values(), *itertools.chain(*cuts.values())))
        if key == self._key:
            return {}
        lists = [self._parts(shape, tiled[shape.tiling], *cuts[shape.tiling, shape.window]) for shape in self._shapes]
        slots = max((n for _, n in lists), default=0)
        if self._partials.size < slots * self._partial_nbytes:
            self._partials = np.zeros(2 * slots * self._partial_nbytes, np.uint8)
        n_tiles = max(map(len, tiled.values()), default=0)
        done = np.zeros(n_tiles * max((s.n_kv_heads for s in self._shapes), default=1), np.int64)
        pairs = np.array([[parts.ctypes.data, len(parts)] for parts, _ in lists], np.int64)
        self._alive = [done, pairs, *(parts for parts, _ in lists)]
        self._key = key
        return {
            "PARTS": pairs.ctypes.data, "PARTS_DONE": done.ctypes.data,
            "PARTIALS": self._partials.ctypes.data, "PARTIAL_NBYTES": self._partial_nbytes,
        }  # fmt: skip

    def steps_alike(self, position: int) -> int:
        """For how many positions from this one on a growing text has the same parts."""
        n = layout.CUT_BLOCKS * BLOCK_TOKENS
        for window in self._windows:
            size, first = layout.cut_blocks(window) * BLOCK_TOKENS, position - window + 1
            n = min(n, size - position % size)
            if window:
                n = min(n, size - first % size if first >= 0 else size - first)
        return n

    def _tiles(
        self, starts: Sequence[int], sequences: np.ndarray, positions: np.ndarray, n_chosen: int, by_block: bool
    ) -> np.ndarray:
        """(first token, tokens, sequence, whether its blocks are chosen), never across two sequences.

        A token that has more than ``n_chosen`` blocks is by itself.
        """
        tiles = list[tuple[int, int, int, int]]()
        for start, stop in itertools.pairwise(starts):
            first, sequence, position = start, int(sequences[start]), int(positions[start])
            while first < stop:
                n, is_chosen = min(self._tile_tokens, stop - first), 0
                if n_chosen and position >= n_chosen * BLOCK_TOKENS:
                    n, is_chosen = 1, 1
                elif by_block:
                    n = min(n, BLOCK_TOKENS - position % BLOCK_TOKENS)
                elif n_chosen:
                    n = min(n, n_chosen * BLOCK_TOKENS - position)
                tiles.append((first, n, sequence, is_chosen))
                first, position = first + n, position + n
        return np.array(tiles, np.int32)

    def _parts(
        self, shape: AttentionShape, tiles: np.ndarray, begin: np.ndarray, end: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """The parts of all tiles over their cuts [begin, end), longest first, and how many (token, cut) are kept."""
        n_tokens, cuts = tiles[:, 1].astype(np.int64), (end - begin).astype(np.int64)
        cost = cuts * n_tokens
        # heads that go together, being neighbours in memory: while their rows and a cut's keys stay near, and while
        # there are cuts enough to deal out
        heads = shape.n_kv_heads
        together = np.minimum(
            layout.TILE_ROWS * heads // (n_tokens * shape.n_heads), NEAR_HEAD_DIMS // shape.head_dim_k
        )
        together = np.clip(together, 1, heads if cuts.sum() >= self._n_threads * PARTS_PER_THREAD else 1)
        together = np.where(tiles[:, 3], 1, together)  # each head has chosen for itself
        n_groups = -(-heads // together)
        wanted = -(-cost * together * self._n_threads * PARTS_PER_THREAD // (heads * cost.sum()))
        n_parts = np.minimum(wanted, cuts) if self._n_threads > 1 else np.ones_like(cuts)
        n_parts[np.cumsum(cost * (n_parts > 1)) * self._partial_nbytes > MAX_PARTIAL_NBYTES] = 1
        kept = cost * (n_parts > 1)
        each = n_groups * n_parts
        tile = np.repeat(np.arange(len(tiles)), each)
        number = np.arange(len(tile)) - np.repeat(np.cumsum(each) - each, each)
        group, number = number // n_parts[tile], number % n_parts[tile]
        cut, stop = (begin[tile] + n * cuts[tile] // n_parts[tile] for n in (number, number + 1))
        head = group * together[tile]
        n_heads = np.minimum(together[tile], heads - head)
        columns = (
            *tiles[tile, :3].T, cut, stop - cut, head, n_heads, n_parts[tile], begin[tile], cuts[tile],
            (np.cumsum(kept) - kept)[tile], tile * heads + group, np.full(len(tile), self._windows.index(shape.window)),
            tiles[tile, 3],
        )  # fmt: skip
        parts = np.stack(columns, axis=1).astype(np.int32)
        longest_first = np.argsort(-(stop - cut) * n_tokens[tile] * n_heads, kind="stable")
        return np.ascontiguousarray(parts[longest_first]), int(kept.sum())


def _visible_cuts_of(position: int, window: int) -> tuple[int, int]:
    """``_visible_cuts`` of one token."""
    size = layout.cut_blocks(window) * BLOCK_TOKENS
    return (max(position - window + 1, 0) // size if window else 0), position // size + 1


def _cuts_of(
    tiles: np.ndarray, positions: np.ndarray, sees: np.ndarray, window: int, n_chosen: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each tile the first cut, and one past the last."""
    begin, end = _visible_cuts(positions[tiles[:, 0]], sees[tiles[:, 0] + tiles[:, 1] - 1], window)
    if n_chosen:
        end = np.where(tiles[:, 3], n_chosen // layout.CUT_BLOCKS, end)
    return begin, end


def _visible_cuts(first: np.ndarray, last: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """For tiles with these first and last positions: the first cut they see, and one past the last."""
    size = layout.cut_blocks(window) * BLOCK_TOKENS
    return (np.maximum(first - window + 1, 0) // size if window else np.zeros_like(first)), last // size + 1
