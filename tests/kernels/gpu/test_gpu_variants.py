"""The weakest device that may be: no optional feature, the least limits, bounds checks in every shader. The bits stay.

A driver differs from another in what it offers. Devices are opened with nothing but what every one must have, so that
one software driver stands for all of these, whatever it can do itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_device import device

from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import executors
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.gpu import adapters, selftest
from edgellm.kernels.gpu.device import LEAST, Device
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

VARIANTS: dict[str, dict[str, str]] = {
    "as the driver is": {},
    "bounds checks": {"EDGELLM_GPU_CHECKED": "1"},
    "the least limits": {"EDGELLM_GPU_LEAST": "1"},
}
# name: (architecture, type of weights, layers on the GPU, experts on the CPU)
MODELS: dict[str, tuple[str, str, Any, bool]] = {
    "llama Q4_K": ("llama", "Q4_K", "auto", False),
    "gemma3 Q6_K": ("gemma3", "Q6_K", "auto", False),
    "gpt-oss Q8_0": ("gpt-oss", "Q8_0", "auto", False),
    "lfm2 Q5_0": ("lfm2", "Q5_0", 1, False),
    "falcon-h1 Q5_0": ("falcon-h1", "Q5_0", "auto", False),
    "gemma4 Q8_0": ("gemma4", "Q8_0", "auto", False),
    "gemma3n Q5_0": ("gemma3n", "Q5_0", "auto", False),
    "deepseek2 Q8_0": ("deepseek2", "Q8_0", "auto", False),
    "qwen3moe Q4_0": ("qwen3moe", "Q4_0", "auto", True),
}
SHADERS = ("matmul_q4_k", "expert_matmul_q8_0", "attention", "attention_kivi2", "pack_kv", "short_conv", "embed_q6_k")
WEAK = {
    "subgroups": "fn f(x: f32) -> f32 { return subgroupAdd(x); }",
    "f16": "enable f16; fn f(x: f32) -> f32 { return f32(f16(x)); }",
}


@pytest.fixture(scope="module")
def index() -> int:
    return int(device("gpu").partition(":")[2])


@pytest.fixture(params=[name for name in VARIANTS if VARIANTS[name]])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in VARIANTS[request.param].items():
        monkeypatch.setenv(name, value)
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    folder = tmp_path_factory.mktemp("models")
    files = {
        name: GGUFFile.open(tiny_models.write_tiny_model(folder / f"{name}.gguf", architecture, quant))
        for name, (architecture, quant, _, _) in MODELS.items()
    }
    yield {name: build_program(file) for name, file in files.items()}
    for file in files.values():
        file.close()


@pytest.fixture(scope="module")
def plain(index: int, programs: dict[str, Program]) -> dict[str, list[np.ndarray]]:
    return {name: logits_of(program, name, index) for name, program in programs.items()}


def steps(program: Program) -> list[Batch]:
    shapes = ((37, 0), (1, 37), (5, 38))
    return [Batch.single(program, np.random.default_rng(n).integers(3, program.n_vocab, n), s) for n, s in shapes]


def logits_of(program: Program, name: str, index: int) -> list[np.ndarray]:
    _, _, layers, cpu_moe = MODELS[name]
    executor = executors.open_executor(
        f"gpu:{index}", program, 8, max_tokens=64, gpu_layers=layers, cpu_moe=cpu_moe
    )  # fmt: skip
    found = [executor.run(batch).copy() for batch in steps(program)]
    executor.close()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_the_same_bits(
    name: str, variant: str, index: int, programs: dict[str, Program], plain: dict[str, list[np.ndarray]]
) -> None:
    program = programs[name]
    judge = ReferenceExecutor(program, 8, 64, "float16")
    for found, before, batch in zip(logits_of(program, name, index), plain[name], steps(program), strict=True):
        assert np.array_equal(found, before)
        assert nmse(found, judge.run(batch)) < 1e-6


@pytest.mark.parametrize("name", SHADERS)
def test_shaders_agree_with_the_reference(name: str, variant: str, index: int) -> None:
    result = selftest.try_shader(name, index, (1, 25))
    assert result.ok, result


@pytest.mark.parametrize("feature", WEAK)
def test_a_device_is_opened_with_what_is_needed_and_nothing_else(feature: str, index: int) -> None:
    """So a shader that wants more is refused here, whatever the driver has."""
    gpu = Device(adapters.choose(index))
    assert set(gpu._device.features) == set(adapters.NEEDED)
    source = WEAK[feature] + "\n@compute @workgroup_size(1) fn main() { _ = f(1.0); }"
    with pytest.raises(EdgeLLMError):
        gpu.pipeline(source, "", 0)
    gpu.close()


def test_the_least_limits_are_those_of_the_device(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_GPU_LEAST", "1")
    gpu = Device(adapters.choose(index))
    assert {name: gpu._device.limits[name] for name in LEAST} == LEAST
    assert gpu.max_binding == 128 << 20 and gpu.workgroup_nbytes == 16 << 10
    gpu.close()
