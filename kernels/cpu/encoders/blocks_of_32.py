"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4: eight neighbouring blocks of a row at a time.

The layouts are drawn in formats/block_quants.py and formats/small_quants.py. Importance i of column i makes the weight
``i sqrt(mean(row^2) + x^2)`` of that value's error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.levels import E2M1_DOUBLED as LEVELS
from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.encoders.searches import fit_affine, fit_signed, largest_value
from edgellm.kernels.cpu.lib import simd as v

_zero, _one, _none = lanes.constant(0.0), lanes.constant(1.0), lanes.integer(0)
_low_nibble, _byte, _bit = lanes.integer(15), lanes.integer(255), lanes.integer(1)
_shift4, _shift8, _shift16, _shift24 = lanes.integer(4), lanes.integer(8), lanes.integer(16), lanes.integer(24)


# ---- levels to bytes -------------------------------------------------------------------------------------------------


@v.forceinline
def _four_bytes(a, b, c, d):
    return (a & _byte()) | ((b & _byte()) << _shift8()) | ((c & _byte()) << _shift16()) | (d << _shift24())


@v.forceinline
def _nibble_pair(levels, j):
    """Level j in the low nibble, level j + 16 in the high one."""
    low, high = v.load_i32x8(levels + j * 32), v.load_i32x8(levels + (j + 16) * 32)
    return (low & _low_nibble()) | ((high & _low_nibble()) << _shift4())


@v.forceinline
def store_nibbles(levels, out, nbytes, last):
    """The 16 bytes qs of eight blocks from a panel of int32 levels."""
    for j in range(0, 16, 4):
        a, b = _nibble_pair(levels, j), _nibble_pair(levels, j + 1)
        c, d = _nibble_pair(levels, j + 2), _nibble_pair(levels, j + 3)
        lanes.scatter_i32(out + j, nbytes, last, _four_bytes(a, b, c, d))


@v.forceinline
def _store_fifth_bits(levels, out, nbytes, last):
    """The u32 qh of eight blocks: bit i is the fifth bit of level i."""
    bits = v.zero_i32x8()
    for j in range(32):
        bits = bits | (((v.load_i32x8(levels + j * 32) >> _shift4()) & _bit()) << v.splat_i32x8(np.int32(j)))
    lanes.scatter_i32(out, nbytes, last, bits)


# ---- the plain quantizers: one scale from the largest value ----------------------------------------------------------


@v.forceinline
def _signed_byte(value):
    """An int32 lane as the int8 that its low byte is."""
    return (value << _shift24()) >> _shift24()


@v.forceinline
def _plain_signed(x, levels, n_bits):
    """Scale of Q4_0 and Q5_0; fills the levels, 0 to 2^bits - 1."""
    half = 1 << (n_bits - 1)
    value, _ = largest_value(x, 32)
    d = value / v.splat_f32x8(np.float32(-half))
    factor, shift = lanes.reciprocal(d), v.splat_f32x8(np.float32(half) + np.float32(0.5))
    highest = v.splat_i32x8(np.int32(2 * half - 1))
    for i in range(32):
        level = _signed_byte(lanes.truncate(v.load_f32x8(x + i * 32) * factor + shift))
        v.store_i32x8(levels + i * 32, lanes.clamp(level, v.splat_i32x8(np.int32(-128)), highest))
    return d


@v.forceinline
def _plain_affine(x, levels, n_bits):
    """Scale and minimum of Q4_1 and Q5_1; fills the levels."""
    largest_float = v.splat_f32x8(np.float32(3.4028234663852886e38))
    low, high = largest_float, _zero() - largest_float
    for i in range(32):
        value = v.load_f32x8(x + i * 32)
        low = lanes.where(lanes.less(value, low), value, low)
        high = lanes.where(lanes.greater(value, high), value, high)
    d = (high - low) / v.splat_f32x8(np.float32((1 << n_bits) - 1))
    factor, half = lanes.reciprocal(d), v.splat_f32x8(np.float32(0.5))
    for i in range(32):
        level = lanes.truncate((v.load_f32x8(x + i * 32) - low) * factor + half)
        if n_bits == 4:  # ggml limits the levels of Q4_1 only
            level = lanes.clamp(_signed_byte(level), v.splat_i32x8(np.int32(-128)), v.splat_i32x8(np.int32(15)))
        v.store_i32x8(levels + i * 32, level)
    return d, low


