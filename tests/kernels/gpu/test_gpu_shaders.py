"""Every shader against the reference, in odd shapes, and the same bits in any number of columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gpu_device import device

from edgellm.kernels.cpu.compile import trials
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.gpu import selftest, sources
from edgellm.kernels.gpu.device import Device, Pipeline
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.gpu.lowering import RULES
from edgellm.kernels.kv import CachePool, KVLayer
from edgellm.kernels.ops import OPS, Embed, ExpertMatmul, ExpertSum, Matmul, Route, SelectOutputs
from edgellm.kernels.ops.sketch import N_VOCAB, Sketch
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor

_plain_pipeline = Device.pipeline
FEW = (1, 25)  # tokens: a row a thread, and tiles
ALIKE = [f"attention_{kind}" for kind in ("bf16", "f32", "q4_0", "q4_1", "q5_0")]  # test_gpu_executor, or alike
CHOICES: list[dict[str, Any]] = [
    {"n": 128, "n_used": 8, "over": "chosen", "scores": "softmax", "biased": False},
    {"n": 33, "n_used": 4, "over": "all", "scores": "sigmoid", "biased": True, "factor": 2.5},
    {"n": 30, "n_used": 5, "over": "all", "scores": "softmax", "biased": True, "groups": (6, 2)},
    {"n": 256, "n_used": 8, "over": "chosen", "scores": "sigmoid", "biased": True, "groups": (8, 4), "best": 2},
    {"n": 16, "n_used": 3, "over": "all", "scores": "softmax", "biased": False, "groups": (4, 2), "best": 1},
]
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


def test_every_half_is_read_as_it_is_and_a_driver_that_drops_small_ones_is_seen(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selftest.try_halves(index).ok
    monkeypatch.setattr(Device, "pipeline", _without_small_halves)
    result = selftest.try_halves(index)
    assert result.nmse == 2 * 1023 / 65536 and "is read as 0.0" in result.detail


def test_packed_keys_with_small_scales_are_read_where_a_driver_drops_small_halves(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale's byte, upper bits of a float16, is below 8 where that is below 2^-14."""
    plain = trials.fill_randomly

    def small(pool: CachePool) -> None:
        plain(pool)
        for layer, arrays in zip(pool.layers, pool.arrays, strict=True):
            if isinstance(layer, KVLayer) and layer.type_k == "kivi2":
                for array, dim in zip(arrays, (layer.head_dim_k, layer.head_dim_v), strict=False):
                    scales = array[..., 8 * dim : 10 * dim]
                    scales[...] = 1 + scales % 7
            elif isinstance(layer, KVLayer) and layer.newest:
                for array in arrays:
                    array[...] = 0

    monkeypatch.setattr(trials, "fill_randomly", small)
    monkeypatch.setattr(Device, "pipeline", _without_small_halves)
    result = selftest.try_shader("attention_kivi2", index, FEW)
    assert result.ok, result


def _without_small_halves(self: Device, source: str, kinds: str, immediates: int) -> Pipeline:
    """A driver that reads float16 below 2^-14 as 0, as WGSL lets it."""
    dropped = """
fn without_small(w: u32) -> vec2<f32> {
  let v = unpack2x16float(w);
  return select(v, vec2<f32>(0.0), abs(v) < vec2<f32>(0x1p-14));
}
"""
    return _plain_pipeline(self, source.replace("unpack2x16float(", "without_small(") + dropped, kinds, immediates)


@pytest.mark.parametrize("choice", CHOICES)
def test_experts_chosen_in_their_first_product_are_those_chosen_alone(choice: dict[str, Any], index: int) -> None:
    s, given = Sketch(np.random.default_rng(3), 8), dict(choice)
    n, n_used, d = given.pop("n"), given.pop("n_used"), 64
    x, router, ids, probs = s.buffer(d), s.buffer(n), s.buffer(n_used, "int32"), s.buffer(n_used)
    made, summed, last = s.buffer(n_used * d), s.buffer(d), s.buffer(d)
    s.buffers[last] = replace(s.buffers[last], rows="outputs")
    bias = s.tensor("F32", (n,)) if given.pop("biased") else None
    s.ops += [Embed(s.tensor("F32", (N_VOCAB, d)), x, 8.0), Matmul(x, s.tensor("F32", (n, d)), router)]
    s.ops += [
        Route(router, ids, probs, bias=bias, **given),
        ExpertMatmul(x, ids, s.tensor("F32", (n, d, d)), made, n_used),
    ]
    s.ops += [ExpertSum(made, probs, summed), SelectOutputs(summed, last)]
    s.ops.append(Matmul(last, s.tensor("F32", (N_VOCAB, d)), Program.output))
    executor = GPUExecutor(s.program(), 1, max_tokens=8, index=index)
    for tokens in ([5], [1, 2, 3, 4, 5, 6, 7]):
        batch = Batch.single(executor.program, tokens, outputs="all")
        fused = executor.run(batch).copy()
        assert np.array_equal(fused, executor.run(batch, lambda *_: None))
        assert nmse(fused, ReferenceExecutor(executor.program, 1, 8, "float16").run(batch)) < selftest.LIMIT
    executor.close()


@pytest.mark.parametrize("quant", sources.TYPES)
def test_a_token_has_the_same_bits_alone_and_among_many(quant: str, index: int) -> None:
    result = selftest.try_order(quant, index, selftest.COLUMNS if quant in EVERY_COLUMN else (1, 33))
    assert result.ok, result
