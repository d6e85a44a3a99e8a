"""Q6_K: 210 bytes: 128 bytes of nibbles, 64 bytes of bit pairs, 16 int8 scales, d; weight d sc (q - 32)."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib.simd import forceinline, load_u8x16
from edgellm.kernels.cpu.weights import common, superblocks

BLOCK_NBYTES = 210
CENTRE = 32
N_MINIMA = 0

row_scales, make_scale = superblocks.rows_apart, superblocks.make_scale_of_sixteen
factors = common.make_single_factor(208)


@forceinline
def decode(p, stride, scales, minima):
    """The sub-scales of eight rows."""
    for r in range(8):
        superblocks.store_sixteen_signed(load_u8x16(p + r * stride + 192), scales + r * 64)


def make_group(g: int) -> Any:
    """group(block): a nibble, and a pair of bits above it."""
    half, k = g // 4, g % 4
    nibble, pair = superblocks.make_field(k // 2 * 4, 15), superblocks.make_field(2 * k - 4, 48)
    low_at, high_at = half * 64 + k % 2 * 32, 128 + half * 32

    @forceinline
    def group(block):
        low, high = superblocks.words_at(block + low_at), superblocks.words_at(block + high_at)
        return superblocks.even_odd(nibble(low) | pair(high))

    return group
