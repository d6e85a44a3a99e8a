"""What is done with the super-block of one row. All eight groups are written out, so that every shift is a constant."""

from __future__ import annotations

import functools
from typing import Any

from numba import types

from edgellm.kernels.cpu.lib import simd as v

GROUPS = 8
"""Groups of 32 weights in a super-block."""

_splat_i16x16 = v.make_splat(v.i16x16)
_low_half, _sixteen_bits = v.make_const(v.i32x8, 0xFFFF), v.make_const(v.i32x8, 16)


@functools.cache
def _groups_and_scales(weights: Any) -> tuple[list[Any], list[Any]]:
    """What reads the integers and the sub-scales of all groups; numba compiles it once for all that call it."""
    return [weights.make_group(g) for g in range(GROUPS)], [weights.make_scale(g) for g in range(GROUPS)]


def _make_add(n: int) -> Any:
    """Sums in eight lanes, of n = 1, 2 or 4 tokens, go on with a group: + scale * (its integers times 32 values)."""

    @v.forceinline
    def one(a, q, scale, x):
        total = v.madd_i16x16(v.zero_i32x8(), v.low_i16x32(q, q), v.load_i16x16(x))
        return a + v.madd_i16x16(total, v.high_i16x32(q, q), v.load_i16x16(x + 32)) * scale

    @v.forceinline
    def add(totals, q, scale, x, x_row):
        if n == 1:
            result = (one(totals[0], q, scale, x),)
        elif n == 2:
            result = (one(totals[0], q, scale, x), one(totals[1], q, scale, x + x_row))
        else:
            result = (
                one(totals[0], q, scale, x),
                one(totals[1], q, scale, x + x_row),
                one(totals[2], q, scale, x + 2 * x_row),
                one(totals[3], q, scale, x + 3 * x_row),
            )
        return result

    return add


@functools.cache
def make_dot(weights: Any, n: int) -> Any:
    """dot(block, scales, x, x_row, centres): a row's super-block times n = 1, 2 or 4 tokens, each in eight lanes.

    Tokens have their 256 activations ``x_row`` bytes apart. Where weights stand above a centre, minus the centre times
    the activations' sums of 16, in the order of the sixteen sub-scales, are 64 bytes apart.
    """
    (g0, g1, g2, g3, g4, g5, g6, g7), (s0, s1, s2, s3, s4, s5, s6, s7) = _groups_and_scales(weights)
    add, centred = _make_add(n), weights.centre != 0

    @v.forceinline
    def start(scales, centres):
        total = v.zero_i32x8()
        if centred:
            total = v.load_i32x8(scales) * v.load_i32x8(centres)
            total = total + v.load_i32x8(scales + 32) * v.load_i32x8(centres + 32)
        return total

    @v.forceinline
    def dot(block, scales, x, x_row, centres):
        a, b = start(scales, centres), start(scales, centres + 64)
        totals = a, b, start(scales, centres + 128), start(scales, centres + 192)
        totals = add(totals, g0(block), s0(scales), x, x_row)
        totals = add(totals, g1(block), s1(scales), x + 64, x_row)
        totals = add(totals, g2(block), s2(scales), x + 128, x_row)
        totals = add(totals, g3(block), s3(scales), x + 192, x_row)
        totals = add(totals, g4(block), s4(scales), x + 256, x_row)
        totals = add(totals, g5(block), s5(scales), x + 320, x_row)
        totals = add(totals, g6(block), s6(scales), x + 384, x_row)
        return add(totals, g7(block), s7(scales), x + 448, x_row)

    return dot


@functools.cache
def make_unpack(weights: Any) -> Any:
    """unpack(block, scales, out): 256 int16 sc (q - centre), in the order of the activations."""
    (g0, g1, g2, g3, g4, g5, g6, g7), (s0, s1, s2, s3, s4, s5, s6, s7) = _groups_and_scales(weights)
    centre = weights.centre

    @v.forceinline
    def store(q, scale, out):
        pair = v.i32x8_as_i16x16((scale << _sixteen_bits()) | (scale & _low_half()))
        less = _splat_i16x16(types.int16(centre))
        v.store_i16x16(out, (v.low_i16x32(q, q) - less) * pair)
        v.store_i16x16(out + 32, (v.high_i16x32(q, q) - less) * pair)

    @v.forceinline
    def unpack(block, scales, out):
        store(g0(block), s0(scales), out)
        store(g1(block), s1(scales), out + 64)
        store(g2(block), s2(scales), out + 128)
        store(g3(block), s3(scales), out + 192)
        store(g4(block), s4(scales), out + 256)
        store(g5(block), s5(scales), out + 320)
        store(g6(block), s6(scales), out + 384)
        store(g7(block), s7(scales), out + 448)

    return unpack
