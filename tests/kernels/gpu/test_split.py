"""A program in parts on CPU and GPU: cut anywhere it is the reference's, and a step keeps its promises in each cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_programs import alone, sequences
from gpu_device import device

import edgellm
from edgellm.engine.cache import pool_blocks
from edgellm.formats.errors import NumericError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import executors, placement
from edgellm.kernels.chosen_blocks import with_chosen_blocks
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.draw import DrawSpec, Link
from edgellm.kernels.gpu import lowering
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.gpu.memory import DeviceMemory
from edgellm.kernels.ops import ExpertMatmul, ExpertSum
from edgellm.kernels.program import Batch, Op, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.split import SplitExecutor
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

N_BLOCKS, N_LAYERS = 24, 3
LIMIT = 1e-6  # of NMSE: activations of 15 bits on the CPU's side give about 1e-7
# name: (architecture, type of weights)
MODELS = {
    "llama": ("llama", "Q4_K"),
    "gemma3": ("gemma3", "Q8_0"),
    "qwen3moe": ("qwen3moe", "Q8_0"),
    "lfm2": ("lfm2", "Q5_1"),
    "qwen35": ("qwen35", "Q8_0"),
    "deepseek2": ("deepseek2", "Q8_0"),
}
CUTS = [(layers, False) for layers in range(1, N_LAYERS + 2)] + [(N_LAYERS + 1, True), (2, True)]


@pytest.fixture(scope="module")
def name() -> str:
    return device("gpu")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    folder = tmp_path_factory.mktemp("models")
    files = {
        model: GGUFFile.open(
            tiny_models.write_tiny_model(folder / f"{model}.gguf", architecture, quant, n_layer=N_LAYERS)
        )
        for model, (architecture, quant) in MODELS.items()
    }
    yield {model: build_program(file) for model, file in files.items()}
    for file in files.values():
        file.close()


def opened(program: Program, name: str, layers: Any, cpu_moe: bool = False) -> Any:
    return executors.open_executor(
        name, program, N_BLOCKS, n_threads=2, max_tokens=64, gpu_layers=layers, cpu_moe=cpu_moe
    )


def steps(program: Program) -> list[Batch]:
    """A prompt in two chunks with a token between them, then one with an answer's rows."""
    shapes: tuple[tuple[int, int, Any], ...] = ((33, 0, "all"), (1, 33, "all"), (7, 34, "last"), (40, 41, "all"))
    return [
        Batch.single(program, np.random.default_rng(n).integers(3, program.n_vocab, n), start, outputs)
        for n, start, outputs in shapes
    ]


@pytest.mark.parametrize("model", MODELS)
def test_cut_at_every_layer_it_is_the_reference(model: str, programs: dict[str, Program], name: str) -> None:
    program = programs[model]
    judge = ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    expected = [judge.run(batch).copy() for batch in steps(program)]
    for layers, cpu_moe in CUTS:
        executor = opened(program, name, layers, cpu_moe)
        for batch, logits in zip(steps(program), expected, strict=True):
            found = executor.run(batch)
            assert nmse(found, logits) < LIMIT, f"{layers} layers, cpu_moe={cpu_moe}"
            for row, judged in zip(found, logits, strict=True):  # another token only where two are as good
                assert judged.max() - judged[row.argmax()] < 1e-2 * (judged.max() - judged.min())
        executor.close()


def test_what_stands_where(programs: dict[str, Program], name: str) -> None:
    program = programs["llama"]
    kinds = {0: CPUExecutor, 1: SplitExecutor, N_LAYERS: SplitExecutor, N_LAYERS + 1: GPUExecutor, 999: GPUExecutor}
    for layers, kind in kinds.items():
        executor = opened(program, name, layers)
        assert type(executor) is kind
        if isinstance(executor, SplitExecutor):
            cpu, gpu = executor.cut.programs
            assert cpu is not None and gpu is not None
            assert executor.cut.n_crossings == 1 and len(gpu.cache_layers) == layers
            assert "token_embd.weight" in cpu.tensors and "output_norm.weight" in gpu.tensors
            assert not any(name.startswith("blk.") and name in gpu.tensors for name in cpu.tensors)
            assert isinstance(executor.parts[0], CPUExecutor) and isinstance(executor.parts[1], GPUExecutor)
        executor.close()


