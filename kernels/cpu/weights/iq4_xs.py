"""IQ4_XS: 136 bytes: d, 8 6-bit scales, 128 bytes of nibbles that name one of 16 levels; weight d (sc - 32) level."""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import common, superblocks

BLOCK_NBYTES = 136
CENTRE = 0
N_MINIMA = 0

row_scales, make_scale = superblocks.rows_paired, superblocks.make_scale_of_eight
factors = common.make_single_factor(0)


@v.forceinline
def _store_scales(block, out):
    """The eight sub-scales: nibbles of four bytes, and bit pairs of a word above them."""
    low, high = types.int64(v.load_u32(block + 4)), types.int64(v.load_u16(block + 2))
    # spread: nibble (pair) i to byte i
    low = (low | (low << 16)) & 0x0000FFFF0000FFFF
    low = (low | (low << 8)) & 0x00FF00FF00FF00FF
    low = (low | (low << 4)) & 0x0F0F0F0F0F0F0F0F
    high = (high | (high << 24)) & 0x000000FF000000FF
    high = (high | (high << 12)) & 0x000F000F000F000F
    high = (high | (high << 6)) & 0x0303030303030303
    superblocks.store_eight(low | (high << 4), 32, out)


@v.forceinline
def decode(p, stride, scales, minima):
    """The sub-scales of eight rows."""
    for r in range(8):
        _store_scales(p + r * stride, scales + superblocks.rows_paired(r))


def make_group(g: int) -> Any:
    """group(block): the levels of 16 low nibbles, then of the high ones."""
    at = 8 + g * 16

    @v.forceinline
    def group(block):
        return common.even_odd_i8(v.lookup_u8x32(common.iq4_levels(), common.nibbles(v.load_u8x16(block + at))))

    return group
