"""Eight rows at a time, transposed in registers straight from the file, on AVX-512 VNNI.

A vector holds 8 bytes of each of eight rows, lane = row, so every row's sums stay in its own two int32 lanes and the
activations come as 8 bytes for all rows. They are split, x = 256 hi + lo, two signed bytes, because one instruction
multiplies four bytes of weights by four of them:

    sum q x = 256 sum q hi + sum q lo

The integers are those of superblock_matmul.py and block_matmul.py, and so are the float32 steps: so are the bits. Up to
four tokens share what was transposed.
"""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.lib import simd as v

_load = v.make_load(v.u64x8)
_splat, _load_eight_bytes = v.make_splat(v.u64x8), v.make_load(types.uint64)
_as_bytes, _as_rows = v.make_convert(v.u64x8, v.u8x64, "bitcast"), v.make_convert(v.u8x64, v.u64x8, "bitcast")
_eight_bits, _top_byte = (v.make_const(v.i32x16, n) for n in (8, 24))


# ---- eight rows ------------------------------------------------------------------------------------------------------

_low_of_two, _high_of_two = (
    v.make_shuffle(v.u64x8, [k + i for k in range(0, 8, 2) for i in (j, 8 + j)]) for j in (0, 1)
)
_first_pairs = v.make_shuffle(v.u64x8, [0, 1, 4, 5, 8, 9, 12, 13])
_last_pairs = v.make_shuffle(v.u64x8, [2, 3, 6, 7, 10, 11, 14, 15])


@v.forceinline
def _columns_of_four(a, b, c, d):
    """Of vectors of two rows each, interleaved: the columns that they hold, the even or the odd ones."""
    ab, cd, ef, gh = _first_pairs(a, b), _first_pairs(c, d), _last_pairs(a, b), _last_pairs(c, d)
    return _first_pairs(ab, cd), _first_pairs(ef, gh), _last_pairs(ab, cd), _last_pairs(ef, gh)


@v.forceinline
def columns(p, stride):
    """64 bytes of eight rows: lane r of the m-th vector is the m-th eight bytes of row r."""
    a, b, c, d = _load(p), _load(p + stride), _load(p + 2 * stride), _load(p + 3 * stride)
    p4 = p + 4 * stride
    e, f, g, h = _load(p4), _load(p4 + stride), _load(p4 + 2 * stride), _load(p4 + 3 * stride)
    even = _columns_of_four(_low_of_two(a, b), _low_of_two(c, d), _low_of_two(e, f), _low_of_two(g, h))
    odd = _columns_of_four(_high_of_two(a, b), _high_of_two(c, d), _high_of_two(e, f), _high_of_two(g, h))
    return even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]


_u64x4, _u64x2 = v.Vec(types.uint64, 4), v.Vec(types.uint64, 2)
_load4, _load2 = v.make_load(_u64x4), v.make_load(_u64x2)
_join4, _join2 = v.make_shuffle(_u64x4, list(range(8))), v.make_shuffle(_u64x2, list(range(4)))
_u64x1 = v.Vec(types.uint64, 1)
_load1, _join1 = v.make_load(_u64x1), v.make_shuffle(_u64x1, [0, 1])


@v.forceinline
def columns_of_32(p, stride):
    """32 bytes of eight rows: four such vectors."""
    p4 = p + 4 * stride
    a, b = _join4(_load4(p), _load4(p + 2 * stride)), _join4(_load4(p + stride), _load4(p + 3 * stride))
    c, d = _join4(_load4(p4), _load4(p4 + 2 * stride)), _join4(_load4(p4 + stride), _load4(p4 + 3 * stride))
    e, f, g, h = _low_of_two(a, b), _low_of_two(c, d), _high_of_two(a, b), _high_of_two(c, d)
    return _first_pairs(e, f), _first_pairs(g, h), _last_pairs(e, f), _last_pairs(g, h)


@v.forceinline
def columns_of_16(p, stride):
    """16 bytes of eight rows: two such vectors."""
    p4 = p + 4 * stride
    a = _join4(_join2(_load2(p), _load2(p + 2 * stride)), _join2(_load2(p4), _load2(p4 + 2 * stride)))
    b = _join4(_join2(_load2(p + stride), _load2(p + 3 * stride)), _join2(_load2(p4 + stride), _load2(p4 + 3 * stride)))
    return _low_of_two(a, b), _high_of_two(a, b)


