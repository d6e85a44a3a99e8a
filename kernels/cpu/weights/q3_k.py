"""Q3_K: 110 bytes: 32 bytes of third bits, 64 bytes of bit pairs, 12 bytes of 6-bit scales, d; weight d sc (q - 4)."""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.lib.simd import forceinline, load_u32
from edgellm.kernels.cpu.weights import common, superblocks

BLOCK_NBYTES = 110
CENTRE = 4
N_MINIMA = 0

row_scales, make_scale = superblocks.rows_apart, superblocks.make_scale_of_sixteen
factors = common.make_single_factor(108)


@forceinline
def _store_scales(p, out):
    """The 16 sub-scales at p, stored with 32 added; their bits are drawn in formats/k_quants.py."""
    a, b, top = types.int64(load_u32(p)), types.int64(load_u32(p + 4)), types.int64(load_u32(p + 8))
    s0 = (a & 0x0F0F0F0F) | ((top & 0x03030303) << 4)
    s4 = (b & 0x0F0F0F0F) | (((top >> 2) & 0x03030303) << 4)
    s8 = ((a >> 4) & 0x0F0F0F0F) | (((top >> 4) & 0x03030303) << 4)
    s12 = ((b >> 4) & 0x0F0F0F0F) | (((top >> 6) & 0x03030303) << 4)
    superblocks.store_sixteen(superblocks.bytes_of(s0 | (s4 << 32), s8 | (s12 << 32)), 32, out)


@forceinline
def decode(p, stride, scales, minima):
    """The sub-scales of eight rows."""
    for r in range(8):
        _store_scales(p + r * stride + 96, scales + r * 64)


def make_group(g: int) -> Any:
    """group(block): a pair of bits, and bit g of the byte of third bits above it."""
    pair, at = superblocks.make_field(g % 4 * 2, 3), 32 + g // 4 * 32
    third_bit = superblocks.make_field(g - 2, 4)

    @forceinline
    def group(block):
        low, high = superblocks.words_at(block + at), superblocks.words_at(block)
        return superblocks.even_odd(pair(low) | third_bit(high))

    return group
