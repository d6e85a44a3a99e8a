"""Pieces that several quantized types share: nibbles, scattered bits, half-precision scales and dots of eight rows.

The order of the 32 integers of a group is that of the activations: 16 even ones, then 16 odd ones. It comes for free
when bytes are read as 16-bit words, and an integer sum does not mind.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgellm.formats import levels
from edgellm.kernels.cpu.lib import lanes
from edgellm.kernels.cpu.lib import simd as v

_low4_16, _four_16 = v.make_const(v.u8x16, 15), v.make_const(v.u8x16, 4)

# ---- bytes to the 32 integers of a group ----------------------------------------------------------------------------

_low_byte, _eight_bits = v.make_const(v.u16x16, 255), v.make_const(v.u16x16, 8)
_eight_bits_signed = v.make_const(v.i16x16, 8)


@v.forceinline
def even_odd_u8(bytes32):
    """i16x32 of unsigned bytes: the even ones, then the odd ones."""
    w = v.u8x32_as_u16x16(bytes32)
    even, odd = v.u16x16_as_i16x16(w & _low_byte()), v.u16x16_as_i16x16(w >> _eight_bits())
    return v.concat_i16x16(even, odd)


@v.forceinline
def even_odd_i8(bytes32):
    """i16x32 of signed bytes: the even ones, then the odd ones."""
    w = v.u16x16_as_i16x16(v.u8x32_as_u16x16(bytes32))
    return v.concat_i16x16((w << _eight_bits_signed()) >> _eight_bits_signed(), w >> _eight_bits_signed())


@v.forceinline
def nibbles(bytes16):
    """u8x32: the low nibbles of 16 bytes, then the high ones."""
    return v.concat_u8x16(bytes16 & _low4_16(), bytes16 >> _four_16())


iq4_levels = v.make_constants(v.u8x16, [n % 256 for n in levels.IQ4])
"""What the nibbles of IQ4_NL and IQ4_XS stand for."""


@intrinsic
def sixteen_where(typing_context: Any, bits: Any) -> Any:
    """u8x32: 16 in lane j where bit j of a uint32 is set."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i32, words, byte = ir.IntType(32), ir.VectorType(ir.IntType(32), 8), v.u8x32.ir
        word = builder.insert_element(ir.Constant(words, ir.Undefined), args[0], ir.Constant(i32, 0))
        every = builder.bitcast(builder.shuffle_vector(word, word, ir.Constant(words, [0] * 8)), byte)
        lanes = ir.Constant(ir.VectorType(i32, 32), [j // 8 for j in range(32)])
        bit = ir.Constant(byte, [1 << j % 8 for j in range(32)])
        found = builder.icmp_unsigned("==", builder.and_(builder.shuffle_vector(every, every, lanes), bit), bit)
        return builder.select(found, *(ir.Constant(byte, [n] * 32) for n in (16, 0)))

    return v.u8x32(types.uint32), codegen


# ---- dots of eight rows with one group of activations ---------------------------------------------------------------


def make_sums(unpack: Any) -> Any:
    """sums(p, stride, x): for eight rows, the int32 sum of the products of a block with the int16 group at x."""

    @v.forceinline
    def dot(block, x):
        w = unpack(block)
        low = v.madd_i16x16(v.zero_i32x8(), v.low_i16x32(w, w), v.low_i16x32(x, x))
        return v.madd_i16x16(low, v.high_i16x32(w, w), v.high_i16x32(x, x))

    @v.forceinline
    def sums(p, stride, x_address):
        x = v.load_i16x32(x_address)
        p4 = p + 4 * stride
        return lanes.sums_of_eight(
            dot(p, x), dot(p + stride, x), dot(p + 2 * stride, x), dot(p + 3 * stride, x),
            dot(p4, x), dot(p4 + stride, x), dot(p4 + 2 * stride, x), dot(p4 + 3 * stride, x),
        )  # fmt: skip

    return sums


_nibble_word, _shift4_word = v.make_const(v.u16x16, 15), v.make_const(v.u16x16, 4)
_shift12_word = v.make_const(v.u16x16, 12)
_twice = v.make_shuffle(v.i16x8, [*range(8), *range(8)])


@v.forceinline
def quarter(x):
    """Eight activations, once for each of two rows."""
    value = v.load_i16x8(x)
    return _twice(value, value)


def make_nibble_sums(first_byte: int) -> Any:
    """make_sums for blocks of 16 nibble bytes at ``first_byte``: two rows share a register.

    A word of two bytes holds the nibbles of weights 2i, 16+2i, 2i+1, 17+2i, so four masks give the four quarters of
    the group for both rows, and one sums_of_four ends the work of eight rows.
    """

    @v.forceinline
    def two_rows(pa, pb, x0, x1, x2, x3):
        w = v.u8x32_as_u16x16(v.concat_u8x16(v.load_u8x16(pa + first_byte), v.load_u8x16(pb + first_byte)))
        even_low = v.u16x16_as_i16x16(w & _nibble_word())
        even_high = v.u16x16_as_i16x16((w >> _shift4_word()) & _nibble_word())
        odd_low = v.u16x16_as_i16x16((w >> _eight_bits()) & _nibble_word())
        odd_high = v.u16x16_as_i16x16(w >> _shift12_word())
        acc = v.madd_i16x16(v.zero_i32x8(), even_low, x0)
        acc = v.madd_i16x16(acc, even_high, x1)
        acc = v.madd_i16x16(acc, odd_low, x2)
        return v.madd_i16x16(acc, odd_high, x3)

    @v.forceinline
    def sums(p, stride, x_address):
        x0, x1 = quarter(x_address), quarter(x_address + 16)
        x2, x3 = quarter(x_address + 32), quarter(x_address + 48)
        p1, p2, p3, p4 = p + stride, p + 2 * stride, p + 3 * stride, p + 4 * stride
        a, b = two_rows(p, p4, x0, x1, x2, x3), two_rows(p1, p1 + 4 * stride, x0, x1, x2, x3)
        c, d = two_rows(p2, p2 + 4 * stride, x0, x1, x2, x3), two_rows(p3, p3 + 4 * stride, x0, x1, x2, x3)
        return lanes.sums_of_four(a, b, c, d)

    return sums


# ---- scales of eight rows -------------------------------------------------------------------------------------------


@v.forceinline
def halves_at(p, stride):
    """f32x8: the float16 at p in eight rows."""
    q = p + 4 * stride
    a, b, c, d = v.load_u16(p), v.load_u16(p + stride), v.load_u16(p + 2 * stride), v.load_u16(p + 3 * stride)
    e, f, g, h = v.load_u16(q), v.load_u16(q + stride), v.load_u16(q + 2 * stride), v.load_u16(q + 3 * stride)
    return v.half_f32x8(v.gather_u16x8(a, b, c, d, e, f, g, h))


# lanes of the 16 floats (d m) x rows 0 1 4 5 2 3 6 7
_d_lanes = v.make_shuffle(v.f32x16, [0, 2, 8, 10, 4, 6, 12, 14])
_m_lanes = v.make_shuffle(v.f32x16, [1, 3, 9, 11, 5, 7, 13, 15])


@v.forceinline
def half_pairs_at(p, stride):
    """Two f32x8: the two neighbouring float16 at p in eight rows. The row order makes the split one shuffle each."""
    q, p2, q2 = p + 4 * stride, p + 2 * stride, p + 6 * stride
    a, b, c, d = v.load_u32(p), v.load_u32(p + stride), v.load_u32(q), v.load_u32(q + stride)
    e, f, g, h = v.load_u32(p2), v.load_u32(p2 + stride), v.load_u32(q2), v.load_u32(q2 + stride)
    pairs = v.half_f32x16(v.u32x8_as_u16x16(v.gather_u32x8(a, b, c, d, e, f, g, h)))
    return _d_lanes(pairs, pairs), _m_lanes(pairs, pairs)


def make_single_factor(at: int) -> Any:
    """factors(p, stride) for types without a minimum: the float16 at byte ``at`` of eight blocks, and zero."""

    @v.forceinline
    def factors(p, stride):
        return halves_at(p + at, stride), v.zero_f32x8()

    return factors
