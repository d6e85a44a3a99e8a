"""Small programs for the tests of the CPU executor: weights of every type, executors that share compiled kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.formats.gguf import QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.cpu.compile import isa, jit
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache, default_folder
from edgellm.kernels.cpu.compile.kernel_table import TOP_K
from edgellm.kernels.cpu.run.draw import CPUDraw
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.ops.sketch import random_tensor
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor

FORMS = isa.available_forms()
READABLE_TYPES = [name for name, kind in QUANT_TYPES.items() if kind.unpack is not None]


@functools.cache
def kernel_cache(form: str) -> KernelCache:
    """The kernels of a form, read or compiled once for the whole test run."""
    return KernelCache(isa.detect(form), default_folder())


@functools.cache
def cpu_draw() -> CPUDraw:
    """What samplers are given behind a loaded model."""
    memory = jit.CodeMemory()
    return CPUDraw(memory.load(TOP_K, kernel_cache(FORMS[0]).objects([TOP_K])[TOP_K]), memory)


def cpu_executor(
    program: Program, n_blocks: Sequence[int] | int, n_threads: int = 2, max_tokens: int = 64, form: str = FORMS[0]
) -> CPUExecutor:
    """An executor of the form, its kernels taken as they are."""
    return CPUExecutor(program, n_blocks, n_threads, max_tokens, untested=kernel_cache(form))


def float_tensor(name: str, values: np.ndarray) -> QuantizedTensor:
    """These numbers as F32."""
    values = np.ascontiguousarray(values, np.float32)
    return QuantizedTensor(name, values.shape, QUANT_TYPES["F32"], values.view(np.uint8).reshape(len(values), -1))


def any_tensor(rng: np.random.Generator, name: str, quant: str, shape: tuple[int, ...]) -> QuantizedTensor:
    """Random weights of any readable type."""
    kind = QUANT_TYPES[quant]
    tensor = random_tensor(rng, name, quant, shape)
    if kind.block_size == 1:
        if kind.layout.kind == "i":  # whole numbers from -9 to 9
            values = rng.integers(-9, 10, shape).astype(kind.layout)
        elif quant == "F64":
            values = rng.standard_normal(shape)
        else:
            return tensor
        return QuantizedTensor(name, shape, kind, values.reshape(-1, shape[-1]).view(np.uint8))
    blocks = tensor.data.reshape(-1).view(kind.layout)
    if quant == "NVFP4":
        blocks["d"] = rng.integers(0x20, 0x40, blocks["d"].shape)  # positive, no NaN
    elif quant == "IQ1_M":  # the top nibbles of four words are one float16
        half = int(np.float16(0.01).view(np.uint16))
        nibbles = np.array([half >> 4 * i & 15 for i in range(4)], np.uint16)
        blocks["scales"] = blocks["scales"] & 0x0FFF | nibbles << 12
    return tensor


def single_sequence(
    program: Program,
    n: int,
    start: int = 0,
    n_blocks: int = 0,
    seed: int | None = None,
    max_id: int | None = None,
    outputs: bool = True,
) -> Batch:
    """n random tokens of one sequence; physical blocks in random order when ``seed`` is given."""
    rng = np.random.default_rng(seed)
    total = max(n_blocks, -(-(start + n) // 32))
    blocks = np.arange(total) if seed is None else rng.permutation(total)
    state = np.array([[0 if start else -1, 0]], np.int32)  # goes on in its place
    return Batch(
        rng.integers(0, max_id or program.n_vocab, n).astype(np.int32),
        np.arange(start, start + n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.full(n, outputs),
        tuple(blocks.astype(np.int32)[None] if g.kind != "state" else state for g in program.groups),
    )


def part(batch: Batch, start: int, stop: int) -> Batch:
    """The tokens [start, stop) of a batch; a state that was fresh is that of its slot by then."""
    rows = slice(start, stop)
    tables = tuple(np.where(t < 0, t[:, 1:], t) if start and t.shape == (1, 2) else t for t in batch.tables)
    return Batch(batch.tokens[rows], batch.positions[rows], batch.sequences[rows], batch.outputs[rows], tables)


def sequences(program: Program, lengths: list[int], starts: list[int], n_blocks: int, seed: int = 1) -> Batch:
    """Some tokens of several sequences, each in blocks of its own, the state of each in a slot of its own."""
    rng, n = np.random.default_rng(seed), len(lengths)
    per = n_blocks // n
    blocks = np.arange(n * per, dtype=np.int32).reshape(n, per)
    states = np.array([[i if start else -1, i] for i, start in enumerate(starts)], np.int32)
    outputs = np.zeros(sum(lengths), bool)
    outputs[np.cumsum(lengths) - 1] = True
    return Batch(
        rng.integers(3, program.n_vocab, sum(lengths)).astype(np.int32),
        np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, lengths, strict=True)]),
        np.repeat(np.arange(n, dtype=np.int32), lengths),
        outputs,
        tuple(states if group.kind == "state" else blocks for group in program.groups),
    )


def alone(batch: Batch, which: int) -> Batch:
    """One sequence of a batch, with the row of the tables that it had."""
    mine = batch.sequences == which
    tables = tuple(table[which : which + 1] for table in batch.tables)
    zeros = np.zeros(int(mine.sum()), np.int32)
    return Batch(batch.tokens[mine], batch.positions[mine], zeros, batch.outputs[mine], tables)


def assert_chunks_change_no_bit(program: Program, tokens: np.ndarray, form: str, rtol: float) -> None:
    """The reference agrees with the CPU, and a sequence in pieces has the bits of the whole."""
    fast = cpu_executor(program, 4, form=form)
    whole = fast.run(Batch.single(program, tokens)).copy()
    judge = ReferenceExecutor(program, 4)
    expected = judge.run(Batch.single(program, tokens))[:, : program.n_vocab]
    np.testing.assert_allclose(whole, expected, rtol=rtol, atol=1e-5)
    for sizes in ([1] * 40, [1, 2, 3, 34], [39, 1]):
        at, found = 0, []
        for n in sizes:
            found.append(fast.run(Batch.single(program, tokens[at : at + n], at)).copy())
            at += n
        np.testing.assert_array_equal(np.concatenate(found), whole)
    fast.close()


def assert_sequences_keep_to_their_slots(program: Program, n_ids: int) -> None:
    """Sequences that share steps have the bits that they have alone, in slots of their own; steps can be run again."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, n_ids, n) for n in (20, 9, 14)]
    fast = cpu_executor(program, 8)
    alone = [fast.run(Batch.single(program, text)).copy() for text in texts]

    def step(table: list[list[int]], parts: dict[int, tuple[int, int]]) -> None:
        """Of each sequence the tokens from one position to another."""
        spans = [np.arange(*span) for span in parts.values()]
        batch = Batch(
            tokens=np.concatenate([texts[i][span] for i, span in zip(parts, spans, strict=True)]).astype(np.int32),
            positions=np.concatenate(spans).astype(np.int32),
            sequences=np.repeat([*parts], [len(span) for span in spans]).astype(np.int32),
            outputs=np.ones(sum(map(len, spans)), bool),
            tables=(np.array(table, np.int32),),
        )
        expected = np.concatenate([alone[i][span] for i, span in zip(parts, spans, strict=True)])
        np.testing.assert_array_equal(fast.run(batch), expected)

    step([[-1, 1], [-1, 4], [-1, 6]], {0: (0, 12), 1: (0, 5), 2: (0, 1)})
    for _ in range(3):
        step([[1, 2], [4, 5], [6, 7]], {0: (12, 20), 2: (1, 14)})
    step([[2, 0], [4, 4], [7, 7]], {1: (5, 9)})  # into the slot that it is read from
    fast.close()


def load_kernel(name: str, function: Any, target: isa.Isa) -> tuple[jit.CodeMemory, Any]:
    """Compile a function of four int64 as a kernel; the memory that holds it, and it as a callable."""
    memory = jit.CodeMemory()
    address = memory.load(name, jit.compile_object(name, function, target))
    return memory, ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
