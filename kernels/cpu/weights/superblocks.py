"""The types of 256 weights: bit fields of words, and sub-scales as int32.

Two neighbouring bytes are one 16-bit word throughout, so a group of 32 weights falls apart into its even and its odd
ones with a mask and a shift.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import common

# ---- the 32 integers of a group --------------------------------------------------------------------------------------

words_at = v.make_load(v.u16x16)
"""u16x16: 32 bytes at an address, as words."""

_low_byte, _eight = v.make_const(v.u16x16, 255), v.make_const(v.u16x16, 8)


@v.forceinline
def even_odd(words):
    """i16x32 of the bytes of 16 words: the even ones, then the odd ones."""
    even, odd = v.u16x16_as_i16x16(words & _low_byte()), v.u16x16_as_i16x16(words >> _eight())
    return v.concat_i16x16(even, odd)


@functools.cache
def make_field(shift: int, mask: int) -> Any:
    """field(words): in every byte its bits from ``shift`` on, under a mask; a negative shift moves them up."""
    count, both = v.make_const(v.u16x16, abs(shift)), v.make_const(v.u16x16, mask * 0x0101)

    @v.forceinline
    def right(words):
        return (words >> count()) & both()

    @v.forceinline
    def left(words):
        return (words << count()) & both()

    return right if shift >= 0 else left


@functools.cache
def _make_byte_field(shift: int, mask: int) -> Any:
    """The same for a CPU that shifts bytes."""
    count, both = v.make_const(v.u8x32, abs(shift)), v.make_const(v.u8x32, mask)

    @v.forceinline
    def right(values):
        return (values >> count()) & both()

    @v.forceinline
    def left(values):
        return (values << count()) & both()

    return right if shift >= 0 else left


# ---- sub-scales and minima of eight rows -----------------------------------------------------------------------------
#
# Rows r and r + 4 share vectors, a half each: a vector holds four numbers of each row, so sums and columns come out in
# the order of the rows.


@v.forceinline
def rows_paired(r):
    """Where row r's sub-scales stand: eight of them, four and then four more 32 bytes on."""
    return (r & 3) * 64 + (r >> 2) * 16


@v.forceinline
def rows_apart(r):
    """Where row r's sub-scales stand: sixteen of them."""
    return r * 64


@functools.cache
def make_scale_of_eight(g: int) -> Any:
    """scale(scales): in every lane sub-scale g of 8, one for each group."""
    offset = g // 4 * 32 + g % 4 * 4

    @v.forceinline
    def scale(scales):
        return v.splat_i32x8(v.load_i32(scales + offset))

    return scale


@functools.cache
def make_scale_of_sixteen(g: int) -> Any:
    """scale(scales): sub-scales 2 g and 2 g + 1 of 16, in the lanes of the first and the last 16 weights of a group."""
    k, offset = g % 4, g // 4 * 32
    spread = v.make_shuffle(v.i32x8, [k] * 4 + [k + 4] * 4)

    @v.forceinline
    def scale(scales):
        value = v.load_i32x8(scales + offset)
        return spread(value, value)

    return scale


_as_words = v.make_convert(v.u8x32, v.u32x8, "bitcast")
_as_bytes = v.make_convert(v.u32x8, v.u8x32, "bitcast")
_as_integers = v.make_convert(v.u8x32, v.i32x8, "bitcast")
_zero_bytes = v.make_const(v.u8x32, 0)
_four = v.make_const(v.u8x32, 4)


@v.forceinline
def two_rows(p, q):
    """u8x32: 16 bytes at p, then 16 at q."""
    return v.concat_u8x16(v.load_u8x16(p), v.load_u8x16(q))


def _make_widen(*chosen: int) -> Any:
    """widen(bytes): in each half, four of its bytes as int32."""
    lanes = [half + byte if part == 0 else 32 for half in (0, 16) for byte in chosen for part in range(4)]
    spread = v.make_shuffle(v.u8x32, lanes)

    @v.forceinline
    def widen(values):
        return _as_integers(spread(values, _zero_bytes()))

    return widen


