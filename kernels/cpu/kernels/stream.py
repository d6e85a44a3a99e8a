"""Reads memory as the products do and computes next to nothing: what is left is the limit of the memory."""

from __future__ import annotations

from edgellm.kernels.cpu.kernels.transposed_rows import OWN_AHEAD
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import AHEAD, STREAM_APART, STREAM_ROW_NBYTES, STREAM_ROWS, STREAM_SIDE_BY_SIDE


@v.forceinline
def _eight_lines(a, b, c, d, p, stride):
    """Of eight rows ``stride`` bytes apart the line at p."""
    for row in range(p, p + 8 * stride, 4 * stride):
        a = a + v.load_i32x16(row)
        b = b + v.load_i32x16(row + stride)
        c = c + v.load_i32x16(row + 2 * stride)
        d = d + v.load_i32x16(row + 3 * stride)
    return a, b, c, d


def stream(address, nbytes, order, out):
    """Adds up all int32 of whole strips of eight rows: one line after the other, the rows of a strip side by side, or
    eight rows side by side that are each an eighth of the memory.

    ``out`` gets 64 bytes, so that no read can be left out.
    """
    a = b = c = d = v.zero_i32x16()
    strip = STREAM_ROWS * STREAM_ROW_NBYTES
    end = address + nbytes // strip * strip
    if order == STREAM_SIDE_BY_SIDE:
        for p in range(address, end, strip):
            ahead = p + strip + AHEAD
            for column in range(p, p + STREAM_ROW_NBYTES, 64):
                for line in range(0, STREAM_ROWS * 64, 64):
                    v.fetch_weights(ahead + line)
                ahead += STREAM_ROWS * 64
                a, b, c, d = _eight_lines(a, b, c, d, column, STREAM_ROW_NBYTES)
    elif order == STREAM_APART:
        row = (end - address) // STREAM_ROWS
        for column in range(address, address + row, 64):
            for ahead in range(column + OWN_AHEAD, column + OWN_AHEAD + STREAM_ROWS * row, row):
                v.fetch_first(ahead)
            a, b, c, d = _eight_lines(a, b, c, d, column, row)
    else:
        for line in range(address, end, 256):
            a = a + v.load_i32x16(line)
            b = b + v.load_i32x16(line + 64)
            c = c + v.load_i32x16(line + 128)
            d = d + v.load_i32x16(line + 192)
    v.store_i32x16(out, a + b + c + d)
