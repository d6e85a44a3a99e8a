"""Encoders of Q2_K, Q4_K and Q5_K: groups with a scale and a minimum. Layouts: formats/k_quants.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.encoders import super_blocks as sb
from edgellm.kernels.cpu.encoders.blocks_of_32 import store_weights
from edgellm.kernels.cpu.encoders.searches import fit_affine, fit_positive
from edgellm.kernels.cpu.lib import simd as v

# weights of a group, largest level, largest scale level, (first, step, steps) of the search without importance
_TYPES = {
    "Q2_K": (16, 3, 15, (-0.5, 0.1, 15)),
    "Q4_K": (32, 15, 63, (-1.0, 0.1, 20)),
    "Q5_K": (32, 31, 63, (-0.5, 0.1, 15)),
}
_NBYTES = {"Q2_K": 84, "Q4_K": 144, "Q5_K": 176}
_zero, _byte = lanes.constant(0.0), lanes.integer(255)


def _make_search(name: str, weighted: bool) -> Any:
    """Fit a scale and a minimum to each of eight groups."""
    group, nmax, _, (first, step, n_steps) = _TYPES[name]
    two_bits = name == "Q2_K"
    mean = np.float32(1 / 256 if two_bits else 2 / 256)  # powers of two: exact
    if weighted:
        first, step, n_steps = -0.9, 0.05, 36

    @v.forceinline
    def weigh(scratch, x, w, block):
        if weighted:
            squares = v.splat_f32x8(v.load_f32(scratch + at.SQUARES + block * 4) * mean)
            store_weights(w, x, group, squares)
        elif two_bits:
            for i in range(group):
                v.store_f32x8(w + i * 32, lanes.absolute(v.load_f32x8(x + i * 32)))
        else:
            total = v.zero_f32x8()
            for i in range(group):
                value = v.load_f32x8(x + i * 32)
                total = total + value * value
            typical = lanes.square_root(total / v.splat_f32x8(np.float32(32)))
            for i in range(group):
                v.store_f32x8(w + i * 32, typical + lanes.absolute(v.load_f32x8(x + i * 32)))

    @v.forceinline
    def search(scratch, block, part):
        x, w, levels = scratch + at.PANEL_X, scratch + at.PANEL_W, scratch + at.PANEL_LEVELS
        weigh(scratch, x, w, block)
        by_magnitude = two_bits and not weighted
        scale, minimum = fit_affine(
            x, w, levels, group, nmax, np.float32(first), np.float32(step), n_steps, by_magnitude, weighted
        )
        sb.store_result(scratch, sb.SCALES, block, part, scale)
        sb.store_result(scratch, sb.MINIMA, block, part, _zero() - minimum)
        if weighted:
            sb.store_result(scratch, sb.WEIGHT_SUMS, block, part, sb.sum_of_weights(w, group))
        sb.store_search_levels(scratch, block, part, group)

    return search


def _make_scale(name: str, weighted: bool) -> Any:
    """Quantize the scales and the minima of the groups."""
    group, _, cap, _ = _TYPES[name]
    n_groups = 256 // group
    limited = name != "Q2_K"

    @v.forceinline
    def scale_one(scratch, source, out, bits_at, value_at):
        values, w = scratch + at.PANEL_X, scratch + at.PANEL_W
        sb.load_results(values, scratch, source, n_groups)
        if weighted:
            sb.load_results(w, scratch, sb.WEIGHT_SUMS, n_groups)
            d = fit_positive(values, w, out, n_groups, cap)
        else:
            high = v.zero_f32x8()
            for i in range(n_groups):
                value = v.load_f32x8(values + i * 32)
                high = lanes.where(lanes.greater(value, high), value, high)
            d = high / v.splat_f32x8(np.float32(cap))
            factor = lanes.where(lanes.greater(high, _zero()), v.splat_f32x8(np.float32(cap)) / high, _zero())
            for i in range(n_groups):
                level = lanes.nearest(factor * v.load_f32x8(values + i * 32)) & _byte()
                if limited:
                    level = lanes.clamp(level, v.zero_i32x8(), v.splat_i32x8(np.int32(cap)))
                v.store_i32x8(out + i * 32, level)
        sb.store_scale(scratch, bits_at, value_at, d)

    @v.forceinline
    def scale(scratch):
        scale_one(scratch, sb.SCALES, scratch + sb.LEVEL_SCALES, sb.D_BITS, sb.D)
        scale_one(scratch, sb.MINIMA, scratch + sb.LEVEL_MINIMA, sb.DMIN_BITS, sb.DMIN)

    return scale


@v.forceinline
def _round(scratch, block, x, group, nmax, i, scale_level, minimum_level):
    """Round group i of a super-block with its scale; one whose scale is 0 keeps the levels of its search."""
    d = v.load_f32(scratch + sb.D + block * 4) * np.float32(scale_level)
    minimum = v.load_f32(scratch + sb.DMIN + block * 4) * np.float32(minimum_level)
    if d != np.float32(0):
        levels = scratch + sb.LEVELS + block * 256 + i * group
        sb.round_group(levels, x + i * group * 4, group, d, minimum, 0, nmax)


@v.forceinline
def _level(scratch, kind, i, block):
    return np.int64(v.load_i32(scratch + kind + i * 32 + block * 4))


@v.forceinline
def _finish_q2_k(scratch, block, x, out):
    for i in range(16):
        both = (_level(scratch, sb.LEVEL_SCALES, i, block) | (_level(scratch, sb.LEVEL_MINIMA, i, block) << 4)) & 255
        lanes.store_u8(out + i, np.uint8(both))
        _round(scratch, block, x, 16, 3, i, both & 15, both >> 4)
    sb.pack_crumbs(scratch + sb.LEVELS + block * 256, out + 16)
    sb.store_half(out + 80, scratch, sb.D_BITS, block)
    sb.store_half(out + 82, scratch, sb.DMIN_BITS, block)


@v.forceinline
def _finish_scales(scratch, block, x, out, nmax):
    """The head of Q4_K and Q5_K: d, dmin, 12 bytes of six-bit scales and minima; rounds the groups."""
    sb.store_half(out, scratch, sb.D_BITS, block)
    sb.store_half(out + 2, scratch, sb.DMIN_BITS, block)
    packed = out + 4
    for i in range(4):
        s, m = _level(scratch, sb.LEVEL_SCALES, i, block), _level(scratch, sb.LEVEL_MINIMA, i, block)
        s4, m4 = _level(scratch, sb.LEVEL_SCALES, i + 4, block), _level(scratch, sb.LEVEL_MINIMA, i + 4, block)
        lanes.store_u8(packed + i, np.uint8((s | (s4 >> 4 << 6)) & 255))
        lanes.store_u8(packed + i + 4, np.uint8((m | (m4 >> 4 << 6)) & 255))
        lanes.store_u8(packed + i + 8, np.uint8((s4 & 15) | (m4 & 15) << 4))
        _round(scratch, block, x, 32, nmax, i, s & 63, m & 63)
        _round(scratch, block, x, 32, nmax, i + 4, s4 & 63, m4 & 63)


@v.forceinline
def _finish_q4_k(scratch, block, x, out):
    _finish_scales(scratch, block, x, out, 15)
    sb.pack_nibbles(scratch + sb.LEVELS + block * 256, out + 16)


_fifth_bit = v.make_const(v.u8x32, 4)


@v.forceinline
def _finish_q5_k(scratch, block, x, out):
    _finish_scales(scratch, block, x, out, 31)
    levels = scratch + sb.LEVELS + block * 256
    sb.pack_bit(levels, out + 16, _fifth_bit())
    sb.pack_nibbles(levels, out + 48)


_FINISH = {"Q2_K": _finish_q2_k, "Q4_K": _finish_q4_k, "Q5_K": _finish_q5_k}


def make_affine_k_encoder(case: tuple[str, bool]) -> Any:
    """The kernel of (type, with importance)."""
    name, weighted = case
    search, scale = _make_search(name, weighted), _make_scale(name, weighted)
    return sb.make_super_block_encoder(_TYPES[name][0], _NBYTES[name], weighted, search, scale, _FINISH[name])