@v.forceinline
def first_eight_bytes(p, stride):
    """The first 8 bytes of eight rows."""
    p4 = p + 4 * stride
    a, b = _join1(_load1(p), _load1(p + stride)), _join1(_load1(p + 2 * stride), _load1(p + 3 * stride))
    c, d = _join1(_load1(p4), _load1(p4 + stride)), _join1(_load1(p4 + 2 * stride), _load1(p4 + 3 * stride))
    return _join4(_join2(a, b), _join2(c, d))


_i64x8 = v.Vec(types.int64, 8)
_as_pairs, _first_of_pairs = v.make_convert(v.i32x16, _i64x8, "bitcast"), v.make_convert(_i64x8, v.i32x8, "trunc")
_thirty_two_bits = v.make_const(_i64x8, 32)


@v.forceinline
def of_rows(value):
    """The two lanes of every row added. Not by shuffles: LLVM would make slow vphaddd of those."""
    pairs = _as_pairs(value)
    return _first_of_pairs(pairs + (pairs >> _thirty_two_bits()))


# ---- bits and bytes of rows ------------------------------------------------------------------------------------------


def bytes_of(value: int) -> Any:
    """A constant: this byte in all 64."""
    return v.make_const(v.u64x8, value * 0x0101010101010101)


def make_shift(left: int) -> Any:
    """shift(v): all bits to the left, or to the right for a negative number."""
    count = v.make_const(v.u64x8, abs(left))

    @v.forceinline
    def shift_left(value):
        return value << count()

    @v.forceinline
    def shift_right(value):
        return value >> count()

    return shift_left if left >= 0 else shift_right


def make_less(number: int) -> Any:
    """less(v): every byte less a number."""
    minus = v.make_const(v.u8x64, number)

    @v.forceinline
    def less(value):
        return _as_rows(_as_bytes(value) - minus())

    return less


def make_sixteen_where(byte: int) -> Any:
    """sixteen_where(v): 16 in the i-th byte of a row where bit i of that byte of the row is set, else 0."""
    repeat = v.make_shuffle(v.u8x64, [8 * row + byte for row in range(8) for _ in range(8)])

    @v.intrinsic
    def select(typing_context, value):
        def codegen(context, builder, sig, args):
            kind = v.u8x64.ir
            bits = v.ir.Constant(kind, [1 << i % 8 for i in range(64)])
            found = builder.icmp_unsigned("!=", builder.and_(args[0], bits), v.ir.Constant(kind, [0] * 64))
            chosen = builder.select(found, *(v.ir.Constant(kind, [n] * 64) for n in (16, 0)))
            return builder.bitcast(chosen, v.u64x8.ir)

        return v.u64x8(v.u8x64), codegen

    @v.forceinline
    def sixteen_where(value):
        value = _as_bytes(value)
        return select(repeat(value, value))

    return sixteen_where


