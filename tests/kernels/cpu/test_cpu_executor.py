"""The CPU executor on whole models: right, the same bits in any company, deaf to bad batches, loud about NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cpu_programs import FORMS, cpu_executor, part, single_sequence

from edgellm.formats.errors import ClosedError, NumericError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.compile import isa
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run import executor as executor_module
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.cpu.run.lowering import lower, work_nbytes
from edgellm.kernels.kv import CachePool
from edgellm.kernels.ops import Embed, Op
from edgellm.kernels.program import Batch, Buffer, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")
decoder_models = pytest.importorskip("decoder_models", reason="the gguf package writes the test models")

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "lfm2"),
    *("qwen2moe", "olmoe", "granite", "granitemoe", "gemma", "gemma2", "gpt-oss", "qwen35", "qwen35moe"),
    *("qwen3next", "gemma4"),
    *("mamba2", "granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe"),
)
LONG_TAIL = tuple(decoder_models.TINY)
OF_ALL_KINDS = (*ARCHITECTURES, "deepseek2")
OTHER_QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q6_K", "IQ4_XS")
ALL_QUANTS_OF = ("llama", "qwen3moe")  # products, and products with experts
N_TOKENS = 150
N_BLOCKS = 12
SEEDS = {
    "qwen2moe": 1,
    "olmoe": 4,
    "granitemoe": 1,
    "gpt-oss": 4,
    "minimax-m2": 1,
}  # of models whose routers are nowhere near a tie
LIMIT = 1e-6  # of the logits: 15-bit activations through every layer


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Program]]:
    """open_model(architecture, quant): the program of a tiny random model; the files stay open for the module."""
    folder = tmp_path_factory.mktemp("models")
    files: dict[Path, GGUFFile] = {}

    def make(architecture: str, quant: str = "Q4_K") -> Program:
        path = folder / f"{architecture}-{quant}.gguf"
        if path not in files:
            # types of different layers of one buffer: q, k and v share their input's int16 form
            mixed = {"attn_v.weight": "Q6_K", "ffn_down.weight": "Q5_0"} if quant == "Q4_K" else None
            tied, seed = architecture != "llama", SEEDS.get(architecture, 0)
            tiny_models.write_tiny_model(path, architecture, quant, quants=mixed, tied=tied, seed=seed)
            files[path] = GGUFFile.open(path)
        return build_program(files[path])

    yield make
    for file in files.values():
        file.close()


def logits_in_chunks(executor: CPUExecutor | ReferenceExecutor, batch: Batch, chunk: int) -> np.ndarray:
    starts = range(0, len(batch), chunk)
    return np.concatenate([executor.run(part(batch, i, i + chunk)).copy() for i in starts])


def cpu_logits(program: Program, batch: Batch, chunk: int, n_threads: int = 2, form: str = FORMS[0]) -> np.ndarray:
    executor = cpu_executor(program, N_BLOCKS, n_threads, 256, form)
    logits = logits_in_chunks(executor, batch, chunk)
    executor.close()
    return logits


# ---- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "quant"),
    [*((name, "Q4_K") for name in (*ARCHITECTURES, *LONG_TAIL)), *itertools.product(ALL_QUANTS_OF, OTHER_QUANTS)],
)
def test_logits_are_those_of_the_reference(architecture: str, quant: str, open_model: Callable[..., Program]) -> None:
    program = open_model(architecture, quant)
    batch = single_sequence(program, N_TOKENS, n_blocks=12, seed=1)
    expected = logits_in_chunks(ReferenceExecutor(program, N_BLOCKS, kv_dtype="float16"), batch, 70)
    for form in FORMS:
        assert nmse(cpu_logits(program, batch, 70, form=form), expected) <= LIMIT


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        *((name, FORMS[0]) for name in (*ARCHITECTURES, *LONG_TAIL)),
        *itertools.product(("llama", "qwen3moe", "gemma3", "qwen35", "mamba2"), FORMS[1:]),
    ],
)
def test_chunks_and_threads_do_not_change_a_bit(
    architecture: str, form: str, open_model: Callable[..., Program]
) -> None:
    program = open_model(architecture)
    batch = single_sequence(program, N_TOKENS, seed=2)
    expected = cpu_logits(program, batch, N_TOKENS, 1, form)
    for chunk, n_threads in ((1, 2), (7, 1), (7, 3), (64, 2), (N_TOKENS, 2)):
        assert np.array_equal(cpu_logits(program, batch, chunk, n_threads, form), expected), (chunk, n_threads)


@pytest.mark.parametrize("of_parts", (False, True))
@pytest.mark.parametrize("architecture", OF_ALL_KINDS)
def test_a_row_has_the_same_logits_when_others_want_none(
    architecture: str, of_parts: bool, open_model: Callable[..., Program]
) -> None:
    """Also where buffers are columns of others, so that no ops stand behind the program for few rows."""
    program = open_model(architecture)
    if of_parts:
        part_of_one = Buffer("part", 16, "tokens", of=next(iter(program.buffers)))
        program = dataclasses.replace(program, buffers={**program.buffers, "part": part_of_one})
    batch = single_sequence(program, 40, seed=1)
    with contextlib.closing(cpu_executor(program, N_BLOCKS, 2, 64)) as executor:
        expected = executor.run(batch).copy()
        for rows in ([39], [0], [3, 17, 38], []):
            outputs = np.zeros(40, bool)
            outputs[rows] = True
            assert np.array_equal(executor.run(dataclasses.replace(batch, outputs=outputs)), expected[rows]), rows


@pytest.mark.parametrize("architecture", OF_ALL_KINDS)
def test_a_sequence_in_a_mixed_batch_computes_what_it_computes_alone(
    architecture: str, open_model: Callable[..., Program]
) -> None:
    """Three sequences in blocks of their own, prefilled and decoded in one batch each."""
    program = open_model(architecture)
    lengths, rng = (40, 1, 77), np.random.default_rng(3)
    ids = [rng.integers(0, program.n_vocab, n + 1).astype(np.int32) for n in lengths]
    alone = []
    for tokens in ids:
        single = Batch.single(program, tokens)
        alone.append(cpu_logits(program, single, len(tokens)))

    blocks = rng.permutation(12)
    table = np.full((3, 4), -1, np.int32)
    table[0, :2], table[1, :1], table[2, :3] = blocks[:2], blocks[2:3], blocks[3:6]
    executor = cpu_executor(program, N_BLOCKS, 2, 256)

    def step(first: list[int], stop: list[int]) -> np.ndarray:
        n = [b - a for a, b in zip(first, stop, strict=True)]
        slots = np.array([[i if a else -1, i] for i, a in enumerate(first)])
        tables = tuple(slots if group.kind == "state" else table for group in program.groups)
        return executor.run(
            Batch(
                np.concatenate([t[a:b] for t, a, b in zip(ids, first, stop, strict=True)]),
                np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)]).astype(np.int32),
                np.repeat(np.arange(3), n).astype(np.int32),
                np.ones(sum(n), bool),
                tables,
            )
        ).copy()

    prefill = step([0, 0, 0], list(lengths))
    decode = step(list(lengths), [n + 1 for n in lengths])
    executor.close()
    for i, (start, n) in enumerate(zip(np.cumsum([0, *lengths]), lengths, strict=False)):
        assert np.array_equal(prefill[start : start + n], alone[i][:n])
        assert np.array_equal(decode[i], alone[i][n])


# ---- hooks and outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", OF_ALL_KINDS)
def test_a_hook_that_looks_changes_nothing_and_sees_every_op(
    architecture: str, open_model: Callable[..., Program]
) -> None:
    program = open_model(architecture)
    batch = single_sequence(program, 40, seed=4)
    seen: list[int] = []

    def look(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        seen.append(index)
        for name in program.buffers:
            assert read(name).shape[1] == program.buffers[name].width

    executor = cpu_executor(program, N_BLOCKS, 2, 256)
    some = dataclasses.replace(batch, outputs=np.arange(40) % 5 == 0)
    assert np.array_equal(executor.run(some, look).copy(), executor.run(some))
    assert seen == list(range(len(program.ops)))
    executor.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen35"])
@pytest.mark.parametrize("last_only", [False, True])
def test_a_step_in_pieces_has_the_same_bits_and_one_that_is_broken_off_leaves_nothing(
    architecture: str, last_only: bool, open_model: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "PIECE_S", 0)  # an op at a time
    program, looks = open_model(architecture), 0
    batch = single_sequence(program, 40, seed=4)
    batch = dataclasses.replace(batch, outputs=np.arange(40) == 39 if last_only else np.arange(40) % 5 == 0)
    executor = cpu_executor(program, N_BLOCKS, 2, 256)

    def wanted() -> bool:
        nonlocal looks
        looks += 1
        return looks != stop

    expected, stop = executor.run(batch).copy(), -1
    logits = executor.run_while(batch, wanted)
    assert logits is not None and np.array_equal(logits, expected)
    n_looks = looks
    assert n_looks > len(program.ops) / 2
    for stop in (1, n_looks // 2, n_looks):
        looks = 0
        assert executor.run_while(batch, wanted) is None and looks == stop
        assert np.array_equal(executor.run(batch), expected)
    executor.close()


@pytest.mark.parametrize("architecture", OF_ALL_KINDS)
def test_a_hook_that_changes_a_buffer_changes_the_logits_as_in_the_reference(
    architecture: str, open_model: Callable[..., Program]
) -> None:
    """After every kind of op once: what the next op reads is the changed buffer, in its quantized form too."""
    program = open_model(architecture)
    batch = single_sequence(program, 20, seed=5)
    firsts = {type(op): i for i, op in reversed(list(enumerate(program.ops))) if hasattr(op, "out")}
    executor = cpu_executor(program, N_BLOCKS, 2, 256)
    reference = ReferenceExecutor(program, N_BLOCKS, kv_dtype="float16")
    plain = executor.run(batch).copy()
    for target in firsts.values():

        def change(index: int, op: Op, read: Callable[[str], np.ndarray], target: int = target) -> None:
            if index == target:
                values = read(op.out)  # type: ignore[union-attr]
                values[:, ::3] *= -1.5

        changed = executor.run(batch, change).copy()
        assert nmse(changed, reference.run(batch, change)) <= LIMIT, program.ops[target]
        assert nmse(changed, plain) > 100 * LIMIT, program.ops[target]
    executor.close()


def test_more_outputs_than_are_computed_at_once(open_model: Callable[..., Program]) -> None:
    """Up to 32 a view of the buffer, above that an array of its own; the same bits."""
    program = open_model("llama")
    batch = single_sequence(program, 100, seed=6)
    executor = cpu_executor(program, N_BLOCKS, 2, 256)
    every = executor.run(batch)
    assert every.shape == (100, program.n_vocab)
    kept = every.copy()
    for wanted in ([99], [0, 31, 32, 99], list(range(33)), list(range(20, 96))):
        outputs = np.zeros(100, bool)
        outputs[wanted] = True
        assert np.array_equal(executor.run(dataclasses.replace(batch, outputs=outputs)), kept[wanted])
    assert np.array_equal(every, kept)
    assert executor.run(dataclasses.replace(batch, outputs=np.zeros(100, bool))).shape == (0, program.n_vocab)
    executor.close()


# ---- bad batches -----------------------------------------------------------------------------------------------------


def changed(batch: Batch, name: str, index: int, value: int) -> Batch:
    array = getattr(batch, name).copy()
    array[index] = value
    return dataclasses.replace(batch, **{name: array})


def with_tables(batch: Batch, change: Callable[[np.ndarray], np.ndarray]) -> Batch:
    return dataclasses.replace(batch, tables=tuple(change(t.copy()) for t in batch.tables))


def block_set_to(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(table: np.ndarray) -> np.ndarray:
        table[0, 1] = value
        return table

    return change


BAD_BATCHES: dict[str, Callable[[Batch], Batch]] = {
    "token -1": lambda b: changed(b, "tokens", 3, -1),
    "token beyond the vocabulary": lambda b: changed(b, "tokens", 39, 100_000),
    "negative position": lambda b: dataclasses.replace(b, positions=b.positions - 1),
    "position given twice": lambda b: changed(b, "positions", 7, 6),
    "position skipped": lambda b: changed(b, "positions", 39, 40),
    "positions falling": lambda b: dataclasses.replace(b, positions=b.positions[::-1].copy()),
    "position without a column of the table": lambda b: dataclasses.replace(b, positions=b.positions + 300),
    "position near 2^31": lambda b: dataclasses.replace(b, positions=b.positions + (2**31 - 60)),
    "sequence without a row of the table": lambda b: dataclasses.replace(b, sequences=b.sequences + 1),
    "negative sequence": lambda b: dataclasses.replace(b, sequences=b.sequences - 1),
    "missing block": lambda b: with_tables(b, block_set_to(-1)),
    "block beyond the pool": lambda b: with_tables(b, block_set_to(12)),
    "block far below": lambda b: with_tables(b, block_set_to(-(2**31))),
    "no tables": lambda b: dataclasses.replace(b, tables=()),
    "too many tables": lambda b: dataclasses.replace(b, tables=(*b.tables, *b.tables)),
    "table of one dimension": lambda b: with_tables(b, lambda t: t[0]),
    "table of three dimensions": lambda b: with_tables(b, lambda t: t[None]),
    "table too short": lambda b: with_tables(b, lambda t: t[:, :1]),
    "table without rows": lambda b: with_tables(b, lambda t: t[:0]),
    "no tokens": lambda b: part(b, 0, 0),
    "positions missing": lambda b: dataclasses.replace(b, positions=b.positions[:-1]),
    "sequences missing": lambda b: dataclasses.replace(b, sequences=b.sequences[:-1]),
    "outputs missing": lambda b: dataclasses.replace(b, outputs=b.outputs[:-1]),
}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_bad_batches_are_refused_and_do_no_harm(architecture: str, open_model: Callable[..., Program]) -> None:
    program = open_model(architecture)
    batch = single_sequence(program, 40, seed=7)
    executor = cpu_executor(program, N_BLOCKS, 2, 40)
    expected = executor.run(batch).copy()
    for name, spoil in BAD_BATCHES.items():
        with pytest.raises(ParameterError):
            executor.run(spoil(batch))
            pytest.fail(f"{name}: accepted")
    with pytest.raises(ParameterError):
        executor.run(single_sequence(program, 41))
    assert np.array_equal(executor.run(batch), expected)
    executor.close()


def test_tables_and_ids_may_be_any_integers_in_any_order(open_model: Callable[..., Program]) -> None:
    """int64, Fortran order, read-only and strided arrays are taken as what they say."""
    program = open_model("gemma3")
    batch = single_sequence(program, 40, seed=8)
    executor = cpu_executor(program, N_BLOCKS, 2, 256)
    expected = executor.run(batch).copy()
    wide = Batch(
        np.repeat(batch.tokens.astype(np.int64), 2)[::2],
        batch.positions.astype(np.int64),
        batch.sequences.astype(np.int8),
        batch.outputs.astype(np.int64),
        tuple(np.asfortranarray(np.tile(t.astype(np.int64), (2, 2))) for t in batch.tables),
    )
    assert np.array_equal(executor.run(wide), expected)
    executor.close()


# ---- NaN is never a silent number ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_nan_or_infinity_in_any_tensor_is_an_error(
    architecture: str, quant: str, value: float, open_model: Callable[..., Program]
) -> None:
    program = open_model(architecture, quant)
    batch = single_sequence(program, 6, seed=9)
    for name, tensor in program.tensors.items():
        data = tensor.data.copy()
        if tensor.quant.name == "Q8_0":
            data.reshape(-1).view(tensor.quant.layout)["d"][:: data.shape[1] // 34] = value
        else:
            data.view(np.float32)[:, 0] = value
        spoilt = program.tensors | {name: dataclasses.replace(tensor, data=data)}
        wrong = dataclasses.replace(program, tensors=spoilt)
        executor = cpu_executor(wrong, N_BLOCKS, 2, 64)
        with pytest.raises(NumericError):
            executor.run(batch)
            pytest.fail(f"{value} in {name} gave finite logits")
        executor.close()


def test_a_logit_of_minus_infinity_is_an_error(open_model: Callable[..., Program]) -> None:
    program = open_model("llama", "F32")
    executor = cpu_executor(program, N_BLOCKS, 2, 64)

    def spoil(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        if index == len(program.ops) - 1:
            read("logits")[0, 5] = -np.inf

    with pytest.raises(NumericError):
        executor.run(single_sequence(program, 1), spoil)
    executor.close()


# ---- the end ---------------------------------------------------------------------------------------------------------


def threads_of_executors() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("edgellm-cpu-")}


def test_close_ends_the_threads_and_may_be_called_twice(open_model: Callable[..., Program]) -> None:
    program = open_model("llama")
    before = threads_of_executors()  # of other tests, which may end meanwhile
    executor = cpu_executor(program, N_BLOCKS, 3, 64)
    executor.run(single_sequence(program, 3))
    started = threads_of_executors() - before
    assert len(started) == 2
    executor.close()
    executor.close()
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(ClosedError):
        executor.run(single_sequence(program, 3))


def test_an_executor_that_nobody_closed_ends_its_threads(open_model: Callable[..., Program]) -> None:
    program = open_model("llama")
    known = threads_of_executors()  # of other tests, which may end meanwhile
    for _ in range(20):
        executor = cpu_executor(program, N_BLOCKS, 3, 64)
        executor.run(single_sequence(program, 3))
        started = threads_of_executors() - known
        assert len(started) == 2
        known |= started
        del executor
        gc.collect()
        for thread in started:
            thread.join(60)  # a thread that the collector took for this ends a little later
            assert not thread.is_alive()


def test_the_embedding_is_the_first_op_a_hook_sees(open_model: Callable[..., Program]) -> None:
    program = open_model("gemma3", "F32")
    batch = single_sequence(program, 5, seed=10)
    rows: list[np.ndarray] = []

    def look(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        if index == 0:
            assert isinstance(op, Embed)
            rows.append(read(op.out).copy())

    executor = cpu_executor(program, N_BLOCKS, 1, 64)
    executor.run(batch, look)
    executor.close()
    op = program.ops[0]
    assert isinstance(op, Embed)
    expected = program.tensors[op.weight].dequantize()[batch.tokens] * np.float32(op.scale)
    assert np.array_equal(rows[0], expected)


def test_every_product_knows_the_weights_that_the_next_one_reads(open_model: Callable[..., Program]) -> None:
    program = open_model("llama", "Q8_0")
    table = lower(program, CachePool(program.cache_layers, N_BLOCKS), 4)
    n_rows = table.first_row[-1]  # of the program; those of the output tail stand behind them
    products = [i for i, kernel in enumerate(table.kernels) if kernel == "matmul_q8_0"]
    own, tail = [i for i in products if i < n_rows], [i for i in products if i >= n_rows]
    assert len(own) > 7 and tail
    field = layout.ARGUMENTS // 8 + layout.MATMUL._fields.index("following")
    for products in (own, tail):
        for i, following in zip(products, [*products[1:], own[0]], strict=True):
            assert table.rows[i, field] == table.rows[following].ctypes.data


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quant", ["Q4_K", "F32", "TQ2_0"])
def test_what_an_executor_takes_is_known_before_it_is_made(
    quant: str, form: str, open_model: Callable[..., Program]
) -> None:
    """TQ2_0 has no kernels and becomes float32. Weights that stay in their file are not counted."""
    program = open_model("qwen2", quant)
    for max_tokens, n_threads in ((1, 1), (70, 3)):
        executor = cpu_executor(program, N_BLOCKS, n_threads, max_tokens, form)
        mapped = [tensor.data for tensor in program.tensors.values()]
        taken = {id(array): array.nbytes for array in (executor._table.rows, executor._scratch, *executor._table.keep)}
        assert executor.nbytes == sum(taken.values()) - sum(taken.pop(id(data), 0) for data in mapped)
        assert executor.nbytes == CPUExecutor.work_nbytes(program, max_tokens, n_threads, form)
        executor.close()


def test_only_the_form_with_tiles_has_scratch_for_them(open_model: Callable[..., Program]) -> None:
    program = open_model("qwen2", "Q4_K")
    plans = {form: [work_nbytes(program, 70, n, form) for n in (1, 3)] for form in isa.FORMS}
    assert plans.pop("amx") == [plans["avx2"][i] + n * layout.TILES_NBYTES for i, n in enumerate((1, 3))]
    assert all(plan == plans["avx2"] for plan in plans.values())
    assert CPUExecutor.work_nbytes(program, 70, 3) == work_nbytes(program, 70, 3, FORMS[0])
