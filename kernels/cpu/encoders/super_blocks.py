"""The way of a k-quant: super-blocks of 256 weights, eight of them under way at once.

First the groups of each super-block are searched for their scales, a group in a lane. Then the scales of the eight
super-blocks are quantized, a super-block in a lane. Last, each super-block is rounded with the scales it really has,
and packed. A group whose scale became 0 keeps the levels of its search, as in ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.lib import simd as v

BLOCK = 256

# scratch behind the panels: (8, 16) float32, a row for each super-block
SCALES, MINIMA, WEIGHT_SUMS = 3584, 4096, 4608
# (16, 8) int32, a super-block in a lane: the quantized scales and minima
LEVEL_SCALES, LEVEL_MINIMA = 5120, 5632
# (8,): scale of scales and of minima as float16 bits (int32) and as the float32 of those; whether all is 0 (int32)
D_BITS, DMIN_BITS, D, DMIN, EMPTY = 6144, 6176, 6208, 6240, 6272
LEVELS = 6400  # (8, 256) bytes

_low_byte, _by_8, _by_16, _by_24 = lanes.integer(255), lanes.integer(8), lanes.integer(16), lanes.integer(24)


@v.forceinline
def store_result(scratch, kind, block, part, values):
    """Keep one float32 of eight groups: their scales, minima or sums of weights."""
    v.store_f32x8(scratch + kind + block * 64 + part * 32, values)


@v.forceinline
def load_results(panel, scratch, kind, n_groups):
    """What ``store_result`` kept, a super-block in a lane."""
    lanes.load_panel(panel, scratch + kind, 64, lanes.LANES - 1, n_groups)


@v.forceinline
def store_scale(scratch, bits_at, value_at, scale):
    """The scale of scales as float16, and as the float32 which that is."""
    bits = lanes.half_bits(scale)
    v.store_i32x8(scratch + bits_at, bits)
    v.store_f32x8(scratch + value_at, lanes.half_value(bits))


@v.forceinline
def store_half(out, scratch, bits_at, block):
    """A super-block's float16 bits to where they are written."""
    v.store_u16(out, np.uint16(v.load_i32(scratch + bits_at + block * 4)))


@v.forceinline
def sum_of_weights(w, n):
    """The weights of each lane, added up from the first to the last."""
    total = v.zero_f32x8()
    for i in range(n):
        total = total + v.load_f32x8(w + i * 32)
    return total


@v.forceinline
def store_search_levels(scratch, super_block, part, group):
    """A panel of int32 levels as bytes, in the order of the weights."""
    out = scratch + LEVELS + super_block * BLOCK + part * lanes.LANES * group
    levels = scratch + at.PANEL_LEVELS
    for i in range(0, group, 4):
        p = levels + i * 32
        low = (v.load_i32x8(p) & _low_byte()) | ((v.load_i32x8(p + 32) & _low_byte()) << _by_8())
        high = ((v.load_i32x8(p + 64) & _low_byte()) << _by_16()) | (v.load_i32x8(p + 96) << _by_24())
        lanes.scatter_i32(out + i, group, 7, low | high)


