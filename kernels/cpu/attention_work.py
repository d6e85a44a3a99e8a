"""Deals out attention: which tokens go through the cache together, and who takes which part of their context.

A tile is a few neighbouring tokens of one sequence. Where tiles are few or one is much longer than the others, its
context is divided into parts of whole cuts, so that every thread has work (the parts' sums are kept until all are
there: attention.py). What a token computes does not depend on how it is dealt.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from edgellm.kernels.cpu import layout
from edgellm.kernels.kv import BLOCK_TOKENS, KVPool
from edgellm.kernels.program import Attention, Program

CUT_TOKENS = layout.CUT_BLOCKS * BLOCK_TOKENS
PARTS_PER_THREAD = 8
MAX_PARTIAL_NBYTES = 64 << 20
"""A tile whose kept sums would not fit is not divided."""


class AttentionWork:
    """The parts of a step's attention, one list for each window; kept while the next step would have the same."""

    def __init__(self, program: Program, pool: KVPool, n_threads: int) -> None:
        ops = [(op, pool.layers[op.layer]) for op in program.ops if isinstance(op, Attention)]
        self._windows, self._n_threads = pool.windows, n_threads
        self._heads = [max([kv.n_kv_heads for kv in pool.layers if kv.window == w], default=1) for w in pool.windows]
        group = max((op.n_heads // kv.n_kv_heads for op, kv in ops), default=1)
        head_dim = max((kv.head_dim_v for _, kv in ops), default=0)
        self._tile_tokens = layout.tile_tokens(group)
        self.scratch_nbytes = layout.attention_scratch_nbytes(group * self._tile_tokens, head_dim)
        n_heads = max((op.n_heads for op, _ in ops), default=1)
        self._partial_nbytes = n_heads * layout.attention_state_nbytes(head_dim)  # of one token and cut
        self._partials = np.zeros(0, np.uint8)
        self._key: bytes | None = None
        self._fields: dict[str, int] = {}
        self._alive: list[np.ndarray] = []

    def plan(self, positions: np.ndarray, starts: Sequence[int], sequences: np.ndarray) -> dict[str, int]:
        """The step's fields for attention; ``starts`` are the first tokens of the sequences, and one past the last."""
        tiles = self._tiles(starts, sequences)
        first, last = positions[tiles[:, 0]], positions[tiles[:, 0] + tiles[:, 1] - 1]
        ranges = [(np.maximum(first - w + 1, 0) // CUT_TOKENS if w else first * 0, last // CUT_TOKENS + 1)
                  for w in self._windows]  # fmt: skip
        key = b"".join(a.tobytes() for a in (tiles, *itertools.chain(*ranges)))
        if key != self._key:
            lists = [self._parts(tiles, *r, heads) for r, heads in zip(ranges, self._heads, strict=True)]
            slots = max((n for _, n in lists), default=0)
            if self._partials.size < slots * self._partial_nbytes:
                self._partials = np.zeros(2 * slots * self._partial_nbytes, np.uint8)
            done = np.zeros(len(tiles) * max(self._heads, default=1), np.int64)
            pairs = np.array([[parts.ctypes.data, len(parts)] for parts, _ in lists], np.int64)
            self._alive = [done, pairs, *(parts for parts, _ in lists)]
            self._fields = {
                "PARTS": pairs.ctypes.data, "PARTS_DONE": done.ctypes.data,
                "PARTIALS": self._partials.ctypes.data, "PARTIAL_NBYTES": self._partial_nbytes,
            }  # fmt: skip
            self._key = key
        return self._fields

    def _tiles(self, starts: Sequence[int], sequences: np.ndarray) -> np.ndarray:
        """(first token, tokens, sequence), never across two sequences."""
        tile = self._tile_tokens
        tiles = [
            (first, min(tile, stop - first), sequences[start])
            for start, stop in itertools.pairwise(starts)
            for first in range(start, stop, tile)
        ]
        return np.array(tiles, np.int32)

    def _parts(self, tiles: np.ndarray, begin: np.ndarray, end: np.ndarray, heads: int) -> tuple[np.ndarray, int]:
        """The parts of all tiles over their cuts [begin, end), longest first, and how many (token, cut) are kept."""
        cuts = (end - begin).astype(np.int64)
        cost = cuts * tiles[:, 1]
        wanted = -(-cost * self._n_threads * PARTS_PER_THREAD // (heads * cost.sum()))
        n_parts = np.minimum(wanted, cuts) if self._n_threads > 1 else np.ones_like(cuts)
        too_many = np.cumsum(cost * (n_parts > 1)) * self._partial_nbytes > MAX_PARTIAL_NBYTES
        n_parts[too_many] = 1
        kept = cost * (n_parts > 1)
        tile = np.repeat(np.arange(len(tiles)), n_parts)
        number = np.arange(len(tile)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
        cut = begin[tile] + number * cuts[tile] // n_parts[tile]
        n_cuts = begin[tile] + (number + 1) * cuts[tile] // n_parts[tile] - cut
        partial = (np.cumsum(kept) - kept)[tile]
        columns = (*tiles[tile].T, cut, n_cuts, n_parts[tile], begin[tile], cuts[tile], partial, tile * heads)
        parts = np.stack(columns, axis=1).astype(np.int32)
        longest_first = np.argsort(-n_cuts * tiles[tile, 1], kind="stable")
        return np.ascontiguousarray(parts[longest_first]), int(kept.sum())
