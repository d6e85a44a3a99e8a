"""What the kernels are built of: half conversion, exponential, the primitives of a form; code for other CPUs."""

from __future__ import annotations

import functools
import re
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from cpu_programs import FORMS, load_kernel

from edgellm.kernels.cpu.compile import isa, jit, kernel_table
from edgellm.kernels.cpu.lib import simd, vector_math
from edgellm.kernels.cpu.lib.simd import load_f32x16, load_i16x32, load_i32x16, load_u16x16, store_f32x16, store_i32x16

load_i16x16 = simd.make_load(simd.i16x16)

# Compiled here as kernels are: op is the address of the input, step that of the output, thread the number of values.


def half_to_float(source, target, n, _unused):  # type: ignore[no-untyped-def]
    for i in range(0, n, 16):
        store_f32x16(target + i * 4, simd.half_f32x16(load_u16x16(source + i * 2)))


def float_to_half(source, target, n, _unused):  # type: ignore[no-untyped-def]
    for i in range(0, n, 16):
        simd.store_u16x16(target + i * 2, simd.round_half_f32x16(load_f32x16(source + i * 4)))


def exponential(source, target, n, _unused):  # type: ignore[no-untyped-def]
    for i in range(0, n, 16):
        store_f32x16(target + i * 4, vector_math.exp_f32x16(load_f32x16(source + i * 4)))


def multiply_add_pairs(source, target, n, _unused):  # type: ignore[no-untyped-def]
    for i in range(0, n, 16):
        a, b = load_i16x32(source + i * 8), load_i16x32(source + i * 8 + 64)
        store_i32x16(target + i * 4, simd.madd_i16(load_i32x16(target + i * 4), a, b))


def multiply_add_halves(source, target, n, _unused):  # type: ignore[no-untyped-def]
    for i in range(0, n, 8):
        a, b = load_i16x16(source + i * 8), load_i16x16(source + i * 8 + 32)
        simd.store_i32x8(target + i * 4, simd.madd_i16x16(simd.zero_i32x8(), a, b))


