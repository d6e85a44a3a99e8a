"""A few tokens on AVX-512 VNNI: eight rows at a time, transposed in registers straight from the file.

A vector holds 8 bytes of each of eight rows, lane = row, so every row's sums stay in its own two int32 lanes and the
activations come as 8 bytes for all rows. They are split, x = 256 hi + lo, two signed bytes, because one instruction
multiplies four bytes of weights by four of them:

    sum q x = 256 sum q hi + sum q lo

These are the integers of superblock_matmul.py, and the float32 steps are the same: so are the bits. Up to four tokens
share what was transposed.

    record of 256 activations   0 hi[256] | 256 lo[256]
                                512 the sums of 32 as signed bytes, 8 lowest, 8 next, 8 highest (for minima)
                                536 float32 scale
                                576 the sums of 16 as bytes, 16 lowest and so on (for a centre)
"""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.kernels.superblock_rows import GROUPS
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import RECORD_NBYTES, SUMS

LO, SUMS_32, SCALE, SUMS_16 = 256, 512, 536, 576

_load = v.make_load(v.u64x8)
_splat, _load_eight_bytes = v.make_splat(v.u64x8), v.make_load(types.uint64)
_as_bytes = v.make_convert(v.u64x8, v.u8x64, "bitcast")
_four_bits, _five_bits, _eight_bits, _top_byte = (v.make_const(v.i32x16, n) for n in (4, 5, 8, 24))


def _bytes(value: int) -> Any:
    """A constant: this byte in all 64."""
    return v.make_const(v.u64x8, value * 0x0101010101010101)


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


_even_lanes = v.make_shuffle(v.i32x16, list(range(0, 32, 2))[:8])
_odd_lanes = v.make_shuffle(v.i32x16, list(range(1, 32, 2))[:8])


@v.forceinline
def _of_rows(value):
    """The two lanes of every row added."""
    return _even_lanes(value, value) + _odd_lanes(value, value)


# ---- products of bytes -----------------------------------------------------------------------------------------------

dot_bytes = v.declared("dot_bytes", v.i32x16, v.i32x16, v.u64x8, v.u64x8)
"""dot_bytes(acc, u, s): lane j of acc plus four unsigned bytes of u times four signed bytes of s."""


@v.forceinline
def _dot(acc, u, x):
    return dot_bytes(acc, u, _splat(_load_eight_bytes(x)))


@v.forceinline
def dot_32(z, x):
    """Of eight rows: 32 weights, 8 bytes in each of four vectors, times the activations at x."""
    acc = _dot(_dot(_dot(_dot(v.zero_i32x16(), z[0], x), z[1], x + 8), z[2], x + 16), z[3], x + 24) << _eight_bits()
    x += LO
    return _dot(_dot(_dot(_dot(acc, z[0], x), z[1], x + 8), z[2], x + 16), z[3], x + 24)


@v.forceinline
def dot_16(z0, z1, x):
    """Of eight rows: 16 weights times the activations at x."""
    acc = _dot(_dot(v.zero_i32x16(), z0, x), z1, x + 8) << _eight_bits()
    return _dot(_dot(acc, z0, x + LO), z1, x + LO + 8)


def _make_spread(byte: int, signed: bool) -> Any:
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


_spread = [_make_spread(byte, False) for byte in range(8)]
_spread_signed = [_make_spread(byte, True) for byte in range(8)]


@v.intrinsic
def _computed(typing_context, value):
    """The same vector, computed here: LLVM would put off what all groups add, and run out of registers."""

    def codegen(context, builder, sig, args):
        vector = sig.return_type.ir
        return builder.asm(v.ir.FunctionType(vector, [vector]), "", "=v,0", [args[0]], True)

    return value(value), codegen


# ---- sums of one, two and four tokens -------------------------------------------------------------------------------


@v.forceinline
def _four_zeros():
    zero = v.zero_i32x16()
    return zero, zero, zero, zero


def _make_for_tokens(n: int, one: Any) -> Any:
    """many(totals, z, x, x_row, scale): one(total, z, x, scale) for each of n tokens, whose records are x_row apart."""

    @v.forceinline
    def many(totals, z, x, x_row, scale):
        if n == 1:
            result = (one(totals[0], z, x, scale),)
        elif n == 2:
            result = (one(totals[0], z, x, scale), one(totals[1], z, x + x_row, scale))
        else:
            result = (
                one(totals[0], z, x, scale),
                one(totals[1], z, x + x_row, scale),
                one(totals[2], z, x + 2 * x_row, scale),
                one(totals[3], z, x + 3 * x_row, scale),
            )
        return result

    return many


@v.forceinline
def _add_group(total, z, x, scale):
    return _computed(total + dot_32(z, x) * scale)


