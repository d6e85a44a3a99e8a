"""Encoders of Q3_K and Q6_K: groups of 16 with a scale, levels on both sides of zero. Layouts: formats/k_quants.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.encoders import super_blocks as sb
from edgellm.kernels.cpu.encoders.blocks_of_32 import store_squares, store_weights
from edgellm.kernels.cpu.encoders.searches import fit_signed, fit_signed_refined, largest_value
from edgellm.kernels.cpu.lib import simd as v

_GROUP = 16
_zero, _one, _none, _nothing = lanes.constant(0.0), lanes.constant(1.0), lanes.integer(0), lanes.constant(1e-15)
_by_24, _int_127 = lanes.integer(24), lanes.integer(127)


def _make_search(name: str, weighted: bool) -> Any:
    half = {"Q3_K": 4, "Q6_K": 32}[name]
    refined, by_row = name == "Q3_K" and not weighted, name == "Q3_K"

    @v.forceinline
    def search(scratch, block, part):
        x, w, levels = scratch + at.PANEL_X, scratch + at.PANEL_W, scratch + at.PANEL_LEVELS
        if refined:
            scale = fit_signed_refined(x, levels, _GROUP, half)
        else:
            if not weighted:
                store_squares(w, x, _GROUP)
            elif by_row:
                squares = v.load_f32(scratch + at.SQUARES + block * 4) * np.float32(2) / np.float32(256)
                store_weights(w, x, _GROUP, v.splat_f32x8(squares))
                sb.store_result(scratch, sb.WEIGHT_SUMS, block, part, sb.sum_of_weights(w, _GROUP))
            scale = fit_signed(x, w, levels, _GROUP, half)
        sb.store_result(scratch, sb.SCALES, block, part, scale)
        sb.store_search_levels(scratch, block, part, _GROUP)

    return search


def _make_scale(name: str, weighted: bool) -> Any:
    """Quantize the scales: Q3_K to 0..63 (32 is zero), Q6_K to int8."""

    @v.forceinline
    def scale_q3_k(scratch, values, out):
        value, _ = largest_value(values, _GROUP)
        factor = v.splat_f32x8(np.float32(-32)) / value
        some = lanes.differs(value, _zero())
        for i in range(_GROUP):
            level = (lanes.nearest(factor * v.load_f32x8(values + i * 32)) << _by_24()) >> _by_24()
            level = lanes.clamp(level, v.splat_i32x8(np.int32(-32)), v.splat_i32x8(np.int32(31)))
            level = level + v.splat_i32x8(np.int32(32))
            v.store_i32x8(out + i * 32, lanes.where(some, level, _none()))
        return lanes.where(some, _one() / factor, _zero())

    @v.forceinline
    def scale_q3_k_weighted(scratch, values, out):
        w = scratch + at.PANEL_W
        sb.load_results(w, scratch, sb.WEIGHT_SUMS, _GROUP)
        return fit_signed(values, w, out, _GROUP, 32)

    @v.forceinline
    def scale_q6_k(scratch, values, out):
        value, magnitude = largest_value(values, _GROUP)
        empty = lanes.less(magnitude, _nothing())
        factor = v.splat_f32x8(np.float32(-128)) / value
        v.store_i32x8(scratch + sb.EMPTY, empty)
        for i in range(_GROUP):
            level = lanes.nearest(factor * v.load_f32x8(values + i * 32))
            level = lanes.clamp(level, v.splat_i32x8(np.int32(-(1 << 31))), _int_127())
            v.store_i32x8(out + i * 32, lanes.where(empty, _none(), (level << _by_24()) >> _by_24()))
        return lanes.where(empty, _zero(), _one() / factor)

    quantize = scale_q6_k if name == "Q6_K" else scale_q3_k_weighted if weighted else scale_q3_k

    @v.forceinline
    def scale(scratch):
        values = scratch + at.PANEL_X
        sb.load_results(values, scratch, sb.SCALES, _GROUP)
        sb.store_scale(scratch, sb.D_BITS, sb.D, quantize(scratch, values, scratch + sb.LEVEL_SCALES))

    return scale


@v.forceinline
def _round(scratch, block, x, half, i, scale_level):
    """Round group i of a super-block; one whose scale is 0 keeps the levels of its search."""
    d = v.load_f32(scratch + sb.D + block * 4) * np.float32(scale_level)
    if d != np.float32(0):
        levels = scratch + sb.LEVELS + block * 256 + i * _GROUP
        sb.round_group(levels, x + i * _GROUP * 4, _GROUP, d, np.float32(0), -half, half - 1)


@v.forceinline
def _level(scratch, i, block):
    return np.int64(v.load_i32(scratch + sb.LEVEL_SCALES + i * 32 + block * 4))


_third_bit = v.make_const(v.u8x32, 2)
_zero_bytes = v.make_const(v.u8x32, 0)


@v.forceinline
def _finish_q3_k(scratch, block, x, out):
    levels = scratch + sb.LEVELS + block * 256
    for i in range(8):
        low, high = _level(scratch, i, block), _level(scratch, i + 8, block)
        lanes.store_u8(out + 96 + i, np.uint8((low & 15) | (high & 15) << 4))
        _round(scratch, block, x, 4, i, low - 32)
        _round(scratch, block, x, 4, i + 8, high - 32)
    for i in range(4):
        a, b = _level(scratch, i, block) >> 4, _level(scratch, i + 4, block) >> 4
        c, e = _level(scratch, i + 8, block) >> 4, _level(scratch, i + 12, block) >> 4
        lanes.store_u8(out + 104 + i, np.uint8(a | b << 2 | c << 4 | e << 6))
    sb.pack_bit(levels, out, _third_bit())
    sb.pack_crumbs(levels, out + 32)
    sb.store_half(out + 108, scratch, sb.D_BITS, block)


@v.forceinline
def _finish_q6_k(scratch, block, x, out):
    levels = scratch + sb.LEVELS + block * 256
    for i in range(_GROUP):
        level = _level(scratch, i, block)
        lanes.store_u8(out + 192 + i, np.uint8(level & 255))
        _round(scratch, block, x, 32, i, level)
    if v.load_i32(scratch + sb.EMPTY + block * 4) != 0:  # ggml clears the whole block
        for i in range(0, 256, 32):
            lanes.store_u8x32(levels + i, _zero_bytes())
    sb.pack_six_bits(levels, out)
    sb.store_half(out + 208, scratch, sb.D_BITS, block)


def make_signed_k_encoder(case: tuple[str, bool]) -> Any:
    """The kernel of (type, with importance)."""
    name, weighted = case
    nbytes, finish = {"Q3_K": (110, _finish_q3_k), "Q6_K": (210, _finish_q6_k)}[name]
    search, scale = _make_search(name, weighted), _make_scale(name, weighted)
    return sb.make_super_block_encoder(_GROUP, nbytes, weighted, search, scale, finish)
