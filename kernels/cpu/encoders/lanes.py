"""Eight blocks side by side: the vector operations that the encoders are made of.

An encoder works on eight blocks (or groups of a super-block) at once, one in each lane, and in every lane does what
ggml's scalar quantizer does, in the same order: no sum crosses lanes, nothing is fused or reassociated. So the bytes
are those of ggml's reference, on every CPU.

A *panel* is 8 numbers by n in memory, number i of all eight blocks in one vector at ``panel + 32 i``. Masks are i32x8
with all bits set or none.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgellm.kernels.cpu.lib import simd as v

LANES = 8

store_u8, store_u8x8, store_u8x32, store_u16x8 = (v.make_store(t) for t in (types.uint8, v.u8x8, v.u8x32, v.u16x8))
i32x8_as_u8x8, i32x8_as_u16x8 = (v.make_convert(v.i32x8, t, "trunc") for t in (v.u8x8, v.u16x8))
bits_of, float_of = v.make_convert(v.f32x8, v.i32x8, "bitcast"), v.make_convert(v.i32x8, v.f32x8, "bitcast")
to_int = v.make_convert(v.f32x8, v.i32x8, "fptosi")


def constant(value: float) -> Any:
    """Eight equal float32."""
    return v.make_const(v.f32x8, value)


def integer(value: int) -> Any:
    """Eight equal int32."""
    return v.make_const(v.i32x8, value)


# ---- comparing and choosing ------------------------------------------------------------------------------------------


def _compare(symbol: str, ordered: bool = True) -> Any:
    """A comparison of float32 lanes; with a NaN an ordered one is false, the other true."""

    @intrinsic
    def compare(typing_context, a, b):
        def codegen(context, builder, sig, args):
            compared = builder.fcmp_ordered if ordered else builder.fcmp_unordered
            return builder.sext(compared(symbol, *args), v.i32x8.ir)

        return v.i32x8(v.f32x8, v.f32x8), codegen

    return compare


less, greater, at_least, same = _compare("<"), _compare(">"), _compare(">="), _compare("==")
differs = _compare("!=", ordered=False)


@intrinsic
def where(typing_context, mask, yes, no):
    """Lane by lane: yes where the mask is set, else no."""

    def codegen(context, builder, sig, args):
        chosen = builder.icmp_signed("!=", args[0], ir.Constant(v.i32x8.ir, [0] * LANES))
        return builder.select(chosen, args[1], args[2])

    return yes(mask, yes, no), codegen


@intrinsic
def clamp(typing_context, value, low, high):
    """int32 lanes held between two bounds."""

    def codegen(context, builder, sig, args):
        number, low_bound, high_bound = args
        number = builder.select(builder.icmp_signed("<", number, high_bound), number, high_bound)
        return builder.select(builder.icmp_signed(">", number, low_bound), number, low_bound)

    return v.i32x8(v.i32x8, v.i32x8, v.i32x8), codegen


def _unary(name: str) -> Any:
    @intrinsic
    def unary(typing_context, value):
        def codegen(context, builder, sig, args):
            function_type = ir.FunctionType(v.f32x8.ir, [v.f32x8.ir])
            return builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}"), args)

        return v.f32x8(v.f32x8), codegen

    return unary


absolute, square_root = _unary("fabs.v8f32"), _unary("sqrt.v8f32")


@intrinsic
def any_lane(typing_context, mask):
    """Whether a mask is set in any lane, as an int32."""

    def codegen(context, builder, sig, args):
        function_type = ir.FunctionType(v.I32, [v.i32x8.ir])
        name = "llvm.vector.reduce.or.v8i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)

    return types.int32(v.i32x8), codegen


# ---- rounding --------------------------------------------------------------------------------------------------------

_magic, _mantissa, _half_mantissa = constant(12582912.0), integer(0x007FFFFF), integer(0x00400000)
_int_end, _int_lowest, _no_float = constant(2147483648.0), integer(-(1 << 31)), constant(0.0)
_half, _one = constant(0.5), constant(1.0)


@v.forceinline
def nearest(value):
    """Nearest whole number, halves to even; past 2^22 what the bits of the sum happen to hold, as in ggml."""
    return (bits_of(value + _magic()) & _mantissa()) - _half_mantissa()


@v.forceinline
def truncate(value):
    """Whole part; the lowest int32 for what does not fit and for NaN, as x86 converts."""
    fits = less(absolute(value), _int_end())
    return where(fits, to_int(where(fits, value, _no_float())), _int_lowest())


@v.forceinline
def round_away(value):
    """Nearest whole number, halves away from zero; the lowest int32 for what does not fit, 0 in its low bits."""
    fits = less(absolute(value), _int_end())
    whole = to_int(where(fits, value, _no_float()))
    rest = value - v.to_f32x8(whole)
    up, down = at_least(rest, _half()), at_least(_no_float() - rest, _half())  # all bits set is -1
    return where(fits, whole - up + down, _int_lowest())


@v.forceinline
def reciprocal(d):
    """1 / d, and 0 of 0."""
    return where(differs(d, _no_float()), _one() / d, _no_float())


# ---- float16 ---------------------------------------------------------------------------------------------------------

_to_infinity, _to_zero = constant(2.0**112), constant(2.0**-110)
_exponent, _smallest, _rebias = integer(0x7F800000), integer(0x38800000), integer(0x07800000)
_largest_int, _sign = integer(0x7FFFFFFF), integer(0x8000)
_shift13, _shift16 = integer(13), integer(16)
_half_exponent, _half_rest, _half_nan = integer(0x7C00), integer(0x0FFF), integer(0x7E00)


@v.forceinline
def half_bits(value):
    """The float16 nearest to each lane, halves to even, as its bits."""
    bits = bits_of(value)
    scaled = (absolute(value) * _to_infinity()) * _to_zero()
    exponent = bits & _exponent()
    exponent = clamp(exponent, _smallest(), _largest_int())
    rounded = bits_of(float_of(exponent + _rebias()) + scaled)
    magnitude = ((rounded >> _shift13()) & _half_exponent()) + (rounded & _half_rest())
    magnitude = where(differs(value, value), _half_nan(), magnitude)
    return magnitude | ((bits >> _shift16()) & _sign())


@v.forceinline
def half_value(bits):
    """The float32 of float16 bits."""
    return v.half_f32x8(i32x8_as_u16x8(bits))


# ---- panels ----------------------------------------------------------------------------------------------------------

_low_pairs = v.make_shuffle(v.f32x8, [0, 8, 1, 9, 4, 12, 5, 13])
_high_pairs = v.make_shuffle(v.f32x8, [2, 10, 3, 11, 6, 14, 7, 15])
_low_quads = v.make_shuffle(v.f32x8, [0, 1, 8, 9, 4, 5, 12, 13])
_high_quads = v.make_shuffle(v.f32x8, [2, 3, 10, 11, 6, 7, 14, 15])
_low_half = v.make_shuffle(v.f32x8, [0, 1, 2, 3, 8, 9, 10, 11])
_high_half = v.make_shuffle(v.f32x8, [4, 5, 6, 7, 12, 13, 14, 15])


@v.forceinline
def _store_columns(panel, a, b, c, d, e, f, g, h):
    """Eight rows of eight float32 as eight columns."""
    ab0, ab1, cd0, cd1 = _low_pairs(a, b), _high_pairs(a, b), _low_pairs(c, d), _high_pairs(c, d)
    ef0, ef1, gh0, gh1 = _low_pairs(e, f), _high_pairs(e, f), _low_pairs(g, h), _high_pairs(g, h)
    a0, a1, a2, a3 = _low_quads(ab0, cd0), _high_quads(ab0, cd0), _low_quads(ab1, cd1), _high_quads(ab1, cd1)
    e0, e1, e2, e3 = _low_quads(ef0, gh0), _high_quads(ef0, gh0), _low_quads(ef1, gh1), _high_quads(ef1, gh1)
    v.store_f32x8(panel, _low_half(a0, e0))
    v.store_f32x8(panel + 32, _low_half(a1, e1))
    v.store_f32x8(panel + 64, _low_half(a2, e2))
    v.store_f32x8(panel + 96, _low_half(a3, e3))
    v.store_f32x8(panel + 128, _high_half(a0, e0))
    v.store_f32x8(panel + 160, _high_half(a1, e1))
    v.store_f32x8(panel + 192, _high_half(a2, e2))
    v.store_f32x8(panel + 224, _high_half(a3, e3))


@v.forceinline
def load_panel(panel, base, stride, last, n):
    """n float32 (a multiple of 8) of eight blocks, ``stride`` bytes apart; lanes past ``last`` repeat that one."""
    p1, p2, p3 = base + min(1, last) * stride, base + min(2, last) * stride, base + min(3, last) * stride
    p4, p5, p6 = base + min(4, last) * stride, base + min(5, last) * stride, base + min(6, last) * stride
    p7 = base + min(7, last) * stride
    for i in range(0, n, 8):
        at = i * 4
        a, b, c, d = v.load_f32x8(base + at), v.load_f32x8(p1 + at), v.load_f32x8(p2 + at), v.load_f32x8(p3 + at)
        e, f, g, h = v.load_f32x8(p4 + at), v.load_f32x8(p5 + at), v.load_f32x8(p6 + at), v.load_f32x8(p7 + at)
        _store_columns(panel + i * 32, a, b, c, d, e, f, g, h)


@v.forceinline
def sums_of_squares(panel, base, stride, last, n):
    """Sum of x^2 of eight blocks of n float32, each added up from the first to the last; the panel holds eight."""
    total = v.zero_f32x8()
    for i in range(0, n, 8):
        load_panel(panel, base + i * 4, stride, last, 8)
        for j in range(8):
            x = v.load_f32x8(panel + j * 32)
            total = total + x * x
    return total


def _make_scatter(nbytes: int) -> Any:
    """An intrinsic that writes the low bytes of lane i to ``base + min(i, last) * stride``."""
    narrow = ir.IntType(8 * nbytes)

    @intrinsic
    def scatter(typing_context, base, stride, last, number):
        def codegen(context, builder, sig, args):
            base, stride, last, number = args
            for lane in range(LANES):
                index = ir.Constant(ir.IntType(64), lane)
                block = builder.select(builder.icmp_signed("<", index, last), index, last)
                address = builder.add(base, builder.mul(block, stride))
                value = builder.extract_element(number, ir.Constant(v.I32, lane))
                value = builder.trunc(value, narrow) if nbytes < 4 else value
                builder.store(value, builder.inttoptr(address, narrow.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64, v.i32x8), codegen

    return scatter


scatter_u8, scatter_u16, scatter_i32 = _make_scatter(1), _make_scatter(2), _make_scatter(4)
