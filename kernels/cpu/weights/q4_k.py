"""Q4_K: 144 bytes: d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles; value d sc q - dmin m."""

from edgellm.kernels.cpu.simd import forceinline, load_u8x32
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 144
GROUPS = 8
HAS_MIN = True
SCALE_STEP = 32
OFFSET = 0

decode_scales = common.decode_k_scales


@forceinline
def unpack(block, s):
    """The 32 weights of group s as int16: the low nibbles of 32 bytes, or for odd s the high ones."""
    return common.even_odd_u8(common.nibble_of(load_u8x32(block + 16 + (s >> 1) * 32), s & 1))


sums = common.make_sums(unpack)