def make_super_block_encoder(
    group: int,
    nbytes: int,
    weighted: bool,
    search: Callable[..., Any],
    scale: Callable[..., Any],
    finish: Callable[..., Any],
) -> Any:
    """A kernel from its three steps.

    search(scratch, super_block, part)   fit the eight groups in the panels; store their scales, minima and levels
    scale(scratch)                       quantize the scales of all super-blocks
    finish(scratch, super_block, x, out) round the 256 weights at x with them, write the block
    ``SQUARES`` holds the sum of squares of each super-block, where there is an importance.
    """

    def encode(op, step, thread, n_threads):
        per_row, scratch = v.load_i64(op + at.N_IN) // BLOCK, v.load_i64(op + at.SCRATCH)
        n_blocks = v.load_i64(op + at.N_ROWS) * per_row
        for first in range(0, n_blocks, lanes.LANES):
            here = min(n_blocks - first, lanes.LANES)
            x = v.load_i64(op + at.X) + first * (BLOCK * 4)
            if weighted:
                squares = lanes.sums_of_squares(scratch + at.PANEL_SUMS, x, BLOCK * 4, here - 1, BLOCK)
                v.store_f32x8(scratch + at.SQUARES, squares)
            for block in range(here):
                for part in range(BLOCK // (lanes.LANES * group)):
                    offset = part * lanes.LANES * group * 4
                    values = x + block * (BLOCK * 4) + offset
                    lanes.load_panel(scratch + at.PANEL_X, values, group * 4, lanes.LANES - 1, group)
                    if weighted:
                        column = (first + block) % per_row * (BLOCK * 4) + offset
                        importance = v.load_i64(op + at.IMPORTANCE) + column
                        lanes.load_panel(scratch + at.PANEL_W, importance, group * 4, lanes.LANES - 1, group)
                    search(scratch, block, part)
            scale(scratch)
            for block in range(here):
                out = v.load_i64(op + at.OUT) + (first + block) * nbytes
                finish(scratch, block, x + block * (BLOCK * 4), out)

    return encode


# ---- rounding and packing, in natural order --------------------------------------------------------------------------

_shift1, _shift2, _shift3, _shift4, _shift5, _shift6, _shift7 = (v.make_const(v.u8x32, n) for n in range(1, 8))
_nibble, _bit, _crumb = (v.make_const(v.u8x32, n) for n in (15, 1, 3))


@v.forceinline
def round_group(levels, x, n, d, minimum, low, high):
    """n levels as bytes: (x + minimum) / d rounded, from low to high, then moved to start at 0."""
    divisor, shift = v.splat_f32x8(d), v.splat_f32x8(minimum)
    lowest, highest = v.splat_i32x8(np.int32(low)), v.splat_i32x8(np.int32(high))
    for i in range(0, n, 8):
        level = lanes.clamp(lanes.nearest((v.load_f32x8(x + i * 4) + shift) / divisor), lowest, highest)
        lanes.store_u8x8(levels + i, lanes.i32x8_as_u8x8(level - lowest))


@v.forceinline
def pack_crumbs(levels, out):
    """The 64 bytes qs of Q2_K and Q3_K from 256 levels of two bits."""
    for half in range(2):
        p = levels + half * 128
        low = (v.load_u8x32(p) & _crumb()) | ((v.load_u8x32(p + 32) & _crumb()) << _shift2())
        high = ((v.load_u8x32(p + 64) & _crumb()) << _shift4()) | (v.load_u8x32(p + 96) << _shift6())
        lanes.store_u8x32(out + half * 32, low | high)


@v.forceinline
def pack_nibbles(levels, out):
    """The 128 bytes qs of Q4_K and Q5_K from the low four bits of 256 levels."""
    for part in range(4):
        low, high = v.load_u8x32(levels + part * 64), v.load_u8x32(levels + part * 64 + 32)
        lanes.store_u8x32(out + part * 32, (low & _nibble()) | (high << _shift4()))


@v.forceinline
def pack_bit(levels, out, shift):
    """32 bytes of one bit of each level: bit k of byte i is bit ``shift`` of level 32 k + i."""
    bits = (v.load_u8x32(levels) >> shift) & _bit()
    bits = bits | (((v.load_u8x32(levels + 32) >> shift) & _bit()) << _shift1())
    bits = bits | (((v.load_u8x32(levels + 64) >> shift) & _bit()) << _shift2())
    bits = bits | (((v.load_u8x32(levels + 96) >> shift) & _bit()) << _shift3())
    bits = bits | (((v.load_u8x32(levels + 128) >> shift) & _bit()) << _shift4())
    bits = bits | (((v.load_u8x32(levels + 160) >> shift) & _bit()) << _shift5())
    bits = bits | (((v.load_u8x32(levels + 192) >> shift) & _bit()) << _shift6())
    lanes.store_u8x32(out, bits | ((v.load_u8x32(levels + 224) >> shift) << _shift7()))


@v.forceinline
def pack_six_bits(levels, out):
    """The 128 bytes ql, then the 64 bytes qh of Q6_K."""
    for half in range(2):
        p = levels + half * 128
        a, b, c, e = v.load_u8x32(p), v.load_u8x32(p + 32), v.load_u8x32(p + 64), v.load_u8x32(p + 96)
        lanes.store_u8x32(out + half * 64, (a & _nibble()) | (c << _shift4()))
        lanes.store_u8x32(out + half * 64 + 32, (b & _nibble()) | (e << _shift4()))
        high = (a >> _shift4()) | ((b >> _shift4()) << _shift2()) | ((c >> _shift4()) << _shift4())
        lanes.store_u8x32(out + 128 + half * 32, high | ((e >> _shift4()) << _shift6()))
