"""Eight int32 vectors of eight lanes: their sums and their columns."""

from __future__ import annotations

from edgellm.kernels.cpu.lib.simd import forceinline, i32x8, load_i32x8, make_shuffle

# unpack and add, not pairs side by side: LLVM would make slow vphaddd of those
_even_lanes = make_shuffle(i32x8, [0, 8, 1, 9, 4, 12, 5, 13])
_odd_lanes = make_shuffle(i32x8, [2, 10, 3, 11, 6, 14, 7, 15])
_low_pairs = make_shuffle(i32x8, [0, 1, 8, 9, 4, 5, 12, 13])
_high_pairs = make_shuffle(i32x8, [2, 3, 10, 11, 6, 7, 14, 15])
low_halves = make_shuffle(i32x8, [0, 1, 2, 3, 8, 9, 10, 11])
high_halves = make_shuffle(i32x8, [4, 5, 6, 7, 12, 13, 14, 15])


@forceinline
def sums_of_four(a, b, c, d):
    """In each half of the result, the sums of that half of a, b, c and d."""
    ab, cd = _even_lanes(a, b) + _odd_lanes(a, b), _even_lanes(c, d) + _odd_lanes(c, d)
    return _low_pairs(ab, cd) + _high_pairs(ab, cd)


@forceinline
def sums_of_eight(a, b, c, d, e, f, g, h):
    """Lane i of the result is the sum of the lanes of the i-th i32x8."""
    abcd, efgh = sums_of_four(a, b, c, d), sums_of_four(e, f, g, h)
    return low_halves(abcd, efgh) + high_halves(abcd, efgh)


@forceinline
def columns_of_four(a, b, c, d):
    """In each half, the columns of that half of the 4x8 matrix with these rows."""
    ab0, ab1, cd0, cd1 = _even_lanes(a, b), _odd_lanes(a, b), _even_lanes(c, d), _odd_lanes(c, d)
    return _low_pairs(ab0, cd0), _high_pairs(ab0, cd0), _low_pairs(ab1, cd1), _high_pairs(ab1, cd1)


@forceinline
def transpose_i32x8(a, b, c, d, e, f, g, h):
    """The columns of the 8x8 matrix with these rows."""
    r0, r1, r2, r3 = columns_of_four(a, b, c, d)
    s0, s1, s2, s3 = columns_of_four(e, f, g, h)
    return (
        low_halves(r0, s0), low_halves(r1, s1), low_halves(r2, s2), low_halves(r3, s3),
        high_halves(r0, s0), high_halves(r1, s1), high_halves(r2, s2), high_halves(r3, s3),
    )  # fmt: skip


@forceinline
def sums_at(address):
    """Lane i of the result is the sum of the lanes of the i-th of eight i32x8."""
    return sums_of_eight(
        load_i32x8(address), load_i32x8(address + 32), load_i32x8(address + 64), load_i32x8(address + 96),
        load_i32x8(address + 128), load_i32x8(address + 160), load_i32x8(address + 192), load_i32x8(address + 224),
    )  # fmt: skip
