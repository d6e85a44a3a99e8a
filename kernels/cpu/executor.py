"""Runs a program on the CPU: fills in the step record, lets the thread team walk the op table, hands back logits.

Everything that the kernels take on trust is checked here: token ids, positions, and every block-table entry that a
token of the batch can reach.
"""

from __future__ import annotations

import itertools
import weakref

import numpy as np

from edgellm.formats.errors import ClosedError, NumericError, ParameterError
from edgellm.kernels import likeliest
from edgellm.kernels.cpu import jit, kernel_table, layout
from edgellm.kernels.cpu.attention_work import AttentionWork
from edgellm.kernels.cpu.kernel_cache import KernelCache, Progress
from edgellm.kernels.cpu.lowering import MAX_OUTPUTS, lower
from edgellm.kernels.cpu.threads import ThreadTeam, aligned_zeros
from edgellm.kernels.cpu.verified_kernels import verified_kernels
from edgellm.kernels.kv import BLOCK_TOKENS, KVPool
from edgellm.kernels.program import Batch, Hook, Program


class CPUExecutor:
    """The ``Executor`` for this machine's CPU.

    form         "amx", "avx512_vnni", "avx2", "neon", "portable", or None for the best that the CPU has
    on_compile   called while kernels are compiled, on the first start: done, total, name
    cache        take the kernels from here as they are; without it they are tested once, and another form is taken
                 when they fail (verified_kernels.py)
    """

    def __init__(
        self,
        program: Program,
        pool: KVPool,
        n_threads: int = 1,
        max_tokens: int = 512,
        on_compile: Progress | None = None,
        form: str | None = None,
        cache: KernelCache | None = None,
    ) -> None:
        self.program, self.pool, self.max_tokens, self.n_threads = program, pool, max_tokens, n_threads
        if pool.dtype != np.float16:
            raise ParameterError(f"the CPU executor keeps keys and values as float16, not {pool.dtype}")
        self._table = lower(program, pool, max_tokens)
        names = [*kernel_table.TEAM, *dict.fromkeys(self._table.kernels)]
        if cache is None:
            names.append(kernel_table.VOCABULARY)
            cache, objects = verified_kernels(names, form, on_compile, CPUExecutor)
        else:
            objects = cache.objects(names, on_compile)
        self.isa, self.n_compiled = cache.isa, cache.n_compiled
        self._code = jit.CodeMemory()
        addresses = {name: self._code.load(name, objects[name]) for name in names}
        if kernel_table.VOCABULARY in addresses:
            likeliest.use(likeliest.VocabularyKernel(addresses[kernel_table.VOCABULARY], self._code))
        self._table.rows[:, 0] = [addresses[name] for name in self._table.kernels]
        self._team = ThreadTeam(addresses, n_threads, self._code)
        self._end_threads = weakref.finalize(self, self._team.close)
        self._step = np.zeros(layout.STEP_FIELDS, np.int64)
        self._work = AttentionWork(program, pool, n_threads)
        per_thread = -(-max(layout.matmul_scratch_nbytes(max_tokens), self._work.scratch_nbytes) // 4096) * 4096
        self._scratch = aligned_zeros(per_thread * n_threads, 4096)
        self._set(SCRATCH=self._scratch.ctypes.data, SCRATCH_NBYTES=per_thread)
        self._alive: list[np.ndarray] = []
        self._closed = False

    def _set(self, **fields: int) -> None:
        for name, value in fields.items():
            self._step[getattr(layout, name) // 8] = value

    # ---- one step ----------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32, valid until the next call; see ``Executor``."""
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        self._check(batch)
        self._begin(batch)
        table, output_rows = self._table, np.flatnonzero(batch.outputs).astype(np.int32)
        middle, first, last = table.n_token_rows, table.n_token_rows, table.first_row[-1]
        if hook is None and len(output_rows) <= MAX_OUTPUTS:
            if len(output_rows) < len(batch):
                middle, first, last = table.n_rows_before_tail, table.first_row[-1], len(table.rows)
            else:  # all in one walk: Python and a meeting are 20 us
                middle, first = 0, 0
        self._run_rows(0, middle, hook)
        logits = table.buffers["logits"][:, : self.program.n_vocab]
        result = logits[: len(output_rows)]
        if len(output_rows) > MAX_OUTPUTS:
            result = np.empty((len(output_rows), self.program.n_vocab), np.float32)
        for start in range(0, len(output_rows), MAX_OUTPUTS):
            chunk = output_rows[start : start + MAX_OUTPUTS]
            self._set(N_OUTPUTS=len(chunk), OUTPUT_ROWS=chunk.ctypes.data)
            self._run_rows(first, last, hook)
            if result.base is not logits.base:
                result[start : start + len(chunk)] = logits[: len(chunk)]
        if len(output_rows) and not (np.isfinite(result.max()) and np.isfinite(result.min())):
            raise NumericError(
                "the model computed NaN or infinity instead of logits. Its file may be damaged: try "
                "`edgellm verify FILE`, then pull it again."
            )
        return result

    def _run_rows(self, first: int, last: int, hook: Hook | None) -> None:
        rows = self._table.rows
        rows[first:last, -1] = 0  # the work counters
        address, step = rows.ctypes.data, self._step.ctypes.data
        if hook is None:
            self._team.run(address, first, last, step)
            return
        for i, op in enumerate(self.program.ops):
            start, stop = self._table.first_row[i : i + 2]
            if first <= start and stop <= last:
                rows[start:stop, -1] = 0
                # a hook may change any buffer, so make the int16 form of this op's input anew
                self._requantize(start, stop, address, step)
                self._team.run(address, start, stop, step)
                hook(i, op, self._read)

    def _requantize(self, start: int, stop: int, address: int, step: int) -> None:
        """Run again the quantize row that made the activations read by the rows [start, stop)."""
        rows, kernels = self._table.rows, self._table.kernels
        for row in range(start, stop):
            if kernels[row].startswith("matmul_"):
                makers = [i for i in range(row) if kernels[i] == "quantize" and rows[i, 3] == rows[row, 1]]
                if makers and makers[-1] < start:
                    self._team.run(address, makers[-1], makers[-1] + 1, step)

    def _read(self, name: str) -> np.ndarray:
        """A writable view of a buffer's rows in this step."""
        buffer = self.program.buffers[name]
        n = self._step[(layout.N_OUTPUTS if buffer.rows == "outputs" else layout.N_TOKENS) // 8]
        return self._table.buffers[name][:n, : buffer.width]

    def _begin(self, batch: Batch) -> None:
        """Fill in the step record."""
        arrays = [np.ascontiguousarray(a, np.int32) for a in (batch.tokens, batch.positions, batch.sequences)]
        tables = [np.ascontiguousarray(t, np.int32) for t in batch.tables]
        pairs = np.array([[t.ctypes.data, t.shape[1]] for t in tables], np.int64)
        angles = [rope.table(arrays[1]) for rope in self.program.ropes.values()]
        ropes = np.array([[cos.ctypes.data, sin.ctypes.data] for cos, sin in angles], np.int64)
        self._set(
            N_TOKENS=len(batch), N_OUTPUTS=0, TOKENS=arrays[0].ctypes.data, POSITIONS=arrays[1].ctypes.data,
            SEQUENCES=arrays[2].ctypes.data, TABLES=pairs.ctypes.data, ROPES=ropes.ctypes.data,
            **self._work.plan(arrays[1], _starts(arrays[2]), arrays[2]),
        )  # fmt: skip
        self._alive = [*arrays, *tables, pairs, ropes, *(a for pair in angles for a in pair)]

    # ---- what the kernels take on trust ------------------------------------------------------------------------------

    def _check(self, batch: Batch) -> None:
        n = len(batch)
        if not 0 < n <= self.max_tokens:
            raise ParameterError(f"a batch of {n} tokens; this executor takes 1 to {self.max_tokens}")
        if len({n, len(batch.positions), len(batch.sequences), len(batch.outputs)}) != 1:
            raise ParameterError("tokens, positions, sequences and outputs of a batch must have one length")
        low, high = int(batch.tokens.min()), int(batch.tokens.max())
        if low < 0 or high >= self.program.n_vocab:
            bad = low if low < 0 else high
            raise ParameterError(f"token id {bad} is not in [0, {self.program.n_vocab})")
        if len(batch.tables) != len(self.pool.windows):
            raise ParameterError(f"{len(batch.tables)} block tables; the model has {len(self.pool.windows)} windows")
        for start, stop in itertools.pairwise(_starts(batch.sequences)):
            first, last = int(batch.positions[start]), int(batch.positions[stop - 1])
            if first < 0 or (stop - start > 1 and (np.diff(batch.positions[start:stop]) != 1).any()):
                raise ParameterError("positions of a sequence must rise by one, from 0 on")
            self._check_blocks(batch, int(batch.sequences[start]), first, last)

    def _check_blocks(self, batch: Batch, sequence: int, first: int, last: int) -> None:
        for window, n_blocks, table in zip(self.pool.windows, self.pool.n_blocks, batch.tables, strict=True):
            if table.ndim != 2:
                raise ParameterError(f"a block table of shape {table.shape}; (n_sequences, max_blocks) is expected")
            begin = max(0, first - window + 1) // BLOCK_TOKENS if window else 0
            end = last // BLOCK_TOKENS + 1
            if not 0 <= sequence < table.shape[0] or end > table.shape[1]:
                raise ParameterError(f"no block table for position {last} of sequence {sequence}")
            blocks = table[sequence, begin:end]
            if int(blocks.min()) < 0 or int(blocks.max()) >= n_blocks:
                raise ParameterError(f"block table of sequence {sequence} points outside its {n_blocks} blocks")

    def close(self) -> None:
        """Stop the threads and let go of weights and cache. May be called twice."""
        if not self._closed:
            self._closed = True
            self._end_threads()
            del self._table, self.pool


def _starts(sequences: np.ndarray) -> list[int]:
    """The first token of each sequence of a batch, and one past the last."""
    if len(sequences) == 1:  # decode: numpy would take 10 us
        return [0, 1]
    return [0, *(np.flatnonzero(np.diff(sequences)) + 1).tolist(), len(sequences)]
