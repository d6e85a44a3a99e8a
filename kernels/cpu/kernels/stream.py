"""Reads memory as the products do and computes next to nothing: what is left is the limit of the memory."""

from __future__ import annotations

from edgellm.kernels.cpu.lib.layout import AHEAD, STREAM_ROW_NBYTES, STREAM_ROWS
from edgellm.kernels.cpu.lib.simd import fetch_weights, load_i32x16, store_i32x16, zero_i32x16


def stream(address, nbytes, side_by_side, out):
    """Adds up all int32 of whole strips of eight rows, one line after the other or the rows side by side.

    ``out`` gets 64 bytes, so that no read can be left out.
    """
    a = b = c = d = zero_i32x16()
    strip = STREAM_ROWS * STREAM_ROW_NBYTES
    for p in range(address, address + nbytes // strip * strip, strip):
        if side_by_side != 0:
            ahead = p + strip + AHEAD
            for column in range(p, p + STREAM_ROW_NBYTES, 64):
                for line in range(0, STREAM_ROWS * 64, 64):
                    fetch_weights(ahead + line)
                ahead += STREAM_ROWS * 64
                for row in range(0, strip, 4 * STREAM_ROW_NBYTES):
                    a = a + load_i32x16(column + row)
                    b = b + load_i32x16(column + row + STREAM_ROW_NBYTES)
                    c = c + load_i32x16(column + row + 2 * STREAM_ROW_NBYTES)
                    d = d + load_i32x16(column + row + 3 * STREAM_ROW_NBYTES)
        else:
            for line in range(p, p + strip, 256):
                a = a + load_i32x16(line)
                b = b + load_i32x16(line + 64)
                c = c + load_i32x16(line + 128)
                d = d + load_i32x16(line + 192)
    store_i32x16(out, a + b + c + d)
