"""Types of keys and values: ggml's numbers, each token by itself, and programs that keep them."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import ggml_library
import numpy as np
import pytest

from edgellm.arguments import CACHE_TYPES
from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.cache_types import FLOATS, PACKED, QUANTIZED, numbers_of, stored
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.kv import CachePool, KVLayer, StateLayer, groups_of, pool_nbytes
from edgellm.kernels.ops import Hadamard
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.models import build_program

RNG = np.random.default_rng(0)


def test_the_names_are_the_rows() -> None:
    assert set(CACHE_TYPES) == {*FLOATS, *QUANTIZED, *PACKED}


@pytest.mark.parametrize("name", QUANTIZED)
def test_numbers_are_those_of_ggml(name: str) -> None:
    x = (RNG.standard_normal((7, 96)) * 3).astype(np.float32)
    x[2], x[3, :32], x[4, 5:7] = 0, 1e-30, (9, -9)
    kind, quant = QUANTIZED[name], QUANT_TYPES[name.upper()]
    write = getattr(ggml_library.library(), f"quantize_row_{name}_ref", None)
    if write is None:
        pytest.skip("this xllamacpp wheel hides how ggml writes the type")
    rows = np.zeros((7, quant.row_nbytes(96)), np.uint8)
    write(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(rows.ctypes.data), ctypes.c_int64(x.size))
    assert np.array_equal(kind.numbers(kind.quantize(x)), ggml_library.dequantize(name.upper(), rows))


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_block_holds_its_codes_whole(name: str) -> None:
    kind, x = QUANTIZED[name], RNG.standard_normal((3, 2, 32, 96)).astype(np.float32)
    codes = kind.quantize(x)
    for values in (False, True):
        blocks = kind.write(codes, values=values)
        assert blocks.shape == (3, 2, kind.head_nbytes(96)) and blocks.dtype == np.uint8
        for part, again in zip(codes, kind.read(blocks, 96, values=values), strict=True):
            assert np.array_equal(part, again)


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_no_number_stays_visible(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 64), np.float32)
        x[0, 40] = bad
        found = QUANTIZED[name].numbers(QUANTIZED[name].quantize(x))
        assert np.isnan(found[0, 32:]).all() and np.isfinite(found[1]).all() and np.isfinite(found[0, :32]).all()


@pytest.mark.parametrize("values", [False, True])
def test_a_packed_block_has_a_few_levels_between_the_ends_of_its_groups(values: bool) -> None:
    """Of keys the positions of a dimension, of values 32 dimensions of a position."""
    kind, n_levels = PACKED["kivi2"], 4 if values else 8
    x = RNG.standard_normal((2, 3, 32, 96) if values else (2, 3, 96, 32)).astype(np.float32)
    data = kind.pack(x, values=values)
    assert data.shape == (2, 3, 96 * (10 if values else 14))
    groups, found = x.reshape(-1, 32), kind.unpack(data, 96, values=values).reshape(-1, 32)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    assert (np.abs(found - groups) <= (high - low) * 0.62 / (n_levels - 1)).all()
    assert max(len(np.unique(group)) for group in found) == n_levels
    scale = (high - low) / (n_levels - 1)
    plain = np.round((groups - low) / scale) * scale + low  # levels from end to end
    errors, others = (np.square(one - groups).sum(axis=1) for one in (found, plain))
    assert errors.sum() < others.sum()
    x[0, 0, 5, 7] = np.nan
    found = kind.unpack(kind.pack(x, values=values), 96, values=values)
    assert np.isnan(found[0, 0, 5, :32]).all() and np.isfinite(found[0, 0, 6]).all() and np.isfinite(found[1]).all()
    assert np.isfinite(found[0, 0, 5, 32:]).all()


def far_numbers(middle: float, noise: np.ndarray, *, values: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers about a middle, and what is left of them."""
    x = np.float32(middle) + noise
    return x, PACKED["kivi2"].unpack(PACKED["kivi2"].pack(x, values=values), 32, values=values)


def test_a_packed_group_far_from_zero_is_as_near_as_a_byte_for_its_minimum_lets_it() -> None:
    for middle in (1.0, -1.0, 1e-2, -7e4 / 2, 0.0):  # scales below 1e-4 are coarse
        for spread in (0.0, 1e-3, 0.1, 1.0):
            noise = np.float32(spread * middle) * RNG.uniform(-1, 1, (1, 32, 32)).astype(np.float32)
            for values, step in ((False, 0.2), (True, 0.45)):
                x, found = far_numbers(middle, noise, values=values)
                most = abs(middle) * max(spread * step, 0.07 if spread else 0.007)
                assert np.abs(found - x).max() <= most, (middle, spread, values)


