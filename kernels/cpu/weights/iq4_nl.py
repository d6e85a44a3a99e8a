"""IQ4_NL: 18 bytes: d, 16 bytes of nibbles that name one of 16 levels; value d level."""

from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 18
HAS_MIN = False
OFFSET = 0

factors = common.make_single_factor(0)


@v.forceinline
def unpack(block):
    """The 32 weights of the block as int16."""
    return common.even_odd_i8(v.lookup_u8x32(common.iq4_levels(), common.nibbles(v.load_u8x16(block + 2))))


sums = common.make_sums(unpack)
