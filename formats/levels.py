"""What the numbers of a block can stand for: one table for the reader, the kernels and the encoders."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Of IQ4_NL and IQ4_XS."""

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Of MXFP4 and NVFP4: a float of four bits, times two."""

KIVI2_WITHIN = ((1.0, 1.5), (0.85, 1.0))
"""Of the way from a group's least number to its largest: where the four levels of 2 bits may lie. And which of them its
middle is where they lie further apart because it is far from zero: between two, or at one."""

KIVI2_REACH = 13
"""Scales from zero to a group's middle, at most: a minimum has a byte."""
