"""Q5_0: 22 bytes: d, 32 fifth bits, 16 bytes of nibbles; value d (q - 16)."""

from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.simd import forceinline, load_u8x16, load_u32
from edgellm.kernels.cpu.weights import common

BLOCK_NBYTES = 22
GROUPS = 1
HAS_MIN = False
SCALE_STEP = 32

_sixteen = simd.make_const(simd.i16x32, 16)


@forceinline
def unpack(block, s):  # type: ignore[no-untyped-def]
    """The 32 weights of group s as int16."""
    q = common.nibbles(load_u8x16(block + 6)) | common.sixteen_where(load_u32(block + 2))
    return simd.widen_u8x32(q) - _sixteen()


@forceinline
def decode_scales(p0, p1, p2, p3, p4, p5, p6, p7, out):  # type: ignore[no-untyped-def]
    """Scales of eight blocks, one per row."""
    simd.store_f32x8(out, common.halves_at(p0, p1, p2, p3, p4, p5, p6, p7))
