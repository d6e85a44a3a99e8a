"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4: eight neighbouring blocks of a row at a time.

The layouts are drawn in formats/block_quants.py and formats/small_quants.py. Importance i of column i makes the weight
``i sqrt(mean(row^2) + x^2)`` of that value's error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.levels import E2M1_DOUBLED as LEVELS
from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders.lanes import (
    absolute,
    bits_of,
    clamp,
    constant,
    differs,
    float_of,
    greater,
    half_bits,
    integer,
    less,
    load_i32x8,
    load_panel,
    round_away,
    same,
    scatter_i32,
    scatter_u8,
    scatter_u16,
    square_root,
    sums_of_squares,
    truncate,
    where,
)
from edgellm.kernels.cpu.encoders.searches import fit_affine, fit_signed, largest_value
from edgellm.kernels.cpu.lib.simd import (
    forceinline,
    load_f32,
    load_f32x8,
    load_i64,
    splat_f32x8,
    splat_i32x8,
    store_f32x8,
    store_i32x8,
    to_f32x8,
    zero_i32x8,
)

_zero, _one, _none = constant(0.0), constant(1.0), integer(0)
_low_nibble, _byte, _bit = integer(15), integer(255), integer(1)
_shift4, _shift8, _shift16, _shift24 = integer(4), integer(8), integer(16), integer(24)


# ---- levels to bytes -------------------------------------------------------------------------------------------------


@forceinline
def _four_bytes(a, b, c, d):
    return (a & _byte()) | ((b & _byte()) << _shift8()) | ((c & _byte()) << _shift16()) | (d << _shift24())


@forceinline
def _nibble_pair(levels, j):
    """Level j in the low nibble, level j + 16 in the high one."""
    low, high = load_i32x8(levels + j * 32) & _low_nibble(), load_i32x8(levels + (j + 16) * 32) & _low_nibble()
    return low | (high << _shift4())


@forceinline
def store_nibbles(levels, out, nbytes, last):
    """The 16 bytes qs of eight blocks from a panel of int32 levels."""
    for j in range(0, 16, 4):
        a, b = _nibble_pair(levels, j), _nibble_pair(levels, j + 1)
        c, d = _nibble_pair(levels, j + 2), _nibble_pair(levels, j + 3)
        scatter_i32(out + j, nbytes, last, _four_bytes(a, b, c, d))


@forceinline
def _store_fifth_bits(levels, out, nbytes, last):
    """The u32 qh of eight blocks: bit i is the fifth bit of level i."""
    bits = zero_i32x8()
    for j in range(32):
        bits = bits | (((load_i32x8(levels + j * 32) >> _shift4()) & _bit()) << splat_i32x8(np.int32(j)))
    scatter_i32(out, nbytes, last, bits)


# ---- the plain quantizers: one scale from the largest value ----------------------------------------------------------


@forceinline
def _reciprocal(d):
    return where(differs(d, _zero()), _one() / d, _zero())


@forceinline
def _signed_byte(v):
    """An int32 lane as the int8 that its low byte is."""
    return (v << _shift24()) >> _shift24()


@forceinline
def _plain_signed(x, levels, n_bits):
    """Scale of Q4_0 and Q5_0; fills the levels, 0 to 2^bits - 1."""
    half = 1 << (n_bits - 1)
    value, _ = largest_value(x, 32)
    d = value / splat_f32x8(np.float32(-half))
    factor, shift = _reciprocal(d), splat_f32x8(np.float32(half) + np.float32(0.5))
    highest = splat_i32x8(np.int32(2 * half - 1))
    for i in range(32):
        level = _signed_byte(truncate(load_f32x8(x + i * 32) * factor + shift))
        store_i32x8(levels + i * 32, clamp(level, splat_i32x8(np.int32(-128)), highest))
    return d


