"""MXFP4: 17 bytes: e, 16 bytes of nibbles that name a float of four bits; value 2^(e - 128) level, levels doubled."""

from numba import types

from edgellm.formats import levels
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 17
HAS_MIN = False
OFFSET = 0

_levels = v.make_constants(v.u8x16, [n % 256 for n in levels.E2M1_DOUBLED])
_one, _bias, _exponent = (v.make_const(v.u32x8, n) for n in (1, 63, 23))
_as_float = v.make_convert(v.u32x8, v.f32x8, "bitcast")


@v.forceinline
def _exponent_at(p):
    return types.uint32(v.load_u8(p))


@v.forceinline
def factors(p, stride):
    """2^(e - 128) of eight rows, as a product of two halves: it may be subnormal; and zero."""
    q = p + 4 * stride
    e = v.gather_u32x8(
        _exponent_at(p), _exponent_at(p + stride), _exponent_at(p + 2 * stride), _exponent_at(p + 3 * stride),
        _exponent_at(q), _exponent_at(q + stride), _exponent_at(q + 2 * stride), _exponent_at(q + 3 * stride),
    )  # fmt: skip
    half = e >> _one()
    first, second = (half + _bias()) << _exponent(), (e - half + _bias()) << _exponent()
    return _as_float(first) * _as_float(second), v.zero_f32x8()


@v.forceinline
def unpack(block):
    """The 32 weights of the block as int16."""
    return common.even_odd_i8(v.lookup_u8x32(_levels(), common.nibbles(v.load_u8x16(block + 1))))


sums = common.make_sums(unpack)