_bytes_0, _bytes_4, _bytes_8, _bytes_12 = (_make_widen(i, i + 1, i + 2, i + 3) for i in (0, 4, 8, 12))
_even_0, _even_8, _odd_0, _odd_8 = (_make_widen(i, i + 2, i + 4, i + 6) for i in (0, 8, 1, 9))

# the scales and minima of Q4_K and Q5_K, six bits each in 12 bytes: drawn in formats/k_quants.py
_low_words = v.make_shuffle(v.u32x8, [1, 3, 2, 3, 5, 7, 6, 7])
_top_words = v.make_shuffle(v.u32x8, [1, 1, 2, 2, 5, 5, 6, 6])
_low_shift = v.make_constants(v.u32x8, [0, 0, 0, 4] * 2)
_low_mask = v.make_constants(v.u32x8, [0x3F3F3F3F, 0x0F0F0F0F] * 4)
_top_mask, _two = v.make_constants(v.u32x8, [0, 0x30303030] * 4), v.make_const(v.u32x8, 2)


@v.forceinline
def decode_k(p, stride, scales, minima):
    """The eight sub-scales and eight minima of eight Q4_K or Q5_K blocks."""
    for r in range(4):
        words = _as_words(two_rows(p + r * stride, p + (r + 4) * stride))
        low = (_low_words(words, words) >> _low_shift()) & _low_mask()
        values = _as_bytes(low | ((_top_words(words, words) >> _two()) & _top_mask()))
        v.store_i32x8(scales + r * 64, _bytes_0(values))
        v.store_i32x8(scales + r * 64 + 32, _bytes_4(values))
        v.store_i32x8(minima + r * 128, _bytes_8(values))
        v.store_i32x8(minima + r * 128 + 32, _bytes_12(values))


@v.forceinline
def decode_q2_minima(p, stride, minima):
    """The minima of eight Q2_K blocks: of the last 16 weights of the groups, and what the first 16 have more."""
    for r in range(4):
        values = two_rows(p + r * stride, p + (r + 4) * stride) >> _four()
        of_last, of_more = _odd_0(values), _odd_8(values)
        v.store_i32x8(minima + r * 128, of_last)
        v.store_i32x8(minima + r * 128 + 32, of_more)
        v.store_i32x8(minima + r * 128 + 64, _even_0(values) - of_last)
        v.store_i32x8(minima + r * 128 + 96, _even_8(values) - of_more)


@v.forceinline
def k_factors(p, stride):
    """d and -dmin, the first numbers of eight blocks."""
    d, dmin = common.half_pairs_at(p, stride)
    return d, v.zero_f32x8() - dmin


# ---- sub-scales of one row -------------------------------------------------------------------------------------------


