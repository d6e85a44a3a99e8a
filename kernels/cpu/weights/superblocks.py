"""Pieces that the types of 256 weights share: bit fields of words, and sub-scales as int32.

Two neighbouring bytes are one 16-bit word throughout, so a group of 32 weights falls apart into its even and its odd
ones with a mask and a shift.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.simd import forceinline, load_i32, load_i32x8, load_u32, splat_i32x8, store_i32x8
from edgellm.kernels.cpu.weights import common

# ---- the 32 integers of a group --------------------------------------------------------------------------------------

words_at = simd.make_load(simd.u16x16)
"""u16x16: 32 bytes at an address, as words."""

_low_byte, _eight = simd.make_const(simd.u16x16, 255), simd.make_const(simd.u16x16, 8)


@forceinline
def even_odd(words):
    """i16x32 of the bytes of 16 words: the even ones, then the odd ones."""
    even, odd = simd.u16x16_as_i16x16(words & _low_byte()), simd.u16x16_as_i16x16(words >> _eight())
    return simd.concat_i16x16(even, odd)


@functools.cache
def make_field(shift: int, mask: int) -> Any:
    """field(words): in every byte its bits from ``shift`` on, under a mask; a negative shift moves them up."""
    count, both = simd.make_const(simd.u16x16, abs(shift)), simd.make_const(simd.u16x16, mask * 0x0101)

    @forceinline
    def right(words):
        return (words >> count()) & both()

    @forceinline
    def left(words):
        return (words << count()) & both()

    return right if shift >= 0 else left


# ---- sub-scales: what store_scales writes and make_scale reads -------------------------------------------------------


@intrinsic
def bytes_of(typing_context: Any, low: Any, high: Any) -> Any:
    """u8x16 of two int64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = ir.Constant(ir.VectorType(ir.IntType(64), 2), ir.Undefined)
        for lane in (0, 1):
            pair = builder.insert_element(pair, args[lane], ir.Constant(ir.IntType(32), lane))
        return builder.bitcast(pair, simd.u8x16.ir)

    return simd.u8x16(types.int64, types.int64), codegen


_first8 = simd.make_shuffle(simd.u8x16, list(range(8)))
_widen = simd.make_convert(simd.u8x8, simd.i32x8, "zext")
_as_signed = simd.make_convert(simd.u8x8, simd.i8x8, "bitcast")
_widen_signed = simd.make_convert(simd.i8x8, simd.i32x8, "sext")
_low4, _four = simd.make_const(simd.u8x16, 15), simd.make_const(simd.u8x16, 4)

# sub-scales 0 to 7, then 8 to 15: those of the first 16 weights of four groups, then those of the other 16
_of_first_groups = simd.make_shuffle(simd.u8x16, [0, 2, 4, 6, 1, 3, 5, 7])
_of_last_groups = simd.make_shuffle(simd.u8x16, [8, 10, 12, 14, 9, 11, 13, 15])
_even_bytes = simd.make_shuffle(simd.u8x16, list(range(0, 16, 2)))
_odd_bytes = simd.make_shuffle(simd.u8x16, list(range(1, 16, 2)))


@forceinline
def eight_bytes(word):
    """i32x8 of the bytes of an int64."""
    v = bytes_of(word, word)
    return _widen(_first8(v, v))


@functools.cache
def make_scale_of_eight(g: int) -> Any:
    """scale(scales): in every lane sub-scale g of 8, one for each group."""

    @forceinline
    def scale(scales):
        return splat_i32x8(load_i32(scales + 4 * g))

    return scale


@functools.cache
def make_scale_of_sixteen(g: int) -> Any:
    """scale(scales): sub-scales 2 g and 2 g + 1 of 16, in the lanes of the first and the last 16 weights of a group."""
    k, offset = g % 4, g // 4 * 32
    spread = simd.make_shuffle(simd.i32x8, [k] * 4 + [k + 4] * 4)

    @forceinline
    def scale(scales):
        v = load_i32x8(scales + offset)
        return spread(v, v)

    return scale


@forceinline
def store_sixteen(values, minus, out):
    """Sixteen unsigned sub-scales less a number, as make_scale_of_sixteen reads them."""
    store_i32x8(out, _widen(_of_first_groups(values, values)) - splat_i32x8(types.int32(minus)))
    store_i32x8(out + 32, _widen(_of_last_groups(values, values)) - splat_i32x8(types.int32(minus)))


@forceinline
def store_sixteen_signed(values, out):
    """Sixteen int8 sub-scales, as make_scale_of_sixteen reads them."""
    store_i32x8(out, _widen_signed(_as_signed(_of_first_groups(values, values))))
    store_i32x8(out + 32, _widen_signed(_as_signed(_of_last_groups(values, values))))


# ---- the scales and minima of Q4_K and Q5_K, six bits each in 12 bytes: drawn in formats/k_quants.py -----------------


@forceinline
def store_k_scales(block, out):
    """The eight sub-scales of a Q4_K or Q5_K block."""
    s, both = types.int64(load_u32(block + 4)), types.int64(load_u32(block + 12))
    high = (both & 0x0F0F0F0F) | (((s >> 6) & 0x03030303) << 4)
    store_i32x8(out, eight_bytes((s & 0x3F3F3F3F) | (high << 32)))


@forceinline
def k_minima(block):
    """The eight minima of a Q4_K or Q5_K block; nothing more for halves of groups."""
    m, both = types.int64(load_u32(block + 8)), types.int64(load_u32(block + 12))
    high = ((both >> 4) & 0x0F0F0F0F) | (((m >> 6) & 0x03030303) << 4)
    return eight_bytes((m & 0x3F3F3F3F) | (high << 32)), simd.zero_i32x8()


@forceinline
def k_factors(p, stride):
    """d and -dmin, the first numbers of eight blocks."""
    d, dmin = common.half_pairs_at(p, stride)
    return d, simd.zero_f32x8() - dmin


@forceinline
def low_nibbles(values):
    """u8x16: bits 3 to 0."""
    return values & _low4()


@forceinline
def high_nibbles(values):
    """u8x16: bits 7 to 4."""
    return values >> _four()


@forceinline
def even_and_odd_bytes(values):
    """Two i32x8: the even and the odd ones of 16 unsigned bytes."""
    return _widen(_even_bytes(values, values)), _widen(_odd_bytes(values, values))


def make_single_factor(at: int) -> Any:
    """factors(p, stride) for types without a minimum: the float16 at byte ``at`` of eight blocks, and zero."""

    @forceinline
    def factors(p, stride):
        return common.halves_at(p + at, stride), simd.zero_f32x8()

    return factors


@forceinline
def no_minima(block):
    """Types without minima."""
    return simd.zero_i32x8(), simd.zero_i32x8()
