"""Encoders of IQ4_NL and IQ4_XS: 16 levels that lie closer together near zero. Layouts: formats/i_quants.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from edgellm.formats.levels import IQ4 as LEVELS
from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.encoders.blocks_of_32 import store_nibbles, store_squares, store_weights
from edgellm.kernels.cpu.encoders.searches import largest_value
from edgellm.kernels.cpu.lib import simd as v

_TRIES = 7
_zero, _one, _nothing, _none = lanes.constant(0.0), lanes.constant(1.0), lanes.constant(1e-15), lanes.integer(0)


def _make_choice(values: tuple[int, ...], vec: v.Vec) -> Any:
    """An intrinsic: for each float32 lane the entry of ``values`` that stands for the nearest of LEVELS."""

    @intrinsic
    def choose(typing_context, value):
        def codegen(context, builder, sig, args):
            twice = builder.fadd(args[0], args[0])  # compared with the sum of two neighbours, which is exact
            chosen = ir.Constant(vec.ir, [values[0]] * lanes.LANES)
            for i in range(1, 16):
                border = ir.Constant(v.f32x8.ir, [float(LEVELS[i - 1] + LEVELS[i])] * lanes.LANES)
                above = builder.fcmp_ordered(">=", twice, border)
                chosen = builder.select(above, ir.Constant(vec.ir, [values[i]] * lanes.LANES), chosen)
            return chosen

        return vec(v.f32x8), codegen

    return choose


_nearest_value, _nearest_index = _make_choice(LEVELS, v.f32x8), _make_choice(tuple(range(16)), v.i32x8)


@v.forceinline
def _sums(x, w, iscale):
    """sum w q x and sum w q^2 of the levels q nearest to iscale x."""
    sum_qx, sum_q2 = v.zero_f32x8(), v.zero_f32x8()
    for i in range(32):
        value = v.load_f32x8(x + i * 32)
        q = _nearest_value(iscale * value)
        weighted = v.load_f32x8(w + i * 32) * q
        sum_qx, sum_q2 = sum_qx + weighted * value, sum_q2 + weighted * q
    return sum_qx, sum_q2


@v.forceinline
def _fit(x, w):
    """The scale of eight groups of 32: sixteen scales around -largest / 127 tried."""
    value, magnitude = largest_value(x, 32)
    lowest = v.splat_f32x8(np.float32(LEVELS[0]))
    sum_qx, sum_q2 = _sums(x, w, _one() / ((_zero() - value) / lowest))
    scale = lanes.where(lanes.greater(sum_q2, _zero()), sum_qx / sum_q2, _zero())
    best = scale * sum_qx
    for step in range(-_TRIES, _TRIES + 1):
        sum_qx, sum_q2 = _sums(x, w, v.splat_f32x8(np.float32(step + LEVELS[0])) / value)
        better = lanes.greater(sum_q2, _zero()) & lanes.greater(sum_qx * sum_qx, best * sum_q2)
        new_scale = sum_qx / sum_q2
        scale, best = lanes.where(better, new_scale, scale), lanes.where(better, new_scale * sum_qx, best)
    return lanes.where(lanes.less(magnitude, _nothing()), _zero(), scale)


@v.forceinline
def _weigh(x, w, squares, weighted):
    if weighted:
        store_weights(w, x, 32, squares)
    else:
        store_squares(w, x, 32)


@v.forceinline
def _store_levels(x, levels, factor):
    for i in range(32):
        v.store_i32x8(levels + i * 32, _nearest_index(factor * v.load_f32x8(x + i * 32)))


def make_iq4_nl_encoder(weighted: bool) -> Any:
    """The kernel of IQ4_NL: eight neighbouring blocks of a row at a time."""

    def encode(op, step, thread, n_threads):
        n_in, n_blocks = v.load_i64(op + at.N_IN), v.load_i64(op + at.N_IN) // 32
        scratch = v.load_i64(op + at.SCRATCH)
        x, w, levels = scratch + at.PANEL_X, scratch + at.PANEL_W, scratch + at.PANEL_LEVELS
        for row in range(v.load_i64(op + at.N_ROWS)):
            for block in range(0, n_blocks, lanes.LANES):
                last = min(n_blocks - 1 - block, lanes.LANES - 1)
                lanes.load_panel(x, v.load_i64(op + at.X) + (row * n_in + block * 32) * 4, 128, last, 32)
                total = v.zero_f32x8()
                if weighted:
                    lanes.load_panel(w, v.load_i64(op + at.IMPORTANCE) + block * 128, 128, last, 32)
                    for i in range(32):
                        value = v.load_f32x8(x + i * 32)
                        total = total + value * value
                _weigh(x, w, total * v.splat_f32x8(np.float32(2 / 32)), weighted)
                scale = _fit(x, w)
                out = v.load_i64(op + at.OUT) + (row * n_blocks + block) * 18
                lanes.scatter_u16(out, 18, last, lanes.half_bits(scale))
                _store_levels(x, levels, lanes.reciprocal(scale))
                store_nibbles(levels, out + 2, 18, last)

    return encode


_FITTED = 4096  # scratch: 8 float32


@v.forceinline
def _quantize_scales(scratch, scale, out):
    """d, scales_h and scales_l of a super-block; the factor of each group's weights."""
    v.store_f32x8(scratch + _FITTED, scale)
    largest, magnitude = np.float32(0), np.float32(0)
    for i in range(lanes.LANES):
        s = v.load_f32(scratch + _FITTED + i * 4)
        if abs(s) > magnitude:
            largest, magnitude = s, abs(s)
    d = v.splat_f32x8(-largest / np.float32(32))
    level = lanes.nearest(lanes.reciprocal(d) * scale)
    level = lanes.clamp(level, v.splat_i32x8(np.int32(-32)), v.splat_i32x8(np.int32(31)))
    v.store_i32x8(scratch + _FITTED, level + v.splat_i32x8(np.int32(32)))
    high = np.int64(0)
    for i in range(0, lanes.LANES, 2):
        a = np.int64(v.load_i32(scratch + _FITTED + i * 4))
        b = np.int64(v.load_i32(scratch + _FITTED + i * 4 + 4))
        lanes.store_u8(out + 4 + i // 2, np.uint8((a & 15) | (b & 15) << 4))
        high = high | (a >> 4) << 2 * i | (b >> 4) << (2 * i + 2)
    lanes.scatter_u16(out, 0, 0, lanes.half_bits(d))
    v.store_u16(out + 2, np.uint16(high))
    return lanes.reciprocal(d * v.to_f32x8(level))


def make_iq4_xs_encoder(weighted: bool) -> Any:
    """The kernel of IQ4_XS: the eight groups of a super-block at a time."""

    def encode(op, step, thread, n_threads):
        per_row, scratch = v.load_i64(op + at.N_IN) // 256, v.load_i64(op + at.SCRATCH)
        x, w, levels = scratch + at.PANEL_X, scratch + at.PANEL_W, scratch + at.PANEL_LEVELS
        n_blocks = v.load_i64(op + at.N_ROWS) * per_row
        for first in range(0, n_blocks, lanes.LANES):
            here = min(n_blocks - first, lanes.LANES)
            blocks = v.load_i64(op + at.X) + first * 1024
            if weighted:
                squares = lanes.sums_of_squares(scratch + at.PANEL_SUMS, blocks, 1024, here - 1, 256)
                v.store_f32x8(scratch + at.SQUARES, squares * v.splat_f32x8(np.float32(2 / 256)))
            for block in range(here):
                lanes.load_panel(x, blocks + block * 1024, 128, lanes.LANES - 1, 32)
                if weighted:
                    importance = v.load_i64(op + at.IMPORTANCE) + (first + block) % per_row * 1024
                    lanes.load_panel(w, importance, 128, lanes.LANES - 1, 32)
                _weigh(x, w, v.splat_f32x8(v.load_f32(scratch + at.SQUARES + block * 4)), weighted)
                scale = _fit(x, w)
                out = v.load_i64(op + at.OUT) + (first + block) * 136
                _store_levels(x, levels, _quantize_scales(scratch, scale, out))
                store_nibbles(levels, out + 8, 16, lanes.LANES - 1)

    return encode
