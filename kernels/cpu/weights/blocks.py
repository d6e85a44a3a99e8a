"""The types of 32 weights: where a block keeps its scale, and how its bytes become 32 integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import types

from edgellm.formats import levels
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import common
from edgellm.kernels.cpu.weights.common import even_odd_i8, even_odd_u8, make_sums, nibbles

_half = common.make_single_factor(0)


@dataclass(frozen=True, eq=False)
class Block:
    """A type as block_matmul.py wants it; the functions are described in the package's docstring."""

    block_nbytes: int
    read: Any
    unpack: Any
    sums: Any
    factors: Any = _half
    has_min: bool = False
    offset: int = 0


def _make_nibbles(quants: int) -> Any:
    @v.forceinline
    def read(block):
        return nibbles(v.load_u8x16(block + quants))

    return read


def _make_five_bits(quants: int) -> Any:
    @v.forceinline
    def read(block):
        return nibbles(v.load_u8x16(block + quants)) | common.sixteen_where(v.load_u32(block + quants - 4))

    return read


def _make_levels(quants: int, levels_of_nibbles: Any) -> Any:
    @v.forceinline
    def read(block):
        return v.lookup_u8x32(levels_of_nibbles(), nibbles(v.load_u8x16(block + quants)))

    return read


@v.forceinline
def _signed_bytes(block):
    return v.load_u8x32(block + 2)


def _make_unpack(read: Any, widen: Any, offset: int = 0) -> Any:
    less = v.make_const(v.i16x32, offset)

    @v.forceinline
    def unpack(block):
        return widen(read(block))

    @v.forceinline
    def unpack_less(block):
        return widen(read(block)) - less()

    return unpack_less if offset else unpack


# ---- MXFP4: the scale is a power of two ------------------------------------------------------------------------------

_mxfp4_levels = v.make_constants(v.u8x16, [n % 256 for n in levels.E2M1_DOUBLED])
_one, _bias, _exponent = (v.make_const(v.u32x8, n) for n in (1, 63, 23))
_as_float = v.make_convert(v.u32x8, v.f32x8, "bitcast")


@v.forceinline
def _exponent_at(p):
    return types.uint32(v.load_u8(p))


@v.forceinline
def power_of_two(e):
    """f32x8: 2^(e - 128), as a product of two halves: it may be subnormal."""
    half = e >> _one()
    first, second = (half + _bias()) << _exponent(), (e - half + _bias()) << _exponent()
    return _as_float(first) * _as_float(second)


@v.forceinline
def _mxfp4_factors(p, stride):
    q = p + 4 * stride
    e = v.gather_u32x8(
        _exponent_at(p), _exponent_at(p + stride), _exponent_at(p + 2 * stride), _exponent_at(p + 3 * stride),
        _exponent_at(q), _exponent_at(q + stride), _exponent_at(q + 2 * stride), _exponent_at(q + 3 * stride),
    )  # fmt: skip
    return power_of_two(e), v.zero_f32x8()


def _block(nbytes: int, read: Any, widen: Any, offset: int = 0, sums: Any = None, **rest: Any) -> Block:
    sums = sums or make_sums(_make_unpack(read, widen))
    return Block(nbytes, read, _make_unpack(read, widen, offset), sums, offset=offset, **rest)


_with_minimum = {"factors": common.half_pairs_at, "has_min": True}

TYPES = {  # the layouts are drawn in formats/block_quants.py and formats/small_quants.py
    "Q4_0": _block(18, _make_nibbles(2), even_odd_u8, 8, common.make_nibble_sums(2)),
    "Q4_1": _block(20, _make_nibbles(4), even_odd_u8, 0, common.make_nibble_sums(4), **_with_minimum),
    "Q5_0": _block(22, _make_five_bits(6), even_odd_u8, 16),
    "Q5_1": _block(24, _make_five_bits(8), even_odd_u8, **_with_minimum),
    "Q8_0": _block(34, _signed_bytes, even_odd_i8),
    "IQ4_NL": _block(18, _make_levels(2, common.iq4_levels), even_odd_i8),
    "MXFP4": _block(17, _make_levels(1, _mxfp4_levels), even_odd_i8, factors=_mxfp4_factors),
}
