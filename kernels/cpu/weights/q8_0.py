"""Q8_0: 34 bytes: d, 32 int8; value d q."""

from edgellm.kernels.cpu.lib.simd import forceinline, load_u8x32
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 34
HAS_MIN = False
OFFSET = 0

factors = common.make_single_factor(0)


@forceinline
def unpack(block):
    """The 32 weights of the group as int16."""
    return common.even_odd_i8(load_u8x32(block + 2))


sums = common.make_sums(unpack)
