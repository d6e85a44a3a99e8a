"""Products of float weights: rows and tokens that go together have the bits of those that go alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_programs import load_kernel

from edgellm.formats.gguf import QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.cpu.compile import isa
from edgellm.kernels.cpu.kernels.float_matmul import make_float_matmul
from edgellm.kernels.cpu.kernels.float_panels import LEAST_TOKENS, make_panel_matmul
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run.panels import panels

WIDE = ("amx", "avx512_vnni")
TYPES = {"F32": np.float32, "F16": np.float16}


def padded_rows(rng: np.random.Generator, n: int, width: int, dtype: type) -> np.ndarray:
    """Random rows, each begun at a whole register."""
    rows = np.zeros((n, layout.padded(width)), dtype)
    rows[:, :width] = rng.standard_normal((n, width))
    return rows


def product(
    kernel: Any, x: np.ndarray, w: np.ndarray, bias: np.ndarray, n: int, n_out: int, n_in: int, *, biased: bool,
    n_threads: int = 1,
) -> np.ndarray:  # fmt: skip
    """What the kernel makes of the first n rows of x, all of its work done by one thread of so many."""
    out, step = np.zeros((n, layout.padded(n_out)), np.float32), np.zeros(layout.STEP_FIELDS, np.int64)
    step[layout.N_TOKENS // 8] = n
    given = dict.fromkeys(layout.MATMUL._fields, 0) | {
        "x": x.ctypes.data, "x_row": x.strides[0], "w": w.ctypes.data, "w_row": w.strides[0],
        "n_out": n_out, "n_in": n_in, "out": out.ctypes.data, "out_row": out.strides[0],
        "bias": bias.ctypes.data * biased, "row_kind": layout.N_TOKENS,
    }  # fmt: skip
    op = np.zeros(layout.OP_FIELDS, np.int64)
    arguments = list(layout.MATMUL(**given))
    op[layout.ARGUMENTS // 8 : layout.ARGUMENTS // 8 + len(arguments)] = arguments
    kernel(op.ctypes.data, step.ctypes.data, 0, n_threads)
    return out


@pytest.mark.skipif(isa.detect().name not in WIDE, reason="this CPU has no 32 wide registers")
@pytest.mark.parametrize("quant", TYPES)
def test_four_rows_at_once_have_the_bits_of_one_by_one(quant: str) -> None:
    target, rng = isa.detect(), np.random.default_rng(1)
    kernels = [load_kernel(f"times_{form}", make_float_matmul(quant, form), target) for form in (None, target.name)]
    for n, n_out, n_in, biased in ((13, 40, 96, True), (4, 37, 48, False), (6, 21, 37, True), (3, 16, 32, False)):
        x, w = padded_rows(rng, n, n_in, np.float32), padded_rows(rng, n_out, n_in, TYPES[quant])
        bias, found = padded_rows(rng, 1, n_out, np.float32), []
        for _, kernel in kernels:
            found.append(product(kernel, x, w, bias, n, n_out, n_in, biased=biased))
        assert np.array_equal(*found), (n, n_out, n_in)
        judge = x[:, :n_in] @ w[:, :n_in].astype(np.float32).T + bias[:, :n_out] * biased
        assert np.allclose(found[0][:, :n_out], judge, atol=1e-4)


@pytest.mark.parametrize("quant", TYPES)
def test_a_token_of_a_text_has_the_same_bits_with_any_others_on_any_number_of_threads(quant: str) -> None:
    target, rng = isa.detect(), np.random.default_rng(1)
    forms = dict.fromkeys((None, target.name) if quant == "F32" else (target.name,))
    kernels = [load_kernel(f"texts_{form}", make_panel_matmul(quant, form), target) for form in forms]
    most = 2 * LEAST_TOKENS + 7  # more than one thread takes of a panel's
    for n_out, n_in, biased in ((130, 1040, True), (64, 512, False), (7, 33, True)):
        x, w = padded_rows(rng, most, n_in, np.float32), padded_rows(rng, n_out, n_in, TYPES[quant])
        bias, rows = padded_rows(rng, 1, n_out, np.float32), np.ascontiguousarray(w[:, :n_in])
        turned = panels(QuantizedTensor("w", (n_out, n_in), QUANT_TYPES[quant], rows.view(np.uint8)))
        judge = x[:, :n_in] @ w[:, :n_in].astype(np.float32).T + bias[:, :n_out] * biased
        whole = product(kernels[0][1], x, turned, bias, most, n_out, n_in, biased=biased)[:, :n_out]
        assert np.allclose(whole, judge, atol=1e-3)
        for _, kernel in kernels:
            for n, n_threads in ((1, 1), (5, 2), (6, 1), (13, 3), (most, 8)):
                found = product(kernel, x, turned, bias, n, n_out, n_in, biased=biased, n_threads=n_threads)
                assert np.array_equal(found[:, :n_out], whole[:n]), (n, n_threads, n_out, n_in)
