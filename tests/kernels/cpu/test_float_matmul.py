"""Products of float weights: rows and tokens that go together four by four have the bits of those that go alone."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import load_kernel

from edgellm.kernels.cpu.compile import isa
from edgellm.kernels.cpu.kernels.float_matmul import make_float_matmul
from edgellm.kernels.cpu.lib import layout

WIDE = ("amx", "avx512_vnni")
TYPES = {"F32": np.float32, "F16": np.float16}


def padded_rows(rng: np.random.Generator, n: int, width: int, dtype: type) -> np.ndarray:
    """Random rows, each begun at a whole register."""
    rows = np.zeros((n, layout.padded(width)), dtype)
    rows[:, :width] = rng.standard_normal((n, width))
    return rows


@pytest.mark.skipif(isa.detect().name not in WIDE, reason="this CPU has no 32 wide registers")
@pytest.mark.parametrize("quant", TYPES)
def test_four_rows_at_once_have_the_bits_of_one_by_one(quant: str) -> None:
    target, rng = isa.detect(), np.random.default_rng(1)
    kernels = [load_kernel(f"times_{form}", make_float_matmul(quant, form), target) for form in (None, target.name)]
    for n, n_out, n_in, biased in ((13, 40, 96, True), (4, 37, 48, False), (6, 21, 37, True), (3, 16, 32, False)):
        x, w = padded_rows(rng, n, n_in, np.float32), padded_rows(rng, n_out, n_in, TYPES[quant])
        bias, found = padded_rows(rng, 1, n_out, np.float32), []
        for _, kernel in kernels:
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
            kernel(op.ctypes.data, step.ctypes.data, 0, 1)
            found.append(out)
        assert np.array_equal(*found), (n, n_out, n_in)
        judge = x[:, :n_in] @ w[:, :n_in].astype(np.float32).T + bias[:, :n_out] * biased
        assert np.allclose(found[0][:, :n_out], judge, atol=1e-4)
