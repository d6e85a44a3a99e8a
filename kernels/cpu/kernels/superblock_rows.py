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


def _make_add(centred: bool) -> tuple[Any, Any, Any]:
    """Sums in eight lanes, of 1, 2 and 4 tokens, go on with a group: + scale * (its integers times 32 activations)."""

    @v.forceinline
    def add_one(a, q, scale, x, centres):
        start = v.zero_i32x8()
        if centred:
            start = v.load_i32x8(centres)
        total = v.madd_i16x16(start, v.low_i16x32(q, q), v.load_i16x16(x))
        return a + v.madd_i16x16(total, v.high_i16x32(q, q), v.load_i16x16(x + 32)) * scale

    @v.forceinline
    def add_two(ab, q, scale, x, x_row, centres):
        return add_one(ab[0], q, scale, x, centres), add_one(ab[1], q, scale, x + x_row, centres + 256)

    @v.forceinline
    def add_four(abcd, q, scale, x, x_row, centres):
        a, b = add_two((abcd[0], abcd[1]), q, scale, x, x_row, centres)
        c, d = add_two((abcd[2], abcd[3]), q, scale, x + 2 * x_row, x_row, centres + 512)
        return a, b, c, d

    return add_one, add_two, add_four


@functools.cache
def make_dots(weights: Any) -> tuple[Any, Any, Any]:
    """dot_one, dot_two, dot_four: a row's super-block times 1, 2 and 4 tokens.

    dot_one(block, scales, x, centres)           products with the 256 activations at x, in eight lanes
    dot_two, dot_four(..., x_row, ...)           the same for tokens ``x_row`` apart, whose centres are 256 apart
    """
    g0, g1, g2, g3, g4, g5, g6, g7 = (weights.make_group(g) for g in range(GROUPS))
    s0, s1, s2, s3, s4, s5, s6, s7 = (weights.make_scale(g) for g in range(GROUPS))
    add_one, add_two, add_four = _make_add(weights.CENTRE != 0)

    @v.forceinline
    def dot_one(block, scales, x, centres):
        a = add_one(v.zero_i32x8(), g0(block), s0(scales), x, centres)
        a = add_one(a, g1(block), s1(scales), x + 64, centres + 32)
        a = add_one(a, g2(block), s2(scales), x + 128, centres + 64)
        a = add_one(a, g3(block), s3(scales), x + 192, centres + 96)
        a = add_one(a, g4(block), s4(scales), x + 256, centres + 128)
        a = add_one(a, g5(block), s5(scales), x + 320, centres + 160)
        a = add_one(a, g6(block), s6(scales), x + 384, centres + 192)
        return add_one(a, g7(block), s7(scales), x + 448, centres + 224)

    @v.forceinline
    def dot_two(block, scales, x, x_row, centres):
        ab = v.zero_i32x8(), v.zero_i32x8()
        ab = add_two(ab, g0(block), s0(scales), x, x_row, centres)
        ab = add_two(ab, g1(block), s1(scales), x + 64, x_row, centres + 32)
        ab = add_two(ab, g2(block), s2(scales), x + 128, x_row, centres + 64)
        ab = add_two(ab, g3(block), s3(scales), x + 192, x_row, centres + 96)
        ab = add_two(ab, g4(block), s4(scales), x + 256, x_row, centres + 128)
        ab = add_two(ab, g5(block), s5(scales), x + 320, x_row, centres + 160)
        ab = add_two(ab, g6(block), s6(scales), x + 384, x_row, centres + 192)
        return add_two(ab, g7(block), s7(scales), x + 448, x_row, centres + 224)

    @v.forceinline
    def dot_four(block, scales, x, x_row, centres):
        abcd = v.zero_i32x8(), v.zero_i32x8(), v.zero_i32x8(), v.zero_i32x8()
        abcd = add_four(abcd, g0(block), s0(scales), x, x_row, centres)
        abcd = add_four(abcd, g1(block), s1(scales), x + 64, x_row, centres + 32)
        abcd = add_four(abcd, g2(block), s2(scales), x + 128, x_row, centres + 64)
        abcd = add_four(abcd, g3(block), s3(scales), x + 192, x_row, centres + 96)
        abcd = add_four(abcd, g4(block), s4(scales), x + 256, x_row, centres + 128)
        abcd = add_four(abcd, g5(block), s5(scales), x + 320, x_row, centres + 160)
        abcd = add_four(abcd, g6(block), s6(scales), x + 384, x_row, centres + 192)
        return add_four(abcd, g7(block), s7(scales), x + 448, x_row, centres + 224)

    return dot_one, dot_two, dot_four


@functools.cache
def make_unpack(weights: Any) -> Any:
    """unpack(block, scales, out): 256 int16 sc (q - CENTRE), in the order of the activations."""
    g0, g1, g2, g3, g4, g5, g6, g7 = (weights.make_group(g) for g in range(GROUPS))
    s0, s1, s2, s3, s4, s5, s6, s7 = (weights.make_scale(g) for g in range(GROUPS))
    centre = weights.CENTRE

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
