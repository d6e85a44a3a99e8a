"""Q5_0: 22 bytes: d, 32 fifth bits, 16 bytes of nibbles; value d (q - 16)."""

from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 22
HAS_MIN = False
OFFSET = 16

_sixteen = v.make_const(v.i16x32, 16)
factors = common.make_single_factor(0)


@v.forceinline
def unsigned(block):
    """The 32 weights of the group plus 16."""
    return common.even_odd_u8(common.nibbles(v.load_u8x16(block + 6)) | common.sixteen_where(v.load_u32(block + 2)))


sums = common.make_sums(unsigned)


@v.forceinline
def unpack(block):
    """The 32 weights of the group as int16."""
    return unsigned(block) - _sixteen()
