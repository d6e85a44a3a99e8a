"""Products of the types of 32 weights, each block with a float16 scale of its own.

The sum over a block is exact in int32, so its order is free; the blocks of a row are added in float32, first to last:

    acc = fma(float(sum_i w_i x_i), w_scale * x_scale, acc)
    acc = fma(w_min, x_scale * sum_i x_i, acc)                 for types with a minimum
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from edgellm.kernels.cpu.kernels.panel import SIXTEEN_ROWS, RowVectors, store_pairs
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import GROUP_NBYTES, PANEL, PANEL_MINIMA, PANEL_SCALES, SUMS

GROUPS = 1
"""Groups of 32 weights in a block."""


@v.forceinline
def sum_of_group(scale_at, per_group):
    """The sum of a group's activations, as float32: what minima are multiplied by."""
    return v.load_f32(scale_at) * np.float32(v.load_i32(scale_at + 2 * per_group))


def few(weights: Any) -> int:
    """Up to so many tokens are multiplied without a panel: eight rows stay in the first cache from token to token."""
    return 6


def make_few_tokens(weights: Any) -> Any:
    """few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead): eight rows times a few tokens, to scratch + SUMS.

    As many bytes as it reads are fetched from ``ahead`` on.
    """
    block_nbytes, has_min, offset = weights.block_nbytes, weights.has_min, weights.offset
    sums, factors = weights.sums, weights.factors

    @v.forceinline
    def eight_rows(p, stride, n_groups, x, ahead):
        scale_at, per_group = x + n_groups * 64, n_groups * 4
        acc = v.zero_f32x8()
        for _ in range(n_groups):
            for line in range(0, block_nbytes * 8, 64):
                v.fetch_weights(ahead + line)
            ahead += block_nbytes * 8
            d, minimum = factors(p, stride)
            total = sums(p, stride, x)
            if offset != 0:
                total = total - v.splat_i32x8(v.load_i32(scale_at + 2 * per_group) * types.int32(offset))
            acc = v.fma_f32x8(v.to_f32x8(total), d * v.splat_f32x8(v.load_f32(scale_at)), acc)
            if has_min:
                acc = v.fma_f32x8(minimum, v.splat_f32x8(sum_of_group(scale_at, per_group)), acc)
            x += 64
            scale_at += 4
            p += block_nbytes
        return acc

    @v.forceinline
    def few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead):
        for t in range(n):
            v.store_f32x8(scratch + SUMS + t * 32, eight_rows(p, stride, n_groups, x + t * x_row, ahead))

    return few_tokens


def make_store_pairs(weights: Any) -> Any:
    """store(p, stride, half, scratch, block, ahead): blocks of eight rows become int16 pairs of the panel."""
    unpack = weights.unpack

    @v.forceinline
    def pairs(block):
        return v.i16x32_as_i32x16(unpack(block))

    @v.forceinline
    def store(p, stride, half, scratch, block, ahead):
        panel, low, high = scratch + PANEL + half * 32 + block * GROUP_NBYTES, v.low_i32x16, v.high_i32x16
        p4 = p + 4 * stride
        a, b, c, d = pairs(p), pairs(p + stride), pairs(p + 2 * stride), pairs(p + 3 * stride)
        e, f, g, h = pairs(p4), pairs(p4 + stride), pairs(p4 + 2 * stride), pairs(p4 + 3 * stride)
        store_pairs(low(a, a), low(b, b), low(c, c), low(d, d), low(e, e), low(f, f), low(g, g), low(h, h), panel)
        store_pairs(
            high(a, a), high(b, b), high(c, c), high(d, d), high(e, e), high(f, f), high(g, g), high(h, h), panel + 512
        )

    return store


def make_pack(weights: Any, store: Any) -> Any:
    """pack(p, stride, n_groups, half, scratch, ahead): eight rows from p become half of the panel's lanes."""
    block_nbytes, has_min, factors = weights.block_nbytes, weights.has_min, weights.factors

    @v.forceinline
    def pack(p, stride, n_groups, half, scratch, ahead):
        scales = scratch + PANEL_SCALES + half * 32
        for block in range(n_groups):
            scale, minimum = factors(p, stride)
            store(p, stride, half, scratch, block, ahead)
            ahead += block_nbytes * 8
            v.store_f32x8(scales, scale)
            if has_min:
                v.store_f32x8(scales + PANEL_MINIMA - PANEL_SCALES, minimum)
            scales += 64
            p += block_nbytes

    return pack


def make_finish(weights: Any, of_rows: RowVectors = SIXTEEN_ROWS) -> Any:
    """finish(acc, total, scratch, block, at, per_group): go on with the float32 sums of rows over a block."""
    has_min = weights.has_min
    load, splat, fma, to_floats = of_rows.load, of_rows.splat, of_rows.fma, of_rows.to_floats

    @v.forceinline
    def finish(acc, total, scratch, block, at, per_group):
        scale = load(scratch + PANEL_SCALES + block * 64)
        acc = fma(to_floats(total), scale * splat(v.load_f32(at)), acc)
        if has_min:
            minimum = load(scratch + PANEL_MINIMA + block * 64)
            acc = fma(minimum, splat(sum_of_group(at, per_group)), acc)
        return acc

    return finish


def make_embed_row(weights: Any) -> Any:
    """embed_row(p, width, factor, out, scratch): factor times the weights of one row, as float32."""
    block_nbytes, has_min = weights.block_nbytes, weights.has_min
    unpack, factors = weights.unpack, weights.factors
    widen = v.make_convert(v.i16x16, v.i32x16, "sext")

    @v.forceinline
    def embed_row(p, width, factor, out, scratch):
        multiplier = v.splat_f32x16(factor)
        for _ in range(width // 32):
            d, m = factors(p, 0)  # eight times the same row
            q = unpack(p)
            even, odd = v.low_i16x32(q, q), v.high_i16x32(q, q)
            scale = v.splat_f32x16(v.first_lane(d))
            low = v.to_f32x16(widen(v.interleave_low_i16x16(even, odd))) * scale
            high = v.to_f32x16(widen(v.interleave_high_i16x16(even, odd))) * scale
            if has_min:
                minimum = v.splat_f32x16(v.first_lane(m))
                low, high = low + minimum, high + minimum
            v.store_f32x16(out, low * multiplier)
            v.store_f32x16(out + 64, high * multiplier)
            out += 128
            p += block_nbytes

    return embed_row
