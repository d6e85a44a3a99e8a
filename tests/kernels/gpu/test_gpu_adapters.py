"""Adapters on a GPU: the reference's numbers, for tokens that have them; the others keep their bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_programs import alone, sequences
from gpu_device import device

import edgellm
from edgellm.adapters.loading import AdapterChoice as Choice
from edgellm.adapters.loading import open_adapters
from edgellm.adapters.rewrite import adapted
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.executors import GPULayers, open_executor
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.ops import AdapterDown
from edgellm.kernels.program import Batch, Op, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.split import SplitExecutor
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

from adapter_files import AROUND, ATTENTION, EXPERTS, FEED_FORWARD, lora_pairs, write_control_vector, write_lora  # noqa: E402

N_BLOCKS = 24
SIZES = {"n_embd": 64, "n_ff": 64, "head_dim": 32}
DIVISIONS: dict[str, tuple[GPULayers, bool]] = {
    "whole": ("auto", False), "one layer": (1, False), "all but the embedding": (2, False), "experts apart": (3, True),
}  # fmt: skip
"""Layers on the GPU, of 2, and whether experts stay on the CPU."""

SCALES = ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (-0.7, 0.0, 0.5), (0.3, 2.0, 0.0))
CHANGES = {"llama": ((*ATTENTION, *AROUND), (*FEED_FORWARD, "attn_q.weight")), "qwen2moe": (EXPERTS, ATTENTION)}
"""Architecture -> what each of two adapters changes."""


@pytest.fixture(scope="module")
def index() -> int:
    return int(device("gpu").partition(":")[2])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Of each architecture a model, two adapters of different ranks, and a control vector."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for architecture, changes in CHANGES.items():
        model = tiny_models.write_tiny_model(
            folder / f"{architecture}.gguf", architecture, "Q8_0", tied=False, seed=3, **SIZES
        )
        loras = [
            write_lora(
                folder / f"{architecture} {i}.gguf", lora_pairs(model, endings, 5 + 30 * i, i, 0.2), architecture
            )
            for i, endings in enumerate(changes)
        ]
        vector = folder / f"{architecture} vector.gguf"
        write_control_vector(vector, {"direction.1": np.linspace(-1, 1, 64, dtype=np.float32)})
        found[architecture] = [model, *loras, vector]
    return found


@pytest.fixture(params=CHANGES)
def program(request: pytest.FixtureRequest, files: dict[str, list[Path]]) -> Iterator[Program]:
    model, *loras, vector = files[request.param]
    loaded = open_adapters([Choice(path) for path in loras], [Choice(vector)])
    with GGUFFile.open(model) as gguf:
        plain = build_program(gguf)
        yield replace(plain, adapted=adapted(plain, loaded.adapters))
    loaded.close()


def scaled(batch: Batch) -> Batch:
    """Each sequence with scales of its own, the first with none."""
    return replace(batch, adapters=np.float32(SCALES)[batch.sequences])


def opened(program: Program, index: int, division: str) -> Any:
    layers, cpu_moe = DIVISIONS[division]
    return open_executor(
        f"gpu:{index}", program, N_BLOCKS, n_threads=1, max_tokens=64, gpu_layers=layers, cpu_moe=cpu_moe
    )


@pytest.mark.parametrize("division", DIVISIONS)
def test_each_token_has_the_numbers_of_its_adapters(program: Program, index: int, division: str) -> None:
    lengths, executor = [9, 17, 1, 5], opened(program, index, division)
    has_experts = any(type(op).__name__.startswith("Expert") for op in program.ops)
    is_split = division != "whole" and (has_experts or division != "experts apart")
    assert isinstance(executor, SplitExecutor if is_split else GPUExecutor)
    judge = ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    batch = scaled(sequences(program, lengths, [0] * 4, N_BLOCKS))
    more = scaled(sequences(program, [1] * 4, lengths, N_BLOCKS, seed=2))
    found = [executor.run(one).copy() for one in (batch, more)]
    for logits, one in zip(found, (batch, more), strict=True):
        assert nmse(logits, judge.run(one)) < 1e-6
    executor.close()
    executor = opened(program, index, division)
    for which in range(4):
        one = [alone(batch, which), alone(more, which)]
        own = [np.tile(np.float32(SCALES[which]), (len(part), 1)) for part in one]
        # without a scale that counts the program without adapters runs, as the engine has it
        parts = [replace(part, adapters=scales if which else None) for part, scales in zip(one, own, strict=True)]
        assert np.array_equal(executor.run(parts[0])[-1], found[0][which])
        assert np.array_equal(executor.run(parts[1])[0], found[1][which])
    executor.close()


@pytest.mark.parametrize("division", [name for name in DIVISIONS if name != "whole"])
def test_a_hook_sees_every_op_and_what_it_changes_counts(program: Program, index: int, division: str) -> None:
    executor, judge = opened(program, index, division), ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    batch, seen = scaled(sequences(program, [9, 17, 1, 5], [0] * 4, N_BLOCKS)), list[Op]()
    plain = executor.run(batch).copy()
    assert np.array_equal(executor.run(batch, lambda at, op, read: seen.append(op)), plain)
    assert program.adapted is not None and tuple(seen) == program.adapted.ops

    def change(at: int, op: Op, read: Any) -> None:
        if isinstance(op, AdapterDown):
            read(op.out)[...] *= np.float32(0.5)

    assert nmse(executor.run(batch, change), judge.run(batch, change)) < 1e-6 < nmse(executor.run(batch, change), plain)
    executor.close()


def test_an_answer_has_its_adapters_wherever_its_layers_are(files: dict[str, Path], index: int) -> None:
    model, lora, *_ = files["llama"]
    answers: list[list[tuple[int, ...]]] = []
    for options in ({"executor": "cpu"}, {"executor": f"gpu:{index}"}, {"executor": f"gpu:{index}", "gpu_layers": 1}):
        with edgellm.load(model, n_ctx=128, n_threads=1, lora=[lora], **options) as llm:
            answers.append([
                tuple(llm.generate([3, 4, 5], temperature=0, max_tokens=6, lora={lora.stem: scale}).tokens)
                for scale in (0.0, 1.0)
            ])  # fmt: skip
    assert answers[0][0] != answers[0][1]
    assert answers[0] == answers[1] == answers[2]
