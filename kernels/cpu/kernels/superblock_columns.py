"""Panels of some types of 256 weights on AVX2, packed from columns: four bytes of each of eight rows in a vector.

Columns come by the transposition of byte_columns.py, so a panel needs no row unpacked and turned on its own: of four
bytes of eight rows the even and the odd ones are the pairs that panel.py multiplies. Weights go 16 at a time, the
fewest that share a sub-scale.
"""

from __future__ import annotations

import functools
from typing import Any

from edgellm.kernels.cpu.kernels.byte_columns import columns_of_16, low_halves
from edgellm.kernels.cpu.kernels.superblock_rows import GROUPS
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import GROUP_NBYTES, PANEL, PANEL_MINIMA, PANEL_SCALES
from edgellm.kernels.cpu.weights import common

_words, _bytes = v.make_convert(v.u8x32, v.u16x16, "bitcast"), v.make_convert(v.u16x16, v.u8x32, "bitcast")
_numbers, _as_bytes = v.make_convert(v.u8x32, v.u32x8, "bitcast"), v.make_convert(v.u32x8, v.u8x32, "bitcast")
_signed, _signed_words = v.make_convert(v.u16x16, v.i16x16, "bitcast"), v.make_convert(v.u8x32, v.i16x16, "bitcast")


# ---- sub-scales: four of eight rows in a vector ----------------------------------------------------------------------

_no_bytes, _eight_signed = v.make_const(v.u8x32, 0), v.make_const(v.i16x16, 8)
_as_wholes, _sixteen_signed = v.make_convert(v.i16x16, v.i32x8, "bitcast"), v.make_const(v.i32x8, 16)


def _make_spread(byte: int) -> Any:
    """spread(v): that signed byte of every row as two int16."""
    shuffle = v.make_shuffle(v.u8x32, [4 * row + byte if part else 32 for row in range(8) for part in (0, 1, 0, 1)])

    @v.forceinline
    def spread(value):
        return _signed_words(shuffle(value, _no_bytes())) >> _eight_signed()

    return spread


_spread = [_make_spread(byte) for byte in range(4)]


# ---- words of a panel: store(z, place, scale) for 16 columns, weights above a centre ---------------------------------

_low_byte, _eight_bits = v.make_const(v.u16x16, 255), v.make_const(v.u16x16, 8)


def _make_store(centre: int) -> Any:
    less = v.make_const(v.i16x16, centre)

    @v.forceinline
    def store(z, place, scale):
        for m in range(4):
            words = _words(z[m])
            even, odd = _signed(words & _low_byte()), _signed(words >> _eight_bits())
            if centre != 0:
                even, odd = even - less(), odd - less()
            v.store_i16x16(place + m * 64, even * scale)
            v.store_i16x16(place + m * 64 + 512, odd * scale)

    return store


def _place(g: int, j: int) -> int:
    """Where the 16 columns from 16 j on of group g stand in a panel."""
    return g * GROUP_NBYTES + j * 256


# ---- the types -------------------------------------------------------------------------------------------------------
#
# block(p, stride, words) fills a panel from eight super-blocks, and gives d, -dmin and, four of each row in a vector,
# their minima.

_low4 = v.make_const(v.u16x16, 0x0F0F)
_low4_words, _bits45_words, _low6_words = (v.make_const(v.u32x8, n * 0x01010101) for n in (15, 48, 63))
_two, _four, _sixteen = (v.make_const(v.u32x8, n) for n in (2, 4, 16))
_four16 = v.make_const(v.u16x16, 4)


def _make_weights(shift: int, left: int, more: int) -> Any:
    """weights(z, bits): nibbles from bit ``shift`` on, and ``bits`` under the mask ``more``, once moved to the left."""
    count, mask = v.make_const(v.u16x16, abs(left)), v.make_const(v.u16x16, more * 0x0101)

    @v.forceinline
    def weights(z, bits):
        words, above = _words(z), _words(bits)
        if shift:
            words = words >> _four16()
        words = words & _low4()
        if more and left >= 0:
            words = words | ((above << count()) & mask())
        if more and left < 0:
            words = words | ((above >> count()) & mask())
        return _bytes(words)

    return weights


@v.forceinline
def _k_header(p, stride):
    """The eight sub-scales and minima of eight Q4_K or Q5_K blocks (drawn in formats/k_quants.py), d and -dmin."""
    z = columns_of_16(p, stride)
    factors, low, minima, high = _numbers(z[0]), _numbers(z[1]), _numbers(z[2]), _numbers(z[3])
    top, more = (low >> _two()) & _bits45_words(), (minima >> _two()) & _bits45_words()
    scales = (_as_bytes(low & _low6_words()), _as_bytes((high & _low4_words()) | top))
    minima = (_as_bytes(minima & _low6_words()), _as_bytes(((high >> _four()) & _low4_words()) | more))
    minus_dmin = v.zero_f32x8() - v.half_f32x8(low_halves(factors >> _sixteen()))
    return scales, minima, v.half_f32x8(low_halves(factors)), minus_dmin


