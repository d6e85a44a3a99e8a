"""Adapters on a GPU: the reference's numbers, for tokens that have them; the others keep their bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cpu_programs import alone, sequences
from gpu_device import device

import edgellm
from edgellm.adapters.loading import AdapterChoice as Choice
from edgellm.adapters.loading import open_adapters
from edgellm.adapters.rewrite import adapted
from edgellm.formats.errors import UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

from adapter_files import AROUND, ATTENTION, EXPERTS, FEED_FORWARD, lora_pairs, write_control_vector, write_lora  # noqa: E402

N_BLOCKS = 24
SIZES = {"n_embd": 64, "n_ff": 64, "head_dim": 32}
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


def test_each_token_has_the_numbers_of_its_adapters(program: Program, index: int) -> None:
    lengths, executor = [9, 17, 1, 5], GPUExecutor(program, N_BLOCKS, max_tokens=64, index=index)
    judge = ReferenceExecutor(program, N_BLOCKS, 64, "float16")
    batch = scaled(sequences(program, lengths, [0] * 4, N_BLOCKS))
    more = scaled(sequences(program, [1] * 4, lengths, N_BLOCKS, seed=2))
    found = [executor.run(one).copy() for one in (batch, more)]
    for logits, one in zip(found, (batch, more), strict=True):
        assert nmse(logits, judge.run(one)) < 1e-6
    executor.close()
    executor = GPUExecutor(program, N_BLOCKS, max_tokens=64, index=index)
    for which in range(4):
        one = [alone(batch, which), alone(more, which)]
        own = [np.tile(np.float32(SCALES[which]), (len(part), 1)) for part in one]
        # without a scale that counts the program without adapters runs, as the engine has it
        parts = [replace(part, adapters=scales if which else None) for part, scales in zip(one, own, strict=True)]
        assert np.array_equal(executor.run(parts[0])[-1], found[0][which])
        assert np.array_equal(executor.run(parts[1])[0], found[1][which])
    executor.close()


def test_an_answer_has_its_adapters(files: dict[str, list[Path]], index: int) -> None:
    model, lora, *_ = files["llama"]
    answers = {}
    for name in (f"gpu:{index}", "cpu"):
        with edgellm.load(model, executor=name, n_ctx=128, n_threads=1, lora=[lora]) as llm:
            for scale in (0.0, 1.0):
                choice = {"lora": {lora.stem: scale}}
                answers[name, scale] = llm.generate([3, 4, 5], temperature=0, max_tokens=6, **choice).tokens
    assert answers[f"gpu:{index}", 0.0] == answers["cpu", 0.0] and answers[f"gpu:{index}", 1.0] == answers["cpu", 1.0]
    assert answers["cpu", 0.0] != answers["cpu", 1.0]


def test_adapters_of_a_model_on_two_devices_are_refused_by_name(files: dict[str, list[Path]], index: int) -> None:
    model, lora, *_ = files["llama"]
    with pytest.raises(UnsupportedError, match="whole model on one device"):
        edgellm.load(model, executor=f"gpu:{index}", gpu_layers=1, n_ctx=128, lora=[lora])
