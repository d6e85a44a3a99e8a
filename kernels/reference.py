"""The judge of the other executors: the same program in plain numpy float32, op by op as ``kernels.ops`` defines them.

Nothing here is fast and nothing is clever. Weights are dequantized whole on first use and kept. The cache is read and
written through the pool's own layout, so one of float16 rounds keys and values exactly as the fast executors do; one of
float32 judges the model itself. Long sums are taken in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.formats.errors import NumericError
from edgellm.kernels.batch_checks import check_batch
from edgellm.kernels.kv import BLOCK_TOKENS, CachePool
from edgellm.kernels.narrowing import hidden_end
from edgellm.kernels.ops.embed import looked_up
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Batch, Hook, Op, Program
from edgellm.kernels.row_log import is_update, taken_back

DEFAULT_POOL_TOKENS = 32768  # positions of the pool made when none is given; pages are committed when touched


class ReferenceExecutor:
    """Runs a program in numpy. Keeps the dequantized weights (4 bytes a weight) until ``close``."""

    backend = "numpy"
    kv_dtype = "float32"
    draw = None

    def __init__(
        self,
        program: Program,
        n_blocks: Sequence[int] | int | None = None,
        max_tokens: int = 512,
        kv_dtype: str = kv_dtype,
        pool: CachePool | None = None,
        **_unused: Any,
    ) -> None:
        """Without ``n_blocks`` the cache is for a single sequence of ``min(context_length, 32768)`` tokens.

        pool   that of another program with the same layers, in place of one of its own

        What else an executor takes (threads, a report of compiling) it has no use for.
        """
        self.program = program
        self.max_tokens = max_tokens
        if n_blocks is None:
            n_blocks = -(-min(program.context_length, DEFAULT_POOL_TOKENS) // BLOCK_TOKENS)
        self.pool = pool or CachePool(program.cache_layers, n_blocks, kv_dtype)
        self._tensors = (program.adapted or program).tensors
        self._weights: dict[str, np.ndarray] = {}
        self.keeps_hidden = True
        self._log: list[tuple[Op, dict[str, np.ndarray]]] = []  # what the ops that make states have read
        self._hidden = self._tapped = np.empty((0, program.n_embd), np.float32)

    @staticmethod
    def work_nbytes(program: Program, max_tokens: int, n_threads: int) -> int:
        """Every weight but tables that are looked up, and the buffers of a step that gives logits for one token."""
        program, rows = program.adapted or program, {"tokens": max_tokens, "outputs": 1}
        buffers = sum(buffer.width * rows[buffer.rows] for buffer in program.buffers.values())
        rows_only = looked_up(program)
        unpacked = (math.prod(tensor.shape) for name, tensor in program.tensors.items() if name not in rows_only)
        return 4 * (sum(unpacked) + buffers)

    def weight(self, name: str) -> np.ndarray:
        """A tensor of the program as float32 in its own shape, dequantized when first asked for."""
        if name not in self._weights:
            tensor = self._tensors[name]
            self._weights[name] = tensor.dequantize().reshape(tensor.shape)
        return self._weights[name]

    def rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Rows of a matrix, dequantized one by one where it is not kept whole: a table may be too large for that."""
        if name in self._weights:
            return self._weights[name][numbers]
        return self._tensors[name].dequantize(numbers)

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32 of the tokens that want them, or their hidden states."""
        if len(batch):
            check_batch(batch, self.program, self.pool, self.max_tokens)
        program = self.program.of(batch)
        step = Step(program, self.pool, self.weight, self.rows, batch)
        end = hidden_end(program) if batch.hidden else len(program.ops)
        self._log = []
        for index, op in enumerate(program.ops[:end]):
            op.reference(step)
            if batch.logged and is_update(program, op):
                self._log.append((op, {name: step[name].copy() for name in op.read_buffers()}))
            if hook is not None:
                hook(index, op, step.__getitem__)
        logits = step[self.program.hidden if batch.hidden else self.program.output]
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise NumericError(
                f"The model computed NaN or infinity as a logit (output row {row}), where finite numbers were "
                "expected. The file may be damaged: run `edgellm verify` on it."
            )
        if self.program.hidden:
            self._hidden = step[self.program.hidden]
        if self.program.tapped and not batch.hidden:
            self._tapped = step[self.program.tapped]
        return logits

    def replay(self, batch: Batch, counts: Sequence[int]) -> None:
        """See ``LoggingExecutor``."""
        rows, kept = taken_back(batch, counts)
        step = Step(self.program.of(batch), self.pool, self.weight, self.rows, kept)
        for op, read in self._log:
            for name, values in read.items():
                step[name] = values[rows]
            op.reference(step)

    def last_hidden(self) -> np.ndarray:
        """See ``HiddenExecutor``."""
        return self._hidden

    def last_tapped(self) -> np.ndarray:
        """See ``HiddenExecutor``."""
        return self._tapped

    def close(self) -> None:
        """Let go of the weights. May be called twice."""
        self._weights.clear()
