"""Many tokens: a panel of 16 rows is unpacked to int16 pairs, lanes = rows, and multiplied with 4 tokens at a time.

What a family of types brings (superblock_matmul.py, block_matmul.py):

    pack(p, stride, n_groups, half, scratch, ahead)      eight rows from p become half of the panel's lanes
    finish(acc, total, scratch, block, scale_at, per_group)   float32 sums of 16 rows go on over a block
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.lanes import transpose_i32x8


class RowVectors(NamedTuple):
    """The vectors, lane = row, that ``finish`` works with."""

    load: Any
    splat: Any
    fma: Any
    to_floats: Any
    load_integers: Any
    splat_integers: Any
    zero_integers: Any


SIXTEEN_ROWS = RowVectors(
    v.load_f32x16, v.splat_f32x16, v.fma_f32x16, v.to_f32x16, v.load_i32x16, v.splat_i32x16, v.zero_i32x16
)
FOUR_ROWS = RowVectors(v.load_f32x4, v.splat_f32x4, v.fma_f32x4, v.to_f32x4, v.load_i32x4, v.splat_i32x4, v.zero_i32x4)


@v.forceinline
def groups_of_part(n_groups, most, run):
    """Groups of columns that a panel takes, at most so many: equal parts, whole blocks."""
    n_parts = (n_groups + most - 1) // most
    return ((n_groups + n_parts - 1) // n_parts + run - 1) // run * run


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
def _group_times_four(panel, x, x1, x2, x3, i0, i1, i2, i3):
    """Go on with the integer sums of 4 tokens over one group of 32."""
    for pair in range(16):
        w = v.load_i16x32(panel + pair * 64)
        i0 = _pairs_times_splat(i0, w, x + pair * 4)
        i1 = _pairs_times_splat(i1, w, x1 + pair * 4)
        i2 = _pairs_times_splat(i2, w, x2 + pair * 4)
        i3 = _pairs_times_splat(i3, w, x3 + pair * 4)
    return i0, i1, i2, i3


def _make_times(run: int, block_nbytes: int, finish: Any) -> Any:
    """times_four: a panel times 4 tokens; c[t] (16 floats) goes on from before, if this is not the first.

    ``run`` groups share a scale and are summed in int32 before ``finish`` goes on with the float32 sums. As many bytes
    as the panel was packed from are fetched from ``ahead`` on, if that is not 0.
    """
    nbytes = at.PANEL_ROWS * block_nbytes // run

    @v.forceinline
    def times_four(scratch, n_groups, x, x_row, scale_at, per_group, c, c_row, first, ahead):
        # the sums stay out of c until the end: its rows may be 4096 bytes apart, and then wait for each other
        f0 = f1 = f2 = f3 = v.zero_f32x16()
        if not first:
            f0, f1 = v.load_f32x16(c), v.load_f32x16(c + c_row)
            f2, f3 = v.load_f32x16(c + 2 * c_row), v.load_f32x16(c + 3 * c_row)
        panel = scratch + at.PANEL
        for block in range(n_groups // run):
            i0 = i1 = i2 = i3 = v.zero_i32x16()
            for _ in range(run):
                if ahead != 0:  # a few lines at a time: while they are packed so many would wait for memory
                    for line in range(0, nbytes, 64):
                        v.fetch_later(ahead + line)
                    ahead += nbytes
                i0, i1, i2, i3 = _group_times_four(panel, x, x + x_row, x + 2 * x_row, x + 3 * x_row, i0, i1, i2, i3)
                panel += at.GROUP_NBYTES
                x += 64
            f0 = finish(f0, i0, scratch, block, scale_at, per_group)
            f1 = finish(f1, i1, scratch, block, scale_at + x_row, per_group)
            f2 = finish(f2, i2, scratch, block, scale_at + 2 * x_row, per_group)
            f3 = finish(f3, i3, scratch, block, scale_at + 3 * x_row, per_group)
            scale_at += run * 4
        v.store_f32x16(c, f0)
        v.store_f32x16(c + c_row, f1)
        v.store_f32x16(c + 2 * c_row, f2)
        v.store_f32x16(c + 3 * c_row, f3)

    return times_four


@v.forceinline
def store_rest(aside, size, n, n_panels, c, c_row):
    """The tokens behind the last whole block of ``size``: what panels left ``aside`` of so many last ones goes to c."""
    rest = n % size
    for panel in range(n_panels):
        for i in range(size - rest, size * min(rest, 1)):
            of_panel = aside + panel * size * 64
            v.store_f32x16(c + panel * 64 + (n - size + i) * c_row, v.load_f32x16(of_panel + i * 64))


def make_multiply(run: int, block_nbytes: int, pack: Any, finish: Any) -> Any:
    """multiply: 16 rows times n >= 4 tokens; ``run`` groups of 32 columns are a block of so many bytes."""
    times_four = _make_times(run, block_nbytes, finish)

    @v.forceinline
    def multiply(x, x_row, n, n_panels, w, w_row, n_groups, c, c_row, scratch, ahead):
        """n_panels times 16 rows from w times n tokens; c is (n, rows) with rows c_row bytes apart.

        What lies from ``ahead`` on comes next.
        """
        width = groups_of_part(n_groups, at.PANEL_GROUPS, run)
        aside = scratch + at.CENTRES
        for g in range(0, n_groups, width):
            here, x_g, scale_g = min(width, n_groups - g), x + g * 64, x + n_groups * 64 + g * 4
            first_block = g // run * block_nbytes
            for row in range(0, n_panels * at.PANEL_ROWS, at.PANEL_ROWS):
                for half in range(2):
                    pack(w + (row + half * 8) * w_row + first_block, w_row, here, half, scratch, 0)
                t, next_panel = 0, ahead + row * w_row + first_block * at.PANEL_ROWS
                while t < n:  # the last four once more with some before them, summed aside
                    c_t, c_t_row = c + t * c_row + row * 4, c_row
                    if t + 4 > n:
                        t, c_t, c_t_row = n - 4, aside + row * 16, 64
                    x_t, scale_t = x_g + t * x_row, scale_g + t * x_row
                    times_four(scratch, here, x_t, x_row, scale_t, n_groups * 4, c_t, c_t_row, g == 0, next_panel)
                    t, next_panel = t + 4, 0
        store_rest(aside, 4, n, n_panels, c, c_row)

    return multiply


def make_panels(multiply: Any) -> Any:
    """panels: so many times 16 rows from ``row`` on, at most n_out, times n tokens."""

    @v.forceinline
    def panels(x, x_row, n, w, w_row, n_groups, row, n_panels, n_out, out, out_row, bias, scratch, ahead):
        start, stop = row, min(row + n_panels * at.PANEL_ROWS, n_out)
        while start < stop:
            first, n_here, c, c_row = start, (stop - start) // at.PANEL_ROWS, out + start * 4, out_row
            is_edge = n_here == 0
            if is_edge:
                # the last rows once more with some before them, summed aside: another thread may own those
                first, n_here, c, c_row = max(0, n_out - at.PANEL_ROWS), 1, scratch + at.EDGE, at.PANEL_ROWS * 4
            multiply(x, x_row, n, n_here, w + first * w_row, w_row, n_groups, c, c_row, scratch, ahead)
            if is_edge:
                for t in range(n):
                    for i in range(start - first, n_out - first):
                        v.store_f32(out + t * out_row + (first + i) * 4, v.load_f32(c + t * c_row + i * 4))
            start += n_here * at.PANEL_ROWS
        if bias != 0:  # rows are padded to 16 floats
            for t in range(n):
                for i in range(row * 4, stop * 4, 64):
                    c = out + t * out_row + i
                    v.store_f32x16(c, v.load_f32x16(c) + v.load_f32x16(bias + i))

    return panels
