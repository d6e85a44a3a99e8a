"""Q4_0: see formats for the block. 18 bytes: d, 16 bytes of nibbles; value d (q - 8)."""

from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.simd import forceinline, load_u8x16
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 18
GROUPS = 1
HAS_MIN = False
SCALE_STEP = 32

_eight = simd.make_const(simd.i16x32, 8)


@forceinline
def unpack(block, s):  # type: ignore[no-untyped-def]
    """The 32 weights of group s as int16."""
    return simd.widen_u8x32(common.nibbles(load_u8x16(block + 2))) - _eight()


@forceinline
def decode_scales(p0, p1, p2, p3, p4, p5, p6, p7, out):  # type: ignore[no-untyped-def]
    """Scales of eight blocks, one per row."""
    simd.store_f32x8(out, common.halves_at(p0, p1, p2, p3, p4, p5, p6, p7))
