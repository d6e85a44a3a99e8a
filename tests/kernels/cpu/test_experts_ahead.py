"""A model whose experts do not fit memory: what a step is sent to is fetched, no bit changes, and its size is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from cpu_programs import FORMS, cpu_executor, single_sequence
from tiny_models import N_EXPERT, write_tiny_model

import edgellm
from edgellm.cli.show import command
from edgellm.formats.errors import MemoryWouldExceedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run import experts_ahead
from edgellm.kernels.ops import ExpertMatmul, Op, Route
from edgellm.kernels.program import Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.loading import LoadOptions, memory_need
from edgellm.machine.memory import SystemMemory
from edgellm.models import build_program

N_LAYER, N_USED = 2, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model.gguf", "qwen3moe", "Q8_0", n_layer=N_LAYER)


@pytest.fixture(scope="module")
def program(path: Path) -> Program:
    with GGUFFile.open(path) as gguf:
        return build_program(gguf)


def test_what_is_fetched_are_the_experts_that_the_step_is_sent_to(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = single_sequence(program, 3)
    chosen: list[set[int]] = []

    def hook(_: int, op: Op, read: object) -> None:
        if isinstance(op, Route):
            chosen.append(set(np.unique(read(op.ids)).tolist()))  # type: ignore[operator]

    ReferenceExecutor(program).run(batch, hook)
    weights = [program.tensors[op.weight] for op in program.ops if isinstance(op, ExpertMatmul)]
    experts = {tuple(piece): i for w in weights for i, piece in enumerate(experts_ahead.pieces_of(w).tolist())}
    asked: list[list[int]] = []
    monkeypatch.setattr(
        experts_ahead, "advise", lambda pieces, _: asked.append([experts[tuple(piece)] for piece in pieces])
    )
    executor = cpu_executor(program, 2, 2, 8, FORMS[0])
    executor._in_file = True  # without giving back its pages
    executor.run(batch)
    executor.close()
    assert [set(one) for one in asked] == [experts for experts in chosen for _ in range(3)]
    assert sum(len(one) for one in asked) < len(experts)


def test_experts_from_the_file_change_no_bit(program: Program) -> None:
    batch = single_sequence(program, 40)
    logits = []
    for leaves in (False, True):
        executor = cpu_executor(program, 4, 2, 64, FORMS[0])
        if leaves:
            executor.leave_experts_in_file()
        logits.append(executor.run(batch).copy())
        executor.close()
    assert np.array_equal(*logits)


def test_a_model_larger_than_memory_is_loaded_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoadOptions(n_ctx=64, n_threads=1)
    with GGUFFile.open(path) as gguf:
        need = memory_need(build_program(gguf), gguf, 64, options)
        experts = sum(tensor.nbytes for name, tensor in gguf.tensors.items() if "_exps" in name)
    assert need.in_file == experts - experts * N_USED // N_EXPERT
    with edgellm.load(path, n_ctx=64, n_threads=1) as llm:
        expected = llm.generate([5, 6, 7], max_tokens=8, temperature=0).tokens
    memory = SystemMemory(1 << 40, need.total - need.in_file // 2)
    for module in ("edgellm.loading", "edgellm.memory"):
        monkeypatch.setattr(f"{module}.system_memory", lambda: memory)
    with (
        pytest.warns(RuntimeWarning, match=r"model\.gguf needs .* of its experts stay on the disk"),
        edgellm.load(path, n_ctx=64, n_threads=1) as llm,
    ):
        assert llm.generate([5, 6, 7], max_tokens=8, temperature=0).tokens == expected
    memory = SystemMemory(1 << 40, need.total - need.in_file - 1)
    with pytest.raises(MemoryWouldExceedError, match="experts may stay on the disk"):
        edgellm.load(path, n_ctx=64, n_threads=1)


def test_show_tells_what_must_be_in_memory_and_what_may_stay_on_the_disk(path: Path) -> None:
    shown = json.loads(CliRunner().invoke(command, [str(path), "--json", "-c", "64"]).output)["memory"]
    assert 0 < shown["in_file"] < shown["weights"]
    text = CliRunner().invoke(command, [str(path), "-c", "64"]).output
    assert "of experts may stay on the disk" in text
