"""What the numbers of a block can stand for: one table for the reader, the kernels and the encoders."""

from __future__ import annotations

from typing import NamedTuple

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Of IQ4_NL and IQ4_XS."""

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Of MXFP4 and NVFP4: a float of four bits, times two."""


class PackedLevels(NamedTuple):
    """Levels that 32 numbers of keys, or of values, share: 2^bits of them, a scale apart.

    within      of the way from the least number to the largest: where the levels may lie. And which of them, halves
                included, is at its middle where they lie further apart because that is far from zero
    per_scale   steps of the minimum in a scale, as long as they are small
    """

    bits: int
    within: tuple[tuple[float, float], tuple[float, float]]
    per_scale: int

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def codes_nbytes(self) -> int:
        """Bytes of the codes of 32 numbers."""
        return 4 * self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of 32 numbers: their codes, a scale and a minimum."""
        return self.codes_nbytes + 2


KIVI2_KEYS = PackedLevels(3, ((1.0, 3.5), (0.93, 3.0)), 4)
KIVI2_VALUES = PackedLevels(2, ((1.0, 1.5), (0.85, 1.0)), 8)

KIVI2_KNEE, KIVI2_FAR_STEP = 48, 8
"""A minimum is a signed byte, in small steps up to the knee; behind it a step is so many of them."""

KIVI2_REACH = 640
"""Small steps from zero to a group's middle, at most: what is further away has a larger scale."""
