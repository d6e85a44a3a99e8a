"""Runs a program on the CPU: fills in the step record, lets the thread team walk the op table, hands back logits.

What the kernels take on trust of a batch is checked by ``kernels.batch_checks``.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import ClassVar, NamedTuple

import numpy as np

from edgellm.formats.errors import ClosedError, ParameterError
from edgellm.kernels.batch_checks import check_batch, checked
from edgellm.kernels.cpu.compile import isa, jit, kernel_table
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache
from edgellm.kernels.cpu.compile.verified_kernels import verified_kernels
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run.decode_threads import DecodeThreads
from edgellm.kernels.cpu.run.draw import MAX_STEPS, CPUDraw, CPUTokenDraw
from edgellm.kernels.cpu.run.experts_ahead import Routed, keep_in_file
from edgellm.kernels.cpu.run.lowering import MAX_OUTPUTS, OpTable, in_file_nbytes, lower, scratch_nbytes, work_nbytes
from edgellm.kernels.cpu.run.step import StepRecord
from edgellm.kernels.cpu.run.threads import ThreadTeam, aligned_zeros
from edgellm.kernels.kv import CachePool
from edgellm.kernels.narrowing import hidden_end
from edgellm.kernels.ops import ExpertMatmul
from edgellm.kernels.ops.embed import embedding_of
from edgellm.kernels.ops.outputs import SelectOutputs
from edgellm.kernels.program import Batch, Hook, Program
from edgellm.kernels.row_log import taken_back
from edgellm.machine.progress import Progress

_COUNTER = layout.COUNTER // 8
PIECE_S = 0.02  # of a step between two looks whether it is still wanted; Python and a meeting of the threads are 20 us


class _NotWantedError(Exception):
    """Nobody wants the rest of the step."""


def _nothing() -> None:
    """The end of threads that are another's."""


class _Wanted(NamedTuple):
    """The buffers that a step's result is in, and one past the last row of the op table that makes it.

    rows       of a walk through the program; of one that ends with the tail, ``tail_rows``
    all_rows   where it is as soon as all tokens are through, when none has to be chosen
    """

    rows: np.ndarray
    tail_rows: np.ndarray
    all_rows: np.ndarray | None
    end: int
    tail_end: int


