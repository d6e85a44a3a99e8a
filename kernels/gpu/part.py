"""The GPU executor of a program that is cut in parts: any of its ops, and buffers in and out (``kernels/split.py``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from edgellm.kernels.batch_checks import check_batch
from edgellm.kernels.gpu.draw import GPUTokenDraw
from edgellm.kernels.gpu.emitter import Counts
from edgellm.kernels.gpu.executor import GPUExecutor, counts_of
from edgellm.kernels.program import Batch, Op


class GPUPart(GPUExecutor):
    """A ``PartExecutor``; see there."""

    narrows: ClassVar[bool] = False
    max_shapes: ClassVar[int] = 4096  # a step has one for each stretch of its ops, and those come in turn
    _counts, _ops = Counts(0, 0, 0), tuple[Op, ...]()

    @property
    def max_outputs(self) -> int:
        """Rows of an ``outputs`` buffer."""
        return self._there.rows["outputs"]

    def begin(self, batch: Batch, outputs: Sequence[int]) -> None:
        """Take a batch, proved first."""
        check_batch(batch, self.program, self.pool, self.max_tokens)
        if self._there.step.begin(batch, outputs):
            self._shapes.clear()
        self._counts = counts_of(batch, len(outputs), self.program)
        self._ops = self._form_of(batch).program.ops

    def outputs(self, rows: Sequence[int]) -> None:
        """Other rows of the same batch."""
        self._there.step.outputs(rows)
        self._counts = dataclasses.replace(self._counts, outputs=len(rows))

    def run_ops(self, first: int, last: int, *, alone: bool = False) -> None:
        """Start the ops [first, last)."""
        ops, following = self._ops[first:last], self._ops[last:]
        if alone:
            self._start(self._record(ops, following, self._counts, fuse=False))
        else:
            self._start(self._recorded(self._counts, ops, following))

    def drawn(self, draws: Sequence[GPUTokenDraw]) -> list[int]:
        """A token for each row of logits of this step; -1 where one of them is not finite."""
        n, k = len(draws), max(draw.k for draw in draws)
        (rows,) = self._top_k.read(k, n, 1, [self._top_k.recording(k, n)])
        return self._draw_all(draws, rows)

    def read(self, name: str) -> np.ndarray:
        """A copy of the rows of a buffer in this step."""
        return self._read(self._counts, {}, name)

    def write(self, name: str, values: np.ndarray) -> None:
        """Put rows into a buffer; in one piece where nothing else stands in them."""
        place, data = self._there.places[name], np.ascontiguousarray(values).view(np.float32)
        if place.at == 0 and all(one is place or one.buffer is not place.buffer for one in self._there.places.values()):
            rows = np.zeros((len(data), place.row), np.float32)  # what a row is filled up with stays zero
            rows[:, : place.width] = data
            self.device.write(place.buffer, 0, rows)
            return
        for row, value in enumerate(data):
            self.device.write(place.buffer, 4 * (row * place.row + place.at), value)