@intrinsic
def bytes_of(typing_context: Any, low: Any, high: Any) -> Any:
    """u8x16 of two int64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = ir.Constant(ir.VectorType(ir.IntType(64), 2), ir.Undefined)
        for lane in (0, 1):
            pair = builder.insert_element(pair, args[lane], ir.Constant(ir.IntType(32), lane))
        return builder.bitcast(pair, v.u8x16.ir)

    return v.u8x16(types.int64, types.int64), codegen


# sub-scales 0 to 7, then 8 to 15: those of the first 16 weights of four groups, then those of the other 16
_of_first_groups = v.make_shuffle(v.u8x16, [0, 2, 4, 6, 1, 3, 5, 7])
_of_last_groups = v.make_shuffle(v.u8x16, [8, 10, 12, 14, 9, 11, 13, 15])
_widen = v.make_convert(v.u8x8, v.i32x8, "zext")
_as_signed = v.make_convert(v.u8x8, v.i8x8, "bitcast")
_widen_signed = v.make_convert(v.i8x8, v.i32x8, "sext")
_low4_16 = v.make_const(v.u8x16, 15)


@v.forceinline
def low_nibbles(values):
    """u8x16: bits 3 to 0."""
    return values & _low4_16()


_i32x4 = v.Vec(types.int32, 4)
_store_i32x4 = v.make_store(_i32x4)
_first_four, _last_four = (v.make_shuffle(v.i32x8, list(range(k, k + 4))) for k in (0, 4))
_first8 = v.make_shuffle(v.u8x16, list(range(8)))


@v.forceinline
def store_eight(word, minus, out):
    """The eight bytes of an int64 less a number, as make_scale_of_eight reads them."""
    value = bytes_of(word, word)
    values = _widen(_first8(value, value)) - v.splat_i32x8(types.int32(minus))
    _store_i32x4(out, _first_four(values, values))
    _store_i32x4(out + 32, _last_four(values, values))


@v.forceinline
def store_sixteen(values, minus, out):
    """Sixteen unsigned sub-scales less a number, as make_scale_of_sixteen reads them."""
    v.store_i32x8(out, _widen(_of_first_groups(values, values)) - v.splat_i32x8(types.int32(minus)))
    v.store_i32x8(out + 32, _widen(_of_last_groups(values, values)) - v.splat_i32x8(types.int32(minus)))


@v.forceinline
def store_sixteen_signed(values, out):
    """Sixteen int8 sub-scales, as make_scale_of_sixteen reads them."""
    v.store_i32x8(out, _widen_signed(_as_signed(_of_first_groups(values, values))))
    v.store_i32x8(out + 32, _widen_signed(_as_signed(_of_last_groups(values, values))))


# ---- each type's way from eight blocks to their sub-scales -----------------------------------------------------------


@v.forceinline
def _decode_q2_k(p, stride, scales, minima):
    for r in range(8):
        store_sixteen(low_nibbles(v.load_u8x16(p + r * stride)), 0, scales + r * 64)
    decode_q2_minima(p, stride, minima)


@v.forceinline
def _q2_k_factors(p, stride):
    return k_factors(p + 80, stride)


@v.forceinline
def _store_q3_k(p, out):
    """The 16 sub-scales at p, stored with 32 added; their bits are drawn in formats/k_quants.py."""
    a, b, top = types.int64(v.load_u32(p)), types.int64(v.load_u32(p + 4)), types.int64(v.load_u32(p + 8))
    s0 = (a & 0x0F0F0F0F) | ((top & 0x03030303) << 4)
    s4 = (b & 0x0F0F0F0F) | (((top >> 2) & 0x03030303) << 4)
    s8 = ((a >> 4) & 0x0F0F0F0F) | (((top >> 4) & 0x03030303) << 4)
    s12 = ((b >> 4) & 0x0F0F0F0F) | (((top >> 6) & 0x03030303) << 4)
    store_sixteen(bytes_of(s0 | (s4 << 32), s8 | (s12 << 32)), 32, out)


@v.forceinline
def _decode_q3_k(p, stride, scales, minima):
    for r in range(8):
        _store_q3_k(p + r * stride + 96, scales + r * 64)


@v.forceinline
def _decode_q6_k(p, stride, scales, minima):
    for r in range(8):
        store_sixteen_signed(v.load_u8x16(p + r * stride + 192), scales + r * 64)


@v.forceinline
def _store_iq4_xs(block, out):
    """The eight sub-scales: nibbles of four bytes, and bit pairs of a word above them."""
    low, high = types.int64(v.load_u32(block + 4)), types.int64(v.load_u16(block + 2))
    # spread: nibble (pair) i to byte i
    low = (low | (low << 16)) & 0x0000FFFF0000FFFF
    low = (low | (low << 8)) & 0x00FF00FF00FF00FF
    low = (low | (low << 4)) & 0x0F0F0F0F0F0F0F0F
    high = (high | (high << 24)) & 0x000000FF000000FF
    high = (high | (high << 12)) & 0x000F000F000F000F
    high = (high | (high << 6)) & 0x0303030303030303
    store_eight(low | (high << 4), 32, out)


@v.forceinline
def _decode_iq4_xs(p, stride, scales, minima):
    for r in range(8):
        _store_iq4_xs(p + r * stride, scales + rows_paired(r))


# ---- the types -------------------------------------------------------------------------------------------------------


def _group(low: tuple[int, int, int], high: tuple[int, int, int] | None = None) -> Any:
    """group(block): a field of 32 bytes, and one of others above it; each is a shift, a mask, and where they stand."""
    low_field, low_at = make_field(*low[:2]), low[2]
    high_field, high_at = make_field(*high[:2]) if high else None, high[2] if high else 0

    @v.forceinline
    def one_field(block):
        return even_odd(low_field(words_at(block + low_at)))

    @v.forceinline
    def two_fields(block):
        low_words, high_words = words_at(block + low_at), words_at(block + high_at)
        return even_odd(low_field(low_words) | high_field(high_words))

    return two_fields if high else one_field


def _bytes(low: tuple[int, int, int], high: tuple[int, int, int] | None = None) -> Any:
    """bytes(block): the same 32 integers in their own order."""
    low_field, low_at = _make_byte_field(*low[:2]), low[2]
    high_field, high_at = _make_byte_field(*high[:2]) if high else None, high[2] if high else 0

    @v.forceinline
    def one_field(block):
        return low_field(v.load_u8x32(block + low_at))

    @v.forceinline
    def two_fields(block):
        return low_field(v.load_u8x32(block + low_at)) | high_field(v.load_u8x32(block + high_at))

    return two_fields if high else one_field


def _group_of_levels(at: int) -> Any:
    """group(block): the levels of 16 low nibbles, then of the high ones."""

    @v.forceinline
    def group(block):
        return common.even_odd_i8(v.lookup_u8x32(common.iq4_levels(), common.nibbles(v.load_u8x16(block + at))))

    return group


def _bytes_of_levels(at: int) -> Any:
    @v.forceinline
    def read(block):
        return v.lookup_u8x32(common.iq4_levels(), common.nibbles(v.load_u8x16(block + at)))

    return read


@dataclass(frozen=True, eq=False)
class SuperBlock:
    """A type as superblock_matmul.py wants it; the functions are described in the package's docstring."""

    block_nbytes: int
    decode: Any
    factors: Any
    facts: Callable[[int], tuple[Any, ...]]
    """Where group g stands: arguments of the two functions of ``reads``."""
    n_scales: int = 16
    n_minima: int = 0
    centre: int = 0
    reads: tuple[Any, Any] = (_group, _bytes)

    def make_group(self, g: int) -> Any:
        """What reads group g as int16."""
        return self.reads[0](*self.facts(g))

    def make_bytes(self, g: int) -> Any:
        """What reads it as bytes."""
        return self.reads[1](*self.facts(g))

    @property
    def row_scales(self) -> Any:
        """Where ``decode`` puts the sub-scales of a row."""
        return rows_paired if self.n_scales == 8 else rows_apart

    def make_scale(self, g: int) -> Any:
        """What reads them, for group g."""
        return make_scale_of_eight(g) if self.n_scales == 8 else make_scale_of_sixteen(g)


