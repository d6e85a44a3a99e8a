"""Q8_0: 34 bytes: d, 32 int8; value d q."""

from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.simd import forceinline, load_i8x32
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 34
GROUPS = 1
HAS_MIN = False
SCALE_STEP = 32


@forceinline
def unpack(block, s):  # type: ignore[no-untyped-def]
    """The 32 weights of group s as int16."""
    return simd.widen_i8x32(load_i8x32(block + 2))


@forceinline
def decode_scales(p0, p1, p2, p3, p4, p5, p6, p7, out):  # type: ignore[no-untyped-def]
    """Scales of eight blocks, one per row."""
    simd.store_f32x8(out, common.halves_at(p0, p1, p2, p3, p4, p5, p6, p7))
