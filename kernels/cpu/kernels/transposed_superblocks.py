"""A few tokens, and panels, of the types of 256 weights on AVX-512 VNNI (transposed_rows.py).

record of 256 activations   0 hi[256] | 256 lo[256]
                            512 the sums of 32 as signed bytes, 8 lowest, 8 next, 8 highest (for 8 minima)
                            536 float32 scale
                            576 the sums of 16 as bytes, 16 lowest and so on (for 16 minima, or a centre)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edgellm.formats import levels
from edgellm.kernels.cpu.kernels import amx_matmul, superblock_matmul, transposed_panel
from edgellm.kernels.cpu.kernels import transposed_rows as rows
from edgellm.kernels.cpu.kernels.superblock_rows import GROUPS
from edgellm.kernels.cpu.kernels.transposed_rows import (
    bytes_of,
    columns,
    columns_of_16,
    columns_of_32,
    make_fetch,
    make_shift,
)
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import GROUP_NBYTES, PANEL, PANEL_MINIMA, PANEL_SCALES, RECORD_NBYTES, SUMS
from edgellm.kernels.cpu.weights import common

LO, SUMS_32, SCALE, SUMS_16 = 256, 512, 536, 576

_four_bits, _eight_bits = v.make_const(v.i32x16, 4), v.make_const(v.i32x16, 8)
_load, _as_rows = v.make_load(v.u64x8), v.make_convert(v.i32x16, v.u64x8, "bitcast")
_spread = [rows.make_spread(byte, signed=False) for byte in range(8)]
_spread_signed = [rows.make_spread(byte, signed=True) for byte in range(8)]


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


@v.forceinline
def _as_it_comes(value):
    return value


def _make_for_tokens(n: int, add: Any, one_is_free: bool) -> Any:
    """many(totals, z, x, x_row, scale): add(total, z, x, scale) for each of n tokens, whose records are x_row apart.

    ``one_is_free``: sums of one token may wait; types with many steps a group gain 5 % by it, Q4_K loses as much.
    """
    keep = _as_it_comes if n == 1 and one_is_free else _computed

    @v.forceinline
    def one(total, z, x, scale):
        return keep(add(total, z, x, scale))

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
    return total + rows.dot_32(z, x, LO) * scale


@v.forceinline
def _add_group_of_sixteenfold(total, z, x, scale):
    """The same for weights that stand in the high nibble of their bytes."""
    return total + (rows.dot_32(z, x, LO) >> _four_bits()) * scale


@v.forceinline
def _add_two_groups(total, z, x, scales):
    """The same for groups of 16 with a scale each."""
    return total + rows.dot_16(z[0], z[1], x, LO) * scales[0] + rows.dot_16(z[2], z[3], x + 16, LO) * scales[1]


# ---- words of a panel in place of sums (transposed_panel.py) ---------------------------------------------------------


@v.forceinline
def _nothing(ahead, p, stride):
    return


class Work(NamedTuple):
    """What is done with weights: with a group of 32, one in high nibbles, and two of 16 with a scale each.

    Each is made for types whose sums may wait, or not (``one_is_free``); places of groups are ``step`` bytes apart.
    """

    group: Any
    sixteenfold: Any
    two_groups: Any
    step: int
    make_fetch: Any


def _sums_of(n: int) -> Work:
    """Sums of n = 1, 2 or 4 tokens; places are activations."""

    def work(add: Any) -> Any:
        return lambda one_is_free=False: _make_for_tokens(n, add, one_is_free)

    return Work(work(_add_group), work(_add_group_of_sixteenfold), work(_add_two_groups), 32, make_fetch)


def _packed(store: Any, step: int) -> Work:
    """Places in a panel, where ``store`` puts them; ``x_row`` is the half. What is packed next others fetch."""

    @v.forceinline
    def pack(z, place, half, scale):
        words = transposed_panel.scale_words(scale)
        for m in range(4):
            store(place + m * 128, half, z[m], words)

    @v.forceinline
    def pack_sixteenfold(z, place, half, scale):
        words, four = transposed_panel.scale_words(scale), _four()
        for m in range(4):
            store(place + m * 128, half, z[m] >> four, words)

    @v.forceinline
    def pack_two(z, place, half, scales):
        first, second = transposed_panel.scale_words(scales[0]), transposed_panel.scale_words(scales[1])
        store(place, half, z[0], first)
        store(place + 128, half, z[1], first)
        store(place + 256, half, z[2], second)
        store(place + 384, half, z[3], second)

    def work(packs: Any) -> Any:
        @v.forceinline
        def stored(totals, z, place, half, scale):
            packs(z, place, half, scale)
            return totals

        return lambda one_is_free=False: stored

    return Work(work(pack), work(pack_sixteenfold), work(pack_two), step, lambda *part: _nothing)


# ---- the types -------------------------------------------------------------------------------------------------------
#
# block(p, stride, x, x_row, ahead) gives the sums of n tokens, or fills a panel; the numbers that multiply sums of
# activations, which are eight minima in one vector, sixteen in two, or the sixteen sub-scales of a type whose weights
# are read above a centre; d and -dmin.

_low2, _low4, _bit2, _high4, _bit4, _bits45 = (bytes_of(n) for n in (0x03, 0x0F, 0x04, 0xF0, 0x10, 0x30))
_low4_of_last = v.make_const(v.u64x8, 0x0F0F0F0F << 32)
_low6_of_first, _top2_of_first = v.make_const(v.u64x8, 0x3F3F3F3F), v.make_const(v.u64x8, 0xC0C0C0C0)
_four, _sixteen, _thirty, _thirty_two, _forty_eight = (v.make_const(v.u64x8, n) for n in (4, 16, 30, 32, 48))
_first_half, _less_32 = v.make_const(v.u64x8, 0xFFFFFFFF), rows.make_less(32)


_to_u16 = v.make_convert(v.u64x8, v.u16x8, "trunc")


@v.forceinline
def _low_half(word):
    """f32x8 of the float16 in the lowest two bytes of every row."""
    return v.half_f32x8(_to_u16(word))


@v.forceinline
def _minus(value):
    return v.zero_f32x8() - value


@v.forceinline
def _k_header(p, stride):
    """The eight sub-scales and minima of eight Q4_K or Q5_K blocks (drawn in formats/k_quants.py), d and -dmin."""
    first, last = columns_of_16(p, stride)
    low = first >> _thirty_two()
    scales = (low & _low6_of_first()) | (last & _low4_of_last()) | ((low & _top2_of_first()) << _thirty())
    more = (last >> _four()) & _low4_of_last()
    minima = (last & _low6_of_first()) | more | ((last & _top2_of_first()) << _thirty())
    return scales, minima, _low_half(first), _minus(_low_half(first >> _sixteen()))


@v.forceinline
def _no_bits(p, stride):
    return 0, 0, 0, 0


def _make_k_block(work: Work, block_nbytes: int, quants: int, fifth_bits: Any, make_pair: Any) -> Any:
    """The block of Q4_K and Q5_K, nibbles from byte ``quants`` on; make_pair(k) goes on with the 64 of 32 bytes."""
    fetch0, fetch1, fetch2, fetch3 = (work.make_fetch(block_nbytes, part, 4) for part in range(4))
    pair0, pair1, pair2, pair3 = (make_pair(k) for k in range(4))

    @v.forceinline
    def block(p, stride, x, x_row, ahead):
        scales, minima, d, minus_dmin = _k_header(p, stride)
        bits = fifth_bits(p + 16, stride)
        fetch0(ahead, p, stride)
        z = columns(p + quants, stride)
        totals = pair0(_four_zeros(), z[0:4], bits, x, x_row, scales)
        fetch1(ahead, p, stride)
        later = columns(p + quants + 64, stride)  # begun while there is much to multiply
        totals = pair1(totals, z[4:8], bits, x, x_row, scales)
        fetch2(ahead, p, stride)
        totals = pair2(totals, later[0:4], bits, x, x_row, scales)
        fetch3(ahead, p, stride)
        return pair3(totals, later[4:8], bits, x, x_row, scales), (minima, minima), d, minus_dmin

    return block


def _make_q4_k(work: Work, block_nbytes: int) -> Any:
    add, add_high = work.group(), work.sixteenfold()

    def make_pair(k: int) -> Any:
        scale, next_scale = _spread[2 * k], _spread[2 * k + 1]
        at, next_at = 2 * k * work.step, (2 * k + 1) * work.step

        @v.forceinline
        def pair(totals, z, bits, x, x_row, scales):
            low, high = _low4(), _high4()
            a = (z[0] & low, z[1] & low, z[2] & low, z[3] & low)
            totals = add(totals, a, x + at, x_row, scale(scales))
            b = (z[0] & high, z[1] & high, z[2] & high, z[3] & high)
            return add_high(totals, b, x + next_at, x_row, next_scale(scales))

        return pair

    return _make_k_block(work, block_nbytes, 16, _no_bits, make_pair)


def _make_q5_k(work: Work, block_nbytes: int) -> Any:
    add = work.group()

    def make_pair(k: int) -> Any:
        scale, next_scale = _spread[2 * k], _spread[2 * k + 1]
        at, next_at = 2 * k * work.step, (2 * k + 1) * work.step
        fifth, next_fifth = make_shift(4 - 2 * k), make_shift(3 - 2 * k)

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
            return add(totals, b, x + next_at, x_row, next_scale(scales))

        return pair

    return _make_k_block(work, block_nbytes, 48, columns_of_32, make_pair)


def _make_q6_k(work: Work, block_nbytes: int) -> Any:
    add = work.two_groups(one_is_free=True)
    fetch0, fetch1, fetch2, fetch3 = (work.make_fetch(block_nbytes, part, 4) for part in range(4))

    def make_group(g: int) -> Any:
        k, at = g % 4, g * work.step
        first, second = _spread_signed[2 * k], _spread_signed[2 * k + 1]
        nibble, pair = make_shift(-(k // 2 * 4)), make_shift(4 - 2 * k)

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
        fetch0(ahead, p, stride)
        z, bits = columns(p, stride), columns_of_32(p + 128, stride)
        totals = group0(_four_zeros(), z[0:4], bits, x, x_row, scales[0])
        totals = group1(totals, z[4:8], bits, x, x_row, scales[0])
        fetch1(ahead, p, stride)
        totals = group2(totals, z[0:4], bits, x, x_row, scales[0])
        totals = group3(totals, z[4:8], bits, x, x_row, scales[0])
        fetch2(ahead, p, stride)
        z, bits = columns(p + 64, stride), columns_of_32(p + 160, stride)
        totals = group4(totals, z[0:4], bits, x, x_row, scales[1])
        totals = group5(totals, z[4:8], bits, x, x_row, scales[1])
        fetch3(ahead, p, stride)
        totals = group6(totals, z[0:4], bits, x, x_row, scales[1])
        d = common.halves_at(p + 208, stride)
        return group7(totals, z[4:8], bits, x, x_row, scales[1]), scales, d, v.zero_f32x8()

    return block


def _make_q2_q3_k(work: Work, block_nbytes: int, quants: int, third_bits: Any, header: Any, spread: list[Any]) -> Any:
    """The block of Q2_K and Q3_K: bit pairs from byte ``quants`` on, sixteen sub-scales, and minima or a third bit."""
    add = work.two_groups(one_is_free=True)
    fetch0, fetch1, fetch2, fetch3 = (work.make_fetch(block_nbytes, part, 4) for part in range(4))
    has_third_bit = third_bits is not _no_bits

    def make_group(g: int) -> Any:
        first, second, at = spread[2 * g % 8], spread[2 * g % 8 + 1], g * work.step
        pair, third = make_shift(-2 * (g % 4)), make_shift(2 - g)

        @v.forceinline
        def weights(z, bits):
            low = pair(z) & _low2()
            return low | (third(bits) & _bit2()) if has_third_bit else low

        @v.forceinline
        def group(totals, z, bits, x, x_row, scales):
            q = (weights(z[0], bits[0]), weights(z[1], bits[1]), weights(z[2], bits[2]), weights(z[3], bits[3]))
            return add(totals, q, x + at, x_row, (first(scales), second(scales)))

        return group

    group0, group1, group2, group3, group4, group5, group6, group7 = (make_group(g) for g in range(8))

    @v.forceinline
    def block(p, stride, x, x_row, ahead):
        scales, minima, d, minus_dmin = header(p, stride)
        bits = third_bits(p, stride)
        fetch0(ahead, p, stride)
        z = columns(p + quants, stride)
        totals = group0(_four_zeros(), z[0:4], bits, x, x_row, scales[0])
        totals = group1(totals, z[0:4], bits, x, x_row, scales[0])
        fetch1(ahead, p, stride)
        totals = group2(totals, z[0:4], bits, x, x_row, scales[0])
        totals = group3(totals, z[0:4], bits, x, x_row, scales[0])
        fetch2(ahead, p, stride)
        totals = group4(totals, z[4:8], bits, x, x_row, scales[1])
        totals = group5(totals, z[4:8], bits, x, x_row, scales[1])
        fetch3(ahead, p, stride)
        totals = group6(totals, z[4:8], bits, x, x_row, scales[1])
        return group7(totals, z[4:8], bits, x, x_row, scales[1]), minima, d, minus_dmin

    return block


@v.forceinline
def _q2_k_header(p, stride):
    first, last = columns_of_16(p, stride)
    d, dmin = common.half_pairs_at(p + 80, stride)
    low4 = _low4()
    return (first & low4, last & low4), ((first >> _four()) & low4, (last >> _four()) & low4), d, _minus(dmin)


@v.forceinline
def _q3_k_header(p, stride):
    """Sub-scales of six bits with 32 added, in the 12 bytes before d (drawn in formats/k_quants.py)."""
    first, last = columns_of_16(p + 94, stride)
    low, top = (first >> _sixteen()) | (last << _forty_eight()), (last >> _sixteen()) & _first_half()
    pairs = top | (top << _thirty())  # of sub-scales 0 to 3 in bits 0 and 1, of 4 to 7 too, in the other half
    scales0 = (low & _low4()) | ((pairs & _low2()) << _four())
    scales1 = ((low >> _four()) & _low4()) | (pairs & _bits45())
    both = (_less_32(scales0), _less_32(scales1))
    return both, both, _low_half(last >> _forty_eight()), v.zero_f32x8()


def _make_q2_k(work: Work, block_nbytes: int) -> Any:
    return _make_q2_q3_k(work, block_nbytes, 16, _no_bits, _q2_k_header, _spread)


def _make_q3_k(work: Work, block_nbytes: int) -> Any:
    return _make_q2_q3_k(work, block_nbytes, 32, columns_of_32, _q3_k_header, _spread_signed)


_IQ4_CENTRE = 128
"""Added to the levels, so that they are unsigned."""
_iq4_levels = v.make_constants(v.u8x64, [n + _IQ4_CENTRE for n in levels.IQ4] * 4)
_nibble_words, _nibble_pairs = (v.make_const(v.u64x8, n) for n in (0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF))
_word, _pair_words, _pair_nibbles = (v.make_const(v.u64x8, n) for n in (0xFFFF, 0x000000FF000000FF, 0x000F000F000F000F))
_six, _eight, _twelve, _twenty_four = (v.make_const(v.u64x8, n) for n in (6, 8, 12, 24))


@v.forceinline
def _iq4_xs_header(p, stride):
    """Sub-scales of six bits with 32 added: pairs in bytes 2 and 3, nibbles in bytes 4 to 7; d."""
    header = rows.first_eight_bytes(p, stride)
    low, high = header >> _thirty_two(), (header >> _sixteen()) & _word()
    low = (low | (low << _sixteen())) & _nibble_words()
    low = (low | (low << _eight())) & _nibble_pairs()
    low = (low | (low << _four())) & _low4()
    high = (high | (high << _twenty_four())) & _pair_words()
    high = (high | (high << _twelve())) & _pair_nibbles()
    high = (high | (high << _six())) & _low2()
    return _less_32(low | (high << _four())), _low_half(header)


def _make_iq4_xs(work: Work, block_nbytes: int) -> Any:
    add = work.group(one_is_free=True)
    fetch0, fetch1, fetch2, fetch3 = (work.make_fetch(block_nbytes, part, 4) for part in range(4))

    def make_group(g: int) -> Any:
        scale, at = _spread_signed[g], g * work.step

        @v.forceinline
        def group(totals, z0, z1, x, x_row, scales):
            low4, table = _low4(), _iq4_levels()
            q = (
                rows.levels_of(table, z0 & low4), rows.levels_of(table, z1 & low4),
                rows.levels_of(table, (z0 >> _four()) & low4), rows.levels_of(table, (z1 >> _four()) & low4),
            )  # fmt: skip
            return add(totals, q, x + at, x_row, scale(scales))

        return group

    group0, group1, group2, group3, group4, group5, group6, group7 = (make_group(g) for g in range(8))

    @v.forceinline
    def block(p, stride, x, x_row, ahead):
        scales, d = _iq4_xs_header(p, stride)
        fetch0(ahead, p, stride)
        z = columns(p + 8, stride)
        totals = group0(_four_zeros(), z[0], z[1], x, x_row, scales)
        totals = group1(totals, z[2], z[3], x, x_row, scales)
        fetch1(ahead, p, stride)
        totals = group2(totals, z[4], z[5], x, x_row, scales)
        totals = group3(totals, z[6], z[7], x, x_row, scales)
        fetch2(ahead, p, stride)
        z = columns(p + 72, stride)
        totals = group4(totals, z[0], z[1], x, x_row, scales)
        totals = group5(totals, z[2], z[3], x, x_row, scales)
        fetch3(ahead, p, stride)
        totals = group6(totals, z[4], z[5], x, x_row, scales)
        return group7(totals, z[6], z[7], x, x_row, scales), rows.bytes_twice(scales), d, v.zero_f32x8()

    return block


class Transposed(NamedTuple):
    """How a type's super-blocks are read: ``make_block(work, its bytes)``; ``centre`` was added to its weights."""

    make_block: Any
    centre: int = 0


