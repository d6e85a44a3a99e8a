"""F32, F16 and BF16 weights times float32 activations.

Each (row, token) is one dot product: 16 lanes of fused multiply-adds along the row, summed as a fixed tree, then the
tail in order. Four tokens share a pass over a row; the sums of a token do not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels.elementwise import FLOAT_AT
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd
from edgellm.kernels.cpu.lib.layout import (
    BIAS,
    N_GROUPS,
    N_OUT,
    OUT,
    OUT_ROW_NBYTES,
    ROW_KIND,
    W_ROW_NBYTES,
    X_ROW_NBYTES,
    W,
    X,
)
from edgellm.kernels.cpu.lib.simd import (
    atomic_add,
    fma_f32,
    fma_f32x16,
    forceinline,
    half_f32x16,
    load_f32,
    load_f32x16,
    load_i64,
    load_u16x16,
    prefetch,
    store_f32,
    sum_f32x16,
    zero_f32x16,
)

N_IN = N_GROUPS
"""Here the argument counts columns."""

_widen_bits = simd.make_convert(simd.u16x16, simd.u32x16, "zext")
_shift16 = simd.make_const(simd.u32x16, 16)
_as_float = simd.make_convert(simd.u32x16, simd.f32x16, "bitcast")


@forceinline
def _f32x16_at(p, i):
    return load_f32x16(p + i * 4)


@forceinline
def _f16x16_at(p, i):
    return half_f32x16(load_u16x16(p + i * 2))


@forceinline
def _bf16x16_at(p, i):
    return _as_float(_widen_bits(load_u16x16(p + i * 2)) << _shift16())


_VECTOR_AT = {"F32": (_f32x16_at, 4), "F16": (_f16x16_at, 2), "BF16": (_bf16x16_at, 2)}


def make_float_matmul(quant: str) -> Any:
    """The kernel out = x @ weight.T (+ bias) for F32, F16 or BF16."""
    (vector_at, nbytes), value_at = _VECTOR_AT[quant], FLOAT_AT[quant]

    @forceinline
    def finish(acc, w, x, n_in, bias, out):
        total = sum_f32x16(acc)
        for i in range(n_in // 16 * 16, n_in):
            total = fma_f32(value_at(w, i), load_f32(x + i * 4), total)
        if bias != 0:
            total = total + load_f32(bias)
        store_f32(out, total)

    @forceinline
    def four_tokens(w, x, x_row, n_in, bias, out, out_row):
        x1, x2, x3 = x + x_row, x + 2 * x_row, x + 3 * x_row
        a = b = c = d = zero_f32x16()
        for i in range(0, n_in // 16 * 16, 16):
            v = vector_at(w, i)
            a = fma_f32x16(v, load_f32x16(x + i * 4), a)
            b = fma_f32x16(v, load_f32x16(x1 + i * 4), b)
            c = fma_f32x16(v, load_f32x16(x2 + i * 4), c)
            d = fma_f32x16(v, load_f32x16(x3 + i * 4), d)
        finish(a, w, x, n_in, bias, out)
        finish(b, w, x1, n_in, bias, out + out_row)
        finish(c, w, x2, n_in, bias, out + 2 * out_row)
        finish(d, w, x3, n_in, bias, out + 3 * out_row)

    @forceinline
    def one_token(w, x, n_in, bias, out):
        acc = zero_f32x16()
        for i in range(0, n_in // 16 * 16, 16):
            prefetch(w + i * nbytes + 4096)
            acc = fma_f32x16(vector_at(w, i), load_f32x16(x + i * 4), acc)
        finish(acc, w, x, n_in, bias, out)

    def matmul(op, step, thread, n_threads):
        n, n_in, n_out = load_i64(step + load_i64(op + ROW_KIND)), load_i64(op + N_IN), load_i64(op + N_OUT)
        x0, x_row, w0, w_row = (
            load_i64(op + X),
            load_i64(op + X_ROW_NBYTES),
            load_i64(op + W),
            load_i64(op + W_ROW_NBYTES),
        )
        out0, out_row, bias0 = load_i64(op + OUT), load_i64(op + OUT_ROW_NBYTES), load_i64(op + BIAS)
        chunk = atomic_add(op + at.COUNTER, 1) * 16
        while chunk < n_out:
            for t in range(0, n // 4 * 4, 4):
                for row in range(chunk, min(chunk + 16, n_out)):
                    bias = (bias0 + row * 4) * (bias0 != 0)
                    four_tokens(
                        w0 + row * w_row, x0 + t * x_row, x_row, n_in, bias, out0 + t * out_row + row * 4, out_row
                    )
            for t in range(n // 4 * 4, n):
                for row in range(chunk, min(chunk + 16, n_out)):
                    bias = (bias0 + row * 4) * (bias0 != 0)
                    one_token(w0 + row * w_row, x0 + t * x_row, n_in, bias, out0 + t * out_row + row * 4)
            chunk = atomic_add(op + at.COUNTER, 1) * 16

    return matmul
