"""Q5_1: 24 bytes: d, m, 32 fifth bits, 16 bytes of nibbles; value d q + m."""

from edgellm.kernels.cpu.lib.simd import forceinline, load_u8x16, load_u32
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 24
HAS_MIN = True
OFFSET = 0

factors = common.half_pairs_at


@forceinline
def unpack(block):
    """The 32 weights of the group as int16."""
    return common.even_odd_u8(common.nibbles(load_u8x16(block + 8)) | common.sixteen_where(load_u32(block + 4)))


sums = common.make_sums(unpack)
