"""Q4_K: 144 bytes: d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles; weight d sc q - dmin m."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib.simd import forceinline
from edgellm.kernels.cpu.weights import superblocks

BLOCK_NBYTES = 144
CENTRE = 0
N_MINIMA = 8

row_scales, make_scale = superblocks.rows_paired, superblocks.make_scale_of_eight
decode, factors = superblocks.decode_k, superblocks.k_factors


def make_group(g: int) -> Any:
    """group(block): the low nibbles of 32 bytes, or for odd g the high ones."""
    nibble, at = superblocks.make_field(g % 2 * 4, 15), 16 + g // 2 * 32

    @forceinline
    def group(block):
        return superblocks.even_odd(nibble(superblocks.words_at(block + at)))

    return group