@v.forceinline
def _add_group_of_sixteenfold(total, z, x, scale):
    """The same for weights that stand in the high nibble of their bytes."""
    return _computed(total + (dot_32(z, x) >> _four_bits()) * scale)


@v.forceinline
def _add_two_groups(total, z, x, scales):
    """The same for groups of 16 with a scale each."""
    return _computed(total + dot_16(z[0], z[1], x) * scales[0] + dot_16(z[2], z[3], x + 16) * scales[1])


# ---- the types: block(p, stride, x, x_row, ahead) gives the sums of n tokens, the sub-scales and the minima ----------

_low4, _low4_of_last = _bytes(0x0F), v.make_const(v.u64x8, 0x0F0F0F0F << 32)
_high4, _bit4, _bits45 = _bytes(0xF0), _bytes(0x10), _bytes(0x30)
_low6_of_first, _top2_of_first = v.make_const(v.u64x8, 0x3F3F3F3F), v.make_const(v.u64x8, 0xC0C0C0C0)
_four, _thirty, _thirty_two = (v.make_const(v.u64x8, n) for n in (4, 30, 32))


def _make_shift(left: int) -> Any:
    """shift(v): all bits to the left, or to the right for a negative number."""
    count = v.make_const(v.u64x8, abs(left))

    @v.forceinline
    def shift_left(value):
        return value << count()

    @v.forceinline
    def shift_right(value):
        return value >> count()

    return shift_left if left >= 0 else shift_right


