"""The step record: what a batch tells the kernels, in arrays that are made once and filled for every step.

Decoding does this once for each token while all threads wait, so it makes few calls into numpy: each takes microseconds
after a step that has emptied the caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run.attention_work import AttentionWork
from edgellm.kernels.ops import AddRows, SelfAttention
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.rope import Rope

ROPE_RUN = 64  # positions whose angles are computed together while one text grows


class StepRecord:
    """The int64 fields of ``layout`` for one executor. ``address`` is what kernels are given."""

    def __init__(self, program: Program, max_tokens: int, n_threads: int) -> None:
        self.work = AttentionWork(program, n_threads)
        self._fields = np.zeros(layout.STEP_FIELDS, np.int64)
        self.address = self._fields.ctypes.data
        self._arrays = np.zeros((6, max_tokens), np.int32)
        n_adapters = program.adapted.n_adapters if program.adapted is not None else program.n_adapters
        self._adapters = np.zeros((max_tokens, n_adapters), np.float32)
        self._is_encoder = any(isinstance(op, SelfAttention) for op in program.ops)
        self._has_types = any(isinstance(op, AddRows) and op.of == "types" for op in program.ops)
        self._tiles = np.zeros((0, 4), np.int32)
        self._tables = np.zeros((len(program.groups), 2), np.int64)
        self._angles = _Angles(list(program.ropes.values()))
        self._alive: Sequence[np.ndarray] = ()
        names = ("TOKENS", "POSITIONS", "SEQUENCES", "OUTPUT_ROWS", "OWN_SEES", "TYPES")
        self.set(**{name: row.ctypes.data for name, row in zip(names, self._arrays, strict=True)})
        self.set(ADAPTERS=self._adapters.ctypes.data, ADAPTERS_ROW=self._adapters.strides[0])
        self.set(TABLES=self._tables.ctypes.data, ROPES=self._angles.pairs.ctypes.data)

    def set(self, **fields: int) -> None:
        """Fill in fields by name."""
        for name, value in fields.items():
            self._fields[getattr(layout, name) // 8] = value

    def get(self, name: str) -> int:
        """A field by name."""
        return int(self._fields[getattr(layout, name) // 8])

    def begin(self, batch: Batch, starts: Sequence[int], n_steps: int = 1) -> None:
        """All that a batch says but its outputs; ``starts`` are as in ``AttentionWork.plan``.

        n_steps   so many may be made of it, each a position further: their angles are there for all
        """
        n = len(batch)
        tokens, positions, sequences, _, sees, types = self._arrays
        tokens[:n], positions[:n], sequences[:n] = batch.tokens, batch.positions, batch.sequences
        self._fields[layout.N_TOKENS // 8], self._fields[layout.N_OUTPUTS // 8] = n, 0
        self._fields[layout.N_LOGGED // 8] = n if batch.logged else 0
        tables = self._alive = [np.ascontiguousarray(table, np.int32) for table in batch.tables]
        for i, table in enumerate(tables):
            self._tables[i, 0], self._tables[i, 1] = table.__array_interface__["data"][0], table.shape[1]
        if batch.adapters is not None:
            self._adapters[:n] = batch.adapters
        if batch.sees is None:
            sees = positions  # the same memory: whatever changes a position, changes what it sees
        else:
            sees[:n] = batch.sees
        self._fields[layout.SEES // 8] = self._fields[(layout.POSITIONS if sees is positions else layout.OWN_SEES) // 8]
        self._angles.turn(positions[:n] if batch.rope_positions is None else batch.rope_positions, n_steps)
        if self._has_types:
            types[:n] = 0 if batch.types is None else batch.types
        if self._is_encoder:
            self._tiles = text_tiles(starts)
            self.set(TEXT_TILES=self._tiles.ctypes.data, N_TEXT_TILES=len(self._tiles))
            return
        if changed := self.work.plan(positions[:n], sees[:n], starts, sequences[:n]):
            self.set(**changed)

    def steps_alike(self, positions: Sequence[int], turning: Sequence[int]) -> int:
        """Decode steps from these positions on that differ from the first in nothing but token, position and angles.

        turning   what rotations go by
        """
        n = min(map(self.work.steps_alike, positions))
        return n if len(positions) > 1 else min(n, ROPE_RUN - turning[0] % ROPE_RUN)

    @property
    def angle_nbytes(self) -> np.ndarray:
        """For each rope, bytes from the angles of one step to those of the next; int64."""
        return self._angles.nbytes

    def outputs(self, rows: Sequence[int]) -> None:
        """The tokens whose logits the next kernels compute."""
        self._arrays[3, : len(rows)] = rows
        self._fields[layout.N_OUTPUTS // 8] = len(rows)


def text_tiles(starts: Sequence[int]) -> np.ndarray:
    """The tiles of texts that begin at these tokens (and one past the last), int32 (n, 4) as in layout.py.

    Those with most to do come first, so that threads end together.
    """
    bounds = np.asarray(starts, np.int64)
    n = np.diff(bounds)
    tiles = -(-n // layout.TEXT_TILE)
    text = np.repeat(np.arange(len(n)), tiles)
    first = (np.arange(len(text)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * layout.TEXT_TILE
    size = np.minimum(n[text] - first, layout.TEXT_TILE)
    found = np.stack((bounds[text], n[text], bounds[text] + first, size), axis=1).astype(np.int32)
    return np.ascontiguousarray(found[np.argsort(-n[text] * size, kind="stable")])


class _Angles:
    """cos and sin of a step's positions, for every rope of a program; ``pairs`` holds their addresses."""

    def __init__(self, ropes: Sequence[Rope]) -> None:
        self.pairs = np.zeros((len(ropes), 2), np.int64)
        self.nbytes = np.zeros(len(ropes), np.int64)  # of a step
        self._ropes = ropes
        self._first = -1  # position of the first row of a run
        self._runs: list[tuple[int, int, int]] = []  # addresses of cos and sin, bytes of a row
        self._alive: list[np.ndarray] = []

    def turn(self, positions: np.ndarray, n_steps: int = 1) -> None:
        """Angles of these positions, (n,) or (n_parts, n), and behind them of the next ones of (n,)."""
        if positions.ndim > 1 or len(positions) > 1:
            if n_steps > 1:
                positions = (np.arange(n_steps, dtype=np.int32)[:, None] + positions).reshape(-1)
            self._compute(positions, positions.shape[-1] // n_steps)
            self._first = -1
            return
        position = int(positions[0])
        first = position // ROPE_RUN * ROPE_RUN
        if first != self._first:
            self._compute(np.arange(first, first + ROPE_RUN, dtype=np.int32), 1)
            self._first = first
        for i, (cos, sin, nbytes) in enumerate(self._runs):
            offset = (position - first) * nbytes
            self.pairs[i, 0], self.pairs[i, 1] = cos + offset, sin + offset

    def _compute(self, positions: np.ndarray, n: int) -> None:
        """``n`` of them are a step's."""
        tables = [rope.table(positions) for rope in self._ropes]
        self._alive = [array for pair in tables for array in pair]
        self._runs = [(cos.ctypes.data, sin.ctypes.data, cos.strides[0]) for cos, sin in tables]
        for i, (cos, sin, nbytes) in enumerate(self._runs):
            self.pairs[i], self.nbytes[i] = (cos, sin), n * nbytes
