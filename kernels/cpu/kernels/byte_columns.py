"""A few tokens of some types of 32 weights on AVX2: eight rows at a time, four bytes of each in a vector, lane = row.

``vpmaddubsw`` multiplies unsigned bytes by signed ones and adds two neighbours in int16; weights below 32 and
activations of two signed bytes, x = 256 hi + lo, leave room for what a block adds up in a row:

    sum of 16 products with hi, |hi| <= 64      below 2^15
    sum of 8 products with lo, |lo| <= 128      below 2^15

Integers and float32 steps are those of block_matmul.py, and so are the bits. Levels of more than five bits have no
room.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from edgellm.formats import levels
from edgellm.kernels.cpu.kernels import transposed_blocks
from edgellm.kernels.cpu.kernels.transposed_blocks import LO, Reads
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.lanes import columns_of_four
from edgellm.kernels.cpu.weights import blocks

# ---- eight rows ------------------------------------------------------------------------------------------------------

_as_columns, _as_bytes = v.make_convert(v.u8x32, v.i32x8, "bitcast"), v.make_convert(v.i32x8, v.u8x32, "bitcast")


@v.forceinline
def _rows(p, q):
    """16 bytes of two rows."""
    return _as_columns(v.concat_u8x16(v.load_u8x16(p), v.load_u8x16(q)))


@v.forceinline
def columns_of_16(p, stride):
    """16 bytes of eight rows: lane r of the m-th vector is the m-th four bytes of row r."""
    p1, p2, p3, half = p + stride, p + 2 * stride, p + 3 * stride, 4 * stride
    z = columns_of_four(_rows(p, p + half), _rows(p1, p1 + half), _rows(p2, p2 + half), _rows(p3, p3 + half))
    return _as_bytes(z[0]), _as_bytes(z[1]), _as_bytes(z[2]), _as_bytes(z[3])


_u64x1, _u64x2, _u64x4 = (v.Vec(types.uint64, n) for n in (1, 2, 4))
_load_eight, _two, _four = v.make_load(_u64x1), v.make_shuffle(_u64x1, [0, 1]), v.make_shuffle(_u64x2, [0, 1, 2, 3])
_as_words = v.make_convert(_u64x4, v.u32x8, "bitcast")
_even_words = v.make_shuffle(v.u32x8, [0, 2, 8, 10, 4, 6, 12, 14])
_odd_words = v.make_shuffle(v.u32x8, [1, 3, 9, 11, 5, 7, 13, 15])


@v.forceinline
def _eight_bytes(p, stride):
    q = p + 4 * stride
    first = _two(_load_eight(p), _load_eight(p + stride))
    return _as_words(_four(first, _two(_load_eight(q), _load_eight(q + stride))))


@v.forceinline
def _header(p, stride):
    """The first and the second four bytes of eight rows."""
    a, b = _eight_bytes(p, stride), _eight_bytes(p + 2 * stride, stride)
    return _even_words(a, b), _odd_words(a, b)


# ---- weights: the first two steps of transposed_blocks.Reads ---------------------------------------------------------

_low4, _four_bits = v.make_const(v.u8x32, 15), v.make_const(v.u16x16, 4)
_four_words, _sixteen_words = v.make_const(v.u32x8, 4), v.make_const(v.u32x8, 16)
low_halves, _word_bytes = v.make_convert(v.u32x8, v.u16x8, "trunc"), v.make_convert(v.u32x8, v.u8x32, "bitcast")


@v.forceinline
def _begin_q4_0(p, stride):
    first, _ = _header(p, stride)
    return columns_of_16(p + 2, stride), v.half_f32x8(low_halves(first)), v.zero_f32x8()


@v.forceinline
def _begin_q4_1(p, stride):
    first, _ = _header(p, stride)
    minimum = v.half_f32x8(low_halves(first >> _sixteen_words()))
    return columns_of_16(p + 4, stride), v.half_f32x8(low_halves(first)), minimum


@v.forceinline
def _begin_q5_0(p, stride):
    first, second = _header(p, stride)
    fifth = (first >> _sixteen_words()) | (second << _sixteen_words())
    return (columns_of_16(p + 6, stride), fifth), v.half_f32x8(low_halves(first)), v.zero_f32x8()


@v.forceinline
def _begin_q5_1(p, stride):
    first, fifth = _header(p, stride)
    minimum = v.half_f32x8(low_halves(first >> _sixteen_words()))
    return (columns_of_16(p + 8, stride), fifth), v.half_f32x8(low_halves(first)), minimum


_factors_of_mxfp4 = blocks.TYPES["MXFP4"].factors


@v.forceinline
def _begin_mxfp4(p, stride):
    d, minimum = _factors_of_mxfp4(p, stride)
    return columns_of_16(p + 1, stride), d, minimum


@v.forceinline
def _nibbles(z):
    """Of columns: the low nibbles of all, then the high ones."""
    low4, shift = _low4(), _four_bits()
    a, b, c, d = z
    high_a, high_b = v.u8x32_as_u16x16(a) >> shift, v.u8x32_as_u16x16(b) >> shift
    high_c, high_d = v.u8x32_as_u16x16(c) >> shift, v.u8x32_as_u16x16(d) >> shift
    return (
        a & low4, b & low4, c & low4, d & low4,
        v.u16x16_as_u8x32(high_a) & low4, v.u16x16_as_u8x32(high_b) & low4,
        v.u16x16_as_u8x32(high_c) & low4, v.u16x16_as_u8x32(high_d) & low4,
    )  # fmt: skip


_sixteen_where = v.make_constants(v.u8x16, [16 if n in (1, 2, 4, 8) else 0 for n in range(16)])
_bit_of_byte = v.make_constants(v.u8x32, [1, 2, 4, 8] * 8)


def _make_fifth(byte: int) -> Any:
    """fifth(bits): 16 where bit 0 to 3 of that byte of a row is set, in the row's four bytes."""
    repeat = v.make_shuffle(v.u8x32, [4 * row + byte for row in range(8) for _ in range(4)])

    @v.forceinline
    def fifth(bits):
        return v.lookup_u8x32(_sixteen_where(), repeat(bits, bits) & _bit_of_byte())

    return fifth


