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
    unpack: Any
    sums: Any
    factors: Any = _half
    has_min: bool = False
    offset: int = 0


_eight, _sixteen = v.make_const(v.i16x32, 8), v.make_const(v.i16x32, 16)


@v.forceinline
def _q4_0(block):
    return even_odd_u8(nibbles(v.load_u8x16(block + 2))) - _eight()


@v.forceinline
def _q4_1(block):
    return even_odd_u8(nibbles(v.load_u8x16(block + 4)))


@v.forceinline
def _q5_0_plus_16(block):
    return even_odd_u8(nibbles(v.load_u8x16(block + 6)) | common.sixteen_where(v.load_u32(block + 2)))


@v.forceinline
def _q5_0(block):
    return _q5_0_plus_16(block) - _sixteen()


@v.forceinline
def _q5_1(block):
    return even_odd_u8(nibbles(v.load_u8x16(block + 8)) | common.sixteen_where(v.load_u32(block + 4)))


@v.forceinline
def _q8_0(block):
    return even_odd_i8(v.load_u8x32(block + 2))


@v.forceinline
def _iq4_nl(block):
    return even_odd_i8(v.lookup_u8x32(common.iq4_levels(), nibbles(v.load_u8x16(block + 2))))


# ---- MXFP4: the scale is a power of two ------------------------------------------------------------------------------

_mxfp4_levels = v.make_constants(v.u8x16, [n % 256 for n in levels.E2M1_DOUBLED])
_one, _bias, _exponent = (v.make_const(v.u32x8, n) for n in (1, 63, 23))
_as_float = v.make_convert(v.u32x8, v.f32x8, "bitcast")


@v.forceinline
def _mxfp4(block):
    return even_odd_i8(v.lookup_u8x32(_mxfp4_levels(), nibbles(v.load_u8x16(block + 1))))


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


TYPES = {  # the layouts are drawn in formats/block_quants.py and formats/small_quants.py
    "Q4_0": Block(18, _q4_0, common.make_nibble_sums(2), offset=8),
    "Q4_1": Block(20, _q4_1, common.make_nibble_sums(4), common.half_pairs_at, has_min=True),
    "Q5_0": Block(22, _q5_0, make_sums(_q5_0_plus_16), offset=16),
    "Q5_1": Block(24, _q5_1, make_sums(_q5_1), common.half_pairs_at, has_min=True),
    "Q8_0": Block(34, _q8_0, make_sums(_q8_0)),
    "IQ4_NL": Block(18, _iq4_nl, make_sums(_iq4_nl)),
    "MXFP4": Block(17, _mxfp4, make_sums(_mxfp4), _mxfp4_factors),
}
