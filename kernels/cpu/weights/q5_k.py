"""Q5_K: 176 bytes: d, dmin, 12 bytes of 6-bit scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles."""

from edgellm.kernels.cpu.simd import forceinline, load_u8x32
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 176
GROUPS = 8
HAS_MIN = True
SCALE_STEP = 32
OFFSET = 0

decode_scales = common.decode_k_scales


@forceinline
def unpack(block, s):
    """The 32 weights of group s as int16: a nibble and bit s of the byte of fifth bits."""
    low = common.nibble_of(load_u8x32(block + 48 + (s >> 1) * 32), s & 1)
    return common.even_odd_u8(low | common.sixteen_if_bit(load_u8x32(block + 16), s))


sums = common.make_sums(unpack)
