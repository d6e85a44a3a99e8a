"""Q4_1: 20 bytes: d, m, 16 bytes of nibbles; value d q + m."""

from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.simd import forceinline, load_u8x16
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 20
GROUPS = 1
HAS_MIN = True
SCALE_STEP = 32


@forceinline
def unpack(block, s):  # type: ignore[no-untyped-def]
    """The 32 weights of group s as int16."""
    return simd.widen_u8x32(common.nibbles(load_u8x16(block + 4)))


@forceinline
def decode_scales(p0, p1, p2, p3, p4, p5, p6, p7, out):  # type: ignore[no-untyped-def]
    """Scales, then minima, of eight blocks, one per row."""
    pairs = common.half_pairs_at(p0, p1, p2, p3, p4, p5, p6, p7)
    simd.store_f32x8(out, common.first_of_pair(pairs))
    simd.store_f32x8(out + 32, common.second_of_pair(pairs))
