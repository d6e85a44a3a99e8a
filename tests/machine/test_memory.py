"""What a model will need, what the machine has, and the refusal when the one is more than the other."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm import loading
from edgellm.formats.errors import MemoryWouldExceedError
from edgellm.formats.gguf import GGUFFile
from edgellm.loading import LoadOptions, memory_need
from edgellm.machine import memory
from edgellm.machine.memory import SystemMemory, peak_rss, system_memory
from edgellm.memory import MemoryNeed, check_fits, estimate
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="writing model files needs the package gguf")


def test_a_need_is_the_sum_of_its_parts() -> None:
    assert MemoryNeed(1, 2, 3, 4).total == 10


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_more_context_needs_more_memory_for_keys_and_values_alone(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    tiny_models.write_tiny_model(path, architecture)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        needs = [estimate(program, gguf.nbytes, n_ctx) for n_ctx in (1024, 2048, 4096)]
    assert needs[0].kv < needs[1].kv < needs[2].kv
    assert {(need.weights, need.work, need.process) for need in needs} == {
        (needs[0].weights, needs[0].work, needs[0].process)
    }
    layers = [layer for layer in program.cache_layers if not layer.window]
    full = sum(layer.n_kv_heads * (layer.head_dim_k + layer.head_dim_v) * 2 for layer in layers)
    assert needs[2].kv - needs[1].kv == 2048 * full


@pytest.mark.parametrize(
    ("quant", "executor", "n_copies"), [("Q8_0", "cpu", 0), ("TQ2_0", "cpu", 1), ("Q8_0", "reference", 1)]
)
def test_what_is_unpacked_to_float32_is_counted(quant: str, executor: str, n_copies: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    tiny_models.write_tiny_model(path, "llama", quant=quant)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        need = memory_need(program, gguf, 64, LoadOptions(executor=executor))
        unpacked = 4 * sum(math.prod(t.shape) for t in program.tensors.values() if t.quant.name == quant)
    others = 4 * sum(math.prod(t.shape) for t in program.tensors.values() if t.quant.name != quant)
    assert n_copies * unpacked <= need.work < n_copies * (unpacked + others) + unpacked * 3 // 4


def test_a_model_that_does_not_fit_is_refused_with_both_numbers() -> None:
    need = MemoryNeed(3 << 30, 1 << 30, 0, 0)
    check_fits(need, SystemMemory(16 << 30, 4 << 30))
    with pytest.raises(MemoryWouldExceedError, match=r"4\.00 GiB .*3\.50 GiB are free"):
        check_fits(need, SystemMemory(16 << 30, 7 << 29))


def test_this_machine_has_memory_and_this_process_took_some() -> None:
    found = system_memory()
    assert 0 < found.available <= found.total
    assert 1 << 20 < peak_rss() < found.total or sys.platform == "win32"


def test_a_control_group_limits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_group_limits", lambda: [(1 << 20, 1 << 19), (1 << 30, 0)])
    assert system_memory() == SystemMemory(1 << 20, 1 << 19)
    monkeypatch.setattr(memory, "_group_limits", lambda: [(1 << 20, 1 << 21)])
    assert system_memory().available == 0


def test_the_limit_of_a_control_group_does_not_count_pages_it_could_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "control_groups", lambda controller: [(tmp_path, True), (tmp_path / "absent", True)])
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\nactive_file 100000\n")
    assert list(memory._group_limits()) == [(1000000, 300000)]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._group_limits()) == []


def test_a_draft_model_of_the_same_file_has_its_weights_once(tmp_path: Path) -> None:
    path, other = tmp_path / "tiny.gguf", tmp_path / "other.gguf"
    tiny_models.write_tiny_model(path, "llama")
    shutil.copy(path, other)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        alone, same, apart = (memory_need(program, gguf, 64, LoadOptions(draft=draft)) for draft in (None, path, other))
        assert 0 < same.draft == apart.draft - alone.weights


def test_what_goes_on_for_a_gpu_counts_and_opens_no_draft_model_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "tiny.gguf", list[MemoryNeed]()
    tiny_models.write_tiny_model(path, "llama")
    monkeypatch.setattr(loading, "check_fits", lambda need, memory: seen.append(need))
    with GGUFFile.open(path) as gguf:
        gone = LoadOptions(draft=tmp_path / "gone.gguf", n_threads=1)
        model: Any = SimpleNamespace(program=build_program(gguf), gguf=gguf, memory_need=None)
        executor, _ = loading._on_cpu(model, 64, gone)
        executor.close()
    assert seen[0].draft == 0 and model.memory_need == seen[0]
