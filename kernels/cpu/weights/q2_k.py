"""Q2_K: 84 bytes: 16 bytes of a 4-bit scale and a 4-bit minimum, 64 bytes of bit pairs, d, dmin."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.simd import forceinline, load_u8x16
from edgellm.kernels.cpu.weights import superblocks

BLOCK_NBYTES = 84
CENTRE = 0
N_MINIMA = 16

make_scale = superblocks.make_scale_of_sixteen


@forceinline
def store_scales(block, out):
    """The 16 sub-scales."""
    superblocks.store_sixteen(superblocks.low_nibbles(load_u8x16(block)), 0, out)


@forceinline
def minima(block):
    """The minima of the last 16 weights of the groups, and what those of the first 16 have more."""
    of_first, of_last = superblocks.even_and_odd_bytes(superblocks.high_nibbles(load_u8x16(block)))
    return of_last, of_first - of_last


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
