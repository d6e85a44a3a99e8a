"""Products of the types of 256 weights, whose sub-scales are integers: all 256 are summed before any float is touched.

A super-block's activations share one scale, small enough that sum |x| < 2^19 (``quantize`` in elementwise.py). With
sub-scales folded in no weight is beyond 4096, so the sum over a super-block is below 2^31 and exact in int32, in any
order; sums on the way to it may wrap. The super-blocks of a row are added in float32, first to last:

    acc = fma(float(sum_i sc_i q_i x_i), d * x_scale, acc)
    acc = fma(float(sum_i m_i x_i), -dmin * x_scale, acc)                for types with minima

Minima come in two parts: ``whole`` times the sum of a group's activations, plus ``half`` times that of its first 16
(a type with one minimum for 32 weights has no second part).
"""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.kernels.panel import SIXTEEN_ROWS, RowVectors, store_pairs
from edgellm.kernels.cpu.kernels.superblock_rows import GROUPS, make_dot, make_unpack
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.lanes import columns_of_four, high_halves, low_halves, sums_at, sums_of_four

_low_twice = v.make_shuffle(v.i32x8, [0, 1, 2, 3, 0, 1, 2, 3])
_high_twice = v.make_shuffle(v.i32x8, [4, 5, 6, 7, 4, 5, 6, 7])


def few(weights: Any) -> int:
    """Up to so many tokens are multiplied without a panel; a panel takes the centre away once for all tokens."""
    return 3 if weights.centre else 6


def _make_minimum_sums(has_halves: bool) -> Any:
    """minimum_sums(minima, group_sums, half_sums): of eight rows, the sum of m_i x_i over a super-block."""

    @v.forceinline
    def minimum_lanes(minima, low, high, more_low, more_high):
        """Minima of two rows times the sums of their groups, four and four of them."""
        lanes = v.load_i32x8(minima) * low + v.load_i32x8(minima + 32) * high
        if has_halves:
            lanes = lanes + v.load_i32x8(minima + 64) * more_low + v.load_i32x8(minima + 96) * more_high
        return lanes

    @v.forceinline
    def minimum_sums(minima, group_sums, half_sums):
        x, y = v.load_i32x8(group_sums), v.load_i32x8(half_sums)
        a, b, c, d = _low_twice(x, x), _high_twice(x, x), _low_twice(y, y), _high_twice(y, y)
        return sums_of_four(
            minimum_lanes(minima, a, b, c, d), minimum_lanes(minima + 128, a, b, c, d),
            minimum_lanes(minima + 256, a, b, c, d), minimum_lanes(minima + 384, a, b, c, d),
        )  # fmt: skip

    return minimum_sums


def _make_eight_rows(weights: Any) -> Any:
    """eight_rows(p, stride, x, x_row, n, sums, per_group, scratch): lanes of eight rows times n = 1, 2 or 4 tokens.

    ``sums`` are those of the groups, those of their first 16 are ``per_group`` further on.
    """
    dot_one, dot_two, dot_four = (make_dot(weights, n) for n in (1, 2, 4))
    row_scales, centre = weights.row_scales, weights.centre

    @v.forceinline
    def store_centres(sums, per_group, out):
        """Minus the centre times the sums of 16, in the order of the sub-scales: of four groups the first, the last."""
        minus, first = v.splat_i32x8(types.int32(-centre)), v.load_i32x8(sums + per_group)
        last = v.load_i32x8(sums) - first
        v.store_i32x8(out, low_halves(first, last) * minus)
        v.store_i32x8(out + 32, high_halves(first, last) * minus)

    @v.forceinline
    def eight_rows(p, stride, x, x_row, n, sums, per_group, scratch):
        if centre:
            for t in range(n):
                store_centres(sums + t * x_row, per_group, scratch + at.CENTRES + t * 64)
        for r in range(8):
            block, scales = p + r * stride, scratch + at.SCALES + row_scales(r)
            lanes, centres = scratch + at.LANES + r * 32, scratch + at.CENTRES
            if n == 1:
                v.store_i32x8(lanes, dot_one(block, scales, x, x_row, centres)[0])
            elif n == 2:
                a, b = dot_two(block, scales, x, x_row, centres)
                v.store_i32x8(lanes, a)
                v.store_i32x8(lanes + 256, b)
            else:
                a, b, c, d = dot_four(block, scales, x, x_row, centres)
                v.store_i32x8(lanes, a)
                v.store_i32x8(lanes + 256, b)
                v.store_i32x8(lanes + 512, c)
                v.store_i32x8(lanes + 768, d)

    return eight_rows


