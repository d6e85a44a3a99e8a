"""Pieces that several quantized types share: nibbles, scattered bits, half-precision scales of eight rows."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.simd import forceinline, load_u16, load_u32
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_low4_16, _four_16 = simd.make_const(simd.u8x16, 15), simd.make_const(simd.u8x16, 4)
_low4_32, _four_32 = simd.make_const(simd.u8x32, 15), simd.make_const(simd.u8x32, 4)
_sixteen_32, _forty_eight_32 = simd.make_const(simd.u8x32, 16), simd.make_const(simd.u8x32, 48)
_splat_u8x32 = simd.make_splat(simd.u8x32)
_scalar_i16 = types.int16


@forceinline
def nibbles(bytes16):  # type: ignore[no-untyped-def]
    """u8x32: the low nibbles of 16 bytes, then the high ones."""
    return simd.concat_u8x16(bytes16 & _low4_16(), bytes16 >> _four_16())


@forceinline
def nibble_of(bytes32, high):  # type: ignore[no-untyped-def]
    """u8x32: the low (high = 0) or the high (1) nibble of 32 bytes."""
    return (bytes32 >> _splat_u8x32(types.uint8(high * 4))) & _low4_32()


@forceinline
def bit_pair_of(bytes32, k):  # type: ignore[no-untyped-def]
    """u8x32: bits 2k and 2k+1 of 32 bytes, at bits 4 and 5."""
    return ((bytes32 >> _splat_u8x32(types.uint8(k * 2))) << _four_32()) & _forty_eight_32()


@forceinline
def sixteen_if_bit(bytes32, k):  # type: ignore[no-untyped-def]
    """u8x32: 16 where bit k of a byte is set."""
    return ((bytes32 >> _splat_u8x32(types.uint8(k))) << _four_32()) & _sixteen_32()


@intrinsic
def sixteen_where(typing_context: Any, bits: Any) -> Any:
    """u8x32: 16 in lane j where bit j of a uint32 is set."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        mask = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 32))
        yes, no = (ir.Constant(simd.u8x32.ir, [n] * 32) for n in (16, 0))
        return builder.select(mask, yes, no)

    return simd.u8x32(types.uint32), codegen


@intrinsic
def two_scales(typing_context: Any, a: Any, b: Any) -> Any:
    """i16x32: the int8 a in lanes 0 to 15, b in lanes 16 to 31."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i16, i32 = ir.IntType(16), ir.IntType(32)
        pair = ir.Constant(ir.VectorType(i16, 2), ir.Undefined)
        for lane in (0, 1):
            pair = builder.insert_element(pair, builder.sext(args[lane], i16), ir.Constant(i32, lane))
        lanes = ir.Constant(ir.VectorType(i32, 32), [0] * 16 + [1] * 16)
        return builder.shuffle_vector(pair, pair, lanes)

    return simd.i16x32(types.int8, types.int8), codegen


@forceinline
def halves_at(p0, p1, p2, p3, p4, p5, p6, p7):  # type: ignore[no-untyped-def]
    """f32x8: the float16 at eight addresses."""
    a, b, c, d = load_u16(p0), load_u16(p1), load_u16(p2), load_u16(p3)
    e, f, g, h = load_u16(p4), load_u16(p5), load_u16(p6), load_u16(p7)
    return simd.half_f32x8(simd.gather_u16x8(a, b, c, d, e, f, g, h))


@forceinline
def words_at(p0, p1, p2, p3, p4, p5, p6, p7):  # type: ignore[no-untyped-def]
    """u32x8: the words at eight addresses."""
    a, b, c, d = load_u32(p0), load_u32(p1), load_u32(p2), load_u32(p3)
    e, f, g, h = load_u32(p4), load_u32(p5), load_u32(p6), load_u32(p7)
    return simd.gather_u32x8(a, b, c, d, e, f, g, h)


_even_u16 = simd.make_shuffle(simd.u16x16, list(range(0, 16, 2)))
_odd_u16 = simd.make_shuffle(simd.u16x16, list(range(1, 16, 2)))


@forceinline
def half_pairs_at(p0, p1, p2, p3, p4, p5, p6, p7):  # type: ignore[no-untyped-def]
    """u16x16: the two neighbouring float16 (as bits) at eight addresses."""
    return simd.u32x8_as_u16x16(words_at(p0, p1, p2, p3, p4, p5, p6, p7))


@forceinline
def first_of_pair(pairs):  # type: ignore[no-untyped-def]
    """f32x8 of the first halves."""
    return simd.half_f32x8(_even_u16(pairs, pairs))


@forceinline
def second_of_pair(pairs):  # type: ignore[no-untyped-def]
    """f32x8 of the second halves."""
    return simd.half_f32x8(_odd_u16(pairs, pairs))


_k6, _k4, _k2 = (simd.make_const(simd.u32x8, n) for n in (0x3F3F3F3F, 0x0F0F0F0F, 0x03030303))
_shift6, _shift4, _byte = (simd.make_const(simd.u32x8, n) for n in (6, 4, 0xFF))
_splat_u32x8 = simd.make_splat(simd.u32x8)
_to_float = simd.make_convert(simd.u32x8, simd.f32x8, "uitofp")


@forceinline
def _store_four(packed, factor, out):  # type: ignore[no-untyped-def]
    """Four vectors of float scales from the four bytes of every row's word."""
    for j in range(4):
        byte = (packed >> _splat_u32x8(types.uint32(8 * j))) & _byte()
        simd.store_f32x8(out + 32 * j, _to_float(byte) * factor)


@forceinline
def decode_k_scales(p0, p1, p2, p3, p4, p5, p6, p7, out):  # type: ignore[no-untyped-def]
    """The 8 scales d sc, then the 8 minima -dmin m, of eight Q4_K or Q5_K blocks; 6-bit packing as in formats."""
    pairs = half_pairs_at(p0, p1, p2, p3, p4, p5, p6, p7)
    d, minus_dmin = first_of_pair(pairs), simd.zero_f32x8() - second_of_pair(pairs)
    u0 = words_at(p0 + 4, p1 + 4, p2 + 4, p3 + 4, p4 + 4, p5 + 4, p6 + 4, p7 + 4)
    u1 = words_at(p0 + 8, p1 + 8, p2 + 8, p3 + 8, p4 + 8, p5 + 8, p6 + 8, p7 + 8)
    u2 = words_at(p0 + 12, p1 + 12, p2 + 12, p3 + 12, p4 + 12, p5 + 12, p6 + 12, p7 + 12)
    _store_four(u0 & _k6(), d, out)
    _store_four((u2 & _k4()) | (((u0 >> _shift6()) & _k2()) << _shift4()), d, out + 128)
    _store_four(u1 & _k6(), minus_dmin, out + 256)
    _store_four(((u2 >> _shift4()) & _k4()) | (((u1 >> _shift6()) & _k2()) << _shift4()), minus_dmin, out + 384)
