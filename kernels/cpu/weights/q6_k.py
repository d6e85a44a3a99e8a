"""Q6_K: 210 bytes: 128 bytes of nibbles, 64 bytes of bit pairs, 16 int8 scales, d; value d sc (q - 32).

The scale of every 16 weights goes into the int16 weight: |sc (q - 32)| <= 128 * 32, and 32 products with activations
of at most 16383 stay below 2^31.
"""

from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.simd import forceinline, load_i8, load_u8x32
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 210
GROUPS = 8
HAS_MIN = False
SCALE_STEP = 0  # one scale for the whole block

_thirty_two = simd.make_const(simd.i16x32, 32)


@forceinline
def unpack(block, s):  # type: ignore[no-untyped-def]
    """The 32 weights of group s times their scale, as int16."""
    half, quarter = s >> 2, s & 3
    low = common.nibble_of(load_u8x32(block + half * 64 + (quarter & 1) * 32), quarter >> 1)
    high = common.bit_pair_of(load_u8x32(block + 128 + half * 32), quarter)
    scales = common.two_scales(load_i8(block + 192 + 2 * s), load_i8(block + 193 + 2 * s))
    return (simd.widen_u8x32(low | high) - _thirty_two()) * scales


@forceinline
def decode_scales(p0, p1, p2, p3, p4, p5, p6, p7, out):  # type: ignore[no-untyped-def]
    """Scales of eight blocks, one per row."""
    d = common.halves_at(p0 + 208, p1 + 208, p2 + 208, p3 + 208, p4 + 208, p5 + 208, p6 + 208, p7 + 208)
    simd.store_f32x8(out, d)
