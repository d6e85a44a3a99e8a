"""What a model takes on each side is known before it is loaded, and held against what each side has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gpu_device import device

from edgellm.cli.app import edgellm as command
from edgellm.formats.errors import MemoryWouldExceedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.gpu import adapters, memory
from edgellm.kernels.gpu.attention import PARTIALS_NBYTES
from edgellm.kernels.gpu.device import UPLOAD_NBYTES
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.gpu.memory import DeviceMemory
from edgellm.kernels.kv import BLOCK_TOKENS, pool_nbytes
from edgellm.kernels.placement import DeviceNeed
from edgellm.kernels.program import Batch
from edgellm.loading import LoadOptions
from edgellm.machine.memory import SystemMemory, system_memory
from edgellm.memory import MemoryNeed, check_fits
from edgellm.models import build_program

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture(scope="module")
def name() -> str:
    return device("gpu")


@pytest.mark.parametrize("options", [[], ["-ngl", "1"], ["--cpu-moe"], ["-ngl", "0"]])
def test_show_prints_the_plan_that_loading_keeps(options: list[str], name: str, tmp_path: Path) -> None:
    tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")
    path = tiny_models.write_tiny_model(tmp_path / "tiny.gguf", "qwen3moe", n_layer=3)
    arguments = ["show", str(path), "--device", name, "-c", "128", *options]
    shown = CliRunner().invoke(command, arguments).output
    plan = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).output)["memory"]
    if options == ["-ngl", "0"]:
        assert "device" not in plan and plan["runs_on"] == "cpu"
        return
    assert "on the GPU" in shown and "on the CPU" in shown and plan["runs_on"].startswith(name)
    there = plan["device"]
    assert there["total"] == there["weights"] + there["kv"] + there["work"]
    assert all(0 <= there[part] <= plan[part] for part in ("weights", "kv", "work", "total"))
    assert (there["layers"], there["n_layers"]) == ((1, 3) if "-ngl" in options else (3, 3))
    import edgellm

    split: dict[str, Any] = {"gpu_layers": 1} if "-ngl" in options else {"cpu_moe": "--cpu-moe" in options}
    with edgellm.load(path, executor=name, n_ctx=128, **split) as llm:
        assert llm.memory_estimate.total == plan["total"] and llm.runs_on == plan["runs_on"]


@pytest.mark.parametrize("architecture", ["llama", "olmo2", "olmoe", "gpt-oss", "qwen35", "mamba2", "deepseek2"])
def test_the_plan_is_what_the_device_holds(architecture: str, name: str, tmp_path: Path) -> None:
    """Behind a long step, and one of a token; with as much of partial results and of what is read back as there was."""
    tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")
    with GGUFFile.open(tiny_models.write_tiny_model(tmp_path / "tiny.gguf", architecture, "Q8_0", n_layer=3)) as gguf:
        program, n = build_program(gguf), 160
        blocks = [n // BLOCK_TOKENS + 1] * len(program.groups)
        plan = GPUExecutor.weights_nbytes(program) + pool_nbytes(program.cache_layers, blocks, GPUExecutor.kv_dtype)
        plan += GPUExecutor.work_nbytes(program, n, 1) - PARTIALS_NBYTES - UPLOAD_NBYTES
        executor = GPUExecutor(program, blocks, max_tokens=n, index=int(name.partition(":")[2]))
        tokens = np.random.default_rng(0).integers(3, program.n_vocab, n + 1)
        executor.run(Batch.single(program, tokens[:n], 0, "last"))
        executor.run(Batch.single(program, tokens[n:], n))
        scratches = executor._there.scratches
        plan += executor.device._staging.size + (scratches["partials"].size if "partials" in scratches else 0)
        assert abs(plan - executor.device.nbytes) < 0.01 * executor.device.nbytes
        assert ("q elsewhere" in scratches) == (architecture in ("olmo2", "olmoe"))
        executor.close()


def test_each_side_is_held_against_its_own_memory() -> None:
    need = MemoryNeed(6 * GIB, GIB, GIB, 0, DeviceNeed(4 * GIB, GIB // 2, GIB // 2))
    card = DeviceMemory(8 * GIB, 6 * GIB, is_own=True)
    assert need.of_device(card) == 5 * GIB and need.of_system(card) == 3 * GIB
    check_fits(need, SystemMemory(16 * GIB, 4 * GIB), card)
    with pytest.raises(MemoryWouldExceedError, match=r"5.00 GiB on the GPU .*4.50 GiB are free.*--gpu-layers"):
        check_fits(need, SystemMemory(16 * GIB, 4 * GIB), card._replace(available=9 * GIB // 2))
    with pytest.raises(MemoryWouldExceedError, match=r"needs 3.00 GiB"):
        check_fits(need, SystemMemory(16 * GIB, 2 * GIB), card)
    shared = card._replace(is_own=False)
    assert need.of_system(shared) == need.total and need.of_device(shared) == 0
    with pytest.raises(MemoryWouldExceedError, match=r"needs 8.00 GiB"):
        check_fits(need, SystemMemory(16 * GIB, 4 * GIB), shared)


CARDS: dict[str, tuple[str, str, list[DeviceMemory], Any]] = {
    "a card has its own": (
        "DiscreteGPU", "Vulkan", [DeviceMemory(GIB, GIB, False), DeviceMemory(8 * GIB, 7 * GIB, True)],
        lambda s: DeviceMemory(8 * GIB, 7 * GIB, True),
    ),
    "one that nobody tells of": ("DiscreteGPU", "D3D12", [], lambda s: DeviceMemory(*s, False)),
    "one without any": (
        "IntegratedGPU", "Vulkan", [DeviceMemory(MIB, MIB, True), DeviceMemory(2 * MIB, MIB, False)],
        lambda s: DeviceMemory(3 * MIB, 2 * MIB, False),
    ),
    "Apple's": ("IntegratedGPU", "Metal", [], lambda s: DeviceMemory(s[0] * 3 // 4, min(s[1], s[0] * 3 // 4), False)),
}  # fmt: skip


@pytest.mark.parametrize("case", CARDS)
def test_the_memory_of_a_device_is_what_its_driver_tells(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, interface, heaps, expected = CARDS[case]
    system = system_memory()
    monkeypatch.setattr(memory, "_told_of", lambda name: heaps)
    monkeypatch.setattr(memory, "system_memory", lambda: system)
    adapter = adapters.Adapter(0, "a card", kind, interface, "", False, (), None)
    assert memory.device_memory(adapter) == expected((system.total, system.available))


def test_vulkan_tells_of_the_heaps_of_every_device(name: str) -> None:
    found = adapters.choose(int(name.partition(":")[2]))
    if found.interface != "Vulkan":
        pytest.skip("the first adapter is none of Vulkan's")
    heaps = memory._told_of(found.name)
    assert heaps and all(heap.total > 0 and 0 <= heap.available <= heap.total for heap in heaps)


def test_a_server_counts_a_cards_memory_apart(name: str) -> None:
    pytest.importorskip("msgspec", reason="the server needs its extra: pip install edgellm[server]")
    from edgellm.server.models import ModelEntry, Models

    models = Models([], LoadOptions(executor=name), budget=4 * GIB)
    assert models.device is not None
    models.device = DeviceMemory(8 * GIB, 8 * GIB, is_own=True)

    class Loaded:
        memory_estimate = MemoryNeed(6 * GIB, 0, 0, 0, DeviceNeed(5 * GIB, 0, 0))

    entry: Any = ModelEntry(("one",), Path("one.gguf"), llm=Loaded())  # type: ignore[arg-type]
    assert models._has_room([entry], 2 * GIB, 3 * GIB)
    assert not models._has_room([entry], 2 * GIB, 4 * GIB), "on the card"
    assert not models._has_room([entry], 4 * GIB, 0), "in the system"


def test_the_rate_of_a_plain_copy_is_measured(name: str) -> None:
    from edgellm.kernels.gpu.copy_bandwidth import copy_bandwidth

    assert copy_bandwidth(int(name.partition(":")[2]), 1 << 20) > 0
