"""Products of bytes on Arm: four rows at a time, for any number of tokens.

A strip is 16 weights of four rows, signed bytes in the order that a form multiplies (lib/neon.py): ``sdot`` takes four
bytes of each of four rows, ``smmla`` eight of two. Eight rows become strips in the first cache, and those serve all
tokens, four at a time. Activations are two signed bytes, x = 256 hi + lo, which ``quantize`` has split in place:

    sum q x = 256 sum q hi + sum q lo

The integers are those of superblock_matmul.py and block_matmul.py, and so are the float32 steps: so are the bits.

    panel    quad of four rows | group of 32: two strips | four rows' sub-scale, or those of 16 and 16 weights
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from edgellm.kernels.cpu.kernels.panel import groups_of_part
from edgellm.kernels.cpu.kernels.superblock_rows import GROUPS
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.lanes import columns_of_four, transpose_i32x8

GROUP_NBYTES = 160
QUAD_NBYTES = at.PANEL_GROUPS * GROUP_NBYTES

_u8x32, _u8x64 = v.u8x32, v.Vec(types.uint8, 64)
_load_strip, _store_strip = v.make_load(_u8x64), v.make_store(_u8x64)
_first_halves = v.make_shuffle(_u8x32, [*range(16), *range(32, 48)])
_last_halves = v.make_shuffle(_u8x32, [*range(16, 32), *range(48, 64)])
_four_rows = v.make_shuffle(_u8x32, list(range(64)))

_strip = v.declared("strip", _u8x64, _u8x64)
"""strip(bytes): 16 bytes of each of four rows, row after row, as a strip."""
_dot_strip = v.declared("dot_strip", v.i32x8, v.i32x8, _u8x64, _u8x32)
"""dot_strip(acc, strip, x): acc plus the products with 16 activations, of four rows, high and low bytes apart."""
_sum_strip = v.declared("sum_strip", v.i32x4, v.i32x8)
"""Of four rows, the sum that dot_strip has apart."""


# ---- activations -----------------------------------------------------------------------------------------------------

splits_activations = v.declared("splits_activations", types.int64)
"""1 in the forms that multiply bytes on Arm, else a constant 0."""
_strip_of_activations = v.declared("strip_of_activations", _u8x32, _u8x32)
"""16 high bytes and 16 low ones in the order that a form multiplies."""

_byte, _half_byte, _eight_bits = (v.make_const(v.i16x16, n) for n in (255, 128, 8))
_as_bytes = v.make_convert(v.i16x16, _u8x32, "bitcast")
_store_bytes = v.make_store(_u8x32)


@v.forceinline
def split_activations(row, first, stop):
    """The int16 groups [first, stop) of a row, first their even ones, become bytes in their own order."""
    for x in range(row + first * 64, row + stop * 64, 64):
        even, odd = v.load_i16x16(x), v.load_i16x16(x + 32)
        high_even, high_odd = (even + _half_byte()) >> _eight_bits(), (odd + _half_byte()) >> _eight_bits()
        high = _as_bytes((high_even & _byte()) | (high_odd << _eight_bits()))
        low = _as_bytes((even & _byte()) | (odd << _eight_bits()))
        _store_bytes(x, _strip_of_activations(_first_halves(high, low)))
        _store_bytes(x + 32, _strip_of_activations(_last_halves(high, low)))


# ---- weights: store(p, stride, half, scratch, block, ahead) makes a block of eight rows to strips -------------------


@v.forceinline
def _store_strips(a, b, c, d, out):
    """A group of 32 of four rows."""
    _store_strip(out, _strip(_four_rows(_first_halves(a, b), _first_halves(c, d))))
    _store_strip(out + 64, _strip(_four_rows(_last_halves(a, b), _last_halves(c, d))))


def _make_fetch(block_nbytes: int) -> Any:
    @v.forceinline
    def fetch(ahead):
        for line in range(0, block_nbytes * 8, 64):
            v.fetch_weights(ahead + line)

    return fetch


def make_store_block(weights: Any) -> Any:
    """``store`` for a type of 32 weights."""
    read, offset, fetch = weights.read, weights.offset, _make_fetch(weights.block_nbytes)
    less = v.make_const(_u8x32, offset)

    @v.forceinline
    def row(p):
        value = read(p)
        if offset != 0:
            value = value - less()
        return value

    @v.forceinline
    def store(p, stride, half, scratch, block, ahead):
        fetch(ahead)
        out = scratch + at.PANEL + half * 2 * QUAD_NBYTES + block * GROUP_NBYTES
        for quad in range(2):
            _store_strips(row(p), row(p + stride), row(p + 2 * stride), row(p + 3 * stride), out + quad * QUAD_NBYTES)
            p += 4 * stride

    return store


_low_four, _high_four = v.make_shuffle(v.i32x8, [0, 1, 2, 3]), v.make_shuffle(v.i32x8, [4, 5, 6, 7])


@v.forceinline
def _store_scale(of_rows, out):
    v.store_i32x4(out, _low_four(of_rows, of_rows))
    v.store_i32x4(out + QUAD_NBYTES, _high_four(of_rows, of_rows))


@v.forceinline
def _store_eight_scales(scales, out):
    """The sub-scales of eight rows, one for a group, as ``rows_paired`` has them."""
    for k in range(2):
        p, to = scales + k * 32, out + k * 4 * GROUP_NBYTES
        a, b, c, d = v.load_i32x8(p), v.load_i32x8(p + 64), v.load_i32x8(p + 128), v.load_i32x8(p + 192)
        columns = columns_of_four(a, b, c, d)
        _store_scale(columns[0], to)
        _store_scale(columns[1], to + GROUP_NBYTES)
        _store_scale(columns[2], to + 2 * GROUP_NBYTES)
        _store_scale(columns[3], to + 3 * GROUP_NBYTES)


@v.forceinline
def _store_sixteen_scales(scales, out):
    """The same, two for a group, as ``rows_apart`` has them."""
    for k in range(2):
        p, to = scales + k * 32, out + k * 4 * GROUP_NBYTES
        columns = transpose_i32x8(
            v.load_i32x8(p), v.load_i32x8(p + 64), v.load_i32x8(p + 128), v.load_i32x8(p + 192),
            v.load_i32x8(p + 256), v.load_i32x8(p + 320), v.load_i32x8(p + 384), v.load_i32x8(p + 448),
        )  # fmt: skip
        _store_scale(columns[0], to)
        _store_scale(columns[1], to + GROUP_NBYTES)
        _store_scale(columns[2], to + 2 * GROUP_NBYTES)
        _store_scale(columns[3], to + 3 * GROUP_NBYTES)
        _store_scale(columns[4], to + 16)
        _store_scale(columns[5], to + GROUP_NBYTES + 16)
        _store_scale(columns[6], to + 2 * GROUP_NBYTES + 16)
        _store_scale(columns[7], to + 3 * GROUP_NBYTES + 16)


def make_store_superblock(weights: Any) -> Any:
    """``store`` for a type of 256 weights, whose sub-scales are decoded at scratch + SCALES."""
    fetch, less = _make_fetch(weights.block_nbytes), v.make_const(_u8x32, weights.centre)
    store_scales = _store_eight_scales if weights.n_scales == GROUPS else _store_sixteen_scales
    has_centre = weights.centre != 0

    def make_group(g: int) -> Any:
        read, place = weights.make_bytes(g), g * GROUP_NBYTES

        @v.forceinline
        def group(p, stride, out):
            a, b, c, d = read(p), read(p + stride), read(p + 2 * stride), read(p + 3 * stride)
            if has_centre:
                a, b, c, d = a - less(), b - less(), c - less(), d - less()
            _store_strips(a, b, c, d, out + place)

        return group

    group0, group1, group2, group3, group4, group5, group6, group7 = (make_group(g) for g in range(GROUPS))

    @v.forceinline
    def store(p, stride, half, scratch, block, ahead):
        fetch(ahead)
        out = scratch + at.PANEL + half * 2 * QUAD_NBYTES + block * GROUPS * GROUP_NBYTES
        store_scales(scratch + at.SCALES, out + 128)
        for _ in range(2):
            group0(p, stride, out)
            group1(p, stride, out)
            group2(p, stride, out)
            group3(p, stride, out)
            group4(p, stride, out)
            group5(p, stride, out)
            group6(p, stride, out)
            group7(p, stride, out)
            p += 4 * stride
            out += QUAD_NBYTES

    return store


# ---- the product -----------------------------------------------------------------------------------------------------


@v.forceinline
def _dot_16(a, x):
    return _sum_strip(_dot_strip(v.zero_i32x8(), a, v.load_u8x32(x)))


@v.forceinline
def _dot_32(a, b, x):
    return _sum_strip(_dot_strip(_dot_strip(v.zero_i32x8(), a, v.load_u8x32(x)), b, v.load_u8x32(x + 32)))


@v.forceinline
def _add_block(total, a, b, x, scales):
    return _dot_32(a, b, x)


@v.forceinline
def _add_group(total, a, b, x, scales):
    return total + _dot_32(a, b, x) * v.load_i32x4(scales)


@v.forceinline
def _add_two_groups(total, a, b, x, scales):
    return total + _dot_16(a, x) * v.load_i32x4(scales) + _dot_16(b, x + 32) * v.load_i32x4(scales + 16)


_ADD = {0: _add_block, 8: _add_group, 16: _add_two_groups}
"""By the number of sub-scales in a block."""


def _make_times(run: int, n_scales: int, finish: Any) -> tuple[Any, Any]:
    """times_four and times_one: ``quads`` of four rows times tokens; c goes on from before, if not ``first``."""
    add = _ADD[n_scales]

    @v.forceinline
    def times_four(scratch, quads, n_groups, x, x_row, scale_at, per_group, c, c_row, first):
        for quad in range(quads):
            f0 = f1 = f2 = f3 = v.zero_f32x4()
            if not first:
                f0, f1 = v.load_f32x4(c), v.load_f32x4(c + c_row)
                f2, f3 = v.load_f32x4(c + 2 * c_row), v.load_f32x4(c + 3 * c_row)
            w, x_at, scale = scratch + at.PANEL + quad * QUAD_NBYTES, x, scale_at
            for block in range(n_groups // run):
                i0 = i1 = i2 = i3 = v.zero_i32x4()
                for _ in range(run):
                    a, b = _load_strip(w), _load_strip(w + 64)
                    i0 = add(i0, a, b, x_at, w + 128)
                    i1 = add(i1, a, b, x_at + x_row, w + 128)
                    i2 = add(i2, a, b, x_at + 2 * x_row, w + 128)
                    i3 = add(i3, a, b, x_at + 3 * x_row, w + 128)
                    w += GROUP_NBYTES
                    x_at += 64
                f0 = finish(f0, i0, scratch + quad * 16, block, scale, per_group)
                f1 = finish(f1, i1, scratch + quad * 16, block, scale + x_row, per_group)
                f2 = finish(f2, i2, scratch + quad * 16, block, scale + 2 * x_row, per_group)
                f3 = finish(f3, i3, scratch + quad * 16, block, scale + 3 * x_row, per_group)
                scale += run * 4
            v.store_f32x4(c, f0)
            v.store_f32x4(c + c_row, f1)
            v.store_f32x4(c + 2 * c_row, f2)
            v.store_f32x4(c + 3 * c_row, f3)
            c += 16

    @v.forceinline
    def times_one(scratch, quads, n_groups, x, scale_at, per_group, c, first):
        for quad in range(quads):
            acc = v.zero_f32x4()
            if not first:
                acc = v.load_f32x4(c)
            w, x_at, scale = scratch + at.PANEL + quad * QUAD_NBYTES, x, scale_at
            for block in range(n_groups // run):
                total = v.zero_i32x4()
                for _ in range(run):
                    total = add(total, _load_strip(w), _load_strip(w + 64), x_at, w + 128)
                    w += GROUP_NBYTES
                    x_at += 64
                acc = finish(acc, total, scratch + quad * 16, block, scale, per_group)
                scale += run * 4
            v.store_f32x4(c, acc)
            c += 16

    return times_four, times_one


class Strips(NamedTuple):
    """A few tokens, as in superblock_matmul.py, and what panel.py's ``panels`` are made of."""

    few_tokens: Any
    multiply: Any


