"""MXFP4: 17 bytes: e, 16 bytes of nibbles that name a float of four bits; value 2^(e - 128) level, levels doubled."""

from numba import types

from edgellm.formats import levels
from edgellm.kernels.cpu.lib import simd
from edgellm.kernels.cpu.lib.simd import forceinline, load_u8, load_u8x16, store_f32x8
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 17
HAS_MIN = False
OFFSET = 0

_levels = simd.make_constants(simd.u8x16, [n % 256 for n in levels.E2M1_DOUBLED])
_one, _bias, _exponent = (simd.make_const(simd.u32x8, n) for n in (1, 63, 23))
_as_float = simd.make_convert(simd.u32x8, simd.f32x8, "bitcast")


@forceinline
def _exponent_at(p):
    return types.uint32(load_u8(p))


@forceinline
def decode_scales(p, stride, out):
    """2^(e - 128) of eight rows, as a product of two halves: it may be subnormal."""
    q = p + 4 * stride
    e = simd.gather_u32x8(
        _exponent_at(p), _exponent_at(p + stride), _exponent_at(p + 2 * stride), _exponent_at(p + 3 * stride),
        _exponent_at(q), _exponent_at(q + stride), _exponent_at(q + 2 * stride), _exponent_at(q + 3 * stride),
    )  # fmt: skip
    half = e >> _one()
    first, second = (half + _bias()) << _exponent(), (e - half + _bias()) << _exponent()
    store_f32x8(out, _as_float(first) * _as_float(second))


@forceinline
def unpack(block):
    """The 32 weights of the block as int16."""
    return common.even_odd_i8(simd.lookup_u8x32(_levels(), common.nibbles(load_u8x16(block + 1))))


sums = common.make_sums(unpack)
