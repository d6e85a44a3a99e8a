"""Encoders of TQ1_0 and TQ2_0: -1, 0 or 1 times the largest magnitude of 256. Layouts: formats/small_quants.py."""

from __future__ import annotations

import numpy as np

from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.encoders import super_blocks as sb
from edgellm.kernels.cpu.lib import simd as v

_LEVELS = 0  # scratch: 256 bytes
_LANES = 512  # scratch: 8 float32
_int_one = lanes.integer(1)


@v.forceinline
def _levels_of_three(x, scratch):
    """Store the 256 levels 0, 1 or 2 of a super-block as bytes; its scale in every lane."""
    high = v.zero_f32x8()
    for i in range(0, 256, 8):
        a = lanes.absolute(v.load_f32x8(x + i * 4))
        high = lanes.where(lanes.greater(a, high), a, high)
    v.store_f32x8(scratch + _LANES, high)
    largest = np.float32(0)
    for i in range(8):
        largest = max(largest, v.load_f32(scratch + _LANES + i * 4))
    d = v.splat_f32x8(largest)
    factor = lanes.reciprocal(d)
    for i in range(0, 256, 8):
        level = lanes.round_away(v.load_f32x8(x + i * 4) * factor) + _int_one()
        lanes.store_u8x8(scratch + _LEVELS + i, lanes.i32x8_as_u8x8(level))
    return d


def encode_tq2_0(op, step, thread, n_threads):
    """TQ2_0: four levels in a byte."""
    scratch = v.load_i64(op + at.SCRATCH)
    for block in range(v.load_i64(op + at.N_ROWS) * (v.load_i64(op + at.N_IN) // 256)):
        d = _levels_of_three(v.load_i64(op + at.X) + block * 1024, scratch)
        out = v.load_i64(op + at.OUT) + block * 66
        sb.pack_crumbs(scratch + _LEVELS, out)
        lanes.scatter_u16(out + 64, 0, 0, lanes.half_bits(d))


@v.forceinline
def _base_3(levels, stride, n_digits):
    """n digits, ``stride`` bytes apart, as a fraction of 243 in a byte, rounded up."""
    number = np.int64(0)
    for i in range(n_digits):
        number = (number * 3 + np.int64(v.load_u8(levels + i * stride))) & 255
    if n_digits == 4:
        number = (number * 3) & 255
    return np.uint8((number * 256 + 242) // 243 & 255)


def encode_tq1_0(op, step, thread, n_threads):
    """TQ1_0: five levels in a byte, four in each of the last four."""
    scratch = v.load_i64(op + at.SCRATCH)
    levels = scratch + _LEVELS
    for block in range(v.load_i64(op + at.N_ROWS) * (v.load_i64(op + at.N_IN) // 256)):
        d = _levels_of_three(v.load_i64(op + at.X) + block * 1024, scratch)
        out = v.load_i64(op + at.OUT) + block * 54
        for i in range(32):
            lanes.store_u8(out + i, _base_3(levels + i, 32, 5))
        for i in range(16):
            lanes.store_u8(out + 32 + i, _base_3(levels + 160 + i, 16, 5))
        for i in range(4):
            lanes.store_u8(out + 48 + i, _base_3(levels + 240 + i, 4, 4))
        lanes.scatter_u16(out + 52, 0, 0, lanes.half_bits(d))