def make_strips(run: int, weights: Any, n_scales: int, pack: Any, finish: Any) -> Strips:
    """``pack`` and ``finish`` are the family's, with strips and for four rows."""
    times_four, times_one = _make_times(run, n_scales, finish)
    block_nbytes = weights.block_nbytes

    @v.forceinline
    def times(x, x_row, n, w, w_row, n_groups, c, c_row, scratch, halves, ahead):
        """8 or 16 rows from w times n tokens; as many bytes as it reads are fetched from ``ahead`` on."""
        width = groups_of_part(n_groups, at.PANEL_GROUPS, run)
        for g in range(0, n_groups, width):
            here = min(width, n_groups - g)
            for half in range(halves):
                pack(w + half * 8 * w_row + g // run * block_nbytes, w_row, here, half, scratch, ahead)
                ahead += here // run * block_nbytes * 8
            x_t, c_t, t = x + g * 64, c, 0
            scale_at = x + n_groups * 64 + g * 4
            while t + 4 <= n:
                times_four(scratch, 2 * halves, here, x_t, x_row, scale_at, n_groups * 4, c_t, c_row, g == 0)
                x_t, scale_at, c_t, t = x_t + 4 * x_row, scale_at + 4 * x_row, c_t + 4 * c_row, t + 4
            while t < n:
                times_one(scratch, 2 * halves, here, x_t, scale_at, n_groups * 4, c_t, g == 0)
                x_t, scale_at, c_t, t = x_t + x_row, scale_at + x_row, c_t + c_row, t + 1

    @v.forceinline
    def few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead):
        times(x, x_row, n, p, stride, n_groups, scratch + at.SUMS, 32, scratch, 1, ahead)

    @v.forceinline
    def multiply(x, x_row, n, n_panels, w, w_row, n_groups, c, c_row, scratch, ahead):
        for row in range(0, n_panels * at.PANEL_ROWS, at.PANEL_ROWS):
            first = row * w_row
            times(x, x_row, n, w + first, w_row, n_groups, c + row * 4, c_row, scratch, 2, ahead + first)

    return Strips(few_tokens, multiply)