class CPUExecutor:
    """The ``Executor`` for this machine's CPU.

    form         one of FORMS (compile/isa.py), or None for the best that the CPU has
    on_compile   called while kernels are compiled, on the first start: done, total, name
    untested     run the kernels of this cache as they are: that is how they are tested. Without it those that have not
                 passed on this CPU are tested now, and another form is taken when one fails (verified_kernels.py)
    is_part      the program is a part of one, with what it needs for few rows among its ops (kernels/split.py)
    beside       run on the threads of this one, which is closed last; the two never run at once
    pool         the cache of another program with the same layers, in place of one of its own
    """

    backend: ClassVar[str] = "CPU"
    kv_dtype: ClassVar[str] = "float16"
    max_outputs = MAX_OUTPUTS
    in_file_nbytes = staticmethod(in_file_nbytes)

    def __init__(
        self,
        program: Program,
        n_blocks: Sequence[int] | int,
        n_threads: int = 1,
        max_tokens: int = 512,
        on_compile: Progress | None = None,
        form: str | None = None,
        untested: KernelCache | None = None,
        is_part: bool = False,
        beside: CPUExecutor | None = None,
        pool: CachePool | None = None,
    ) -> None:
        self.program, self.max_tokens, self.n_threads = program, max_tokens, n_threads
        self.pool = pool = pool or CachePool(program.cache_layers, n_blocks, self.kv_dtype)
        self._plain = lower(program, pool, max_tokens, narrows=not is_part)
        tables = [table for table in (self._plain, self._plain.adapted) if table is not None]
        called = [name for table in tables for _, _, name in table.calls]
        used = dict.fromkeys([*(kernel for table in tables for kernel in table.kernels), *called])
        names = [*kernel_table.TEAM, *used, kernel_table.TOP_K]
        if untested is None:
            cache, objects = verified_kernels(names, form, on_compile, CPUExecutor)
        else:
            cache, objects = untested, untested.objects(names, on_compile)
        self.isa, self.n_compiled = cache.isa, cache.n_compiled
        self._code = jit.CodeMemory()
        addresses = {name: self._code.load(name, objects[name]) for name in names}
        self.draw = CPUDraw(addresses[kernel_table.TOP_K], self._code)
        for table in tables:
            table.rows[:, layout.KERNEL // 8] = [addresses[name] for name in table.kernels]
            for row, field, name in table.calls:
                table.rows[row, field] = addresses[name]
        self._use(self._plain)
        self._team: ThreadTeam = ThreadTeam(addresses, n_threads, self._code) if beside is None else beside._team
        self._decode_threads: dict[int, DecodeThreads] = {}
        self._end_threads = weakref.finalize(self, self._team.close if beside is None else _nothing)
        self._step = StepRecord(program, max_tokens, n_threads)
        self._has_state = any(group.kind == "state" for group in program.groups)
        per_thread = scratch_nbytes(program, max_tokens, self.isa.name)
        self._scratch = aligned_zeros(per_thread * n_threads, 4096)
        self.nbytes = self._plain.nbytes + len(self._scratch)
        first = self._scratch.ctypes.data + layout.tiles_nbytes(self.isa.name)
        self._step.set(SCRATCH=first, SCRATCH_NBYTES=per_thread)
        self._results: dict[tuple[bool, bool], _Wanted] = {}
        self._in_file = False
        self.keeps_hidden = False
        self._last = (False, 0)  # whether the tail for few rows made the last step's logits, and of how many rows
        self._n_tokens = 0  # of the last step
        self._kept: list[np.ndarray] = []  # the hidden states of a step of more rows than are computed at once
        self._closed = False
        self._still_wanted: Callable[[], bool] | None = None

    @staticmethod
    def work_nbytes(program: Program, max_tokens: int, n_threads: int, form: str | None = None) -> int:
        """Bytes that one would hold besides mapped weights and its cache, without taking them."""
        return work_nbytes(program, max_tokens, n_threads, form or isa.available_forms()[0])

    @property
    def settled(self) -> bool:
        """Whether the numbers of threads that decode fastest are found: until then decode steps try others."""
        return all(threads.found for threads in self._decode_threads.values())

    def decode_threads(self, n_tokens: int) -> DecodeThreads:
        """The number of threads of decode steps of so many tokens: the more, the less they wait for memory."""
        if n_tokens not in self._decode_threads:
            self._decode_threads[n_tokens] = DecodeThreads(self._team, self._decode_threads.values())
        return self._decode_threads[n_tokens]

    def leave_experts_in_file(self) -> None:
        """For a model that is larger than memory: a step fetches the experts that it is sent to (experts_ahead.py)."""
        self._in_file = True
        experts = {op.weight for op in self.program.ops if isinstance(op, ExpertMatmul)}
        keep_in_file(self.program.tensors[name] for name in experts)

    @property
    def _ahead(self) -> list[Routed]:
        return self._table.routed if self._in_file else []

    def _use(self, table: OpTable) -> None:
        """Run the rows of this table from now on."""
        self._table, self._rows_address = table, table.rows.ctypes.data

    def _use_for(self, batch: Batch) -> None:
        """The table for a batch: a batch without adapters has that of the program without them."""
        table = self._plain if batch.adapters is None or self._plain.adapted is None else self._plain.adapted
        if table is not self._table:
            self._use(table)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32, or hidden states, valid until the next call; see ``Executor``."""
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        n, decodes = len(batch), hook is None and not batch.hidden
        with self.decode_threads(n) if decodes and n <= MAX_OUTPUTS and batch.outputs.all() else nullcontext():
            return self._run(batch, hook)

    def _run(self, batch: Batch, hook: Hook | None) -> np.ndarray:
        self._use_for(batch)
        wanted = self._wanted(hidden=batch.hidden)
        starts, self._n_tokens = check_batch(batch, self.program, self.pool, self.max_tokens), len(batch)
        self._step.begin(batch, starts)
        table, output_rows = self._table, [row for row, wanted in enumerate(batch.outputs.tolist()) if wanted]
        begin = 0 if batch.embeddings is None else self._embed(*batch.embeddings, hook)
        if hook is None and table.last_write is not None and len(output_rows) < len(batch):
            stop = table.first_row[table.last_write.start]
            self._run_rows(begin, stop, None)
            if not output_rows:
                return np.empty((0, wanted.rows.shape[1]), np.float32)
            batch, starts = self._drop_rows(batch, output_rows, table.last_write.buffers)
            self._step.begin(batch, starts)
            begin, output_rows = stop, list(range(len(batch)))
        middle, first, last, rows = table.n_token_rows, table.n_token_rows, wanted.end, wanted.rows
        if hook is None and len(output_rows) <= MAX_OUTPUTS:
            if len(output_rows) == len(batch):  # all in one walk: Python and a meeting are 20 us
                middle, first = begin, begin
            elif len(table.tail_first_row) > 1:  # there is a tail for few rows
                middle, first, last = table.n_rows_before_tail, table.first_row[-1], wanted.tail_end
                rows = wanted.tail_rows
        self._last, self._kept = (rows is wanted.tail_rows, len(output_rows)), []
        self._run_rows(begin, middle, hook)
        if hook is None and wanted.all_rows is not None and len(output_rows) == len(batch) and middle > begin:
            return checked(wanted.all_rows[: len(batch)])
        result = rows[: len(output_rows)]
        if len(output_rows) > MAX_OUTPUTS:
            result = np.empty((len(output_rows), rows.shape[1]), np.float32)
        for start in range(0, len(output_rows), MAX_OUTPUTS):
            chunk = output_rows[start : start + MAX_OUTPUTS]
            self._step.outputs(chunk)
            self._run_rows(first, last, hook)
            if result.base is not rows.base:
                result[start : start + len(chunk)] = rows[: len(chunk)]
                if self.keeps_hidden and not batch.hidden:
                    self._kept.append(self._wanted(hidden=True).rows[: len(chunk)].copy())
        return checked(result)

    def replay(self, batch: Batch, counts: Sequence[int]) -> None:
        """See ``LoggingExecutor``."""
        rows, kept = taken_back(batch, counts)
        if rows[-1] >= len(rows):  # rows between them are left out
            for log in self._table.log:
                log[: len(rows)] = log[rows]
        self._step.begin(kept, check_batch(kept, self.program, self.pool, self.max_tokens))
        self._run_rows(self._table.tail_first_row[-1], len(self._table.rows), None)

    def last_hidden(self) -> np.ndarray:
        """See ``HiddenExecutor``."""
        (by_tail, n), found = self._last, self._wanted(hidden=True)
        if n > MAX_OUTPUTS:
            if not self._kept:
                raise ParameterError(f"last_hidden() is of at most {MAX_OUTPUTS} rows; the last step had {n}")
            return np.concatenate(self._kept)
        return (found.tail_rows if by_tail else found.rows)[:n]

    def last_tapped(self) -> np.ndarray:
        """See ``HiddenExecutor``."""
        name = self.program.tapped
        return self._table.buffers[name][: self._n_tokens, : self._table.widths[name]]

    def _wanted(self, *, hidden: bool) -> _Wanted:
        """Where a step's result will be."""
        key = hidden, self._table is self._plain
        if key not in self._results:
            table, program = self._table, self._table.program
            n_after, name = 0, program.output
            if hidden:
                n_after, name = len(program.ops) - hidden_end(program), program.hidden

            def rows(name: str) -> np.ndarray:
                width = table.widths[name]
                return table.buffers[name][:, : width if hidden else min(width, program.n_vocab)]

            last = program.ops[-1 - n_after]
            self._results[key] = _Wanted(
                rows(name),
                rows(table.tail_names.get(name, name)),
                rows(last.x) if isinstance(last, SelectOutputs) else None,
                # without a tail there is one row of it, which is not used
                *(each[max(0, len(each) - 1 - n_after)] for each in (table.first_row, table.tail_first_row)),
            )
        return self._results[key]

    def run_while(self, batch: Batch, wanted: Callable[[], bool]) -> np.ndarray | None:
        """The same in pieces of about ``PIECE_S``, at least one op; see ``InterruptibleExecutor``."""
        self._still_wanted = wanted
        try:
            return self.run(batch)
        except _NotWantedError:
            return None
        finally:
            self._still_wanted = None

    def decode(self, batch: Batch, n_steps: int, draw: CPUTokenDraw, stop_ids: Collection[int] = ()) -> int:
        """Several decode steps in one call; see ``DecodingExecutor``."""
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        if len(batch) != 1 or not batch.outputs[0] or n_steps < 1:
            raise ParameterError("decode() takes one token that wants logits, and at least one step")
        return self._decode(batch, n_steps, [draw], [stop_ids])[0]

    def decode_together(
        self, batch: Batch, n_steps: int, draws: Sequence[CPUTokenDraw], stop_ids: Sequence[Collection[int]]
    ) -> list[int]:
        """The same for the next tokens of several sequences; see ``TogetherDecodingExecutor``."""
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        n = len(batch)
        is_one_each = n == len(set(draws)) == len(draws) == len(stop_ids) == len(set(batch.sequences.tolist()))
        if not is_one_each or not batch.outputs.all() or n_steps < 1:
            raise ParameterError(
                "decode_together() takes one token of each sequence, which wants logits, a draw and stop ids for each, "
                "and at least one step"
            )
        return self._decode(batch, n_steps, draws, stop_ids)

    def hurry(self, wanted: bool) -> None:
        """See ``TogetherDecodingExecutor``."""
        self._team.hurry(wanted)

    def _decode(
        self, batch: Batch, n_steps: int, draws: Sequence[CPUTokenDraw], stop_ids: Sequence[Collection[int]]
    ) -> list[int]:
        self._use_for(batch)
        n, n_vocab, table = len(batch), self.program.n_vocab, self._table
        turning = batch.positions if batch.rope_positions is None else batch.rope_positions
        if self._has_state or turning.ndim > 1 or batch.embeddings is not None or n > MAX_OUTPUTS:
            return [0] * n  # each step has a slot of its own, or angles that do not follow from its position
        if self._ahead:
            return [0] * n  # each layer's experts are fetched between two rows
        n_steps = min(n_steps, MAX_STEPS, self._step.steps_alike(batch.positions.tolist(), turning.tolist()))
        self._step.begin(batch, check_batch(batch, self.program, self.pool, self.max_tokens, n_steps), n_steps)
        self._step.outputs(range(n))
        stops = [
            np.array([i for i in ids if isinstance(i, int | np.integer) and 0 <= i < n_vocab], np.int64)
            for ids in stop_ids
        ]
        table.rows[:, _COUNTER] = 0
        logits = table.buffers[self.program.output]
        first, nbytes = logits.ctypes.data, logits.strides[0]
        arguments = (
            self._rows_address,
            table.first_row[-1],
            self._step.address,
            n_steps,
            self.draw.address,
            [draw.begin(first + i * nbytes, n_vocab) for i, draw in enumerate(draws)],
            self._step.angle_nbytes,
            stops,
        )
        with self.decode_threads(n) as threads:
            n_made = threads.n_steps = self._team.decode(*arguments)
        return [n_made - (draw.tokens(n_made)[-1] < 0) for draw in draws]

    # ---- as a part of a program that is split ------------------------------------------------------------------------

    def begin(self, batch: Batch, outputs: Sequence[int]) -> None:
        """See ``PartExecutor``, also for the next four."""
        self._use_for(batch)
        self._step.begin(batch, check_batch(batch, self.program, self.pool, self.max_tokens))
        self.outputs(outputs)

    def outputs(self, rows: Sequence[int]) -> None:
        self._step.outputs(rows)

    def run_ops(self, first: int, last: int, *, alone: bool = False) -> None:
        start, stop = self._table.first_row[first], self._table.first_row[last]
        self._table.rows[start:stop, _COUNTER] = 0
        if alone:
            self._requantize(start, stop, self._rows_address, self._step.address)
        self._team.run(self._rows_address, start, stop, self._step.address)

    def read(self, name: str) -> np.ndarray:
        return self._read(name)

    def write(self, name: str, values: np.ndarray) -> None:
        self._read(name)[:] = values

    # ---- the ops of a step -------------------------------------------------------------------------------------------

    def _embed(self, rows: np.ndarray, values: np.ndarray, hook: Hook | None) -> int:
        """Run what stands up to the embedding, with these rows of it, and give the row of the op table behind it."""
        i = embedding_of(self.program)
        assert i is not None, "checked"
        start, stop = self._table.first_row[i : i + 2]
        op = self.program.ops[i]
        self._run_rows(0, start, hook)
        self._run_rows(start, stop, None)
        self._read(op.written_buffers()[0])[rows] = values
        if hook is not None:
            hook(i, op, self._read)
        return stop

    def _drop_rows(self, batch: Batch, kept: list[int], buffers: Sequence[str]) -> tuple[Batch, list[int]]:
        """A batch of these rows alone, moved to the front of the buffers, and the first row of each sequence in it."""
        rows = np.array(kept)
        for name in buffers:
            array = self._table.buffers[name]
            array[: len(rows)] = array[rows]
        left = dataclasses.replace(
            batch,
            **{name: getattr(batch, name)[rows] for name in ("tokens", "positions", "sequences", "outputs")},
            sees=None if batch.sees is None else batch.sees[rows],
            rope_positions=None if batch.rope_positions is None else batch.rope_positions[..., rows],
            embeddings=None,
            adapters=None if batch.adapters is None else batch.adapters[rows],
        )
        return left, [0, *(np.flatnonzero(np.diff(left.sequences)) + 1).tolist(), len(rows)]

    def _run_rows(self, first: int, last: int, hook: Hook | None) -> None:
        rows = self._table.rows
        rows[first:last, _COUNTER] = 0
        address, step = self._rows_address, self._step.address
        if hook is None:
            for routed in self._ahead:
                if first <= routed.row < last:
                    self._walk(first, routed.row + 1)
                    routed.fetch()
                    first = routed.row + 1
            self._walk(first, last)
            return
        for i, op in enumerate(self._table.program.ops):
            start, stop = self._table.first_row[i : i + 2]
            if first <= start and stop <= last:
                rows[start:stop, _COUNTER] = 0
                # a hook may change any buffer, so make the int16 form of this op's input anew
                self._requantize(start, stop, address, step)
                self._team.run(address, start, stop, step)
                hook(i, op, self._read)

    def _walk(self, first: int, last: int) -> None:
        """Rows [first, last), with looks whether they are still wanted where the caller would know."""
        if self._still_wanted is None:
            self._team.run(self._rows_address, first, last, self._step.address)
        else:
            self._run_pieces(first, last, self._still_wanted)

    def _run_pieces(self, first: int, last: int, wanted: Callable[[], bool]) -> None:
        """Rows [first, last) with looks between ops, of which as many are run as will likely take ``PIECE_S``."""
        stops, n = [*sorted({row for row in self._table.first_row if first < row < last}), last], 1
        while first < last:
            if not wanted():
                raise _NotWantedError
            started, stop = perf_counter(), stops[min(n, len(stops)) - 1]
            self._team.run(self._rows_address, first, stop, self._step.address)
            first, stops = stop, stops[n:]
            n = max(1, min(2 * n, int(n * PIECE_S / (perf_counter() - started))))

    def _requantize(self, start: int, stop: int, address: int, step: int) -> None:
        """Run again the rows that made the int16 activations which the rows [start, stop) read."""
        for source in sorted(set(self._table.sources[start:stop])):
            if 0 <= source < start:
                self._team.run(address, source, source + 1, step)

    def _read(self, name: str) -> np.ndarray:
        """A writable view of a buffer's rows in this step."""
        buffer = self._table.program.buffers[name]
        n = self._step.get("N_OUTPUTS" if buffer.rows == "outputs" else "N_TOKENS")
        return self._table.buffers[name][:n, : buffer.width]

    def close(self) -> None:
        """Stop the threads and let go of weights and cache. May be called twice."""
        if not self._closed:
            self._closed = True
            self._end_threads()
            self._results.clear()
            del self._table, self._plain, self.pool