def _q6_k_facts(g: int) -> tuple[Any, ...]:
    half, k = g // 4, g % 4
    return (k // 2 * 4, 15, half * 64 + k % 2 * 32), (2 * k - 4, 48, 128 + half * 32)


TYPES = {  # the layouts are drawn in formats/k_quants.py and formats/i_quants.py
    "Q2_K": SuperBlock(
        84, _decode_q2_k, _q2_k_factors, lambda g: ((g % 4 * 2, 3, 16 + g // 4 * 32),), n_minima=16
    ),
    "Q3_K": SuperBlock(
        110, _decode_q3_k, common.make_single_factor(108),
        lambda g: ((g % 4 * 2, 3, 32 + g // 4 * 32), (g - 2, 4, 0)), centre=4,
    ),
    "Q4_K": SuperBlock(
        144, decode_k, k_factors, lambda g: ((g % 2 * 4, 15, 16 + g // 2 * 32),), n_scales=8, n_minima=8
    ),
    "Q5_K": SuperBlock(
        176, decode_k, k_factors,
        lambda g: ((g % 2 * 4, 15, 48 + g // 2 * 32), (g - 4, 16, 16)), n_scales=8, n_minima=8,
    ),
    "Q6_K": SuperBlock(210, _decode_q6_k, common.make_single_factor(208), _q6_k_facts, centre=32),
    "IQ4_XS": SuperBlock(
        136, _decode_iq4_xs, common.make_single_factor(0), lambda g: (8 + g * 16,), n_scales=8,
        reads=(_group_of_levels, _bytes_of_levels),
    ),
}  # fmt: skip