@forceinline
def _plain_affine(x, levels, n_bits):
    """Scale and minimum of Q4_1 and Q5_1; fills the levels."""
    largest_float = splat_f32x8(np.float32(3.4028234663852886e38))
    low, high = largest_float, _zero() - largest_float
    for i in range(32):
        v = load_f32x8(x + i * 32)
        low, high = where(less(v, low), v, low), where(greater(v, high), v, high)
    d = (high - low) / splat_f32x8(np.float32((1 << n_bits) - 1))
    factor, half = _reciprocal(d), splat_f32x8(np.float32(0.5))
    for i in range(32):
        level = truncate((load_f32x8(x + i * 32) - low) * factor + half)
        if n_bits == 4:  # ggml limits the levels of Q4_1 only
            level = clamp(_signed_byte(level), splat_i32x8(np.int32(-128)), splat_i32x8(np.int32(15)))
        store_i32x8(levels + i * 32, level)
    return d, low


# ---- with importance: a search ---------------------------------------------------------------------------------------


@forceinline
def store_weights(w, x, n, squares):
    """Importance in the panel w becomes importance * sqrt(squares + x^2)."""
    for i in range(n):
        v = load_f32x8(x + i * 32)
        store_f32x8(w + i * 32, load_f32x8(w + i * 32) * square_root(squares + v * v))


# ---- the kernels -----------------------------------------------------------------------------------------------------


@forceinline
def _row_squares(op, row):
    """Mean square of a row, in every lane; eight rows are summed at once, the results kept in scratch."""
    n_in, scratch = load_i64(op + at.N_IN), load_i64(op + at.SCRATCH)
    if row % 8 == 0:
        base, last = load_i64(op + at.X) + row * n_in * 4, load_i64(op + at.N_ROWS) - 1 - row
        total = sums_of_squares(scratch + at.PANEL_SUMS, base, n_in * 4, min(last, 7), n_in)
        store_f32x8(scratch + at.SQUARES, total / splat_f32x8(np.float32(n_in)))
    return splat_f32x8(load_f32(scratch + at.SQUARES + row % 8 * 4))


def make_block_encoder(case: tuple[int, bool, bool]) -> Any:
    """The kernel for levels of n bits: (bits, with a minimum, with importance)."""
    n_bits, has_min, weighted = case
    nbytes = 18 + 2 * has_min + 4 * (n_bits - 4)
    qh = 2 + 2 * has_min
    qs = qh + 4 * (n_bits - 4)

    @forceinline
    def fit(x, w, levels):
        if has_min and weighted:
            first, step = np.float32(-0.9), np.float32(0.05)
            return fit_affine(x, w, levels, 32, (1 << n_bits) - 1, first, step, 36, False, True)
        if has_min:
            return _plain_affine(x, levels, n_bits)
        if weighted:
            return fit_signed(x, w, levels, 32, 1 << (n_bits - 1)), _zero()
        return _plain_signed(x, levels, n_bits), _zero()

    def encode(op, step, thread, n_threads):
        n_in, n_blocks = load_i64(op + at.N_IN), load_i64(op + at.N_IN) // 32
        scratch = load_i64(op + at.SCRATCH)
        x, w, levels = scratch + at.PANEL_X, scratch + at.PANEL_W, scratch + at.PANEL_LEVELS
        for row in range(load_i64(op + at.N_ROWS)):
            if weighted:
                squares = _row_squares(op, row)
            for block in range(0, n_blocks, 8):
                last = min(n_blocks - 1 - block, 7)
                load_panel(x, load_i64(op + at.X) + (row * n_in + block * 32) * 4, 128, last, 32)
                if weighted:
                    load_panel(w, load_i64(op + at.IMPORTANCE) + block * 128, 128, last, 32)
                    store_weights(w, x, 32, squares)
                scale, minimum = fit(x, w, levels)
                out = load_i64(op + at.OUT) + (row * n_blocks + block) * nbytes
                scatter_u16(out, nbytes, last, half_bits(scale))
                if has_min:
                    scatter_u16(out + 2, nbytes, last, half_bits(minimum))
                if n_bits == 5:
                    _store_fifth_bits(levels, out + qh, nbytes, last)
                store_nibbles(levels, out + qs, nbytes, last)

    return encode


