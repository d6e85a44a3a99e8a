"""The native loop that writes a step down for the GPU does what Python does, or is not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_device import device

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.gpu import adapters, walk
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.program import Batch
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")


@pytest.fixture(scope="module")
def gpu() -> Device:
    return Device(adapters.choose(int(device("gpu").partition(":")[2])))


def test_a_device_takes_the_native_loop(gpu: Device) -> None:
    assert "native_walk" in gpu.walk.__qualname__


def test_the_native_loop_gives_the_bits_that_pythons_gives(tmp_path: Path) -> None:
    index = int(device("gpu").partition(":")[2])
    path = tiny_models.write_tiny_model(tmp_path / "m.gguf", "gemma3", "Q8_0")
    with GGUFFile.open(path) as gguf:
        executor = GPUExecutor(build_program(gguf), 8, max_tokens=64, index=index)
        batch = Batch.single(executor.program, range(3, 40))
        native = executor.run(batch).copy()
        executor.device.walk = walk.python_walk(executor.device._lib, executor.device._ffi.NULL)
        assert np.array_equal(executor.run(batch), native)
        executor.close()


def test_an_empty_recording_calls_nothing(gpu: Device) -> None:
    calls: list[str] = []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: calls.append(name)

    walk.python_walk(Noting(), None)(None, gpu.recording([]))
    assert not calls
    assert not len(gpu.play([gpu.recording([])]))  # and the native one ends
    gpu.wait()


def test_another_header_is_not_called(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = walk.FUNCTIONS | {walk.SET_IMMEDIATES: walk.FUNCTIONS[walk.SET_IMMEDIATES][:3]}
    monkeypatch.setattr(walk, "FUNCTIONS", wrong)
    assert walk.native_walk(gpu._lib, gpu._ffi) is None


@pytest.mark.parametrize(
    "change",
    [("i32 %x, i32 %y", "i32 %y, i32 %x"), ("br i1 %same", "br i1 %none"), ("i64 0, ptr null", "i64 1, ptr null")],
)
def test_a_loop_that_makes_other_calls_is_not_taken(
    change: tuple[str, str], gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = walk._IR.replace(*change)
    assert changed != walk._IR
    monkeypatch.setattr(walk, "_IR", changed)
    walk._loop.cache_clear()
    assert walk.native_walk(gpu._lib, gpu._ffi) is None
    walk._loop.cache_clear()


def test_where_no_native_code_can_be_made_python_walks(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise OSError("no memory may be executed here")

    monkeypatch.setattr(walk, "_loop", refuse)
    assert walk.native_walk(gpu._lib, gpu._ffi) is None