@pytest.mark.parametrize(
    ("types", "also", "per_layer"), [(("q8_0", "q4_0"), "hadamard", 1), (("kivi2",) * 2, "pack_kv", 2)]
)
def test_keys_and_values_of_few_bits_stand_with_their_layers(
    types: tuple[str, str], also: str, per_layer: int, programs: dict[str, Program], name: str
) -> None:
    program = with_cache_types(programs["llama"], *types)
    executor, judge = opened(program, name, 2), ReferenceExecutor(program, N_BLOCKS, 64)
    cpu, gpu = executor.cut.programs
    for part, n_layers in ((cpu, N_LAYERS - 2), (gpu, 2)):
        assert {"store_kv", "attention", also} <= {op.name for op in part.ops}
        assert len(part.cache_layers) == n_layers * per_layer
    for batch in steps(program):
        assert nmse(executor.run(batch), judge.run(batch)) < 1e-3  # a code may fall on the other side of a half
    executor.close()


def test_runs_of_steps_draw_the_tokens_of_steps_with_all_logits(programs: dict[str, Program], name: str) -> None:
    program, lengths = programs["gemma3"], [31, 3, 17]
    executor = opened(program, name, 2)
    links = (Link("top_k", 40), Link("top_p", 0.9, 1), Link("temperature", 0.8))
    specs = [DrawSpec((Link("temperature", 0.0),), 1, 1), DrawSpec(links, 40, 40), DrawSpec(links, 40, 40)]
    executor.run(sequences(program, lengths, [0] * 3, N_BLOCKS))

    def opened_draws() -> list[Any]:
        return [executor.draw.open(spec, np.random.default_rng(i)) for i, spec in enumerate(specs)]

    first = replace(sequences(program, [1] * 3, lengths, N_BLOCKS), tokens=np.array([9, 10, 11], np.int32))
    draws, batch, expected = opened_draws(), first, list[list[int]]()
    for _ in range(6):
        logits = executor.run(batch)
        assert all(draw.draw(row) for draw, row in zip(draws, logits, strict=True))
        expected.append([draw.tokens(1)[0] for draw in draws])
        tokens = np.array(expected[-1], np.int32)
        batch = replace(batch, tokens=tokens, positions=batch.positions + np.int32(1))
    draws = opened_draws()
    assert executor.decode_together(first, 6, draws, [[]] * 3) == [6] * 3
    assert [draw.tokens(6) for draw in draws] == [list(tokens) for tokens in zip(*expected, strict=True)]
    stop, seen = expected[3][1], [tokens[1] for tokens in expected[:3]]
    n = 4 if stop not in seen else seen.index(stop) + 1
    assert executor.decode_together(first, 6, opened_draws(), [[], [stop], []]) == [n] * 3
    alone_draw = executor.draw.open(specs[0], np.random.default_rng(0))
    assert executor.decode(alone(first, 0), 6, alone_draw) == 6
    assert alone_draw.tokens(6) == [tokens[0] for tokens in expected]
    with pytest.raises(ParameterError):
        executor.decode_together(first, 6, draws[:2], [[]] * 3)
    executor.close()


