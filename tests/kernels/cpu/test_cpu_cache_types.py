"""The CPU executor with keys and values in fewer bits: right, and the same bits in any company and any block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cpu_programs import FORMS, cpu_executor, part, single_sequence
from test_cpu_executor import cpu_logits, logits_in_chunks

from edgellm.arguments import CACHE_TYPES
from edgellm.formats.errors import ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import chosen_blocks
from edgellm.kernels.cache_types import QUANTIZED
from edgellm.kernels.cpu.compile import trials
from edgellm.kernels.cpu.compile.trials import fill_randomly, nmse, outputs_of_ops
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import Attention
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

PAIRS = [("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q5_1", "q4_1"), ("iq4_nl", "q5_0"), ("f16", "q8_0"), ("bf16", "f32")]
PAIRS.append(("kivi2", "kivi2"))
N_TOKENS, N_BLOCKS = 150, 12


def test_no_type_is_left_out() -> None:
    assert {name for pair in PAIRS for name in pair} == set(CACHE_TYPES)


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Program]]:
    """The program of a tiny model; gemma3 has windows, gemma4 heads of two sizes and layers that share keys."""
    folder: Path = tmp_path_factory.mktemp("models")
    files: dict[str, GGUFFile] = {}

    def make(name: str) -> Program:
        if name not in files:
            files[name] = GGUFFile.open(tiny_models.write_tiny_model(folder / f"{name}.gguf", name, head_dim=32))
        return build_program(files[name])

    yield make
    for file in files.values():
        file.close()


@pytest.mark.parametrize(("pair", "form"), [(p, FORMS[0]) for p in PAIRS] + [(PAIRS[0], f) for f in FORMS[1:]])
def test_logits_are_those_of_the_reference(
    pair: tuple[str, str], form: str, open_model: Callable[[str], Program]
) -> None:
    """As far as rounding lets them: a code may fall on the other side of a half."""
    program = with_cache_types(open_model("llama"), *pair)
    batch = single_sequence(program, N_TOKENS, n_blocks=N_BLOCKS, seed=1)
    expected = logits_in_chunks(ReferenceExecutor(program, N_BLOCKS, kv_dtype="float16"), batch, 70)
    assert nmse(cpu_logits(program, batch, 70, form=form), expected) <= (1e-3 if pair[0] in ("q4_0", "kivi2") else 2e-4)


CASES = [
    *(("llama", pair, FORMS[0]) for pair in PAIRS),
    *(("gemma3", PAIRS[0], form) for form in FORMS),
    ("gemma4", PAIRS[2], FORMS[0]),
    *(("gemma3", PAIRS[-1], form) for form in FORMS),
    ("gemma4", PAIRS[-1], FORMS[0]),
]


@pytest.mark.parametrize(("name", "pair", "form"), CASES)
def test_chunks_threads_and_what_lay_in_the_blocks_do_not_change_a_bit(
    name: str, pair: tuple[str, str], form: str, open_model: Callable[[str], Program]
) -> None:
    program = with_cache_types(open_model(name), *pair)
    batch = single_sequence(program, N_TOKENS, seed=2)
    expected = cpu_logits(program, batch, N_TOKENS, 1, form)
    for chunk, n_threads in ((1, 2), (7, 3), (64, 2)):
        executor = cpu_executor(program, N_BLOCKS, n_threads, 256, form)
        fill_randomly(executor.pool)
        assert np.array_equal(logits_in_chunks(executor, batch, chunk), expected), (chunk, n_threads)
        executor.close()


N_LONG = 330


@pytest.mark.parametrize(
    ("kept", "form"), [("f16", form) for form in FORMS] + [(name, FORMS[0]) for name in ("q8_0", "bf16", "kivi2")]
)
def test_blocks_are_chosen_alike_in_any_chunks_and_as_the_reference_does(
    kept: str, form: str, open_model: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first 256 positions are read whole, and have the bits that they have where nothing is chosen."""
    monkeypatch.setattr(chosen_blocks, "WHOLE_LAYERS", 0)
    whole = with_cache_types(open_model("llama"), kept, kept)
    program = chosen_blocks.with_chosen_blocks(whole, 256)
    batch = single_sequence(program, N_LONG, n_blocks=N_BLOCKS, seed=1)
    judged = logits_in_chunks(ReferenceExecutor(program, N_BLOCKS, kv_dtype="float16"), batch, 100)
    expected = cpu_logits(program, batch, 200, 1, form)
    assert nmse(expected, judged) <= (1e-6 if kept in ("f16", "bf16") else 1e-3)
    plain = cpu_logits(whole, batch, 200, 1, form)
    assert np.array_equal(expected[:256], plain[:256]) and not np.array_equal(expected[290:], plain[290:])
    for chunk, n_threads in ((1, 2), (50, 3)):
        executor = cpu_executor(program, N_BLOCKS, n_threads, 256, form)
        fill_randomly(executor.pool)
        assert np.array_equal(logits_in_chunks(executor, batch, chunk), expected), (chunk, n_threads)
        executor.close()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_sequence_in_a_mixed_batch_computes_what_it_computes_alone(
    pair: tuple[str, str], open_model: Callable[[str], Program]
) -> None:
    program, rng = with_cache_types(open_model("llama"), *pair), np.random.default_rng(3)
    ids = [rng.integers(0, program.n_vocab, n).astype(np.int32) for n in (40, 1, 77)]
    alone = [cpu_logits(program, Batch.single(program, tokens), len(tokens)) for tokens in ids]
    table = np.full((3, 3), -1, np.int32)
    blocks = rng.permutation(N_BLOCKS)
    table[0, :2], table[1, :1], table[2, :3] = blocks[:2], blocks[2:3], blocks[3:6]
    executor = cpu_executor(program, N_BLOCKS, 2, 256)
    together = Batch(
        np.concatenate(ids),
        np.concatenate([np.arange(len(x)) for x in ids]).astype(np.int32),
        np.repeat(np.arange(3), [len(x) for x in ids]).astype(np.int32),
        np.ones(sum(map(len, ids)), bool),
        (table,) * len(program.groups),
    )
    assert np.array_equal(executor.run(together), np.concatenate(alone))
    executor.close()


