"""Q4_1: 20 bytes: d, m, 16 bytes of nibbles; value d q + m."""

from edgellm.kernels.cpu.lib.simd import forceinline, load_u8x16
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 20
HAS_MIN = True
OFFSET = 0

factors = common.half_pairs_at
sums = common.make_nibble_sums(4)


@forceinline
def unpack(block):
    """The 32 weights of the group as int16."""
    return common.even_odd_u8(common.nibbles(load_u8x16(block + 4)))
