"""Q2_K: 84 bytes: 16 bytes of a 4-bit scale and a 4-bit minimum, 64 bytes of bit pairs, d, dmin."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib.simd import forceinline, load_u8x16
from edgellm.kernels.cpu.weights import superblocks

BLOCK_NBYTES = 84
CENTRE = 0
N_MINIMA = 16

row_scales, make_scale = superblocks.rows_apart, superblocks.make_scale_of_sixteen


@forceinline
def decode(p, stride, scales, minima):
    """The sub-scales and minima of eight rows."""
    for r in range(8):
        superblocks.store_sixteen(superblocks.low_nibbles(load_u8x16(p + r * stride)), 0, scales + r * 64)
    superblocks.decode_q2_minima(p, stride, minima)


@forceinline
def factors(p, stride):
    """d and -dmin of eight blocks."""
    return superblocks.k_factors(p + 80, stride)


def make_group(g: int) -> Any:
    """group(block): a pair of bits of 32 bytes."""
    pair, at = superblocks.make_field(g % 4 * 2, 3), 16 + g // 4 * 32

    @forceinline
    def group(block):
        return superblocks.even_odd(pair(superblocks.words_at(block + at)))

    return group