TYPES = {
    "Q2_K": Transposed(_make_q2_k),
    "Q3_K": Transposed(_make_q3_k, 4),
    "Q4_K": Transposed(_make_q4_k),
    "Q5_K": Transposed(_make_q5_k),
    "Q6_K": Transposed(_make_q6_k, 32),
    "IQ4_XS": Transposed(_make_iq4_xs, _IQ4_CENTRE),
}


# ---- activations, and the path itself --------------------------------------------------------------------------------

_in_turn = v.make_shuffle(v.i32x8, [lane for g in range(8) for lane in (g, 8 + g)])
_unsigned = v.make_convert(v.i32x16, v.u32x16, "bitcast")
_narrow16 = v.make_convert(v.u32x16, v.u8x16, "trunc")
_store_u8x16, _eight_u32 = v.make_store(v.u8x16), v.make_const(v.u32x16, 8)


@v.forceinline
def _store_record(x, scale, per_group, record):
    """256 activations of a quantized row (layout.py) as a record."""
    for g in range(GROUPS):
        rows.store_split(x + g * 64, record + g * 32, record + LO + g * 32)
    sums, first = v.load_i32x8(scale + 2 * per_group), v.load_i32x8(scale + 3 * per_group)
    sixteens = _unsigned(_in_turn(first, sums - first))
    for digit in range(4):
        _store_u8x16(record + SUMS_16 + digit * 16, _narrow16(sixteens))
        sixteens = sixteens >> _eight_u32()
    v.store_i32x8(record + SUMS_32, v.load_i32x8(scale + per_group))
    v.store_f32(record + SCALE, v.load_f32(scale))  # over the eight bytes behind them


