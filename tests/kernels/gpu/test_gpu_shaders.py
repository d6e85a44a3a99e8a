"""Every shader against the reference, in odd shapes, and the same bits in any number of columns."""

from __future__ import annotations

import pytest
from gpu_device import device

from edgellm.kernels.gpu import selftest, sources
from edgellm.kernels.gpu.lowering import RULES
from edgellm.kernels.ops import OPS

FEW = (1, 17)  # tokens: a row a thread, and tiles
ALIKE = [f"attention_{kind}" for kind in ("bf16", "f32", "q4_0", "q4_1", "q5_0")]  # test_gpu_executor, or alike
EVERY_COLUMN = ("F32", "Q4_0", "Q6_K")  # types whose products are compiled for all numbers of columns


@pytest.fixture(scope="module")
def index() -> int:
    return int(device("gpu").partition(":")[2])


def test_the_types_of_the_cpu_have_shaders_and_every_shader_is_tried() -> None:
    from edgellm.kernels.cpu.weights import FLOAT, QUANTIZED

    assert set(sources.TYPES) == {*QUANTIZED, *FLOAT}
    tried = {name for op in RULES for name in selftest.SHADERS if f"{name}_".startswith(f"{op.name}_")}
    assert tried == set(selftest.SHADERS) and set(RULES) <= set(OPS)


@pytest.mark.parametrize("name", [name for name in selftest.SHADERS if name not in ALIKE])
def test_a_shader_agrees_with_the_reference(name: str, index: int) -> None:
    result = selftest.try_shader(name, index, FEW)
    assert result.ok, result


def test_a_step_of_a_decoder_has_the_bits_of_its_ops_and_of_its_tokens_alone(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = selftest.try_step(index)
    assert result.ok, result
    real = sources.expert_down
    monkeypatch.setattr(
        sources,
        "expert_down",
        lambda *given, **named: real(*given, **named).replace("sum = fma(", "sum = 1.0001 * fma("),
    )
    assert "op by op" in selftest.try_step(index).detail


@pytest.mark.parametrize("quant", sources.TYPES)
def test_a_token_has_the_same_bits_alone_and_among_many(quant: str, index: int) -> None:
    result = selftest.try_order(quant, index, selftest.COLUMNS if quant in EVERY_COLUMN else (1, 33))
    assert result.ok, result
