"""What the numbers of a block can stand for: one table for the reader, the kernels and the encoders."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Of IQ4_NL and IQ4_XS."""

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Of MXFP4 and NVFP4: a float of four bits, times two."""

KIVI2_WITHIN = ((1.0, 1.5), (0.85, 1.0))
"""Of the way from a group's least number to its largest: where the four levels of 2 bits may lie. And which of them its
middle is where they lie further apart because it is far from zero: between two, or at one."""

KIVI2_KNEE, KIVI2_FAR_STEP = 48, 8
"""A group's minimum is a signed byte, in eighths of its scale up to the knee; behind it a step is so many of them."""

KIVI2_REACH = 80
"""Scales from zero to a group's middle, at most: what is further away has a larger scale."""
