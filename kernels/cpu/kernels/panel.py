"""Many tokens: a panel of 16 rows is unpacked to int16 pairs, lanes = rows, and multiplied with 4 tokens at a time.

What a family of types brings (superblock_matmul.py, block_matmul.py):

    pack(p, stride, n_groups, half, scratch)      eight rows from p become half of the panel's lanes
    times_four, times_one                         the panel times tokens; c[t] (16 floats) goes on from before
    tile_times                                    the same on a CPU with AMX (amx_matmul.py)
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels.amx_matmul import has_tiles
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.lanes import transpose_i32x8


@v.forceinline
def store_pairs(a, b, c, d, e, f, g, h, out):
    """Column j of the 8x8 int32 matrix with rows a..h goes to out + 64 j."""
    columns = transpose_i32x8(a, b, c, d, e, f, g, h)
    v.store_i32x8(out, columns[0])
    v.store_i32x8(out + 64, columns[1])
    v.store_i32x8(out + 128, columns[2])
    v.store_i32x8(out + 192, columns[3])
    v.store_i32x8(out + 256, columns[4])
    v.store_i32x8(out + 320, columns[5])
    v.store_i32x8(out + 384, columns[6])
    v.store_i32x8(out + 448, columns[7])


@v.forceinline
def _pairs_times_splat(acc, w, x):
    """acc += w * the int16 pair at x, in all 16 rows."""
    return v.madd_i16(acc, w, v.i32x16_as_i16x32(v.splat_i32x16(v.load_i32(x))))


@v.forceinline
def group_times_four(panel, x, x1, x2, x3, i0, i1, i2, i3):
    """Go on with the integer sums of 4 tokens over one group of 32."""
    for pair in range(16):
        w = v.load_i16x32(panel + pair * 64)
        i0 = _pairs_times_splat(i0, w, x + pair * 4)
        i1 = _pairs_times_splat(i1, w, x1 + pair * 4)
        i2 = _pairs_times_splat(i2, w, x2 + pair * 4)
        i3 = _pairs_times_splat(i3, w, x3 + pair * 4)
    return i0, i1, i2, i3


@v.forceinline
def group_times_one(panel, x, i0):
    """Go on with the integer sums of one token over one group of 32."""
    for pair in range(16):
        i0 = _pairs_times_splat(i0, v.load_i16x32(panel + pair * 64), x + pair * 4)
    return i0


def make_many_tokens(
    block_groups: int, block_nbytes: int, pack: Any, times_four: Any, times_one: Any, tile_times: Any
) -> Any:
    """The path for many tokens: panels of 16 rows, taken from the op's work counter."""

    @v.forceinline
    def multiply(op, n, row, c, c_row, scratch):
        """16 rows from ``row`` times n tokens; c is (n, 16) with rows c_row bytes apart."""
        x, x_row, n_groups = v.load_i64(op + at.X), v.load_i64(op + at.X_ROW_NBYTES), v.load_i64(op + at.N_GROUPS)
        w_row = v.load_i64(op + at.W_ROW_NBYTES)
        w = v.load_i64(op + at.W) + row * w_row
        n_panels = (n_groups + at.PANEL_GROUPS - 1) // at.PANEL_GROUPS
        # equal parts, whole blocks
        width = ((n_groups + n_panels - 1) // n_panels + block_groups - 1) // block_groups * block_groups
        for g in range(0, n_groups, width):
            here = min(width, n_groups - g)
            for half in range(2):
                pack(w + half * 8 * w_row + g // block_groups * block_nbytes, w_row, here, half, scratch)
            scale_at = x + n_groups * 64 + g * 4
            t = 0
            if has_tiles() != 0 and n >= at.TILE_TOKENS:
                tile_times(scratch, here, x, x_row, n, g, n_groups, c, c_row)
                t = n
            while t + 4 <= n:
                x_t, scale_t = x + t * x_row + g * 64, scale_at + t * x_row
                times_four(scratch, here, x_t, x_row, scale_t, n_groups * 4, c + t * c_row, c_row, g == 0)
                t += 4
            while t < n:
                x_t, scale_t = x + t * x_row + g * 64, scale_at + t * x_row
                times_one(scratch, here, x_t, scale_t, n_groups * 4, c + t * c_row, g == 0)
                t += 1

    @v.forceinline
    def many_tokens(op, n, scratch):
        n_out, out, out_row = v.load_i64(op + at.N_OUT), v.load_i64(op + at.OUT), v.load_i64(op + at.OUT_ROW_NBYTES)
        bias = v.load_i64(op + at.BIAS)
        row = v.atomic_add(op + at.COUNTER, 1) * at.PANEL_ROWS
        while row < n_out:
            if row + at.PANEL_ROWS <= n_out:
                multiply(op, n, row, out + row * 4, out_row, scratch)
            else:
                # the last rows once more with some before them, summed aside: another thread may own those
                first = max(0, n_out - at.PANEL_ROWS)
                multiply(op, n, first, scratch + at.EDGE, at.PANEL_ROWS * 4, scratch)
                for t in range(n):
                    for i in range(row - first, n_out - first):
                        value = v.load_f32(scratch + at.EDGE + t * at.PANEL_ROWS * 4 + i * 4)
                        v.store_f32(out + t * out_row + (first + i) * 4, value)
            if bias != 0:  # rows are padded to 16 floats
                for t in range(n):
                    c = out + t * out_row + row * 4
                    v.store_f32x16(c, v.load_f32x16(c) + v.load_f32x16(bias + row * 4))
            row = v.atomic_add(op + at.COUNTER, 1) * at.PANEL_ROWS

    return many_tokens