def encode_q8_0(op, step, thread, n_threads):
    """Q8_0: d = largest / 127, levels rounded away from zero."""
    n_blocks = load_i64(op + at.N_ROWS) * (load_i64(op + at.N_IN) // 32)
    x = load_i64(op + at.SCRATCH)
    for block in range(0, n_blocks, 8):
        last = min(n_blocks - 1 - block, 7)
        load_panel(x, load_i64(op + at.X) + block * 128, 128, last, 32)
        _, magnitude = largest_value(x, 32)
        d = magnitude / splat_f32x8(np.float32(127))
        factor = _reciprocal(d)
        out = load_i64(op + at.OUT) + block * 34
        scatter_u16(out, 34, last, half_bits(d))
        for i in range(0, 32, 4):
            a = round_away(load_f32x8(x + i * 32) * factor)
            b = round_away(load_f32x8(x + i * 32 + 32) * factor)
            c = round_away(load_f32x8(x + i * 32 + 64) * factor)
            e = round_away(load_f32x8(x + i * 32 + 96) * factor)
            scatter_i32(out + 2 + i, 34, last, _four_bytes(a, b, c, e))


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------

_mantissa, _unit_bits, _shift23 = integer(0x007FFFFF), integer(0x3F800000), integer(23)
_smallest_normal, _two23, _half, _log2_e = (
    constant(2.0**-126),
    constant(2.0**23),
    constant(0.5),
    constant(1.4426950408889634),
)
_subnormal, _int_one, _int_23, _int_125, _int_126 = (integer(n) for n in (0x00200000, 1, 23, 125, 126))


@forceinline
def _floor_log2(v):
    """floor(log2(v)) of positive lanes with the logarithm rounded to float32 first, as ggml gets it.

    v = 2^k (1 - t) has the logarithm k - t log2(e), t small; where that rounds to k, k is the answer.
    """
    tiny = less(v, _smallest_normal())
    bits = bits_of(where(tiny, v * _two23(), v))
    exponent = (bits >> _shift23()) - _int_126() - (tiny & _int_23())
    t = _one() - float_of((bits & _mantissa()) | _unit_bits()) * _half()
    k = to_f32x8(exponent)
    return where(same(k - t * _log2_e(), k), exponent, exponent - _int_one())


@forceinline
def _nearest_level(v, d):
    """Index of the level whose product with d is nearest to v, the first of equals."""
    best, index = absolute(splat_f32x8(np.float32(0)) * d - v), zero_i32x8()
    for i in range(1, 16):
        error = absolute(splat_f32x8(np.float32(LEVELS[i])) * d - v)
        nearer = less(error, best)
        best, index = where(nearer, error, best), where(nearer, splat_i32x8(np.int32(i)), index)
    return index


def encode_mxfp4(op, step, thread, n_threads):
    """MXFP4: scale 2^(e - 128) from the exponent of the largest value, the nearest of 15 levels."""
    n_blocks = load_i64(op + at.N_ROWS) * (load_i64(op + at.N_IN) // 32)
    x, levels = load_i64(op + at.SCRATCH), load_i64(op + at.SCRATCH) + at.PANEL_LEVELS
    for block in range(0, n_blocks, 8):
        last = min(n_blocks - 1 - block, 7)
        load_panel(x, load_i64(op + at.X) + block * 128, 128, last, 32)
        _, magnitude = largest_value(x, 32)
        e = where(greater(magnitude, _zero()), _floor_log2(magnitude) + _int_125(), _none()) & _byte()
        small = less(to_f32x8(e), splat_f32x8(np.float32(2)))
        d = float_of(where(small, _subnormal() << e, (e - _int_one()) << _shift23()))
        out = load_i64(op + at.OUT) + block * 17
        scatter_u8(out, 17, last, e)
        for i in range(32):
            store_i32x8(levels + i * 32, _nearest_level(load_f32x8(x + i * 32), d))
        store_nibbles(levels, out + 1, 17, last)