@pytest.mark.parametrize("form", ["reference", *FORMS])
@pytest.mark.parametrize("position", [95, 127, 128, 149])
def test_a_token_reads_the_first_block_and_its_own_run_in_16_bits_and_the_others_packed(
    position: int, form: str, open_model: Callable[[str], Program]
) -> None:
    program = with_cache_types(open_model("llama"), "kivi2", "kivi2")
    batch = single_sequence(program, position + 1, n_blocks=N_BLOCKS, seed=1)
    made = ReferenceExecutor(program, N_BLOCKS) if form == "reference" else cpu_executor(program, N_BLOCKS, form=form)
    logits_in_chunks(made, part(batch, 0, position), 64)
    last, blocks, n = part(batch, position, position + 1), batch.tables[0][0], position // 32 + 1
    expected = made.run(last).copy()
    whole = {0, *range(position // 128 * 4, n)}
    for spoilt, number in (("what is not read", 255), ("what is", 0)):  # of packed ones scales that are NaN, or zero
        for layer, arrays in zip(made.pool.layers, made.pool.arrays, strict=True):
            assert isinstance(layer, KVLayer)
            read = [b for b in range(n) if (b in whole) == layer.newest]
            of_it = read if spoilt == "what is" else [b for b in range(n) if b not in read]
            for array in arrays:
                array[blocks[of_it]] = number
        assert np.array_equal(made.run(last), expected) == (spoilt == "what is not read")
    made.close()


@pytest.mark.parametrize("n_sequences", [1, 2])
def test_a_first_block_that_is_nowhere_is_refused(n_sequences: int, open_model: Callable[[str], Program]) -> None:
    """It is read in 16 bits, far before the run of a token."""
    program = with_cache_types(open_model("llama"), "kivi2", "kivi2")
    table = np.arange(n_sequences * 6, dtype=np.int32).reshape(n_sequences, 6)
    sequences, executor = np.arange(n_sequences, dtype=np.int32), cpu_executor(program, N_BLOCKS)
    for bad in (-1, N_BLOCKS):
        wrong = table.copy()
        wrong[-1, 0] = bad
        tables = tuple(wrong if group.kind == "newest" else table for group in program.groups)
        with pytest.raises(ParameterError, match="points outside"):
            executor.run(Batch(sequences, sequences * 0 + 150, sequences, sequences >= 0, tables))
    executor.close()


@pytest.mark.parametrize("name", QUANTIZED)
def test_nan_in_queries_keys_and_values_reaches_the_output(name: str) -> None:
    s = trials.sketch(0, 64)
    layers = [s.layer(KVLayer(2, 64, 64, window, False, name, name)) for window in (0, 100)]
    for layer in layers:
        s.emit("attention", Attention(s.input(4 * 64), s.buffer(4 * 64), layer, 4, 0.125))
    program = s.program()
    for where in ("q", "k", "v"):
        executor = cpu_executor(program, 30)
        fill_randomly(executor.pool)
        if where == "q":
            for values in s.inputs.values():
                values[:, ::5] = np.nan
        for keys, values in executor.pool.arrays if where != "q" else []:
            halves = (keys if where == "k" else values)[..., -64:]  # scales, or minima, of the last 32 dimensions
            halves[...] = np.full(32, np.nan, np.float16).view(np.uint8)
        for n, start in ((1, 40), (20, 40), (1, 600)):
            for out in outputs_of_ops(executor, single_sequence(program, n, start, 30), s.inputs)[1:]:
                assert not np.isfinite(out).all(axis=1).any(), (where, n, start)
        executor.close()
