"""Q4_0: 18 bytes: d, 16 bytes of nibbles; value d (q - 8)."""

from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 18
HAS_MIN = False
OFFSET = 8

_eight = v.make_const(v.i16x32, 8)
factors = common.make_single_factor(0)
sums = common.make_nibble_sums(2)


@v.forceinline
def unpack(block):
    """The 32 weights of the group as int16."""
    return common.even_odd_u8(common.nibbles(v.load_u8x16(block + 2))) - _eight()