_bytes_twice = [
    v.make_shuffle(v.u8x64, [8 * row + half * 4 + i // 2 for row in range(8) for i in range(8)]) for half in (0, 1)
]
_first_bytes_twice, _last_bytes_twice = _bytes_twice


@v.forceinline
def bytes_twice(value):
    """Every byte of a row two times: in two vectors."""
    value = _as_bytes(value)
    return _as_rows(_first_bytes_twice(value, value)), _as_rows(_last_bytes_twice(value, value))


levels_of = v.declared("lookup_64", v.u64x8, v.u8x64, v.u64x8)
"""levels_of(table, names): every byte, below 16, replaced by that of the table, 16 bytes four times over."""


rows_apart = v.declared("rows_apart", types.int64)
"""1 where the CPU's own fetching follows eight rows far apart better than requests do (isa.py), else a constant 0."""

OWN_AHEAD = 1024
"""There each row's own lines are requested so many bytes ahead, into the first level."""


def make_fetch(block_nbytes: int, part: int, n_parts: int) -> Any:
    """fetch(ahead, p, stride): this part of the lines of eight blocks; or what rows from p on will need, if apart."""
    n_lines = -(-block_nbytes * 8 // 64)
    first, end = n_lines * part // n_parts * 64, n_lines * (part + 1) // n_parts * 64
    first_row, end_row = 8 * part // n_parts, 8 * (part + 1) // n_parts
    own_nbytes = -(-block_nbytes // 64) * 64

    @v.forceinline
    def fetch(ahead, p, stride):
        if rows_apart() != 0:
            for row in range(first_row, end_row):
                for line in range(OWN_AHEAD, OWN_AHEAD + own_nbytes, 64):
                    v.fetch_first(p + row * stride + line)
        else:
            for line in range(first, end, 64):
                v.fetch_weights(ahead + line)

    return fetch


# ---- products of bytes -----------------------------------------------------------------------------------------------

dot_bytes = v.declared("dot_bytes", v.i32x16, v.i32x16, v.u64x8, v.u64x8)
"""dot_bytes(acc, u, s): lane j of acc plus four unsigned bytes of u times four signed bytes of s."""


@v.forceinline
def splat_eight_bytes(p):
    """The eight bytes at p, for every row."""
    return _splat(_load_eight_bytes(p))


@v.forceinline
def dot_eight(acc, u, x):
    """acc plus 8 unsigned bytes of each row times the signed ones at x, in the row's two lanes."""
    return dot_bytes(acc, u, splat_eight_bytes(x))


@v.forceinline
def dot_signed(acc, u, s):
    """The same for eight unsigned bytes at u, the same for all rows, and signed ones of each."""
    return dot_bytes(acc, splat_eight_bytes(u), s)


@v.forceinline
def _dot_32(acc, z, x):
    return dot_eight(dot_eight(dot_eight(dot_eight(acc, z[0], x), z[1], x + 8), z[2], x + 16), z[3], x + 24)


@v.forceinline
def dot_32(z, x, lo):
    """Of eight rows: 32 weights, 8 bytes in each of four vectors, times those at x; their low bytes are ``lo`` on."""
    return _dot_32(_dot_32(v.zero_i32x16(), z, x) << _eight_bits(), z, x + lo)


@v.forceinline
def dot_32_apart(z, x, lo):
    """The same in two chains of instructions."""
    high, low = _dot_32(v.zero_i32x16(), z, x), _dot_32(v.zero_i32x16(), z, x + lo)
    return (high << _eight_bits()) + low


@v.forceinline
def dot_16(z0, z1, x, lo):
    """Of eight rows: 16 weights times the activations at x."""
    acc = dot_eight(dot_eight(v.zero_i32x16(), z0, x), z1, x + 8) << _eight_bits()
    return dot_eight(dot_eight(acc, z0, x + lo), z1, x + lo + 8)


def make_spread(byte: int, signed: bool) -> Any:
    """spread(v): that byte of every row as int32, in the row's two lanes."""
    place = 3 if signed else 0
    lanes = [8 * row + byte if part == place else 64 for row in range(8) for _ in (0, 1) for part in range(4)]
    shuffle, zero = v.make_shuffle(v.u8x64, lanes), v.make_const(v.u8x64, 0)
    as_integers = v.make_convert(v.u8x64, v.i32x16, "bitcast")

    @v.forceinline
    def unsigned(value):
        return as_integers(shuffle(_as_bytes(value), zero()))

    @v.forceinline
    def with_sign(value):
        return unsigned(value) >> _top_byte()

    return with_sign if signed else unsigned


# ---- activations -----------------------------------------------------------------------------------------------------

_byte, _half_byte, _eight16 = (v.make_const(v.i16x16, n) for n in (255, 128, 8))


@v.forceinline
def store_split(x, high, low):
    """A group of 32 int16, first its even ones, as two signed bytes each, in their own order."""
    even, odd = v.load_i16x16(x), v.load_i16x16(x + 32)
    high_even, high_odd = (even + _half_byte()) >> _eight16(), (odd + _half_byte()) >> _eight16()
    v.store_i16x16(high, (high_even & _byte()) | (high_odd << _eight16()))
    v.store_i16x16(low, (even & _byte()) | (odd << _eight16()))
