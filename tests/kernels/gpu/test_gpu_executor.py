"""The GPU executor: the reference's logits, the same tokens alone and in a batch, in any chunks, in small bindings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_programs import alone, sequences
from gpu_device import device

from edgellm.formats.errors import (
    ClosedError,
    MemoryWouldExceedError,
    NumericError,
    ParameterError,
    UnsupportedError,
)
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cache_types import QUANTIZED
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.draw import DrawSpec, Link
from edgellm.kernels.gpu import adapters, lowering
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.pool import GPUPool
from edgellm.kernels.gpu.top_k import MAX_K, ROOM, TopK
from edgellm.kernels.kv import CachePool, KVLayer
from edgellm.kernels.ops import Attention
from edgellm.kernels.program import Batch, Op, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

N_BLOCKS = 24
# name: (architecture, type of weights, what else)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama Q4_K": ("llama", "Q4_K", {"quants": {"attn_v.weight": "Q6_K"}}),
    "gemma3 Q8_0": ("gemma3", "Q8_0", {}),
    "qwen2 F32": ("qwen2", "F32", {}),
    "qwen3 Q4_0": ("qwen3", "Q4_0", {}),
    "qwen3moe Q8_0": ("qwen3moe", "Q8_0", {}),
    "lfm2 Q5_1": ("lfm2", "Q5_1", {}),
    "qwen35 Q8_0": ("qwen35", "Q8_0", {}),
    "qwen35moe Q5_K": ("qwen35moe", "Q5_K", {}),
    "qwen3next Q8_0": ("qwen3next", "Q8_0", {}),
    "deepseek2 Q8_0": ("deepseek2", "Q8_0", {}),
    "nemotron_h_moe Q8_0": ("nemotron_h_moe", "Q8_0", {}),
    "gpt-oss Q8_0": ("gpt-oss", "Q8_0", {}),
    "granitehybrid Q8_0": ("granitehybrid", "Q8_0", {}),
    "phi3 Q4_K": ("phi3", "Q4_K", {}),
    "falcon-h1 Q4_K": ("falcon-h1", "Q4_K", {"quants": {"attn_v.weight": "Q6_K"}}),
    "gemma4 Q8_0": ("gemma4", "Q8_0", {}),
    "gemma3n Q4_K": ("gemma3n", "Q4_K", {"quants": {"attn_v.weight": "Q6_K"}}),
}


@pytest.fixture(scope="module")
def index() -> int:
    return int(device("gpu").partition(":")[2])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.write_tiny_model(folder / f"{name}.gguf", architecture, quant, **options)
        for name, (architecture, quant, options) in MODELS.items()
    }


@pytest.fixture(params=MODELS)
def program(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[Program]:
    with GGUFFile.open(files[request.param]) as gguf:
        yield build_program(gguf)


def opened(program: Program, index: int, **options: Any) -> GPUExecutor:
    return GPUExecutor(program, N_BLOCKS, max_tokens=64, index=index, **options)


def test_logits_are_the_references(program: Program, index: int) -> None:
    fast, judge = opened(program, index), ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    for n, start, outputs in ((33, 0, "all"), (1, 33, "all"), (7, 34, "last"), (40, 41, "all")):
        batch = Batch.single(program, np.random.default_rng(n).integers(3, program.n_vocab, n), start, outputs)
        assert nmse(fast.run(batch), judge.run(batch)) < 1e-6
    fast.close()


def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_in_any_chunks(program: Program, index: int) -> None:
    lengths, executor = [31, 1, 7, 17], opened(program, index)
    batch, more = sequences(program, lengths, [0] * 4, N_BLOCKS), sequences(program, [1] * 4, lengths, N_BLOCKS, seed=2)
    together = [executor.run(batch).copy(), executor.run(more).copy()]
    for which in range(4):
        executor.close()
        executor = opened(program, index)
        one = alone(batch, which)
        parts = [slice(0, len(one))] if which % 2 else [slice(i, i + 5) for i in range(0, len(one), 5)]
        for part in parts:
            tables = tuple(
                np.array([[t[0, 1] if part.start else -1, t[0, 1]]], np.int32) if g.kind == "state" else t
                for t, g in zip(one.tables, program.groups, strict=True)
            )
            fields = (getattr(one, name)[part] for name in ("tokens", "positions", "sequences", "outputs"))
            logits = executor.run(Batch(*fields, tables))
        assert np.array_equal(logits[-1], together[0][which])
        assert np.array_equal(executor.run(alone(more, which))[0], together[1][which])
    executor.close()


@pytest.mark.parametrize("n", [2, 3, 5, 9, 16])
def test_decoding_many_sequences_gives_each_the_bits_of_one_alone(n: int, files: dict[str, Path], index: int) -> None:
    with GGUFFile.open(files["llama Q4_K"]) as gguf:
        program = build_program(gguf)
    executor = opened(program, index)
    for start, length in ((0, 3), (3, 1)):
        batch = sequences(program, [length] * n, [start] * n, N_BLOCKS)
        together = executor.run(batch).copy()
        for which in {0, n // 2, n - 1}:
            assert np.array_equal(executor.run(alone(batch, which)), together[which : which + 1])
    executor.close()


@pytest.mark.parametrize(("type_k", "type_v"), [("q8_0", "q4_0"), ("bf16", "f32")])
def test_keys_and_values_are_kept_in_any_type(type_k: str, type_v: str, files: dict[str, Path], index: int) -> None:
    with GGUFFile.open(files["llama Q4_K"]) as gguf:
        program = with_cache_types(build_program(gguf), type_k, type_v)
    fast, judge = opened(program, index), ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    batch, more = sequences(program, [31, 9], [0, 0], N_BLOCKS), sequences(program, [1, 1], [31, 9], N_BLOCKS)
    found = [fast.run(one).copy() for one in (batch, more)]
    for logits, one in zip(found, (batch, more), strict=True):
        assert nmse(logits, judge.run(one)) < 1e-5, "a code may be rounded otherwise"
    assert fast.pool.nbytes == judge.pool.nbytes
    for block in (0, 1) if type_v in QUANTIZED else ():
        kept = np.frombuffer(judge.pool.read_block(0, block), np.uint8)
        assert np.mean(np.frombuffer(fast.pool.read_block(0, block), np.uint8) != kept) < 0.02
    fast.close()
    fast = opened(program, index)
    for which in (0, 1):
        one = alone(batch, which)
        for first in range(0, len(one), 4):
            fields = (getattr(one, name)[first : first + 4] for name in ("tokens", "positions", "sequences", "outputs"))
            logits = fast.run(Batch(*fields, one.tables))
        assert np.array_equal(logits[-1], found[0][which])
        assert np.array_equal(fast.run(alone(more, which))[0], found[1][which])
    fast.close()


@pytest.mark.parametrize("name", ["llama Q4_K", "gemma3 Q8_0", "gpt-oss Q8_0"])
def test_full_blocks_are_packed_and_read_alike_alone_and_in_any_chunks(
    name: str, files: dict[str, Path], index: int
) -> None:
    """Over the end of a run of 128, with windows and with sinks; ``files`` have heads of 64."""
    with GGUFFile.open(files[name]) as gguf:
        program = with_cache_types(build_program(gguf), "kivi2", "kivi2")
    fast, judge = (
        GPUExecutor(program, N_BLOCKS, max_tokens=256, index=index),
        ReferenceExecutor(program, N_BLOCKS, 256, "float16"),
    )
    lengths = [140, 101]
    batch, more = sequences(program, lengths, [0, 0], N_BLOCKS), sequences(program, [30, 1], lengths, N_BLOCKS, seed=2)
    found = [fast.run(one).copy() for one in (batch, more)]
    for logits, one in zip(found, (batch, more), strict=True):
        assert nmse(logits, judge.run(one)) < 1e-4, "a code may be rounded otherwise"
    assert fast.pool.nbytes == judge.pool.nbytes
    for group in range(len(program.groups)):
        kept = np.frombuffer(judge.pool.read_block(group, 1), np.uint8)
        assert np.mean(np.frombuffer(fast.pool.read_block(group, 1), np.uint8) != kept) < 0.05
    fast.close()
    fast = opened(program, index)
    for which in (0, 1):
        for one, logits in zip((alone(batch, which), alone(more, which)), found, strict=True):
            step = 1 if which else 7  # a lone token's block is packed beside its attention
            for first in range(0, len(one), step):
                names = ("tokens", "positions", "sequences", "outputs")
                fields = (getattr(one, name)[first : first + step] for name in names)
                last = fast.run(Batch(*fields, one.tables))
            assert np.array_equal(last[-1], logits[which])
    fast.close()


def test_small_bindings_change_no_bit(program: Program, index: int) -> None:
    arrays = [array for layer in program.cache_layers for array in layer.arrays(np.dtype(np.float16))]
    if 8 * max(math.prod(shape) * kept.itemsize for shape, kept in arrays) > 66 << 10:
        pytest.skip("what a layer keeps lies in one binding, and it is larger")
    whole, parts = (GPUExecutor(program, 8, max_tokens=20, index=index, max_binding=most) for most in (None, 66 << 10))
    assert max(len(matrix.parts) for matrix, _ in parts._there.matrices.values()) > 1
    for batch in (sequences(program, [13, 7], [0, 0], n_blocks=8), sequences(program, [1, 1], [13, 7], n_blocks=8)):
        assert np.array_equal(whole.run(batch), parts.run(batch))
    whole.close()
    parts.close()


def test_a_hook_sees_every_op_and_what_it_changes_counts(program: Program, index: int) -> None:
    executor = opened(program, index)
    batch, seen = sequences(program, [5, 40], [0, 0], N_BLOCKS), list[Op]()
    plain = executor.run(batch).copy()

    def look(at: int, op: Op, read: Any) -> None:
        seen.append(op)
        for name in op.read_buffers():
            assert np.isfinite(read(name)).all()

    assert np.array_equal(executor.run(batch, look), plain), "ops that are fused have the bits of single ones"
    assert tuple(seen) == program.ops

    def halve(at: int, op: Op, read: Any) -> None:
        if at == len(program.ops) - 1:
            read(program.output)[...] *= 0.5

    assert np.array_equal(executor.run(batch, halve), plain * np.float32(0.5))
    executor.close()


def test_more_outputs_than_a_buffer_has_rows_are_computed_in_turns(files: dict[str, Path], index: int) -> None:
    with GGUFFile.open(files["llama Q4_K"]) as gguf:
        executor = opened(build_program(gguf), index)
        batch = Batch.single(executor.program, np.arange(3, 63), outputs="all")
        assert executor._there.rows["outputs"] < len(batch)
        last = executor.run(replace(batch, outputs=np.arange(60) >= 55)).copy()
        assert np.array_equal(executor.run(batch)[55:], last)
        executor.close()


def test_parts_of_256_positions_are_summed_as_the_reference_does(files: dict[str, Path], index: int) -> None:
    with GGUFFile.open(files["gemma3 Q8_0"]) as gguf:
        program = build_program(gguf)
    fast, judge = opened(program, index), ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    tokens = np.random.default_rng(5).integers(3, program.n_vocab, 600)
    short = [Batch.single(program, tokens[i : i + 1], i) for i in (3, 259)]  # recorded for one part, and for two
    for start in range(0, 576, 64):
        for executor in (fast, judge):
            logits = executor.run(Batch.single(program, tokens[start : start + 64], start, "last"))
            if executor is fast:
                found = logits.copy()
        assert nmse(found, logits) < 1e-6
        if start == 320:
            before = [fast.run(batch).copy() for batch in short]
    assert all(np.array_equal(fast.run(batch), logits) for batch, logits in zip(short, before, strict=True))
    again = [fast.run(Batch.single(program, tokens[i : i + 1], i)).copy() for i in range(570, 576)]
    assert np.array_equal(again[-1], found)
    fast.close()


def test_blocks_are_copied_and_move_between_host_and_device(index: int) -> None:
    gpu = Device(adapters.choose(index))
    layers = (KVLayer(2, 40, 24), KVLayer(1, 17, 33, 40))
    ours, host = GPUPool(gpu, layers, [5, 6]), CachePool(layers, [5, 6])
    rng = np.random.default_rng(1)
    for group in (0, 1):
        assert ours.block_nbytes(group) == host.block_nbytes(group)
        block = rng.integers(0, 256, host.block_nbytes(group), np.uint8).tobytes()
        ours.write_block(group, 3, block)
        host.write_block(group, 3, block)
        ours.copy_block(group, 3, 1)
        assert ours.read_block(group, 1) == ours.read_block(group, 3) == host.read_block(group, 3)
        assert not any(ours.read_block(group, 2))
    assert ours.nbytes == host.nbytes
    gpu.close()


# ---- tokens drawn ----------------------------------------------------------------------------------------------------


CHAIN = (Link("top_k", 40), Link("top_p", 0.9, 1), Link("min_p", np.log(0.05), 1), Link("temperature", 0.8))
SPECS = {
    "greedy": DrawSpec((Link("temperature", 0.0),), 1, 1),
    "sampled": DrawSpec(CHAIN, 40, 40),
    "sampled with logprobs": DrawSpec(CHAIN, 40, 64, wants_sum=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_runs_of_steps_draw_the_tokens_that_steps_with_all_logits_draw(
    spec: DrawSpec, files: dict[str, Path], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(files["gemma3 Q8_0"]) as gguf:
        executor = opened(build_program(gguf), index)
    program, start = executor.program, np.arange(5, 12)
    executor.run(Batch.single(program, start))
    one, run = (executor.draw.open(spec, np.random.default_rng(7)) for _ in range(2))
    token, drawn = 9, []
    for i in range(12):
        assert one.draw(executor.run(Batch.single(program, [token], 7 + i))[0])
        drawn += one.drawn(1)
        token = drawn[-1].token
    batch = replace(Batch.single(program, [9], 7), tables=(np.arange(2, dtype=np.int32)[None],) * len(program.groups))
    reads, read = list[int](), executor._top_k.read
    monkeypatch.setattr(executor._top_k, "read", lambda *given: [reads.append(given[2]), read(*given)][1])
    assert executor.decode(batch, 12, run) == 12
    assert len(reads) <= 4, "the device draws what the host draws, all but always, and goes on by itself"
    assert run.tokens(12) == [row.token for row in drawn]
    for mine, judge in zip(run.drawn(12), drawn, strict=True):
        same = ("token", "place", "positions", "values", "left", "shaped")
        assert all(getattr(mine, name) == getattr(judge, name) for name in same)
        assert mine.sum == pytest.approx(judge.sum, rel=1e-5) if spec.wants_sum else True
    stop = run.tokens(12)[4]
    assert executor.decode(batch, 12, executor.draw.open(spec, np.random.default_rng(7)), [stop]) <= 5
    executor.close()


def next_tokens(program: Program, lengths: list[int], tokens: list[int]) -> Batch:
    """A token of each sequence behind those that are in the cache."""
    return replace(sequences(program, [1] * len(lengths), lengths, N_BLOCKS), tokens=np.array(tokens, np.int32))


@pytest.mark.parametrize(
    "names", [["greedy"] * 3, ["sampled with logprobs", "greedy", "sampled"]], ids=["ahead", "mixed"]
)
def test_sequences_that_decode_together_draw_the_tokens_of_each_alone(
    names: list[str], files: dict[str, Path], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(files["gemma3 Q8_0"]) as gguf:
        executor = opened(build_program(gguf), index)
    program, lengths = executor.program, [31, 3, 17]
    executor.run(sequences(program, lengths, [0, 0, 0], N_BLOCKS))

    def opened_draws() -> list[Any]:
        return [executor.draw.open(SPECS[name], np.random.default_rng(i)) for i, name in enumerate(names)]

    judges, tokens = [], [9, 10, 11]
    for i, draw in enumerate(opened_draws()):
        token, drawn = tokens[i], []
        for step in range(10):
            batch = alone(next_tokens(program, [length + step for length in lengths], [token] * 3), i)
            assert draw.draw(executor.run(batch)[0])
            drawn += draw.drawn(1)
            token = drawn[-1].token
        judges.append(drawn)
    batch = next_tokens(program, lengths, tokens)

    def check(n_steps: int, stop_ids: list[list[int]], expected: int) -> None:
        draws = opened_draws()
        assert executor.decode_together(batch, n_steps, draws, stop_ids) == [expected] * 3
        for draw, judge in zip(draws, judges, strict=True):
            for mine, other in zip(draw.drawn(expected), judge, strict=False):
                same = ("token", "place", "positions", "values", "left", "shaped")
                assert all(getattr(mine, name) == getattr(other, name) for name in same)

    check(10, [[], [], []], 10)
    token, before = judges[1][5].token, [row.token for row in judges[1][:5]]
    check(10, [[], [token], []], 6 if token not in before else before.index(token) + 1)
    with monkeypatch.context() as patch:  # every distribution is a flat one: all logits come to the host
        patch.setattr("edgellm.kernels.gpu.top_k.ROOM", -1)
        check(6, [[], [], []], 6)
    for name in ("tokens", "outputs", "positions", "sequences"):
        with pytest.raises(ParameterError):
            executor.decode_together(
                replace(batch, **{name: getattr(batch, name)[:2] * 0}), 3, opened_draws(), [[]] * 3
            )
    executor.close()


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("name", ["lfm2 Q5_1", "qwen35 Q8_0", "nemotron_h_moe Q8_0"])
def test_a_run_leaves_the_states_of_the_steps_that_count(
    name: str, kind: str, files: dict[str, Path], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(files[name]) as gguf:
        executor = opened(build_program(gguf), index)
    program, lengths = executor.program, [9, 1, 6]
    group = next(i for i, one in enumerate(program.groups) if one.kind == "state")
    executor.run(sequences(program, lengths, [0, 0, 0], N_BLOCKS))

    def into(first: int) -> Batch:
        """The next token of each sequence, whose state goes to slots of its own."""
        batch = next_tokens(program, lengths, [9, 10, 11])
        slots = np.array([[i, first + i] for i in range(3)], np.int32)
        return replace(batch, tables=tuple(slots if i == group else t for i, t in enumerate(batch.tables)))

    def opened_draws() -> list[Any]:
        return [executor.draw.open(SPECS[kind], np.random.default_rng(i)) for i in range(3)]

    def states(first: int) -> list[bytes]:
        return [executor.pool.read_block(group, first + i) for i in range(3)]

    draws, batch, expected, kept = opened_draws(), into(3), list[list[int]](), list[list[bytes]]()
    for _ in range(10):
        assert all(draw.draw(row) for draw, row in zip(draws, executor.run(batch), strict=True))
        expected.append([draw.tokens(1)[0] for draw in draws])
        kept.append(states(3))
        batch = batch.onward(expected[-1], program.groups)

    def check(n_steps: int, stops: list[list[int]], n: int) -> None:
        draws = opened_draws()
        assert executor.decode_together(into(6), n_steps, draws, stops) == [n] * 3
        assert [draw.tokens(n) for draw in draws] == [list(tokens) for tokens in zip(*expected[:n], strict=True)]
        assert states(6) == kept[n - 1]

    check(10, [[], [], []], 10)
    for at in (1, 5, 6):
        stop, seen = expected[at][1], [tokens[1] for tokens in expected]
        check(10, [[], [stop], []], seen.index(stop) + 1)
    with monkeypatch.context() as patch:  # every distribution is a flat one: all logits come to the host
        patch.setattr("edgellm.kernels.gpu.top_k.ROOM", -1)
        check(6, [[], [], []], 6)
    in_place = into(0)
    assert executor.decode_together(in_place, 4, opened_draws(), [[]] * 3) == [4] * 3
    assert states(0) == kept[3], "slot by slot where it was read"
    executor.close()


def test_a_step_that_gives_nan_to_one_sequence_gives_tokens_to_the_others(files: dict[str, Path], index: int) -> None:
    with GGUFFile.open(files["llama Q4_K"]) as gguf:
        executor = opened(build_program(gguf), index)
    program, lengths = executor.program, [5, 3, 7]
    executor.run(sequences(program, lengths, [0, 0, 0], N_BLOCKS))
    block = int(sequences(program, [1] * 3, lengths, N_BLOCKS).tables[0][1, 0])
    executor.pool.write_block(0, block, b"\x00\x7e" * (executor.pool.block_nbytes(0) // 2))
    draws = [executor.draw.open(SPECS["greedy"], np.random.default_rng(0)) for _ in range(3)]
    assert executor.decode_together(next_tokens(program, lengths, [9, 10, 11]), 6, draws, [[]] * 3) == [1, 0, 1]
    with pytest.raises(NumericError):
        executor.run(next_tokens(program, lengths, [9, 10, 11]))
    executor.close()


@pytest.mark.parametrize("n", [1, 7, 257, 4099, 49152, 262144])
def test_the_largest_logits_are_found_in_order(n: int, index: int) -> None:
    gpu, rng = Device(adapters.choose(index)), np.random.default_rng(n)
    place = Place(gpu.buffer(4 * n + 400), 64, n + 64, n, "outputs")
    finder = TopK(gpu, place, n)

    def find(logits: np.ndarray, k: int) -> Any:
        gpu.write(place.buffer, 256, logits)
        return finder.read(k, 1, 1, [finder.recording(k)])[0][0]

    peaked = rng.standard_normal(n).astype(np.float32) * 3 - 20
    peaked[rng.integers(0, n, 20)] += 30
    for logits in (rng.standard_normal(n).astype(np.float32).round(2), peaked):
        for k in sorted({1, min(n, 40), min(n, MAX_K)}):
            order = np.argsort(-logits, kind="stable")[:k]
            found = find(logits, k)
            if found is None:  # too many alike
                assert n > ROOM
                continue
            assert np.array_equal(found.positions, order) and np.array_equal(found.values, logits[order])
            assert found.sum == pytest.approx(np.exp(logits.astype(np.float64) - logits.max()).sum(), rel=1e-5)
    flat = np.full(n, 1.5, np.float32)
    assert (find(flat, 1) is None) == (n > ROOM)
    for bad in (np.nan, np.inf, -np.inf):
        flat[n // 2] = bad
        assert find(flat, 1) is False
    assert find(peaked, 1).positions[0] == peaked.argmax(), "what was bad has left nothing behind"
    gpu.close()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_nan_is_seen(files: dict[str, Path], index: int) -> None:
    with GGUFFile.open(files["llama Q4_K"]) as gguf:
        executor = opened(build_program(gguf), index)

        def spoil(at: int, op: Op, read: Any) -> None:
            if at == 0:
                read(op.written_buffers()[0])[0, 0] = np.nan

        with pytest.raises(NumericError):
            executor.run(Batch.single(executor.program, [3]), spoil)
        executor.close()


def test_what_has_no_shader_is_refused_by_name(
    files: dict[str, Path], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(files["llama Q4_K"]) as gguf:
        program = build_program(gguf)
        rules = {op: rule for op, rule in lowering.RULES.items() if op.name != "rope"}
        monkeypatch.setattr(lowering, "RULES", rules)
        with pytest.raises(UnsupportedError, match="rope"):
            opened(program, index)
        monkeypatch.undo()
        older = lowering.RULES | {Attention: lowering.Rule(lowering.RULES[Attention].lower, "q out layer n_heads")}
        monkeypatch.setattr(lowering, "RULES", older)
        with pytest.raises(UnsupportedError, match="attention with scale="):
            opened(program, index)
        monkeypatch.undo()
        with pytest.raises(MemoryWouldExceedError, match="-c"):
            GPUExecutor(program, 4096, max_tokens=64, index=index, max_binding=1 << 20)


def test_a_batch_that_shaders_cannot_be_trusted_with_is_refused(files: dict[str, Path], index: int) -> None:
    with GGUFFile.open(files["llama Q4_K"]) as gguf:
        executor = opened(build_program(gguf), index)
    batch = Batch.single(executor.program, [3, 4])
    for wrong in (
        replace(batch, tokens=np.array([3, executor.program.n_vocab], np.int32)),
        replace(batch, positions=np.array([0, 2], np.int32)),
        replace(batch, tables=(np.array([[N_BLOCKS]], np.int32),)),
    ):
        with pytest.raises(ParameterError):
            executor.run(wrong)
    executor.close()
    executor.close()
    with pytest.raises(ClosedError):
        executor.run(batch)


def test_an_adapter_that_is_not_there_is_an_error_that_names_those_that_are(index: int) -> None:
    with pytest.raises(ParameterError, match=f"gpu:{index}"):
        adapters.choose(999)
    hardware = [adapter for adapter in adapters.adapters() if not adapter.is_software]
    if not hardware:
        with pytest.raises(ParameterError, match="--device cpu"):
            adapters.choose(None)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wgpu", None)
    with pytest.raises(UnsupportedError, match=r"edgellm\[gpu\]"):
        adapters.wgpu_module()