def sums(source, target, n, _unused):  # type: ignore[no-untyped-def]
    for i in range(0, n, 16):
        simd.store_f32(target + i // 4, simd.sum_f32x16(load_f32x16(source + i * 4)))


@functools.cache
def compiled(function: Any, form: str) -> Any:
    return load_kernel(function.__name__, function, isa.detect(form))


def apply(function: Any, form: str, values: np.ndarray, out: np.ndarray) -> np.ndarray:
    compiled(function, form)[1](values.ctypes.data, out.ctypes.data, len(values), 0)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_every_half_becomes_its_float(form: str) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    found = apply(half_to_float, form, halves, np.empty(65536, np.float32))
    expected = halves.view(np.float16).astype(np.float32)
    is_number = ~np.isnan(expected)
    assert np.array_equal(found[is_number].view(np.uint32), expected[is_number].view(np.uint32))
    assert np.isnan(found[~is_number]).all()


@pytest.mark.parametrize("form", FORMS)
def test_floats_round_to_the_nearest_half_as_numpy_rounds(form: str) -> None:
    """Every half, every tie between two, the floats beside each tie, overflow, subnormals, random bits."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (exact[:-1] + exact[1:]) / 2
    edges = np.array([65504, 65519.996, 65520, 65536, 1e30, np.inf, 2.0**-24, 2.0**-25, 2.0**-26, 1e-45, 0], np.float32)
    rng = np.random.default_rng(0)
    random_bits = rng.integers(0, 1 << 32, 1 << 20, np.uint32).view(np.float32)
    positive = [exact, ties, np.nextafter(ties, 0), np.nextafter(ties, np.float32(np.inf)), edges]
    values = np.concatenate([*positive, *(-p for p in positive), random_bits])
    values = np.concatenate([values, np.zeros(-len(values) % 16, np.float32)])
    found = apply(float_to_half, form, values, np.empty(len(values), np.uint16))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    is_number = ~np.isnan(values)
    assert np.array_equal(found[is_number], expected[is_number].view(np.uint16))
    assert np.isnan(found[~is_number].view(np.float16)).all()


@pytest.mark.parametrize("form", FORMS)
def test_exponential_is_right_to_two_units_in_the_last_place(form: str) -> None:
    x = np.linspace(-87, 88, 1 << 20).astype(np.float32)
    found = apply(exponential, form, x, np.empty_like(x)).astype(np.float64)
    exact = np.exp(x.astype(np.float64))
    unit = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(found - exact) / unit) <= 2.0


@pytest.mark.parametrize("form", FORMS)
def test_exponential_of_special_numbers(form: str) -> None:
    x = np.array([0, -0.0, -np.inf, -87.5, -1e30, 88, 89, np.inf, 1e30, np.nan, 1e-40, -1e-40, 0, 0, 0, 0], np.float32)
    found = apply(exponential, form, x, np.empty_like(x))
    assert found[0] == found[1] == found[10] == found[11] == 1
    assert (found[2:5] == 0).all()
    assert (found[6:9] == found[5]).all() and np.isfinite(found[5]) and found[5] > 1.6e38
    assert np.isnan(found[9])


@pytest.mark.parametrize("form", FORMS)
def test_multiply_add_of_pairs_is_exact(form: str) -> None:
    rng = np.random.default_rng(1)
    n = 16 * 64
    pairs = rng.integers(-32768, 32768, (n // 16, 2, 32)).astype(np.int16)
    pairs[:16, 0], pairs[:16, 1] = 4096, 16383
    pairs[8:16, 0] = -4096
    pairs[pairs == -32768] = -32767  # two products of -32768 squared would leave int32
    start = rng.integers(-1000, 1000, n).astype(np.int32)
    out = start.copy()
    compiled(multiply_add_pairs, form)[1](pairs.ctypes.data, out.ctypes.data, n, 0)
    products = pairs[:, 0].astype(np.int64) * pairs[:, 1]
    expected = (start + (products[:, ::2] + products[:, 1::2]).reshape(-1)).astype(np.int64)
    assert np.array_equal(out, expected.astype(np.int32))


@pytest.mark.parametrize("form", FORMS)
def test_products_of_a_half_stay_in_its_lanes(form: str) -> None:
    rng = np.random.default_rng(3)
    n = 8 * 64
    values = rng.integers(-32767, 32768, (n // 8, 2, 2, 8)).astype(np.int16)  # (vectors, operands, halves, lanes)
    values[:, 1] //= 16  # eight products of full size would leave int32
    out = np.empty(n, np.int32)
    compiled(multiply_add_halves, form)[1](values.ctypes.data, out.ctypes.data, n, 0)
    products = values[:, 0].astype(np.int64) * values[:, 1]
    assert np.array_equal(out.reshape(-1, 2, 4).sum(-1, dtype=np.int64), products.sum(-1))


def test_sum_of_lanes_has_the_same_bits_in_every_form() -> None:
    x = np.random.default_rng(2).standard_normal(16 * 1000).astype(np.float32)
    results = [apply(sums, form, x, np.empty(1000, np.float32)) for form in FORMS]
    tree = x.reshape(-1, 16)
    for half in (8, 4, 2, 1):
        tree = tree[:, :half] + tree[:, half : 2 * half]
    assert all(np.array_equal(r.view(np.uint32), tree[:, 0].view(np.uint32)) for r in results)


# ---- code for CPUs that are not here (for Arm: test_cpu_arm.py) ------------------------------------------------------

AVX512_FEATURES = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx2,+fma,+f16c"
TARGETS = {
    "alderlake": ("avx_vnni", "x86_64-unknown-linux-gnu", "+avx2,+fma,+f16c,+avxvnni"),
    "cascadelake": ("avx512_vnni", "x86_64-unknown-linux-gnu", AVX512_FEATURES),
    "emeraldrapids": ("avx512_vnni", "x86_64-unknown-linux-gnu", AVX512_FEATURES),
    "icelake-server": ("avx512_vnni", "x86_64-unknown-linux-gnu", AVX512_FEATURES),
    "znver4": ("avx512_vnni", "x86_64-unknown-linux-gnu", AVX512_FEATURES),
    "znver5": ("avx512_vnni", "x86_64-unknown-linux-gnu", AVX512_FEATURES),
}


@functools.cache
def portable_ir(kernel: str, form: str | None = None) -> str:
    return jit.portable_ir(kernel, kernel_table.function(kernel, form))


@pytest.fixture
def assembly() -> Any:
    """assembly(kernel, cpu, own): what jit.compile_ir makes for a CPU, of its form's own kernel if ``own``, as text."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()

    def make(kernel: str, cpu: str, own: bool = False) -> str:
        form, triple, features = TARGETS[cpu]
        try:
            llvm.Target.from_triple(triple)
        except RuntimeError:
            pytest.skip(f"this llvmlite has no code generator for {triple}")
        flags = {name[1:]: True for name in features.split(",")}
        target = isa.Isa(form, triple, cpu, features, isa.primitives(form, flags, triple, cpu))
        return jit.assembly(kernel, portable_ir(kernel, form if own else None), target)

    return make


@pytest.mark.parametrize("cpu", ["cascadelake", "icelake-server"])
def test_products_use_the_dot_instruction_of_avx512(cpu: str, assembly: Any) -> None:
    text = assembly("matmul_q4_k", cpu)
    assert "vpdpwssd" in text and "vfmadd" in text and "zmm" in text


def test_products_use_the_dot_instruction_of_avx_vnni_without_avx512(assembly: Any) -> None:
    text = assembly("matmul_q4_k", "alderlake")
    assert re.search(r"vpdpwssd\s.*%ymm", text) and not re.search(r"%zmm|%ymm(1[6-9]|2\d|3[01])|%k[1-7]", text)


@pytest.mark.parametrize(
    ("cpu", "first"),
    [("znver4", False), ("znver5", True), ("icelake-server", False), ("emeraldrapids", True)],
)
def test_weights_are_fetched_to_the_level_that_is_best_for_a_cpu(cpu: str, first: bool, assembly: Any) -> None:
    """Where panels are packed they always go to the second."""
    found = re.findall(r"\bprefetch\w+", assembly("matmul_q8_0", cpu, own=True))
    assert ("prefetcht0" in found) == first


def test_attention_fills_the_registers_of_avx512(assembly: Any) -> None:
    text = assembly("attention", "cascadelake")
    assert re.search(r"vfmadd\w+\s.*%zmm", text) and "vcvtph2ps" in text