@v.forceinline
def prepare(x, x_row, n, n_groups, records):
    """The activations of n tokens as records; returns the bytes from one token's to the next's."""
    row = n_groups // GROUPS * RECORD_NBYTES
    for t in range(n):
        scale, per_group = x + t * x_row + n_groups * 64, n_groups * 4
        for i in range(n_groups // GROUPS):
            record = records + t * row + i * RECORD_NBYTES
            _store_record(x + t * x_row + i * GROUPS * 64, scale + i * GROUPS * 4, per_group, record)
    return row


@v.forceinline
def _times_sums_of_16(x, numbers):
    """Of eight rows: sixteen signed bytes times the sums of 16."""
    total = v.zero_i32x16()
    for digit in range(3, -1, -1):
        at = x + SUMS_16 + digit * 16
        total = rows.dot_signed(total << _eight_bits(), at, numbers[0])
        total = rows.dot_signed(total, at + 8, numbers[1])
    return total


@v.forceinline
def _times_sums_of_32(x, numbers):
    """Of eight rows: eight unsigned bytes times the sums of 32."""
    total = rows.dot_eight(v.zero_i32x16(), numbers[0], x + SUMS_32 + 16) << _eight_bits()
    total = rows.dot_eight(total, numbers[0], x + SUMS_32 + 8) << _eight_bits()
    return rows.dot_eight(total, numbers[0], x + SUMS_32)


def _make_step(quant: str, weights: Any, n: int) -> Any:
    """step(p, stride, x, x_row, sums, ahead): the float32 sums of n tokens go on with a super-block of eight rows."""
    make_block, centre = TYPES[quant]
    block, has_min = make_block(_sums_of(n), weights.block_nbytes), weights.n_minima > 0
    times_sums = _times_sums_of_32 if weights.n_minima == GROUPS else _times_sums_of_16
    centre_bits = v.make_const(v.i32x16, centre.bit_length() - 1)  # a power of two

    @v.forceinline
    def finish(total, numbers, d, minus_dmin, x, sums):
        x_scale, acc = v.splat_f32x8(v.load_f32(x + SCALE)), v.load_f32x8(sums)
        if centre != 0:
            total = total - (times_sums(x, numbers) << centre_bits())
        acc = v.fma_f32x8(v.to_f32x8(rows.of_rows(total)), d * x_scale, acc)
        if has_min:
            acc = v.fma_f32x8(v.to_f32x8(rows.of_rows(times_sums(x, numbers))), minus_dmin * x_scale, acc)
        v.store_f32x8(sums, acc)

    @v.forceinline
    def step(p, stride, x, x_row, sums, ahead):
        totals, numbers, d, minus_dmin = block(p, stride, x, x_row, ahead)
        finish(totals[0], numbers, d, minus_dmin, x, sums)
        if n > 1:
            finish(totals[1], numbers, d, minus_dmin, x + x_row, sums + 32)
        if n > 2:
            finish(totals[2], numbers, d, minus_dmin, x + 2 * x_row, sums + 64)
            finish(totals[3], numbers, d, minus_dmin, x + 3 * x_row, sums + 96)

    return step


def make_few_tokens(quant: str, weights: Any) -> Any:
    """few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead): as in superblock_matmul.py, but x are records."""
    step_one, step_two, step_four = (_make_step(quant, weights, n) for n in (1, 2, 4))
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


def _make_store_sixteen_minima() -> Any:
    """store(numbers, out, half): minima of eight rows, for 16 rows each: whole ones of groups, then half ones."""

    def make_store(g: int) -> Any:
        which, low, high = 2 * g // 8, _spread[2 * g % 8], _spread[2 * g % 8 + 1]

        @v.forceinline
        def store(numbers, out, half):
            first, second = low(numbers[which]), high(numbers[which])
            transposed_panel.store_numbers(out + g * 64, second, half)
            transposed_panel.store_numbers(out + GROUPS * 64 + g * 64, first - second, half)

        return store

    store0, store1, store2, store3, store4, store5, store6, store7 = (make_store(g) for g in range(GROUPS))

    @v.forceinline
    def store(numbers, out, half):
        store0(numbers, out, half)
        store1(numbers, out, half)
        store2(numbers, out, half)
        store3(numbers, out, half)
        store4(numbers, out, half)
        store5(numbers, out, half)
        store6(numbers, out, half)
        store7(numbers, out, half)

    return store


@v.forceinline
def _store_eight_minima(numbers, out, half):
    """Minima of eight rows as bytes, for 16 rows: of four groups, then of the other four."""
    transposed_panel.store_bytes(out, numbers[0], half)


@v.forceinline
def _dot_four_and_four(acc, first, last, x):
    """Bytes of 16 rows times eight at x, the same for all rows."""
    acc = rows.dot_bytes(acc, first, _as_rows(v.splat_i32x16(v.load_i32(x))))
    return rows.dot_bytes(acc, last, _as_rows(v.splat_i32x16(v.load_i32(x + 4))))


@v.forceinline
def _minimum_sums_of_bytes(minima, scale_at, per_group):
    """Of 16 rows, the sum of m_i x_i over a super-block: 6 instructions that multiply, of integers there are 8."""
    first, last, digits = _load(minima), _load(minima + 64), scale_at + per_group
    total = _dot_four_and_four(v.zero_i32x16(), first, last, digits + 16) << _eight_bits()
    total = _dot_four_and_four(total, first, last, digits + 8) << _eight_bits()
    return _dot_four_and_four(total, first, last, digits)


def make_finish(weights: Any) -> Any:
    """finish(acc, total, scratch, block, scale_at, per_group): as in superblock_matmul.py."""
    return superblock_matmul.make_finish(
        weights, minimum_sums=_minimum_sums_of_bytes if weights.n_minima == GROUPS else None
    )


def make_pack(quant: str, weights: Any, for_tiles: bool = False) -> Any:
    """pack(p, stride, n_groups, half, scratch): eight rows for a panel of transposed_panel.py, or of amx_matmul.py."""
    make_block, centre = TYPES[quant]
    block_nbytes, has_min = weights.block_nbytes, weights.n_minima > 0
    if for_tiles:
        work = _packed(transposed_panel.make_store_planes(centre, amx_matmul.LOW_NBYTES), amx_matmul.GROUP_NBYTES)
    else:
        work = _packed(transposed_panel.make_store_words(centre), GROUP_NBYTES)
    block = make_block(work, block_nbytes)
    store_minima = _store_eight_minima if weights.n_minima == GROUPS else _make_store_sixteen_minima()

    @v.forceinline
    def pack(p, stride, n_groups, half, scratch):
        place, factors, minima = scratch + PANEL, scratch + PANEL_SCALES, scratch + PANEL_MINIMA
        for _ in range(n_groups // GROUPS):
            _, numbers, d, minus_dmin = block(p, stride, place, half, 0)
            transposed_panel.store_floats(factors, d, half)
            if has_min:
                transposed_panel.store_floats(factors + 64, minus_dmin, half)
                store_minima(numbers, minima, half)
            p += block_nbytes
            place += GROUPS * GROUP_NBYTES
            factors += 128
            minima += GROUPS * 128

    return pack
