"""What the reference of an op works on: one run of a batch, its buffers, weights and cache as numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgellm.kernels.kv import CachePool
from edgellm.kernels.program import Batch, Program


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
    """One run of a batch: its buffers by name, and what the ops look up.

    weight   a tensor of the program by name, float32 in its own shape
    rows     some rows of a matrix by name and numbers, float32
    """

    def __init__(
        self,
        program: Program,
        pool: CachePool,
        weight: Callable[[str], np.ndarray],
        rows: Callable[[str, np.ndarray], np.ndarray],
        batch: Batch,
    ) -> None:
        self.program, self.pool, self.weight, self.rows, self.batch = program, pool, weight, rows, batch
        self.segments = segments(batch)
        n_rows = {"tokens": len(batch), "outputs": int(np.count_nonzero(batch.outputs))}
        self.buffers: dict[str, np.ndarray] = {}
        for name, buffer in sorted(program.buffers.items(), key=lambda item: item[1].of != ""):
            if buffer.of:
                self.buffers[name] = self.buffers[buffer.of][:, buffer.first : buffer.first + buffer.width]
            else:
                self.buffers[name] = np.zeros((n_rows[buffer.rows], buffer.width), buffer.dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.buffers[name]

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        assert value.shape == self.buffers[name].shape, f"{name}: {value.shape}, declared {self.buffers[name].shape}"
        self.buffers[name][...] = value

    @property
    def rope_positions(self) -> np.ndarray:
        """What rotations go by: (n,), or (n_parts, n)."""
        return self.batch.positions if self.batch.rope_positions is None else self.batch.rope_positions

    @property
    def types(self) -> np.ndarray:
        """The type of every token, (n,)."""
        return np.zeros(len(self.batch), np.int32) if self.batch.types is None else self.batch.types

    def adapters(self, name: str) -> np.ndarray:
        """The scale of every adapter for the rows of a buffer, (n_rows, n_adapters)."""
        scales = self.batch.adapters
        if scales is None:
            return np.zeros((len(self.buffers[name]), self.program.n_adapters), np.float32)
        return scales if self.program.buffers[name].rows == "tokens" else scales[self.batch.outputs]

    def table(self, layer: int) -> np.ndarray:
        """The block tables (n_sequences, max_blocks) of the layer's group."""
        return self.batch.tables[self.program.table_of(layer)]