# ---- with importance: a search ---------------------------------------------------------------------------------------


@v.forceinline
def store_weights(w, x, n, squares):
    """Importance in the panel w becomes importance * sqrt(squares + x^2)."""
    for i in range(n):
        value = v.load_f32x8(x + i * 32)
        v.store_f32x8(w + i * 32, v.load_f32x8(w + i * 32) * lanes.square_root(squares + value * value))


@v.forceinline
def store_squares(w, x, n):
    """The weights where there is no importance: x^2."""
    for i in range(n):
        value = v.load_f32x8(x + i * 32)
        v.store_f32x8(w + i * 32, value * value)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@v.forceinline
def _row_squares(op, row):
    """Mean square of a row, in every lane; eight rows are summed at once, the results kept in scratch."""
    n_in, scratch = v.load_i64(op + at.N_IN), v.load_i64(op + at.SCRATCH)
    if row % 8 == 0:
        base, last = v.load_i64(op + at.X) + row * n_in * 4, v.load_i64(op + at.N_ROWS) - 1 - row
        total = lanes.sums_of_squares(scratch + at.PANEL_SUMS, base, n_in * 4, min(last, 7), n_in)
        v.store_f32x8(scratch + at.SQUARES, total / v.splat_f32x8(np.float32(n_in)))
    return v.splat_f32x8(v.load_f32(scratch + at.SQUARES + row % 8 * 4))


def make_block_encoder(case: tuple[int, bool, bool]) -> Any:
    """The kernel for levels of n bits: (bits, with a minimum, with importance)."""
    n_bits, has_min, weighted = case
    nbytes = 18 + 2 * has_min + 4 * (n_bits - 4)
    qh = 2 + 2 * has_min
    qs = qh + 4 * (n_bits - 4)

    @v.forceinline
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
        n_in, n_blocks = v.load_i64(op + at.N_IN), v.load_i64(op + at.N_IN) // 32
        scratch = v.load_i64(op + at.SCRATCH)
        x, w, levels = scratch + at.PANEL_X, scratch + at.PANEL_W, scratch + at.PANEL_LEVELS
        for row in range(v.load_i64(op + at.N_ROWS)):
            if weighted:
                squares = _row_squares(op, row)
            for block in range(0, n_blocks, 8):
                last = min(n_blocks - 1 - block, 7)
                lanes.load_panel(x, v.load_i64(op + at.X) + (row * n_in + block * 32) * 4, 128, last, 32)
                if weighted:
                    lanes.load_panel(w, v.load_i64(op + at.IMPORTANCE) + block * 128, 128, last, 32)
                    store_weights(w, x, 32, squares)
                scale, minimum = fit(x, w, levels)
                out = v.load_i64(op + at.OUT) + (row * n_blocks + block) * nbytes
                lanes.scatter_u16(out, nbytes, last, lanes.half_bits(scale))
                if has_min:
                    lanes.scatter_u16(out + 2, nbytes, last, lanes.half_bits(minimum))
                if n_bits == 5:
                    _store_fifth_bits(levels, out + qh, nbytes, last)
                store_nibbles(levels, out + qs, nbytes, last)

    return encode


