"""Runs a program on a GPU: sends the batch, dispatches the shaders, reads back what is asked for.

The dispatches of a step depend on how many tokens and outputs it has, and on how far its tokens see, so they are
recorded once for each such shape and played again. Everything that the shaders take on trust is checked before
(``kernels/batch_checks.py``).

A token's numbers do not depend on what else is in its batch: every sum has one order, whatever the number of columns
(``shaders/matmul.wgsl``, ``shaders/attention.wgsl``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from edgellm.formats.errors import ClosedError, ParameterError
from edgellm.kernels.batch_checks import check_batch, check_logits
from edgellm.kernels.gpu import adapters
from edgellm.kernels.gpu.attention import PARTIALS_NBYTES, apart_nbytes
from edgellm.kernels.gpu.device import UPLOAD_NBYTES, Device
from edgellm.kernels.gpu.draw import GPUTokenDraw, open_draw
from edgellm.kernels.gpu.emitter import Counts
from edgellm.kernels.gpu.experts import groups_nbytes
from edgellm.kernels.gpu.layout import MAX_BINDING, MAX_OUTPUTS, buffers_nbytes, row_counts
from edgellm.kernels.gpu.lowering import matrices_of, put_program, record
from edgellm.kernels.gpu.pool import GPUPool
from edgellm.kernels.gpu.step import StepBuffer
from edgellm.kernels.gpu.top_k import AHEAD, CHAIN_WORDS, Found, TopK
from edgellm.kernels.gpu.walk import Recording
from edgellm.kernels.gpu.weights import matrix_nbytes
from edgellm.kernels.kv import CachePool
from edgellm.kernels.narrowing import OutputTail, output_tail, result_of
from edgellm.kernels.ops import SelectOutputs
from edgellm.kernels.ops.embed import embedding_of
from edgellm.kernels.program import Batch, Hook, Op, Program
from edgellm.machine.progress import Progress

MAX_STEPS = 16  # between two looks of the engine
SUBMISSION_FLOPS = 10**11  # systems take a device away that works on one submission for seconds
PART = 256


class GPUExecutor:
    """The ``Executor`` for a GPU.

    index        N of "gpu:N" (adapters.py); None takes the best hardware
    on_compile   called while the kernel that draws tokens is compiled, on the first start: done, total, name
    max_binding  bytes that one binding may have, below what the device allows
    """

    backend: ClassVar[str] = "wgpu"
    kv_dtype: ClassVar[str] = "float16"
    max_shapes: ClassVar[int] = 64  # recordings that are kept
    narrows: ClassVar[bool] = True  # whether a program's last ops are there for few rows, too

    def __init__(
        self,
        program: Program,
        n_blocks: Sequence[int] | int,
        n_threads: int = 1,
        max_tokens: int = 512,
        on_compile: Progress | None = None,
        index: int | None = None,
        max_binding: int | None = None,
    ) -> None:
        self.program, self.max_tokens = program, max_tokens
        self.device = Device(adapters.choose(index), max_binding)
        self._end = weakref.finalize(self, self.device.close)
        self._closed = self._is_waited_for = self.keeps_hidden = False
        self._last, self._kept = _Last("", 0, 0), list[np.ndarray]()
        self._has_state = any(group.kind == "state" for group in program.groups)
        try:
            pool = GPUPool(self.device, program.cache_layers, n_blocks)
            self.pool: CachePool = pool
            self._plain = _form(program, narrows=self.narrows)
            self._adapted = _form(program.adapted, narrows=self.narrows) if program.adapted else self._plain
            self._there = put_program(self.device, _all_of(self._plain, self._adapted), pool, max_tokens)
        except BaseException:
            self.close()
            raise
        self.draw = open_draw(on_compile)
        if _has_logits(program):
            most = self._there.rows["outputs"]
            self._chains = self.device.buffer(4 * MAX_OUTPUTS * CHAIN_WORDS)
            self._top_k = TopK(self.device, self._there.places[program.output], program.n_vocab, most)
        self._shapes: OrderedDict[tuple[Any, ...], list[Recording]] = OrderedDict()

    @staticmethod
    def work_nbytes(program: Program, max_tokens: int, n_threads: int) -> int:
        """Bytes on the device beside the weights and the cache."""
        found = TopK.held_nbytes(program.n_vocab, MAX_OUTPUTS) if _has_logits(program) else 0
        found += 4 * MAX_OUTPUTS * CHAIN_WORDS * bool(found)
        plain = _form(program, narrows=True)
        whole = _all_of(plain, _form(program.adapted, narrows=True) if program.adapted else plain)
        rows = row_counts(whole, max_tokens, MAX_BINDING)
        found += apart_nbytes(whole, rows) + groups_nbytes(whole, rows) + StepBuffer.held_nbytes(whole, max_tokens)
        return buffers_nbytes(whole, rows) + PARTIALS_NBYTES + UPLOAD_NBYTES + found

    @staticmethod
    def weights_nbytes(program: Program) -> int:
        """Bytes of the weights as they are kept on the device."""
        program = program.adapted or program
        names, matrices = {name for op in program.ops for name in op.weight_names()}, matrices_of(program)
        vectors = sum(4 * math.prod(program.tensors[name].shape) for name in names - matrices)
        return vectors + sum(matrix_nbytes(program.tensors[name]) for name in matrices)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32, or hidden states; see ``Executor``."""
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        form, n, self._kept = self._form_of(batch), len(batch), []
        wanted = result_of(form.program, form.tail, hidden=batch.hidden)
        check_batch(batch, self.program, self.pool, self.max_tokens)
        rows = np.flatnonzero(batch.outputs).tolist()
        most = self._there.rows["outputs"]
        if self._there.step.begin(batch, rows[:most]):
            self._shapes.clear()
        self._last = _Last(self.program.hidden, len(rows), n)
        if hook is not None:
            return self._run_hooked(batch, rows, hook, form)
        ops, tail, name, first_output = form.program.ops, form.tail, wanted.name, form.first_output_op
        before: Sequence[Op] = ops[: wanted.end]
        after: Sequence[Op] = ()
        rest: Sequence[Op] = ops[wanted.end :]
        if wanted.selected and len(rows) == n:
            before, rest, name, most = ops[: wanted.end - 1], ops[wanted.end - 1 :], wanted.selected, n
        elif len(rows) > most:
            before, after, rest = ops[:first_output], ops[first_output : wanted.end], ops[first_output:]
        elif len(rows) < n and tail.ops:
            before, after, rest, name = ops[: tail.start], tail.ops[: wanted.tail_end], tail.ops, wanted.tail_name
            self._last = self._last._replace(hidden=tail.names.get(self._last.hidden, self._last.hidden))
        counts = counts_of(batch, min(len(rows), most), self.program)
        if batch.embeddings is not None:
            looked_up, before = before[: form.embedding + 1], before[form.embedding + 1 :]
            self._start(self._recorded(counts, looked_up, [*before, *rest]))
            self._embed(form, *batch.embeddings)
        self._start(self._recorded(counts, before, rest))
        result = np.empty((len(rows), self._there.places[name].width), np.float32)
        for first in range(0, len(rows), most):
            chunk = rows[first : first + most]
            if first:
                self._there.step.outputs(chunk)
            if after:
                self._start(self._recorded(dataclasses.replace(counts, outputs=len(chunk)), after, rest[len(after) :]))
            result[first : first + len(chunk)] = self._rows(name, len(chunk))
            if self.keeps_hidden and len(rows) > most and not batch.hidden:
                self._kept.append(self._rows(self._last.hidden, len(chunk)))
        check_logits(result)
        return result

    def last_hidden(self) -> np.ndarray:
        """See ``HiddenExecutor``."""
        most = self._there.rows["outputs"]
        if self._last.n_outputs > most and not self._kept:
            raise ParameterError(f"last_hidden() is of at most {most} rows; the last step had {self._last.n_outputs}")
        return np.concatenate(self._kept) if self._kept else self._rows(self._last.hidden, self._last.n_outputs)

    def last_tapped(self) -> np.ndarray:
        """See ``HiddenExecutor``."""
        return self._rows(self.program.tapped, self._last.n_tokens)

    def decode(self, batch: Batch, n_steps: int, draw: GPUTokenDraw, stop_ids: Collection[int] = ()) -> int:
        """Several decode steps that read back a few logits each; see ``DecodingExecutor``."""
        if len(batch) != 1:
            raise ParameterError("decode() takes one token; decode_together() takes those of several sequences")
        return self.decode_together(batch, n_steps, [draw], [stop_ids])[0]

    def decode_together(
        self, batch: Batch, n_steps: int, draws: Sequence[GPUTokenDraw], stop_ids: Sequence[Collection[int]]
    ) -> list[int]:
        """The same for the next tokens of several sequences; how many were drawn of each.

        The run ends with the step in which one of them ends. The device draws, too, and goes from step to step by
        itself; what it took is drawn again here, and where it was wrong its later steps do not count:
        keys are written over, and states are made anew.
        """
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        n = len(batch)
        is_one_each = n == len(draws) == len(stop_ids) == len(np.unique(batch.sequences))
        if not is_one_each or not batch.outputs.all() or n_steps < 1:
            raise ParameterError(
                "decode_together() takes one token of each sequence, which wants logits, a draw and stop ids for each, "
                "and at least one step"
            )
        if batch.rope_positions is not None or batch.embeddings is not None or n > self._top_k.rows:
            return [0] * n  # angles do not follow from its position, or there is no room
        n_steps = min(n_steps, MAX_STEPS, self.max_tokens // n if self._has_state else MAX_STEPS)
        check_batch(batch, self.program, self.pool, self.max_tokens, n_steps)
        for draw in draws:
            draw.begin()
        is_kept = self._has_state and not batch.overwrites(self.program.groups)  # the state before all steps
        is_ahead = all(draw.goes_ahead for draw in draws) and is_kept == self._has_state
        first, ahead, counts, made, ended = batch, AHEAD if is_ahead else 1, [0] * n, [batch.tokens.tolist()], False
        while not ended and counts[0] < n_steps and not (counts[0] and self._is_waited_for):
            before = counts[0]
            found = self._steps(batch, min(ahead, n_steps - before), draws)
            for step, rows in enumerate(found):
                if None in rows and step + 1 < len(found):  # all logits are needed, and another step's are there
                    ahead = 1
                    break
                tokens = self._draw_all(draws, rows)
                for row, token in enumerate(tokens):
                    counts[row] += token >= 0
                ended = any(token < 0 or token in stops for token, stops in zip(tokens, stop_ids, strict=True))
                if ended:
                    break
                made.append(tokens)
                batch = batch.onward(tokens, self.program.groups)
                taken = [one.taken for one in rows if isinstance(one, Found)]
                if step + 1 < len(found) and taken != tokens:
                    break
            if is_kept and max(counts) > 0 and min(counts) < before + len(found):
                self.run(first.again(made, counts))  # a state behind the steps that count, and no others
        return counts

    def hurry(self, wanted: bool) -> None:
        """See ``TogetherDecodingExecutor``."""
        self._is_waited_for = wanted

    def _steps(
        self, batch: Batch, n_steps: int, draws: Sequence[GPUTokenDraw]
    ) -> list[list[Found | bool | None]]:  # fmt: skip
        """The largest logits of each step and row; what follows the first step goes on with what the device draws."""
        n, there, k = len(batch), self._there, max(draw.k for draw in draws)
        answer = TopK.nbytes(k) // 4
        if n_steps > 1:
            self.device.write(self._chains, 0, np.concatenate([draw.chain() for draw in draws]))
        if there.step.begin(batch, range(n), n_steps):
            self._shapes.clear()
        last = dataclasses.replace(batch, positions=batch.positions + np.int32(n_steps - 1), sees=None)
        recordings = self._recorded(counts_of(last, n, self.program), self._form_of(batch).program.ops, ())
        for step in range(n_steps - 1):
            ahead = there.step.advance(
                n, self.program.n_vocab, self._top_k.found, step * n * answer, answer, self._chains
            )
            finding = self._top_k.recording(k, n, step)
            self.device.play([*recordings, finding, self.device.recording([ahead])])
        return self._top_k.read(k, n, n_steps, [*recordings, self._top_k.recording(k, n, n_steps - 1)])

    def _draw_all(self, draws: Sequence[GPUTokenDraw], rows: Sequence[Found | bool | None]) -> list[int]:
        """A token for each row of the last step; -1 where a logit was not finite."""
        logits = self._rows(self.program.output, len(rows)) if None in rows else None
        tokens = []
        for row, (draw, found) in enumerate(zip(draws, rows, strict=True)):
            if isinstance(found, Found):
                tokens.append(draw.take(found))
            else:
                tokens.append(-1 if found is False or logits is None else draw.take_all(logits[row]))
        return tokens

    def _form_of(self, batch: Batch) -> _Form:
        """The program that runs for a batch: one without adapters has that without them."""
        return self._plain if batch.adapters is None else self._adapted

    def _embed(self, form: _Form, rows: np.ndarray, values: np.ndarray) -> None:
        """Put these rows in place of what was embedded."""
        place = self._there.places[form.program.ops[form.embedding].written_buffers()[0]]
        for row, value in zip(rows.tolist(), values.astype(np.float32), strict=True):
            self.device.write(place.buffer, 4 * (row * place.row + place.at), value)

    def _recorded(self, counts: Counts, ops: Sequence[Op], following: Sequence[Op]) -> list[Recording]:
        """The dispatches of some ops for a batch of this shape, cut where a submission would be long."""
        key = (len(ops), len(following), *((id(ops[0]), id(ops[-1])) if ops else ()), *dataclasses.astuple(counts))
        if key not in self._shapes:
            recorded = self._record(ops, following, counts, fuse=True)
            self._shapes[key] = recorded
            while len(self._shapes) > self.max_shapes:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        return self._shapes[key]

    def _record(self, ops: Sequence[Op], following: Sequence[Op], counts: Counts, *, fuse: bool) -> list[Recording]:
        n_scratches = self._there.n_scratches
        recorded = record(self._there, ops, following, counts, fuse=fuse)
        if self._there.n_scratches != n_scratches:  # what was recorded before may be over a buffer that is gone
            self._shapes.clear()
        first, flops, pieces = 0, 0, list[Recording]()
        for i, row in enumerate(recorded):
            flops += row.flops
            if flops > SUBMISSION_FLOPS or i + 1 == len(recorded):
                pieces.append(self.device.recording(recorded[first : i + 1]))
                first, flops = i + 1, 0
        return pieces

    def _start(self, recordings: Sequence[Recording]) -> None:
        """Play recordings, each as a submission of its own."""
        for recording in recordings:
            self.device.play([recording])

    def _rows(self, name: str, n: int) -> np.ndarray:
        """The first rows of a buffer."""
        place = self._there.places[name]
        data = self.device.read(place.buffer, 4 * place.row * n).view(np.float32).reshape(n, place.row)
        return data[:, place.at : place.at + place.width]

    def _run_hooked(self, batch: Batch, rows: list[int], hook: Hook, form: _Form) -> np.ndarray:
        """Op by op, and what the hook has looked at goes back to the device."""
        most, result, wanted = self._there.rows["outputs"], [], result_of(form.program, form.tail, hidden=batch.hidden)
        counts = counts_of(batch, min(len(rows), most), self.program)
        for first in range(0, max(1, len(rows)), most):
            chunk = rows[first : first + most]
            counts = dataclasses.replace(counts, outputs=len(chunk))
            if first:
                self._there.step.outputs(chunk)
            for i, op in enumerate(form.program.ops[: wanted.end]):
                if first and i < form.first_output_op:
                    continue
                self._start(self._record([op], (), counts, fuse=False))
                if i == form.embedding and batch.embeddings is not None:
                    self._embed(form, *batch.embeddings)
                taken: dict[int, tuple[Any, np.ndarray]] = {}
                hook(i, op, functools.partial(self._read, counts, taken))
                for buffer, data in taken.values():
                    self.device.write(buffer, 0, data)
            result.append(self._rows(wanted.name, max(1, len(chunk)))[: len(chunk)])
        logits = np.concatenate(result)
        check_logits(logits)
        return logits

    def _read(self, counts: Counts, taken: dict[int, tuple[Any, np.ndarray]], name: str) -> np.ndarray:
        """A writable view of a buffer's rows in this step."""
        place = self._there.places[name]
        n = counts.rows(place.rows)
        if id(place.buffer) not in taken:
            data = self.device.read(place.buffer, 4 * place.row * n).view(np.float32).reshape(n, place.row)
            taken[id(place.buffer)] = place.buffer, data
        rows = taken[id(place.buffer)][1]
        return rows[:, place.at : place.at + place.width].view(self._there.program.buffers[name].dtype)

    def close(self) -> None:
        """Let go of the device. May be called twice."""
        self._closed = True
        self._end()


class _Last(NamedTuple):
    """Of the last step: the buffer of its hidden states, its rows of logits, and its tokens."""

    hidden: str
    n_outputs: int
    n_tokens: int


class _Form(NamedTuple):
    """A program as it runs.

    tail     what is run for the rows that want logits alone
    whole    the program, and behind its ops those of the tail
    first_output_op, embedding   indices of ops; the second is -1 where none looks tokens up
    """

    program: Program
    tail: OutputTail
    whole: Program
    first_output_op: int
    embedding: int


def _form(program: Program, *, narrows: bool) -> _Form:
    tail = (output_tail(program) if narrows else None) or OutputTail(len(program.ops), (), {})
    whole = dataclasses.replace(program, ops=(*program.ops, *tail.ops), buffers={**program.buffers, **tail.buffers})
    selects = [i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs)]
    embedding = embedding_of(program)
    first = selects[0] if selects else len(program.ops)
    return _Form(program, tail, whole, first, -1 if embedding is None else embedding)


def _has_logits(program: Program) -> bool:
    """Whether there is something to draw tokens from: encoders have vectors, and a part may end before them."""
    return program.output in program.buffers and not program.is_encoder


def _all_of(plain: _Form, adapted: _Form) -> Program:
    """A program with the ops, buffers and weights of both, the plain ones first: what is to be on the device."""
    if adapted is plain:
        return plain.whole
    buffers = {**plain.whole.buffers, **adapted.whole.buffers}
    return dataclasses.replace(adapted.whole, ops=(*plain.whole.ops, *adapted.whole.ops), buffers=buffers)


def counts_of(batch: Batch, n_outputs: int, program: Program) -> Counts:
    """How large a step is. Parts are rounded up to a power of two: few shapes for a long text."""
    sees, n = batch.positions if batch.sees is None else batch.sees, len(batch)
    parts = 1 << (int(sees.max()) // PART).bit_length()
    n_sequences = 1 + int(np.count_nonzero(np.diff(batch.sequences)))
    # tokens of a prompt can share what they read of the cache
    return Counts(
        n,
        n_outputs,
        parts,
        n >= 2 * n_sequences,
        n == n_sequences,
        n > n_sequences and batch.overwrites(program.groups),
    )
