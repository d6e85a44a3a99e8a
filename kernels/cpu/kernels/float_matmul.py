"""F32, F16 and BF16 weights times float32 activations.

Each (row, token) is one dot product: 16 lanes of fused multiply-adds along the row, summed as a fixed tree, then the
tail in order. Four tokens share a pass over a row; the sums of a token do not depend on its neighbours. Where there are
32 wide registers, four tokens share a pass over four rows, and the trees of a token's four sums are added side by side:
the same additions in the same order, 1.4 times as fast while both stay in the first cache.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

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


@v.forceinline
def _f32_at(p, i):
    return v.load_f32(p + i * 4)


@v.forceinline
def _f16_at(p, i):
    return v.first_lane(v.half_f32x8(v.splat_u16x8(v.load_u16(p + i * 2))))


@v.forceinline
def _bf16_at(p, i):
    return v.f32_from_bits(v.load_u16(p + i * 2) << 16)


# halves, quarters ... of two vectors side by side, for the steps of ``v.sum_f32x16`` on four sums at once
_low8 = v.make_shuffle(v.f32x16, [*range(8), *range(16, 24)])
_high8 = v.make_shuffle(v.f32x16, [*range(8, 16), *range(24, 32)])
_low4 = v.make_shuffle(v.f32x16, [start + i for start in (0, 8, 16, 24) for i in range(4)])
_high4 = v.make_shuffle(v.f32x16, [start + i for start in (4, 12, 20, 28) for i in range(4)])
_low2 = v.make_shuffle(v.f32x16, [0, 1, 4, 5, 8, 9, 12, 13])
_high2 = v.make_shuffle(v.f32x16, [2, 3, 6, 7, 10, 11, 14, 15])
_even, _odd = v.make_shuffle(v.f32x8, [0, 2, 4, 6]), v.make_shuffle(v.f32x8, [1, 3, 5, 7])


@v.forceinline
def _four_sums(a, b, c, d):
    """The sums of four vectors, each as ``v.sum_f32x16`` adds it up."""
    ab, cd = _low8(a, b) + _high8(a, b), _low8(c, d) + _high8(c, d)
    quarters = _low4(ab, cd) + _high4(ab, cd)
    pairs = _low2(quarters, quarters) + _high2(quarters, quarters)
    return _even(pairs, pairs) + _odd(pairs, pairs)


# number i of a row, 16 of them from there on, bytes of one
_TYPES = {"F32": (_f32_at, _f32x16_at, 4), "F16": (_f16_at, _f16x16_at, 2), "BF16": (_bf16_at, _bf16x16_at, 2)}


def vector_loads(quant: str) -> tuple[Any, int]:
    """vector_at(p, i): 16 float32 from number i of a row of this type on; bytes of a number."""
    return _TYPES[quant][1:]


def _make_tiles(vector_at: Any) -> Any:
    """tiles(...), the arguments of ``times``: four rows times four tokens at a time; the first row that is left."""

    @v.forceinline
    def four_rows(w, w_row, x, x_row, n_in, bias, out, out_row):
        w1, w2, w3 = w + w_row, w + 2 * w_row, w + 3 * w_row
        x1, x2, x3 = x + x_row, x + 2 * x_row, x + 3 * x_row
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = v.zero_f32x16()
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = v.zero_f32x16()
        for i in range(0, n_in, 16):
            p, q = v.load_f32x16(x + i * 4), v.load_f32x16(x1 + i * 4)
            r, s = v.load_f32x16(x2 + i * 4), v.load_f32x16(x3 + i * 4)
            value = vector_at(w, i)
            a0, b0 = v.fma_f32x16(value, p, a0), v.fma_f32x16(value, q, b0)
            c0, d0 = v.fma_f32x16(value, r, c0), v.fma_f32x16(value, s, d0)
            value = vector_at(w1, i)
            a1, b1 = v.fma_f32x16(value, p, a1), v.fma_f32x16(value, q, b1)
            c1, d1 = v.fma_f32x16(value, r, c1), v.fma_f32x16(value, s, d1)
            value = vector_at(w2, i)
            a2, b2 = v.fma_f32x16(value, p, a2), v.fma_f32x16(value, q, b2)
            c2, d2 = v.fma_f32x16(value, r, c2), v.fma_f32x16(value, s, d2)
            value = vector_at(w3, i)
            a3, b3 = v.fma_f32x16(value, p, a3), v.fma_f32x16(value, q, b3)
            c3, d3 = v.fma_f32x16(value, r, c3), v.fma_f32x16(value, s, d3)
        first, second = _four_sums(a0, a1, a2, a3), _four_sums(b0, b1, b2, b3)
        third, fourth = _four_sums(c0, c1, c2, c3), _four_sums(d0, d1, d2, d3)
        if bias != 0:
            more = v.load_f32x4(bias)
            first, second, third, fourth = first + more, second + more, third + more, fourth + more
        v.store_f32x4(out, first)
        v.store_f32x4(out + out_row, second)
        v.store_f32x4(out + 2 * out_row, third)
        v.store_f32x4(out + 3 * out_row, fourth)

    @v.forceinline
    def tiles(x, x_row, n, w, w_row, n_in, first, stop, out, out_row, bias):
        whole = first + (stop - first) // 4 * 4 * (n_in % 16 == 0)
        for t in range(0, n // 4 * 4, 4):
            for row in range(first, whole, 4):
                b, c = (bias + row * 4) * (bias != 0), out + t * out_row + row * 4
                four_rows(w + row * w_row, w_row, x + t * x_row, x_row, n_in, b, c, out_row)
        return whole

    return tiles


@v.forceinline
def _no_tiles(x, x_row, n, w, w_row, n_in, first, stop, out, out_row, bias):
    return first


def make_times(quant: str, form: str | None = None) -> Any:
    """times(x, x_row, n, w, w_row, n_in, first, stop, out, out_row, bias): the rows [first, stop) times n tokens."""
    value_at, vector_at, nbytes = _TYPES[quant]

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
            v.fetch_first(w + i * nbytes + 4096)
            acc = v.fma_f32x16(vector_at(w, i), v.load_f32x16(x + i * 4), acc)
        finish(acc, w, x, n_in, bias, out)

    by_fours = _make_tiles(vector_at) if form in ("amx", "avx512_vnni") else _no_tiles

    @v.forceinline
    def times(x, x_row, n, w, w_row, n_in, first, stop, out, out_row, bias):
        rest = by_fours(x, x_row, n, w, w_row, n_in, first, stop, out, out_row, bias)
        for t in range(0, n // 4 * 4, 4):
            for row in range(rest, stop):
                b, c = (bias + row * 4) * (bias != 0), out + t * out_row + row * 4
                four_tokens(w + row * w_row, x + t * x_row, x_row, n_in, b, c, out_row)
        for t in range(n // 4 * 4, n):
            for row in range(first, stop):
                b, c = (bias + row * 4) * (bias != 0), out + t * out_row + row * 4
                one_token(w + row * w_row, x + t * x_row, n_in, b, c)

    return times


def make_float_matmul(quant: str, form: str | None = None) -> Any:
    """The kernel out = x @ weight.T (+ bias) for F32, F16 or BF16."""
    times = make_times(quant, form)

    def matmul(op, step, thread, n_threads):
        a = v.arguments(op, at.MATMUL)
        n = v.load_i64(step + a.row_kind)
        first = v.atomic_add(op + at.COUNTER, 1) * 16
        while first < a.n_out:
            stop = min(first + 16, a.n_out)
            times(a.x, a.x_row, n, a.w, a.w_row, a.n_in, first, stop, a.out, a.out_row, a.bias)
            first = v.atomic_add(op + at.COUNTER, 1) * 16

    return matmul


def make_float_embed_row(quant: str) -> Any:
    """embed_row(p, width, factor, out, scratch): factor times the weights of one row."""
    value_at = _TYPES[quant][0]

    @v.forceinline
    def embed_row(p, width, factor, out, scratch):
        for i in range(width):
            v.store_f32(out + i * 4, value_at(p, i) * factor)

    return embed_row