_fifth0, _fifth1, _fifth2, _fifth3 = (_make_fifth(byte) for byte in range(4))


@v.forceinline
def _five_bits(begun):
    z, bits = _nibbles(begun[0]), begun[1]
    even, odd = _word_bytes(bits), _word_bytes(bits >> _four_words())
    return (
        z[0] | _fifth0(even), z[1] | _fifth0(odd), z[2] | _fifth1(even), z[3] | _fifth1(odd),
        z[4] | _fifth2(even), z[5] | _fifth2(odd), z[6] | _fifth3(even), z[7] | _fifth3(odd),
    )  # fmt: skip


_E2M1_CENTRE = 12
"""Added to the levels, so that they are unsigned."""
_e2m1 = v.make_constants(v.u8x16, [n + _E2M1_CENTRE for n in levels.E2M1_DOUBLED])


@v.forceinline
def _levels(begun):
    z, of = _nibbles(begun), v.lookup_u8x32
    table = _e2m1()
    return (
        of(table, z[0]), of(table, z[1]), of(table, z[2]), of(table, z[3]),
        of(table, z[4]), of(table, z[5]), of(table, z[6]), of(table, z[7]),
    )  # fmt: skip


class Columns(NamedTuple):
    """How a type's blocks are read; ``centre`` was added to its weights."""

    begin: Any
    ready: Any
    centre: int = 0


TYPES = {  # the layouts are drawn in formats/block_quants.py and formats/small_quants.py
    "Q4_0": Columns(_begin_q4_0, _nibbles, 8),
    "Q4_1": Columns(_begin_q4_1, _nibbles),
    "Q5_0": Columns(_begin_q5_0, _five_bits, 16),
    "Q5_1": Columns(_begin_q5_1, _five_bits),
    "MXFP4": Columns(_begin_mxfp4, _levels, _E2M1_CENTRE),
}


# ---- products --------------------------------------------------------------------------------------------------------

_dot_pairs = v.declared("dot_pairs", v.i16x16, v.u8x32, v.u8x32)
"""dot_pairs(u, s): two neighbouring unsigned bytes of u times the signed ones of s, added in int16."""
_splat = v.make_splat(v.u32x8)
_hundreds, _ones = v.make_const(v.i16x16, 256), v.make_const(v.i16x16, 1)


@v.forceinline
def _dot_four(z, x):
    return _dot_pairs(z, _word_bytes(_splat(v.load_u32(x))))


@v.forceinline
def _dot_16(z, x):
    return (_dot_four(z[0], x) + _dot_four(z[1], x + 4)) + (_dot_four(z[2], x + 8) + _dot_four(z[3], x + 12))


@v.forceinline
def _dot(z, x):
    high = _dot_16(z[0:4], x) + _dot_16(z[4:8], x + 16)
    total = v.madd_i16x16(v.zero_i32x8(), high, _hundreds())
    total = v.madd_i16x16(total, _dot_16(z[0:4], x + LO), _ones())
    return v.madd_i16x16(total, _dot_16(z[4:8], x + LO + 16), _ones())


def make_few_tokens(quant: str, weights: Any) -> Any:
    """few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead): as in block_matmul.py, but x are records."""
    begin, ready, centre = TYPES[quant]
    return transposed_blocks.make_times_few(Reads(begin, ready, _dot, centre), weights)
