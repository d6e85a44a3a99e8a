"""The table of executors: what each row promises, several executors in one process, and what one of them holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_programs import cpu_executor
from gpu_device import device

from edgellm.engine.cache import pool_blocks
from edgellm.formats.errors import ParameterError
from edgellm.formats.gguf import GGUFFile, QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.executors import CHOICES, EXECUTORS, executor_class, open_executor, resolved
from edgellm.kernels.gpu.attention import PARTIALS_NBYTES
from edgellm.kernels.gpu.device import UPLOAD_NBYTES
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.program import Batch, Executor, Program
from edgellm.memory import estimate
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

TOKENS = list(range(3, 43))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    folder = tmp_path_factory.mktemp("models")
    files = {
        name: GGUFFile.open(tiny_models.write_tiny_model(folder / f"{name}.gguf", name)) for name in ("llama", "gemma3")
    }
    yield {name: build_program(file) for name, file in files.items()}
    for file in files.values():
        file.close()


def logits_of(executor: Executor) -> np.ndarray:
    """Those of all tokens, the second half in steps of their own."""
    program = executor.program
    parts = [executor.run(Batch.single(program, TOKENS[:20])).copy()]
    parts += [executor.run(Batch.single(program, TOKENS[i : i + 1], i)).copy() for i in range(20, 40)]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_row_opens_an_executor_with_a_cache_of_its_own(name: str, programs: dict[str, Program]) -> None:
    program, name = programs["gemma3"], device(name)
    executors = [open_executor(name, program, n_blocks, n_threads=2, max_tokens=32) for n_blocks in (2, [2, 3])]
    for executor, n_blocks in zip(executors, ((2, 2), (2, 3)), strict=True):
        assert executor.program is program and executor.max_tokens == 32
        assert executor.pool.n_blocks == n_blocks and executor.pool.dtype == executor_class(name).kv_dtype
        assert executor.draw is None or executor.draw.max_k >= 40, "as many as top_k keeps by default"
    assert np.array_equal(logits_of(executors[0]), logits_of(executors[1]))
    for executor in (*executors, *executors):
        executor.close()


def test_a_name_that_the_table_does_not_have_is_refused_with_those_that_it_has(programs: dict[str, Program]) -> None:
    for name in ("tpu", "gpu:", "gpu:x", "gpu:-1", "cpu:0", "", None):
        with pytest.raises(ParameterError, match=CHOICES):
            open_executor(name, programs["llama"], 2)  # type: ignore[arg-type]


def test_auto_is_a_device_of_its_own_name() -> None:
    assert resolved("auto") in ("cpu", "gpu") and resolved("gpu:3") == "gpu:3" and resolved("cpu") == "cpu"


@pytest.mark.parametrize("names", [("cpu", "reference"), ("gpu",)])
def test_executors_in_one_process_give_what_each_gives_alone(
    names: tuple[str, ...], programs: dict[str, Program]
) -> None:
    pairs = [(device(name), architecture) for name in names for architecture in programs]

    def opened(name: str, architecture: str) -> Executor:
        return open_executor(name, programs[architecture], 2, n_threads=2, max_tokens=32)

    alone = []
    for pair in pairs:
        executor = opened(*pair)
        alone.append(logits_of(executor))
        executor.close()
    together = [opened(*pair) for pair in pairs]
    steps: list[list[np.ndarray]] = [[] for _ in pairs]
    for start, n in ((0, 20), *((i, 1) for i in range(20, 40))):  # in turns
        for executor, found in zip(together, steps, strict=True):
            found.append(executor.run(Batch.single(executor.program, TOKENS[start : start + n], start)).copy())
    for found, expected in zip(steps, alone, strict=True):
        assert np.array_equal(np.concatenate(found), expected)
    while together:
        together.pop(0).close()
        for executor, expected in zip(together, alone[-len(together) :] if together else (), strict=True):
            assert np.array_equal(logits_of(executor), expected), "closing another has changed it"


# ---- what one holds --------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "SmolLM2 135M": ("llama", {"n_vocab": 49152, "n_layer": 30, "n_embd": 576, "n_ff": 1536, "n_head": 9, "n_kv": 3}),
    "Gemma 3 270M": ("gemma3", {"n_vocab": 262144, "n_layer": 18, "n_embd": 640, "n_ff": 2048, "n_head": 4, "n_kv": 1}),
    "1B": ("llama", {"n_vocab": 128256, "n_layer": 16, "n_embd": 2048, "n_ff": 8192, "n_head": 32, "n_kv": 8}),
}


def program_of(
    architecture: str, path: Path, *, n_vocab: int, n_layer: int, n_embd: int, n_ff: int, n_head: int, n_kv: int
) -> Program:
    """A program of this shape whose weights are pages that nobody touches."""
    head_dim = 256 if architecture == "gemma3" else 64
    with GGUFFile.open(tiny_models.write_tiny_model(path, architecture, sliding_window=512)) as gguf:
        sizes: dict[str, int] = {
            "block_count": n_layer, "embedding_length": n_embd, "feed_forward_length": n_ff, "vocab_size": n_vocab,
            "attention.head_count": n_head, "attention.head_count_kv": n_kv, "context_length": 8192,
            "attention.key_length": head_dim, "attention.value_length": head_dim,
        }  # fmt: skip
        gguf.metadata.update({f"{architecture}.{key}": value for key, value in sizes.items()})
        gguf.metadata["tokenizer.ggml.tokens"] = [""] * n_vocab
        shapes = tiny_models.tensor_shapes(
            architecture, n_vocab, n_layer, n_embd, n_ff, n_head * head_dim, n_kv * head_dim, head_dim, True
        )
        gguf.tensors.clear()
        for name, shape in shapes.items():
            quant = QUANT_TYPES["Q8_0" if len(shape) > 1 else "F32"]
            rows = shape[0] if len(shape) > 1 else 1
            data = np.zeros((rows, quant.row_nbytes(shape[-1])), np.uint8)
            gguf.tensors[name] = QuantizedTensor(name, shape, quant, data)
        return build_program(gguf)


def held(executor: Executor) -> int:
    """Bytes of all arrays that can be reached from an executor, those of the program and the cache left out."""
    found: dict[int, int] = {}
    seen = {id(executor.program), id(executor.pool)}
    weights = {id(_owner(tensor.data)) for tensor in executor.program.tensors.values()}
    weights |= {id(_owner(array)) for arrays in executor.pool.arrays for array in arrays}
    todo: list[Any] = [executor]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            owner = _owner(thing)
            if id(owner) not in weights:
                found[id(owner)] = owner.nbytes
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple | set):
            todo += thing
        elif type(thing).__module__.startswith("edgellm.kernels") and hasattr(thing, "__dict__"):
            todo += vars(thing).values()
    return sum(found.values())


def _owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("max_tokens", [1, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_what_a_cpu_executor_holds(shape: str, max_tokens: int, tmp_path: Path) -> None:
    architecture, sizes = SHAPES[shape]
    program, n_ctx = program_of(architecture, tmp_path / "tiny.gguf", **sizes), 4096
    need = estimate(program, 0, n_ctx, max_tokens, n_threads=3)
    executor = cpu_executor(program, pool_blocks(program.cache_layers, n_ctx, max_tokens), 3, max_tokens)
    assert need.kv == executor.pool.nbytes
    assert need.work == pytest.approx(held(executor), rel=0.05)
    executor.close()


def test_the_estimate_is_what_the_reference_holds(programs: dict[str, Program]) -> None:
    for program in programs.values():
        need = estimate(program, 0, 64, 64, executor="reference")
        executor = open_executor("reference", program, pool_blocks(program.cache_layers, 64, 64), max_tokens=64)
        executor.run(Batch.single(program, TOKENS, outputs="last"))
        rows = {"tokens": 64, "outputs": 1}
        buffers = 4 * sum(b.width * rows[b.rows] for b in program.buffers.values())  # gone after a step
        assert need.kv == executor.pool.nbytes
        assert need.work - buffers == pytest.approx(held(executor), rel=0.05)


def test_the_estimate_is_what_a_gpu_executor_holds(programs: dict[str, Program]) -> None:
    name = device("gpu")
    for program in programs.values():
        need = estimate(program, 1 << 40, 64, 64, executor=name)
        executor = open_executor(name, program, pool_blocks(program.cache_layers, 64, 64), max_tokens=64)
        assert isinstance(executor, GPUExecutor) and need.kv == executor.pool.nbytes
        before = executor.device.nbytes
        executor.run(Batch.single(program, TOKENS, outputs="all"))
        assert before <= executor.device.nbytes <= need.kv + need.weights + need.work
        spare = PARTIALS_NBYTES + UPLOAD_NBYTES
        small = 256 << 10  # norms, the batch, what finds the largest logits
        assert need.kv + need.weights + need.work - spare == pytest.approx(before, abs=small)
        executor.close()
