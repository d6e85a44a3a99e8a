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
SCALE_STEP = 0
OFFSET = 0

_thirty_two = simd.make_const(simd.i16x32, 32)


@forceinline
def unpack(block, s):
    """The 32 weights of group s times their scale, as int16."""
    half, quarter = s >> 2, s & 3
    low = common.nibble_of(load_u8x32(block + half * 64 + (quarter & 1) * 32), quarter >> 1)
    high = common.bit_pair_of(load_u8x32(block + 128 + half * 32), quarter)
    scales = common.scales_even_odd(load_i8(block + 192 + 2 * s), load_i8(block + 193 + 2 * s))
    return (common.even_odd_u8(low | high) - _thirty_two()) * scales


sums = common.make_sums(unpack)


@forceinline
def decode_scales(p, stride, out):
    """One scale for each of eight rows."""
    common.decode_half_scales(p + 208, stride, out)
