"""Products of every Arm form, run under qemu, have the bits of this machine's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import arm_assembly
import arm_machine
import numpy as np
import pytest
from cpu_programs import FORMS, load_kernel

from edgellm.kernels.cpu.compile import isa, jit, kernel_table
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.weights import SUPERBLOCKS
from edgellm.kernels.ops.sketch import random_tensor

pytestmark = [
    pytest.mark.skipif(arm_machine.QEMU is None, reason="qemu-aarch64 is not here (Debian: qemu-user-static)"),
    pytest.mark.skipif("avx2" not in FORMS, reason="this CPU has no fused multiply-add: other bits"),
]

QUANTS = ("Q5_0", "Q8_0", "Q4_K", "Q6_K")  # a fifth bit, signed bytes, eight minima, sixteen sub-scales and a centre
CASES = (
    (1, 256, 16),
    (1, 2304, 24),
    (2, 512, 24),
    (4, 1280, 16),
    (5, 512, 61),
    (17, 1280, 40),
)  # tokens, columns, rows


class Product(NamedTuple):
    """Rows of float32 quantized, then times a matrix: memory, arguments of both kernels, and where the result is."""

    image: np.ndarray
    quantize: int
    matmul: int
    step: int
    out: slice


def product(base: int, quant: str, n: int, n_in: int, n_out: int) -> Product:
    """The memory as it is at the address ``base``."""
    parts: list[tuple[int, np.ndarray]] = []
    end = 0

    def place(array: np.ndarray) -> int:
        nonlocal end
        data, at = np.ascontiguousarray(array).reshape(-1).view(np.uint8), end
        parts.append((at, data))
        end = -(-(at + data.nbytes) // 64) * 64 + 64
        return base + at

    def op(arguments: tuple[int, ...]) -> int:
        row = np.zeros(layout.OP_FIELDS, np.int64)
        row[layout.ARGUMENTS // 8 :][: len(arguments)] = arguments
        return place(row)

    rng = np.random.default_rng(n_in + n)
    x = (rng.standard_normal((n, n_in)) * np.exp(rng.standard_normal((n, n_in)))).astype(np.float32)
    weights = random_tensor(np.random.default_rng(1), "w", quant, (n_out, n_in)).data.reshape(-1).view(np.uint8)
    x_at, w, q_row, out_row = place(x), place(weights), layout.activation_row_nbytes(n_in), layout.padded(n_out) * 4
    q, out = place(np.zeros(n * q_row, np.uint8)), place(np.zeros(n * out_row, np.uint8))
    scratch_nbytes = layout.matmul_scratch_nbytes(n, n_in)
    step = np.zeros(layout.STEP_FIELDS, np.int64)
    step[layout.N_TOKENS // 8], step[layout.SCRATCH_NBYTES // 8] = n, scratch_nbytes
    step[layout.SCRATCH // 8] = place(np.zeros(scratch_nbytes, np.uint8))
    run = 8 if quant in SUPERBLOCKS else 1
    quantize = op(layout.QUANTIZE(x_at, n_in * 4, q, q_row, n_in // 32, run, layout.N_TOKENS, 0, 0, 1, 0))
    matmul = op(layout.MATMUL(q, q_row, w, len(weights) // n_out, n_out, n_in, out, out_row, 0, layout.N_TOKENS, 0))
    step_at = place(step)
    image = np.zeros(end, np.uint8)
    for at, data in parts:
        image[at : at + data.nbytes] = data
    return Product(image, quantize, matmul, step_at, slice(out - base, out - base + n * out_row))


def run_here(kernels: list[Callable[..., None]], case: tuple[str, int, int, int]) -> np.ndarray:
    """The result of a product by loaded kernels."""
    memory = np.zeros(product(0, *case).image.nbytes + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :]
    made = product(aligned.ctypes.data, *case)
    aligned[: made.image.nbytes] = made.image
    kernels[0](made.quantize, made.step, 0, 1)
    kernels[1](made.matmul, made.step, 0, 1)
    return aligned[made.out].copy()


@pytest.mark.parametrize("quant", QUANTS)
def test_products_of_bytes_on_arm_have_the_bits_of_all_forms(quant: str) -> None:
    names = ("quantize", f"matmul_{quant.lower()}")
    loaded = [load_kernel(name, kernel_table.function(name, "avx2"), isa.detect("avx2")) for name in names]
    expected = [run_here([kernel for _, kernel in loaded], (quant, *case)) for case in CASES]
    assert all(result.any() for result in expected)
    for form in ("neon_dotprod", "neon_i8mm"):
        target = arm_assembly.target("generic", form)
        objects = {name: jit.compile_ir(name, arm_assembly.portable_ir(name, True), target) for name in names}
        for case, result in zip(CASES, expected, strict=True):
            made = product(arm_machine.IMAGE, quant, *case)
            calls = [(names[0], made.quantize, made.step), (names[1], made.matmul, made.step)]
            image = np.frombuffer(arm_machine.run(objects, calls, made.image.tobytes()), np.uint8)
            np.testing.assert_array_equal(image[made.out], result, err_msg=f"{form} {case}")
