"""F32, F16 and BF16 weights times float32 activations.

Each (row, token) is one dot product: 16 lanes of fused multiply-adds along the row, summed as a fixed tree, then the
tail in order. Four tokens share a pass over a row; the sums of a token do not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels.elementwise import FLOAT_AT
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

N_IN = at.N_GROUPS
"""Here the argument counts columns."""

_widen_bits = v.make_convert(v.u16x16, v.u32x16, "zext")
_shift16 = v.make_const(v.u32x16, 16)
_as_float = v.make_convert(v.u32x16, v.f32x16, "bitcast")


@v.forceinline
def _f32x16_at(p, i):
    return v.load_f32x16(p + i * 4)


@v.forceinline
def _f16x16_at(p, i):
    return v.half_f32x16(v.load_u16x16(p + i * 2))


@v.forceinline
def _bf16x16_at(p, i):
    return _as_float(_widen_bits(v.load_u16x16(p + i * 2)) << _shift16())


_VECTOR_AT = {"F32": (_f32x16_at, 4), "F16": (_f16x16_at, 2), "BF16": (_bf16x16_at, 2)}


def make_float_matmul(quant: str) -> Any:
    """The kernel out = x @ weight.T (+ bias) for F32, F16 or BF16."""
    (vector_at, nbytes), value_at = _VECTOR_AT[quant], FLOAT_AT[quant]

    @v.forceinline
    def finish(acc, w, x, n_in, bias, out):
        total = v.sum_f32x16(acc)
        for i in range(n_in // 16 * 16, n_in):
            total = v.fma_f32(value_at(w, i), v.load_f32(x + i * 4), total)
        if bias != 0:
            total = total + v.load_f32(bias)
        v.store_f32(out, total)

    @v.forceinline
    def four_tokens(w, x, x_row, n_in, bias, out, out_row):
        x1, x2, x3 = x + x_row, x + 2 * x_row, x + 3 * x_row
        a = b = c = d = v.zero_f32x16()
        for i in range(0, n_in // 16 * 16, 16):
            value = vector_at(w, i)
            a = v.fma_f32x16(value, v.load_f32x16(x + i * 4), a)
            b = v.fma_f32x16(value, v.load_f32x16(x1 + i * 4), b)
            c = v.fma_f32x16(value, v.load_f32x16(x2 + i * 4), c)
            d = v.fma_f32x16(value, v.load_f32x16(x3 + i * 4), d)
        finish(a, w, x, n_in, bias, out)
        finish(b, w, x1, n_in, bias, out + out_row)
        finish(c, w, x2, n_in, bias, out + 2 * out_row)
        finish(d, w, x3, n_in, bias, out + 3 * out_row)

    @v.forceinline
    def one_token(w, x, n_in, bias, out):
        acc = v.zero_f32x16()
        for i in range(0, n_in // 16 * 16, 16):
            v.prefetch(w + i * nbytes + 4096)
            acc = v.fma_f32x16(vector_at(w, i), v.load_f32x16(x + i * 4), acc)
        finish(acc, w, x, n_in, bias, out)

    def matmul(op, step, thread, n_threads):
        n, n_in, n_out = (
            v.load_i64(step + v.load_i64(op + at.ROW_KIND)),
            v.load_i64(op + N_IN),
            v.load_i64(op + at.N_OUT),
        )
        x0, x_row, w0, w_row = (
            v.load_i64(op + at.X),
            v.load_i64(op + at.X_ROW_NBYTES),
            v.load_i64(op + at.W),
            v.load_i64(op + at.W_ROW_NBYTES),
        )
        out0, out_row, bias0 = v.load_i64(op + at.OUT), v.load_i64(op + at.OUT_ROW_NBYTES), v.load_i64(op + at.BIAS)
        chunk = v.atomic_add(op + at.COUNTER, 1) * 16
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
            chunk = v.atomic_add(op + at.COUNTER, 1) * 16

    return matmul