def encode_q8_0(op, step, thread, n_threads):
    """Q8_0: d = largest / 127, levels rounded away from zero."""
    n_blocks = v.load_i64(op + at.N_ROWS) * (v.load_i64(op + at.N_IN) // 32)
    x = v.load_i64(op + at.SCRATCH)
    for block in range(0, n_blocks, 8):
        last = min(n_blocks - 1 - block, 7)
        lanes.load_panel(x, v.load_i64(op + at.X) + block * 128, 128, last, 32)
        _, magnitude = largest_value(x, 32)
        d = magnitude / v.splat_f32x8(np.float32(127))
        factor = lanes.reciprocal(d)
        out = v.load_i64(op + at.OUT) + block * 34
        lanes.scatter_u16(out, 34, last, lanes.half_bits(d))
        for i in range(0, 32, 4):
            a = lanes.round_away(v.load_f32x8(x + i * 32) * factor)
            b = lanes.round_away(v.load_f32x8(x + i * 32 + 32) * factor)
            c = lanes.round_away(v.load_f32x8(x + i * 32 + 64) * factor)
            e = lanes.round_away(v.load_f32x8(x + i * 32 + 96) * factor)
            lanes.scatter_i32(out + 2 + i, 34, last, _four_bytes(a, b, c, e))


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------

_mantissa, _unit_bits, _shift23 = lanes.integer(0x007FFFFF), lanes.integer(0x3F800000), lanes.integer(23)
_smallest_normal, _two23, _half, _log2_e = (lanes.constant(x) for x in (2.0**-126, 2.0**23, 0.5, 1.4426950408889634))
_subnormal, _int_one, _int_23, _int_125, _int_126 = (lanes.integer(n) for n in (0x00200000, 1, 23, 125, 126))


@v.forceinline
def _floor_log2(value):
    """floor(log2(v)) of positive lanes with the logarithm rounded to float32 first, as ggml gets it.

    v = 2^k (1 - t) has the logarithm k - t log2(e), t small; where that rounds to k, k is the answer.
    """
    tiny = lanes.less(value, _smallest_normal())
    bits = lanes.bits_of(lanes.where(tiny, value * _two23(), value))
    exponent = (bits >> _shift23()) - _int_126() - (tiny & _int_23())
    t = _one() - lanes.float_of((bits & _mantissa()) | _unit_bits()) * _half()
    k = v.to_f32x8(exponent)
    return lanes.where(lanes.same(k - t * _log2_e(), k), exponent, exponent - _int_one())


@v.forceinline
def _nearest_level(value, d):
    """Index of the level whose product with d is nearest to v, the first of equals."""
    best, index = lanes.absolute(v.splat_f32x8(np.float32(0)) * d - value), v.zero_i32x8()
    for i in range(1, 16):
        error = lanes.absolute(v.splat_f32x8(np.float32(LEVELS[i])) * d - value)
        nearer = lanes.less(error, best)
        best, index = lanes.where(nearer, error, best), lanes.where(nearer, v.splat_i32x8(np.int32(i)), index)
    return index


def encode_mxfp4(op, step, thread, n_threads):
    """MXFP4: scale 2^(e - 128) from the exponent of the largest value, the nearest of 15 levels."""
    n_blocks = v.load_i64(op + at.N_ROWS) * (v.load_i64(op + at.N_IN) // 32)
    x, levels = v.load_i64(op + at.SCRATCH), v.load_i64(op + at.SCRATCH) + at.PANEL_LEVELS
    for block in range(0, n_blocks, 8):
        last = min(n_blocks - 1 - block, 7)
        lanes.load_panel(x, v.load_i64(op + at.X) + block * 128, 128, last, 32)
        _, magnitude = largest_value(x, 32)
        e = lanes.where(lanes.greater(magnitude, _zero()), _floor_log2(magnitude) + _int_125(), _none()) & _byte()
        small = lanes.less(v.to_f32x8(e), v.splat_f32x8(np.float32(2)))
        d = lanes.float_of(lanes.where(small, _subnormal() << e, (e - _int_one()) << _shift23()))
        out = v.load_i64(op + at.OUT) + block * 17
        lanes.scatter_u8(out, 17, last, e)
        for i in range(32):
            v.store_i32x8(levels + i * 32, _nearest_level(v.load_f32x8(x + i * 32), d))
        store_nibbles(levels, out + 1, 17, last)