def _make_fetch(block_nbytes: int, part: int) -> Any:
    """fetch(ahead): a quarter of the lines of eight blocks."""
    n_lines = -(-block_nbytes * 8 // 64)
    first, end = n_lines * part // 4 * 64, n_lines * (part + 1) // 4 * 64

    @v.forceinline
    def fetch(ahead):
        for line in range(first, end, 64):
            v.prefetch_l2(ahead + line)

    return fetch


@v.forceinline
def _k_scales(p, stride):
    """The eight sub-scales and eight minima of eight Q4_K or Q5_K blocks (drawn in formats/k_quants.py)."""
    first, last = columns_of_16(p, stride)
    low = first >> _thirty_two()
    scales = (low & _low6_of_first()) | (last & _low4_of_last()) | ((low & _top2_of_first()) << _thirty())
    more = (last >> _four()) & _low4_of_last()
    return scales, (last & _low6_of_first()) | more | ((last & _top2_of_first()) << _thirty())


@v.forceinline
def _no_bits(p, stride):
    return 0


def _make_k_block(block_nbytes: int, quants: int, fifth_bits: Any, make_pair: Any) -> Any:
    """The block of Q4_K and Q5_K, nibbles from byte ``quants`` on; make_pair(k) goes on with the 64 of 32 bytes."""
    fetch0, fetch1, fetch2, fetch3 = (_make_fetch(block_nbytes, part) for part in range(4))
    pair0, pair1, pair2, pair3 = (make_pair(k) for k in range(4))

    @v.forceinline
    def block(p, stride, x, x_row, ahead):
        scales, minima = _k_scales(p, stride)
        bits = fifth_bits(p + 16, stride)
        fetch0(ahead)
        z = columns(p + quants, stride)
        totals = pair0(_four_zeros(), z[0:4], bits, x, x_row, scales)
        fetch1(ahead)
        totals = pair1(totals, z[4:8], bits, x, x_row, scales)
        fetch2(ahead)
        z = columns(p + quants + 64, stride)
        totals = pair2(totals, z[0:4], bits, x, x_row, scales)
        fetch3(ahead)
        return pair3(totals, z[4:8], bits, x, x_row, scales), (scales, scales), minima

    return block


def _make_q4_k(n: int, block_nbytes: int) -> Any:
    add, add_high = _make_for_tokens(n, _add_group), _make_for_tokens(n, _add_group_of_sixteenfold)

    def make_pair(k: int) -> Any:
        scale, next_scale, at = _spread[2 * k], _spread[2 * k + 1], 64 * k

        @v.forceinline
        def pair(totals, z, bits, x, x_row, scales):
            low, high = _low4(), _high4()
            a = (z[0] & low, z[1] & low, z[2] & low, z[3] & low)
            totals = add(totals, a, x + at, x_row, scale(scales))
            b = (z[0] & high, z[1] & high, z[2] & high, z[3] & high)
            return add_high(totals, b, x + at + 32, x_row, next_scale(scales))

        return pair

    return _make_k_block(block_nbytes, 16, _no_bits, make_pair)


def _make_q5_k(n: int, block_nbytes: int) -> Any:
    add = _make_for_tokens(n, _add_group)

    def make_pair(k: int) -> Any:
        scale, next_scale, at = _spread[2 * k], _spread[2 * k + 1], 64 * k
        fifth, next_fifth = _make_shift(4 - 2 * k), _make_shift(3 - 2 * k)

        @v.forceinline
        def low_of(z, bits):
            return (z & _low4()) | (fifth(bits) & _bit4())

        @v.forceinline
        def high_of(z, bits):
            return ((z >> _four()) & _low4()) | (next_fifth(bits) & _bit4())

        @v.forceinline
        def pair(totals, z, bits, x, x_row, scales):
            a = (low_of(z[0], bits[0]), low_of(z[1], bits[1]), low_of(z[2], bits[2]), low_of(z[3], bits[3]))
            totals = add(totals, a, x + at, x_row, scale(scales))
            b = (high_of(z[0], bits[0]), high_of(z[1], bits[1]), high_of(z[2], bits[2]), high_of(z[3], bits[3]))
            return add(totals, b, x + at + 32, x_row, next_scale(scales))

        return pair

    return _make_k_block(block_nbytes, 48, columns_of_32, make_pair)


def _make_q6_k(n: int, block_nbytes: int) -> Any:
    add = _make_for_tokens(n, _add_two_groups)
    fetch0, fetch1, fetch2, fetch3 = (_make_fetch(block_nbytes, part) for part in range(4))

    def make_group(g: int) -> Any:
        k, at = g % 4, 32 * g
        first, second = _spread_signed[2 * k], _spread_signed[2 * k + 1]
        nibble, pair = _make_shift(-(k // 2 * 4)), _make_shift(4 - 2 * k)

        @v.forceinline
        def six(z, bits):
            return (nibble(z) & _low4()) | (pair(bits) & _bits45())

        @v.forceinline
        def group(totals, z, bits, x, x_row, scales):
            q = (six(z[0], bits[0]), six(z[1], bits[1]), six(z[2], bits[2]), six(z[3], bits[3]))
            return add(totals, q, x + at, x_row, (first(scales), second(scales)))

        return group

    group0, group1, group2, group3, group4, group5, group6, group7 = (make_group(g) for g in range(8))

    @v.forceinline
    def block(p, stride, x, x_row, ahead):
        scales = columns_of_16(p + 192, stride)
        fetch0(ahead)
        z, bits = columns(p, stride), columns_of_32(p + 128, stride)
        totals = group0(_four_zeros(), z[0:4], bits, x, x_row, scales[0])
        totals = group1(totals, z[4:8], bits, x, x_row, scales[0])
        fetch1(ahead)
        totals = group2(totals, z[0:4], bits, x, x_row, scales[0])
        totals = group3(totals, z[4:8], bits, x, x_row, scales[0])
        fetch2(ahead)
        z, bits = columns(p + 64, stride), columns_of_32(p + 160, stride)
        totals = group4(totals, z[0:4], bits, x, x_row, scales[1])
        totals = group5(totals, z[4:8], bits, x, x_row, scales[1])
        fetch3(ahead)
        totals = group6(totals, z[0:4], bits, x, x_row, scales[1])
        return group7(totals, z[4:8], bits, x, x_row, scales[1]), scales, scales[0]

    return block


TYPES = {"Q4_K": _make_q4_k, "Q5_K": _make_q5_k, "Q6_K": _make_q6_k}
"""The types that have this path. A type without a centre has minima for groups of 32, one with a centre has none."""


# ---- activations, and the path itself --------------------------------------------------------------------------------

_load_i16x16, _store_u16x16 = v.load_i16x16, v.make_store(v.i16x16)
_byte, _half_byte, _eight16 = (v.make_const(v.i16x16, n) for n in (255, 128, 8))
_eight32 = v.make_const(v.i32x8, 8)
_narrow8, _widen8 = v.make_convert(v.i32x8, v.i8x8, "trunc"), v.make_convert(v.i8x8, v.i32x8, "sext")
_store_i8x8 = v.make_store(v.i8x8)
_u32x16 = v.u32x16
_in_turn = v.make_shuffle(v.i32x8, [lane for g in range(8) for lane in (g, 8 + g)])
_unsigned = v.make_convert(v.i32x16, _u32x16, "bitcast")
_narrow16 = v.make_convert(_u32x16, v.u8x16, "trunc")
_store_u8x16, _eight_u32 = v.make_store(v.u8x16), v.make_const(_u32x16, 8)


@v.forceinline
def _store_record(x, sums, first_sums, scale, record):
    """256 activations of a quantized row (layout.py) as a record."""
    for g in range(GROUPS):
        even, odd = _load_i16x16(x + g * 64), _load_i16x16(x + g * 64 + 32)
        high_even, high_odd = (even + _half_byte()) >> _eight16(), (odd + _half_byte()) >> _eight16()
        _store_u16x16(record + g * 32, (high_even & _byte()) | (high_odd << _eight16()))
        _store_u16x16(record + LO + g * 32, (even & _byte()) | (odd << _eight16()))
    rest, first = v.load_i32x8(sums), v.load_i32x8(first_sums)
    sixteens = _unsigned(_in_turn(first, rest - first))
    for digit in range(4):
        _store_u8x16(record + SUMS_16 + digit * 16, _narrow16(sixteens))
        sixteens = sixteens >> _eight_u32()
    for digit in range(3):
        low = _narrow8(rest)
        _store_i8x8(record + SUMS_32 + digit * 8, low)
        rest = (rest - _widen8(low)) >> _eight32()
    v.store_f32(record + SCALE, v.load_f32(scale))


@v.forceinline
def prepare(x, x_row, n, n_groups, records):
    """The activations of n tokens as records; returns the bytes from one token's to the next's."""
    row = n_groups // GROUPS * RECORD_NBYTES
    for t in range(n):
        scale, per_group = x + t * x_row + n_groups * 64, n_groups * 4
        for i in range(n_groups // GROUPS):
            at = scale + i * GROUPS * 4
            record = records + t * row + i * RECORD_NBYTES
            _store_record(x + t * x_row + i * GROUPS * 64, at + 2 * per_group, at + 3 * per_group, at, record)
    return row


def _make_step(weights: Any, make_block: Any, n: int) -> Any:
    """step(p, stride, x, x_row, sums, ahead): the float32 sums of n tokens go on with a super-block of eight rows."""
    block, factors, has_min = make_block(n, weights.block_nbytes), weights.factors, weights.n_minima > 0

    @v.forceinline
    def finish(total, scales, minima, d, minus_dmin, x, sums):
        x_scale, acc = v.splat_f32x8(v.load_f32(x + SCALE)), v.load_f32x8(sums)
        if has_min:
            acc = v.fma_f32x8(v.to_f32x8(_of_rows(total)), d * x_scale, acc)
            total = _dot(v.zero_i32x16(), minima, x + SUMS_32 + 16) << _eight_bits()
            total = _dot(total, minima, x + SUMS_32 + 8) << _eight_bits()
            acc = v.fma_f32x8(v.to_f32x8(_of_rows(_dot(total, minima, x + SUMS_32))), minus_dmin * x_scale, acc)
        else:
            centre = v.zero_i32x16()
            for digit in range(3, -1, -1):
                at = x + SUMS_16 + digit * 16
                centre = dot_bytes(centre << _eight_bits(), _splat(_load_eight_bytes(at)), scales[0])
                centre = dot_bytes(centre, _splat(_load_eight_bytes(at + 8)), scales[1])
            acc = v.fma_f32x8(v.to_f32x8(_of_rows(total - (centre << _five_bits()))), d * x_scale, acc)
        v.store_f32x8(sums, acc)

    @v.forceinline
    def step(p, stride, x, x_row, sums, ahead):
        totals, scales, minima = block(p, stride, x, x_row, ahead)
        d, minus_dmin = factors(p, stride)
        finish(totals[0], scales, minima, d, minus_dmin, x, sums)
        if n > 1:
            finish(totals[1], scales, minima, d, minus_dmin, x + x_row, sums + 32)
        if n > 2:
            finish(totals[2], scales, minima, d, minus_dmin, x + 2 * x_row, sums + 64)
            finish(totals[3], scales, minima, d, minus_dmin, x + 3 * x_row, sums + 96)

    return step


def make_few_tokens(quant: str, weights: Any) -> Any:
    """few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead): as in superblock_matmul.py, but x are records."""
    step_one, step_two, step_four = (_make_step(weights, TYPES[quant], n) for n in (1, 2, 4))
    block_nbytes = weights.block_nbytes

    @v.forceinline
    def few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead):
        for t in range(n):
            v.store_f32x8(scratch + SUMS + t * 32, v.zero_f32x8())
        for _ in range(n_groups // GROUPS):
            t = 0
            while t < n:
                here, sums = n - t, scratch + SUMS + t * 32
                if here >= 4:
                    step_four(p, stride, x + t * x_row, x_row, sums, ahead)
                    t += 4
                elif here >= 2:
                    step_two(p, stride, x + t * x_row, x_row, sums, ahead)
                    t += 2
                else:
                    step_one(p, stride, x + t * x_row, x_row, sums, ahead)
                    t += 1
            p += block_nbytes
            x += RECORD_NBYTES
            ahead += 8 * block_nbytes

    return few_tokens