@pytest.mark.parametrize("model", ["lfm2", "qwen35"])
def test_a_run_leaves_the_states_of_the_steps_that_count(
    model: str, programs: dict[str, Program], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, lengths = programs[model], [9, 1, 6]
    executor = opened(program, name, 2)
    group = next(i for i, one in enumerate(program.groups) if one.kind == "state")
    executor.run(sequences(program, lengths, [0] * 3, N_BLOCKS))

    def into(first: int) -> Batch:
        """The next token of each sequence, whose state goes to slots of its own."""
        batch = replace(sequences(program, [1] * 3, lengths, N_BLOCKS), tokens=np.array([9, 10, 11], np.int32))
        slots = np.array([[i, first + i] for i in range(3)], np.int32)
        return replace(batch, tables=tuple(slots if i == group else t for i, t in enumerate(batch.tables)))

    batch, tokens = into(3), list[list[int]]()
    for _ in range(5):
        tokens.append(executor.run(batch).argmax(axis=1).tolist())
        batch = batch.onward(tokens[-1], program.groups)
    spec = DrawSpec((Link("temperature", 0.0),), 1, 1)
    draws = [executor.draw.open(spec, np.random.default_rng(0)) for _ in range(3)]
    assert executor.decode_together(into(6), 5, draws, [[]] * 3) == [5] * 3
    assert [draw.tokens(5) for draw in draws] == [list(one) for one in zip(*tokens, strict=True)]
    for i in range(3):
        assert executor.pool.read_block(group, 6 + i) == executor.pool.read_block(group, 3 + i)
    stops: list[list[int]] = [[], [tokens[2][1]], []]  # the second ends with its third token, and all with it
    assert executor.decode_together(into(12), 5, draws, stops) == [3] * 3
    part, drawn, n_calls = executor.parts[executor._output_part], executor.parts[executor._output_part].drawn, 0  # type: ignore[attr-defined]

    def nan_at_third(draws: Sequence[Any]) -> list[int]:
        nonlocal n_calls
        n_calls += 1
        return [-1] * len(draws) if n_calls == 3 else drawn(draws)

    monkeypatch.setattr(part, "drawn", nan_at_third)
    assert executor.decode_together(into(15), 5, draws, [[]] * 3) == [2] * 3
    batch = into(18)
    for some in tokens[:2]:
        executor.run(batch)
        batch = batch.onward(some, program.groups)
    for i in range(3):
        assert executor.pool.read_block(group, 15 + i) == executor.pool.read_block(group, 18 + i), "two steps count"
    again = into(9).again([[9, 10, 11], *tokens], [5, 0, 2])
    assert again.positions.tolist() == [*range(9, 14), 6, 7] and again.sequences.tolist() == [0] * 5 + [2] * 2
    executor.run(again)
    assert executor.pool.read_block(group, 9) == executor.pool.read_block(group, 3), "the same bits in one step"
    executor.close()


def test_what_has_no_shader_is_computed_by_the_cpu(
    programs: dict[str, Program], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = programs["llama"]
    monkeypatch.setattr(lowering, "RULES", {op: rule for op, rule in lowering.RULES.items() if op.name != "attention"})
    executor, judge = opened(program, name, "auto"), ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    cpu, gpu = executor.cut.programs
    assert {op.name for op in cpu.ops if op.computes} == {
        "store_kv",
        "attention",
        "select_outputs",
    } and not gpu.cache_layers
    for batch in steps(program):
        assert nmse(executor.run(batch), judge.run(batch)) < LIMIT
    executor.close()


def test_the_cpu_chooses_blocks_of_the_cache_and_reads_them(programs: dict[str, Program], name: str) -> None:
    program = with_chosen_blocks(programs["llama"], 256)
    executor, judge = opened(program, name, "auto"), ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    cpu, gpu = executor.cut.programs
    chosen = {"bound_keys", "choose_blocks", "store_kv", "attention"}
    assert chosen <= {op.name for op in cpu.ops} and len(cpu.cache_layers) == 1
    assert "matmul" in {op.name for op in gpu.ops} and len(gpu.cache_layers) == N_LAYERS - 1
    for start in range(0, 448, 64):
        tokens = np.random.default_rng(start).integers(3, program.n_vocab, 64)
        batch = Batch.single(program, tokens, start)
        assert nmse(executor.run(batch), judge.run(batch)) < 1e-5  # a block may be chosen for another that is as good
    executor.close()


def test_experts_stay_on_the_cpu_and_nothing_else_does(programs: dict[str, Program], name: str) -> None:
    program = programs["qwen3moe"]
    executor = opened(program, name, N_LAYERS + 1, cpu_moe=True)
    assert isinstance(executor, SplitExecutor)
    cpu, gpu = executor.cut.programs
    assert cpu is not None and gpu is not None
    kept = [op for op in cpu.ops if op.computes]
    assert {op.name for op in kept} == {"expert_matmul", "gated", "expert_sum"} and not cpu.cache_layers
    assert not any(isinstance(op, ExpertMatmul | ExpertSum) for op in gpu.ops)
    assert executor.cut.n_crossings == 4 * N_LAYERS, "an input, who is chosen and by how much; a sum back"
    executor.close()


@pytest.mark.parametrize(("model", "layers", "cpu_moe"), [
    ("llama", 2, False), ("gemma3", 1, False), ("qwen3moe", 2, True), ("lfm2", 2, False), ("qwen35", 2, False),
])  # fmt: skip
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_in_any_chunks(
    model: str, layers: int, cpu_moe: bool, programs: dict[str, Program], name: str
) -> None:
    program, lengths = programs[model], [31, 1, 7, 17]
    batch = sequences(program, lengths, [0] * 4, 16, seed=0)
    more = sequences(program, [1] * 4, lengths, 16, seed=sum(lengths))
    executor = opened(program, name, layers, cpu_moe)
    together = [executor.run(batch).copy(), executor.run(more).copy()]
    for which in range(4):
        executor.close()
        executor = opened(program, name, layers, cpu_moe)
        one = alone(batch, which)
        cuts = [slice(0, len(one))] if which % 2 else [slice(i, i + 5) for i in range(0, len(one), 5)]
        for part in cuts:
            tables = tuple(
                np.array([[t[0, 1] if part.start else -1, t[0, 1]]], np.int32) if g.kind == "state" else t
                for t, g in zip(one.tables, program.groups, strict=True)
            )
            fields = (getattr(one, field)[part] for field in ("tokens", "positions", "sequences", "outputs"))
            logits = executor.run(Batch(*fields, tables))
        assert np.array_equal(logits[-1], together[0][which])
        assert np.array_equal(executor.run(alone(more, which))[0], together[1][which])
    executor.close()


@pytest.mark.parametrize(("model", "layers", "cpu_moe"), [("llama", 2, False), ("qwen3moe", 4, True)])
def test_a_hook_sees_every_op_and_what_it_changes_counts(
    model: str, layers: int, cpu_moe: bool, programs: dict[str, Program], name: str
) -> None:
    program = programs[model]
    executor, seen = opened(program, name, layers, cpu_moe), list[Op]()
    batch = replace(Batch.single(program, np.arange(3, 43)), outputs=np.arange(40) > 30)
    plain = executor.run(batch).copy()

    def look(at: int, op: Op, read: Any) -> None:
        seen.append(op)
        for buffer in (*op.read_buffers(), *op.written_buffers()):
            assert np.isfinite(read(buffer)).all()

    assert np.array_equal(executor.run(batch, look), plain)
    assert tuple(seen) == program.ops

    judge = ReferenceExecutor(program, N_BLOCKS, 64, "float16")

    def change(at: int, op: Op, read: Any) -> None:
        if "x" in op.written_buffers() and at % 3 == 0:
            read("x")[..., :7] *= np.float32(0.5)

    changed = executor.run(batch, change).copy()
    assert nmse(changed, judge.run(batch, change)) < LIMIT and nmse(changed, plain) > 1e-3
    assert np.array_equal(executor.run(batch), plain)

    def spoil(at: int, op: Op, read: Any) -> None:
        if at == 0:
            read(op.written_buffers()[0])[0, 0] = np.nan

    with pytest.raises(NumericError):
        executor.run(Batch.single(program, [3]), spoil)
    executor.close()


def test_embeddings_stand_in_place_of_tokens(programs: dict[str, Program], name: str) -> None:
    program = programs["llama"]
    executor, judge = opened(program, name, 2), ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    values = np.random.default_rng(1).standard_normal((2, program.n_embd)).astype(np.float32)
    batch = replace(Batch.single(program, [3, 4, 5, 6]), embeddings=(np.array([1, 2]), values))
    assert nmse(executor.run(batch), judge.run(batch)) < LIMIT
    executor.close()


def test_more_outputs_than_a_buffer_has_rows_are_computed_in_turns(programs: dict[str, Program], name: str) -> None:
    program = programs["llama"]
    executor = opened(program, name, 1)
    batch = Batch.single(program, np.arange(3, 63), outputs="all")
    assert executor.max_outputs < len(batch)
    last = executor.run(replace(batch, outputs=np.arange(60) >= 55)).copy()
    assert np.array_equal(executor.run(batch)[55:], last)
    assert executor.run(replace(batch, outputs=np.zeros(60, bool))).shape == (0, program.n_vocab)
    executor.close()


def test_blocks_are_copied_and_move_between_every_kind_of_cache(programs: dict[str, Program], name: str) -> None:
    for model in ("gemma3", "lfm2"):
        program = programs[model]
        made = [opened(program, name, layers) for layers in (0, 1, 2, N_LAYERS + 1)]
        pools = [executor.pool for executor in made]
        assert len({pool.nbytes for pool in pools}) == 1
        for group in range(len(program.groups)):
            rng = np.random.default_rng(group)
            block = rng.integers(0, 256, len(pools[0].read_block(group, 0)), np.uint8).tobytes()
            for pool in pools:
                pool.write_block(group, 3, block)
                pool.copy_block(group, 3, 1)
                assert pool.read_block(group, 1) == pool.read_block(group, 3) == block
                assert not any(pool.read_block(group, 2))
        for executor in made:
            executor.close()


# ---- through the library ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    found: Path = tiny_models.write_tiny_model(folder / "tiny.gguf", "gemma3", "Q8_0", n_layer=N_LAYERS)
    return found


def test_a_session_goes_on_where_another_division_has_left_it(path: Path, name: str, tmp_path: Path) -> None:
    divisions: list[dict[str, Any]] = [
        {}, {"executor": name, "gpu_layers": 1}, {"executor": name, "gpu_layers": 3}, {"executor": name}
    ]  # fmt: skip
    prompt = list(range(3, 73))
    for i, options in enumerate(divisions):
        with edgellm.load(path, n_ctx=128, **options) as llm:
            if i:
                assert len(llm.load_state(tmp_path / "state")) >= 64
            result = llm.generate(prompt, max_tokens=4, temperature=0)
            assert (result.timings.reused_n >= 64) == bool(i)
            assert len(result.tokens) == 4
            llm.save_state(tmp_path / "state", prompt)


def test_a_division_answers_as_its_steps_do_and_auto_takes_what_fits(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgellm.load(path, n_ctx=128, executor=name, gpu_layers=2) as llm:
        assert isinstance(llm.executor, SplitExecutor)
        once = llm.generate("Rivers flow", max_tokens=8, temperature=0).tokens
        assert once == llm.generate("Rivers flow", max_tokens=8, temperature=0).tokens
        need = llm.memory_estimate
        assert need.device is not None and 0 < need.device.total < need.total
    with edgellm.load(path, n_ctx=128, executor=name) as llm:
        assert isinstance(llm.executor, GPUExecutor)
        whole = llm.memory_estimate.device
        assert whole is not None
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        blocks = pool_blocks(program.cache_layers, 128, 128, 1)
        found = []
        for spare in (whole.total, whole.total - 1, whole.total // 2, 0):
            memory = DeviceMemory(1 << 40, spare + executors.RESERVED_NBYTES, is_own=True)
            monkeypatch.setattr(executors, "device_memory", lambda _, memory=memory: memory)
            where = executors.placed(name, program, blocks, 128)
            assert where is not None
            found.append(where.layers)
            assert executors.needs(program, where, blocks, 128, 1)[1].total <= spare
        assert found[0] == N_LAYERS + 1 > found[1] >= found[2] >= found[3] == 0


def test_wrong_divisions_are_refused(path: Path, name: str) -> None:
    for options in ({"gpu_layers": 3}, {"executor": name, "gpu_layers": -1}, {"executor": name, "gpu_layers": "all"},
                    {"executor": name, "cpu_moe": 1}):  # fmt: skip
        with pytest.raises(ParameterError, match=r"gpu_layers|cpu_moe"):
            edgellm.load(path, **options)  # type: ignore[arg-type]


def test_layers_are_told_by_the_names_of_weights(programs: dict[str, Program]) -> None:
    for program in programs.values():
        layers, n = placement.layers_of(program)
        assert n == N_LAYERS and layers == sorted(layers) and layers[0] == -1 and layers[-1] == n
        assert set(layers) == set(range(-1, n + 1))