def test_a_packed_group_that_is_constant_but_for_noise_keeps_the_noise() -> None:
    noise = RNG.standard_normal((8, 32, 32)).astype(np.float32)
    for middle, of_keys, of_values in (
        (0, 0.17, 0.36), (5, 0.17, 0.36), (20, 0.18, 0.36), (50, 0.19, 0.36), (75, 0.19, 0.36), (100, 0.2, 0.4),
        (-50, 0.19, 0.36), (150, 0.28, 0.56), (300, 0.6, 1.0),
    ):  # fmt: skip
        for values, most in ((False, of_keys), (True, of_values)):
            x, found = far_numbers(middle, noise, values=values)
            assert np.sqrt(np.mean(np.square(found - x))) < most, (middle, values)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    torch = pytest.importorskip("torch", reason="torch judges")
    x = np.concatenate([RNG.standard_normal(1000), [0.0, -0.0, 1.0039062, 1.01171875, np.inf]]).astype(np.float32)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.array_equal(numbers_of(stored(x, "bf16"), "bf16"), expected)
    assert np.isnan(numbers_of(stored(np.array([np.nan], np.float32), "bf16"), "bf16")).all()


def test_a_pool_has_the_bytes_of_its_types() -> None:
    layers = [KVLayer(2, 64, 96, 0, False, "q8_0", "q4_0"), KVLayer(1, 32, 32, 40, False, "f32", "bf16"), StateLayer(5)]
    blocks = [4, 6, 2]
    pool = CachePool(layers, blocks)
    assert pool_nbytes(layers, blocks) == pool.nbytes
    assert pool.block_nbytes(0) == 2 * 32 * (64 * 34 + 96 * 18) // 32
    assert pool.block_nbytes(1) == 32 * 32 * (4 + 2)
    assert layers[0].seen_nbytes(100) == 2 * 100 * (64 * 34 + 96 * 18) // 32
    pool.arrays[0][0][1] = RNG.integers(0, 256, pool.arrays[0][0][1].shape)
    pool.write_block(0, 2, pool.read_block(0, 1))
    assert np.array_equal(pool.arrays[0][0][2], pool.arrays[0][0][1])


def test_a_window_as_long_as_the_newest_run_has_a_table_of_its_own_before_it() -> None:
    newest = KVLayer(1, 32, 32, newest=True)
    layers = [KVLayer(1, 32, 32), KVLayer(1, 32, 32, newest.group.window), newest, StateLayer(3)]
    for some in (layers, layers[::-1]):
        assert [group.kind for group in groups_of(some)] == ["all", "window", "newest", "state"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")
    folder: Path = tmp_path_factory.mktemp("models")
    files = {
        name: GGUFFile.open(tiny_models.write_tiny_model(folder / f"{name}.gguf", name, head_dim=head_dim))
        for name, head_dim in (("llama", 64), ("gemma4", 32), ("qwen35", 64), ("qwen3", 48))
    }
    return {name: build_program(file) for name, file in files.items()}


@pytest.mark.parametrize("name", ["llama", "gemma4", "qwen35"])
def test_a_rotation_alone_changes_nothing_but_roundings(programs: dict[str, Program], name: str) -> None:
    """Heads of two sizes, layers that share keys, and states: q8_0 with and without it stand close to float32."""
    program = programs[name]
    batch = Batch.single(program, np.arange(3, 43))
    expected = ReferenceExecutor(program, 4).run(batch).copy()
    for rotates in (False, True):
        typed = with_cache_types(program, "q8_0", "q8_0", rotates=rotates)
        assert any(isinstance(op, Hadamard) for op in typed.ops) == rotates
        assert nmse(ReferenceExecutor(typed, 4).run(batch), expected) < 1e-3
    whole = with_cache_types(program, "f32", "f32")
    assert np.array_equal(ReferenceExecutor(whole, 4).run(batch), expected)


def test_types_that_cannot_be_are_refused_by_name(programs: dict[str, Program]) -> None:
    program = programs["llama"]
    assert with_cache_types(program, "f16", "f16") is program
    with pytest.raises(ParameterError, match="q8_0"):
        with_cache_types(program, "q9_9", "f16")
    with pytest.raises(UnsupportedError, match="together, and q8_0"):
        with_cache_types(program, "q8_0", "kivi2")
    with pytest.raises(UnsupportedError, match="heads of 48 dimensions") as found:
        with_cache_types(programs["qwen3"], "q8_0", "f16")
    assert found.value.code == "CACHE_TYPE"
    assert with_cache_types(programs["qwen3"], "bf16", "f32").cache_layers[0].arrays(np.dtype(np.float16))
    latent = dataclasses.replace(program, cache_layers=(KVLayer(1, 64, 32, latent=True),))
    with pytest.raises(UnsupportedError, match="keys that are values"):
        with_cache_types(latent, "q8_0", "q8_0")