def _make_k_block(quants: int, has_fifth: bool) -> Any:
    """The block of Q4_K and Q5_K, nibbles from byte ``quants`` on; the fifth bits in the 32 bytes before them."""
    store, more = _make_store(0), 0x10 if has_fifth else 0

    def make_quad(k: int, j: int) -> Any:
        """The low and the high nibbles of 16 bytes, of the groups 2 k and 2 k + 1 the weights from 16 j on."""
        at, low_at, high_at = quants + 32 * k + 16 * j, _place(2 * k, j), _place(2 * k + 1, j)
        spread, next_spread, which = _spread[2 * k % 4], _spread[2 * k % 4 + 1], k // 2
        low, high = _make_weights(0, 4 - 2 * k, more), _make_weights(4, 3 - 2 * k, more)

        @v.forceinline
        def quad(p, stride, bits, words, scales):
            z = columns_of_16(p + at, stride)
            q = (low(z[0], bits[0]), low(z[1], bits[1]), low(z[2], bits[2]), low(z[3], bits[3]))
            store(q, words + low_at, spread(scales[which]))
            q = (high(z[0], bits[0]), high(z[1], bits[1]), high(z[2], bits[2]), high(z[3], bits[3]))
            store(q, words + high_at, next_spread(scales[which]))

        return quad

    def make_half(j: int) -> Any:
        quad0, quad1, quad2, quad3 = (make_quad(k, j) for k in range(4))
        at = quants - 32 + 16 * j

        @v.forceinline
        def half(p, stride, words, scales):
            bits = scales[0], scales[0], scales[0], scales[0]  # none: they are not looked at
            if has_fifth:
                bits = columns_of_16(p + at, stride)
            quad0(p, stride, bits, words, scales)
            quad1(p, stride, bits, words, scales)
            quad2(p, stride, bits, words, scales)
            quad3(p, stride, bits, words, scales)

        return half

    half0, half1 = make_half(0), make_half(1)

    @v.forceinline
    def block(p, stride, words):
        scales, minima, d, minus_dmin = _k_header(p, stride)
        half0(p, stride, words, scales)
        half1(p, stride, words, scales)
        return d, minus_dmin, minima

    return block


def _make_q6_k() -> Any:
    store = _make_store(32)

    def make_quads(k: int) -> Any:
        """Of half a super-block, k // 2, the weights that have their two high bits in 16 bytes."""
        j, quants, bits_at = k % 2, k // 2 * 64 + k % 2 * 16, 128 + 16 * k
        six0, six1, six2, six3 = (_make_weights(g // 2 * 4, 4 - 2 * g, 0x30) for g in range(4))
        at0, at1, at2, at3 = (_place(k // 2 * 4 + g, j) for g in range(4))
        spread0, spread1, low, high = _spread[j], _spread[2 + j], k // 2 * 2, k // 2 * 2 + 1

        @v.forceinline
        def quads(p, stride, words, scales):
            b, z = columns_of_16(p + bits_at, stride), columns_of_16(p + quants, stride)
            q = (six0(z[0], b[0]), six0(z[1], b[1]), six0(z[2], b[2]), six0(z[3], b[3]))
            store(q, words + at0, spread0(scales[low]))
            q = (six2(z[0], b[0]), six2(z[1], b[1]), six2(z[2], b[2]), six2(z[3], b[3]))
            store(q, words + at2, spread0(scales[high]))
            z = columns_of_16(p + quants + 32, stride)
            q = (six1(z[0], b[0]), six1(z[1], b[1]), six1(z[2], b[2]), six1(z[3], b[3]))
            store(q, words + at1, spread1(scales[low]))
            q = (six3(z[0], b[0]), six3(z[1], b[1]), six3(z[2], b[2]), six3(z[3], b[3]))
            store(q, words + at3, spread1(scales[high]))

        return quads

    quads0, quads1, quads2, quads3 = (make_quads(k) for k in range(4))

    @v.forceinline
    def block(p, stride, words):
        scales = columns_of_16(p + 192, stride)
        quads0(p, stride, words, scales)
        quads1(p, stride, words, scales)
        quads2(p, stride, words, scales)
        quads3(p, stride, words, scales)
        return common.halves_at(p + 208, stride), v.zero_f32x8(), scales

    return block


BLOCKS = {
    "Q4_K": functools.partial(_make_k_block, 16, has_fifth=False),
    "Q5_K": functools.partial(_make_k_block, 48, has_fifth=True),
    "Q6_K": _make_q6_k,
}


# ---- panels ----------------------------------------------------------------------------------------------------------


def _make_store_minima() -> Any:
    """store_minima(minima, out): eight of eight rows, those of a group 64 bytes after those of the one before."""
    spread0, spread1, spread2, spread3 = _spread

    @v.forceinline
    def one(number, out):
        v.store_i32x8(out, _as_wholes(number) >> _sixteen_signed())

    @v.forceinline
    def store_minima(minima, out):
        for i in range(2):
            one(spread0(minima[i]), out + i * 256)
            one(spread1(minima[i]), out + i * 256 + 64)
            one(spread2(minima[i]), out + i * 256 + 128)
            one(spread3(minima[i]), out + i * 256 + 192)

    return store_minima


def make_pack(quant: str, weights: Any) -> Any:
    """pack(p, stride, n_groups, half, scratch, ahead): as in superblock_matmul.py."""
    block, store_minima = BLOCKS[quant](), _make_store_minima()
    block_nbytes, has_min = weights.block_nbytes, weights.n_minima > 0

    @v.forceinline
    def pack(p, stride, n_groups, half, scratch, ahead):
        words, factors = scratch + PANEL + half * 32, scratch + PANEL_SCALES + half * 32
        minima_at = scratch + PANEL_MINIMA + half * 32
        for _ in range(n_groups // GROUPS):
            d, minus_dmin, minima = block(p, stride, words)
            v.store_f32x8(factors, d)
            if has_min:
                v.store_f32x8(factors + 64, minus_dmin)
                store_minima(minima, minima_at)
            p += block_nbytes
            words += GROUPS * GROUP_NBYTES
            factors += 128
            minima_at += GROUPS * 128

    return pack