def make_few_tokens(weights: Any) -> Any:
    """few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead): eight rows times a few tokens, to scratch + SUMS.

    As many bytes as it reads are fetched from ``ahead`` on.
    """
    decode, factors, eight_rows = weights.decode, weights.factors, _make_eight_rows(weights)
    block_nbytes, has_min = weights.block_nbytes, weights.n_minima > 0
    minimum_sums = _make_minimum_sums(weights.n_minima > GROUPS)

    @v.forceinline
    def few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead):
        per_group = n_groups * 4
        scale_at = x + n_groups * 64
        for t in range(n):
            v.store_f32x8(scratch + at.SUMS + t * 32, v.zero_f32x8())
        for _ in range(n_groups // GROUPS):
            for line in range(0, block_nbytes * 8, 64):
                v.fetch_weights(ahead + line)
            ahead += block_nbytes * 8
            decode(p, stride, scratch + at.SCALES, scratch + at.MINIMA)
            d, minus_dmin = factors(p, stride)
            t = 0
            while t < n:
                here = 4
                if n - t < 4:
                    here = min(n - t, 2)
                sums = scale_at + t * x_row + 2 * per_group
                eight_rows(p, stride, x + t * x_row, x_row, here, sums, per_group, scratch)
                for i in range(here):
                    scale, c = scale_at + (t + i) * x_row, scratch + at.SUMS + (t + i) * 32
                    x_scale, total = v.splat_f32x8(v.load_f32(scale)), sums_at(scratch + at.LANES + i * 256)
                    acc = v.fma_f32x8(v.to_f32x8(total), d * x_scale, v.load_f32x8(c))
                    if has_min:
                        total = minimum_sums(scratch + at.MINIMA, scale + 2 * per_group, scale + 3 * per_group)
                        acc = v.fma_f32x8(v.to_f32x8(total), minus_dmin * x_scale, acc)
                    v.store_f32x8(c, acc)
                t += here
            p += block_nbytes
            x += GROUPS * 64
            scale_at += GROUPS * 4

    return few_tokens


def make_store_pairs(weights: Any) -> Any:
    """store(p, stride, half, scratch, block, ahead): super-blocks of eight rows become int16 pairs of the panel."""
    unpack, row_scales = make_unpack(weights), weights.row_scales

    @v.forceinline
    def transpose(rows, step, out):
        store_pairs(
            v.load_i32x8(rows), v.load_i32x8(rows + step), v.load_i32x8(rows + 2 * step), v.load_i32x8(rows + 3 * step),
            v.load_i32x8(rows + 4 * step), v.load_i32x8(rows + 5 * step), v.load_i32x8(rows + 6 * step),
            v.load_i32x8(rows + 7 * step), out,
        )  # fmt: skip

    @v.forceinline
    def store(p, stride, half, scratch, block, ahead):
        panel = scratch + at.PANEL + half * 32 + block * GROUPS * at.GROUP_NBYTES
        for r in range(8):
            unpack(p + r * stride, scratch + at.SCALES + row_scales(r), scratch + at.UNPACKED + r * GROUPS * 64)
        for k in range(0, GROUPS * 64, 32):
            transpose(scratch + at.UNPACKED + k, GROUPS * 64, panel)
            panel += at.GROUP_NBYTES // 2

    return store


def make_pack(weights: Any, store: Any) -> Any:
    """pack(p, stride, n_groups, half, scratch, ahead): eight rows from p become half of the panel's lanes.

    Of every super-block the panel holds what ``store`` makes, its factors (d, then -dmin, of 16 rows), and its minima
    (int32 of 16 rows: ``whole`` of its groups, then ``half``).
    """
    decode, factors = weights.decode, weights.factors
    block_nbytes, has_min, has_halves = weights.block_nbytes, weights.n_minima > 0, weights.n_minima > GROUPS

    @v.forceinline
    def store_four_groups(minima, out):
        """Minima of two rows in a vector, of four groups, to eight rows of each group."""
        a, b = v.load_i32x8(minima), v.load_i32x8(minima + 128)
        columns = columns_of_four(a, b, v.load_i32x8(minima + 256), v.load_i32x8(minima + 384))
        v.store_i32x8(out, columns[0])
        v.store_i32x8(out + 64, columns[1])
        v.store_i32x8(out + 128, columns[2])
        v.store_i32x8(out + 192, columns[3])

    @v.forceinline
    def pack(p, stride, n_groups, half, scratch, ahead):
        factors_at, minima_at = scratch + at.PANEL_SCALES + half * 32, scratch + at.PANEL_MINIMA + half * 32
        for block in range(n_groups // GROUPS):
            decode(p, stride, scratch + at.SCALES, scratch + at.MINIMA)
            store(p, stride, half, scratch, block, ahead)
            ahead += block_nbytes * 8
            d, minus_dmin = factors(p, stride)
            v.store_f32x8(factors_at, d)
            if has_min:
                v.store_f32x8(factors_at + 64, minus_dmin)
                for k in range(4 if has_halves else 2):
                    store_four_groups(scratch + at.MINIMA + k * 32, minima_at + k * 256)
                minima_at += GROUPS * 128
            factors_at += 128
            p += block_nbytes

    return pack


def _make_panel_minimum_sums(has_halves: bool, of_rows: RowVectors) -> Any:
    """minimum_sums(minima, scale_at, per_group): sum of m_i x_i over a super-block, rows of a panel times one token."""
    zero, load, splat = of_rows.zero_integers, of_rows.load_integers, of_rows.splat_integers

    @v.forceinline
    def minimum_sums(minima, scale_at, per_group):
        total = zero()
        for g in range(GROUPS):
            of_group = v.load_i32(scale_at + 2 * per_group + g * 4)
            of_first16 = v.load_i32(scale_at + 3 * per_group + g * 4)
            total = total + load(minima + g * 64) * splat(of_group)
            if has_halves:
                total = total + load(minima + GROUPS * 64 + g * 64) * splat(of_first16)
        return total

    return minimum_sums


def make_finish(weights: Any, of_rows: RowVectors = SIXTEEN_ROWS, minimum_sums: Any = None) -> Any:
    """finish(acc, total, scratch, block, scale_at, per_group): the float32 sums of rows go on over a super-block.

    ``minimum_sums`` reads minima of a panel that are not as ``make_pack`` has them.
    """
    has_min = weights.n_minima > 0
    minimum_sums = minimum_sums or _make_panel_minimum_sums(weights.n_minima > GROUPS, of_rows)
    load_floats, splat_floats, fma, to_floats = of_rows.load, of_rows.splat, of_rows.fma, of_rows.to_floats

    @v.forceinline
    def finish(acc, total, scratch, block, scale_at, per_group):
        factors, x_scale = scratch + at.PANEL_SCALES + block * 128, splat_floats(v.load_f32(scale_at))
        acc = fma(to_floats(total), load_floats(factors) * x_scale, acc)
        if has_min:
            total = minimum_sums(scratch + at.PANEL_MINIMA + block * GROUPS * 128, scale_at, per_group)
            acc = fma(to_floats(total), load_floats(factors + 64) * x_scale, acc)
        return acc

    return finish


def make_embed_row(weights: Any) -> Any:
    """embed_row(p, width, factor, out, scratch): factor times the weights of one row, as float32."""
    unpack = make_unpack(weights)
    decode, factors = weights.decode, weights.factors
    block_nbytes, has_min, has_halves = weights.block_nbytes, weights.n_minima > 0, weights.n_minima > GROUPS
    widen = v.make_convert(v.i16x16, v.i32x16, "sext")

    @v.forceinline
    def sixteen(q, d, minus_dmin, minimum, multiplier):
        value = v.to_f32x16(widen(q)) * d
        if has_min:
            value = v.fma_f32x16(v.to_f32x16(v.splat_i32x16(types.int32(minimum))), minus_dmin, value)
        return value * multiplier

    @v.forceinline
    def embed_row(p, width, factor, out, scratch):
        multiplier = v.splat_f32x16(factor)
        for _ in range(width // 256):
            decode(p, 0, scratch + at.SCALES, scratch + at.MINIMA)  # eight times the same row
            unpack(p, scratch + at.SCALES, scratch + at.UNPACKED)
            d8, minus_dmin8 = factors(p, 0)
            d = v.splat_f32x16(v.first_lane(d8))
            minus_dmin = v.splat_f32x16(v.first_lane(minus_dmin8))
            for g in range(GROUPS):
                even = v.load_i16x16(scratch + at.UNPACKED + g * 64)
                odd = v.load_i16x16(scratch + at.UNPACKED + g * 64 + 32)
                low, high = v.interleave_low_i16x16(even, odd), v.interleave_high_i16x16(even, odd)
                whole = half = types.int32(0)
                if has_min:
                    minimum = scratch + at.MINIMA + g // 4 * 32 + g % 4 * 4
                    whole = v.load_i32(minimum)
                    if has_halves:
                        half = v.load_i32(minimum + 64)
                v.store_f32x16(out, sixteen(low, d, minus_dmin, whole + half, multiplier))
                v.store_f32x16(out + 64, sixteen(high, d, minus_dmin, whole, multiplier))
                out += 128
            p += block_nbytes

    return embed_row
