"""Q5_K: 176 bytes: d, dmin, 12 bytes of 6-bit scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib.simd import forceinline
from edgellm.kernels.cpu.weights import superblocks

BLOCK_NBYTES = 176
CENTRE = 0
N_MINIMA = 8

row_scales, make_scale = superblocks.rows_paired, superblocks.make_scale_of_eight
decode, factors = superblocks.decode_k, superblocks.k_factors


def make_group(g: int) -> Any:
    """group(block): a nibble, and bit g of the byte of fifth bits above it."""
    nibble, at = superblocks.make_field(g % 2 * 4, 15), 48 + g // 2 * 32
    fifth_bit = superblocks.make_field(g - 4, 16)

    @forceinline
    def group(block):
        low, high = superblocks.words_at(block + at), superblocks.words_at(block + 16)
        return superblocks.even_odd(nibble(low) | fifth_bit(high))

    return group
