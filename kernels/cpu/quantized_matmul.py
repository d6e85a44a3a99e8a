"""Quantized weights times quantized activations: one token straight from the mapped file, many through a packed panel.

Activations are int16 with one scale for 32 values (15 bits: ``quantize`` in elementwise.py). The sum over a group of
32 is exact in int32, so its order is free; the groups of a row are added in float32, first to last:

    acc = fma(float(sum_i w_i x_i), w_scale * x_scale, acc)
    acc = fma(w_min, x_scale * sum_i x_i, acc)                 for types with a minimum

Every path below keeps to these two lines. A token therefore gets the same bits alone, in a prompt of any length, and
on every instruction set with a fused multiply-add.

    one token    8 rows at a time, their 8 group sums gathered into one register      bound by memory
    more         a panel of 16 rows is unpacked to int16 pairs, lanes = rows, and      bound by multiply-adds
                 multiplied with 4 tokens at a time
"""

from __future__ import annotations

import importlib
from typing import Any

from numba import types

from edgellm.kernels.cpu import layout as at
from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.layout import (
    EDGE,
    GROUP_NBYTES,
    PANEL,
    PANEL_GROUPS,
    PANEL_MINIMA,
    PANEL_ROWS,
    PANEL_SCALES,
    SCALES,
)
from edgellm.kernels.cpu.simd import (
    atomic_add,
    fma_f32x8,
    fma_f32x16,
    forceinline,
    load_f32,
    load_f32x8,
    load_f32x16,
    load_f64,
    load_i16x32,
    load_i32,
    load_i64,
    madd_i16,
    prefetch,
    splat_f32x8,
    splat_f32x16,
    splat_i32x8,
    splat_i32x16,
    store_f32,
    store_f32x8,
    store_f32x16,
    to_f32x8,
    to_f32x16,
    zero_f32x8,
    zero_f32x16,
    zero_i32x16,
)

CHUNK_ROWS = 256
"""One token: a thread takes its share of the rows in parts of at most so many. Small parts cost dear: what one core
has fetched ahead then belongs to another (SmolLM2 on two cores, parts of 16, 64, 144 rows: 7.6, 5.7, 4.6 ms)."""

# arguments of a matmul op
X, X_ROW_NBYTES, W, W_ROW_NBYTES, N_OUT, N_GROUPS, OUT, OUT_ROW_NBYTES, BIAS, ROW_KIND = (8 * i for i in range(1, 11))
# arguments of an embed op
EMBED_W, EMBED_ROW_NBYTES, EMBED_GROUPS, EMBED_OUT, EMBED_OUT_ROW_NBYTES, EMBED_SCALE = (8 * i for i in range(1, 7))


def _weights(quant: str) -> Any:
    return importlib.import_module(f"edgellm.kernels.cpu.weights.{quant.lower()}")


_inter_low = simd.make_shuffle(simd.i32x8, [0, 8, 1, 9, 4, 12, 5, 13])
_inter_high = simd.make_shuffle(simd.i32x8, [2, 10, 3, 11, 6, 14, 7, 15])
_quad_low = simd.make_shuffle(simd.i32x8, [0, 1, 8, 9, 4, 5, 12, 13])
_quad_high = simd.make_shuffle(simd.i32x8, [2, 3, 10, 11, 6, 7, 14, 15])
_half_low = simd.make_shuffle(simd.i32x8, [0, 1, 2, 3, 8, 9, 10, 11])
_half_high = simd.make_shuffle(simd.i32x8, [4, 5, 6, 7, 12, 13, 14, 15])


@forceinline
def _store_transposed(a, b, c, d, e, f, g, h, out):
    """Store column j of the 8x8 int32 matrix with rows a..h at out + 64 j."""
    ab0, ab1, cd0, cd1 = _inter_low(a, b), _inter_high(a, b), _inter_low(c, d), _inter_high(c, d)
    ef0, ef1, gh0, gh1 = _inter_low(e, f), _inter_high(e, f), _inter_low(g, h), _inter_high(g, h)
    r0, r1, r2, r3 = _quad_low(ab0, cd0), _quad_high(ab0, cd0), _quad_low(ab1, cd1), _quad_high(ab1, cd1)
    s0, s1, s2, s3 = _quad_low(ef0, gh0), _quad_high(ef0, gh0), _quad_low(ef1, gh1), _quad_high(ef1, gh1)
    simd.store_i32x8(out, _half_low(r0, s0))
    simd.store_i32x8(out + 64, _half_low(r1, s1))
    simd.store_i32x8(out + 128, _half_low(r2, s2))
    simd.store_i32x8(out + 192, _half_low(r3, s3))
    simd.store_i32x8(out + 256, _half_high(r0, s0))
    simd.store_i32x8(out + 320, _half_high(r1, s1))
    simd.store_i32x8(out + 384, _half_high(r2, s2))
    simd.store_i32x8(out + 448, _half_high(r3, s3))


@forceinline
def _pairs_times_splat(acc, w, x):
    """acc += w * the int16 pair at x, in all 16 rows."""
    return madd_i16(acc, w, simd.i32x16_as_i16x32(splat_i32x16(load_i32(x))))


def _make_pack(weights: Any) -> Any:
    """pack(p, stride, n_groups, half, scratch): eight rows from p become half of the panel's lanes."""
    groups, block_nbytes, has_min = weights.GROUPS, weights.BLOCK_NBYTES, weights.HAS_MIN
    scale_step, unpack, decode_scales = weights.SCALE_STEP, weights.unpack, weights.decode_scales

    @forceinline
    def pairs(block, s):
        return simd.i16x32_as_i32x16(unpack(block, s))

    @forceinline
    def pack(p, stride, n_groups, half, scratch):
        panel, scales = scratch + PANEL + half * 32, scratch + PANEL_SCALES + half * 32
        low, high = simd.low_i32x16, simd.high_i32x16
        for _ in range(n_groups // groups):
            decode_scales(p, stride, scratch + SCALES)
            p4 = p + 4 * stride
            for s in range(groups):
                a, b, c, d = pairs(p, s), pairs(p + stride, s), pairs(p + 2 * stride, s), pairs(p + 3 * stride, s)
                e, f, g, h = pairs(p4, s), pairs(p4 + stride, s), pairs(p4 + 2 * stride, s), pairs(p4 + 3 * stride, s)
                _store_transposed(
                    low(a, a), low(b, b), low(c, c), low(d, d), low(e, e), low(f, f), low(g, g), low(h, h), panel
                )
                _store_transposed(
                    high(a, a), high(b, b), high(c, c), high(d, d), high(e, e), high(f, f), high(g, g), high(h, h),
                    panel + 512,
                )  # fmt: skip
                store_f32x8(scales, load_f32x8(scratch + SCALES + s * scale_step))
                if has_min:
                    minima = scratch + SCALES + (groups + s) * 32
                    store_f32x8(scales + PANEL_MINIMA - PANEL_SCALES, load_f32x8(minima))
                panel += GROUP_NBYTES
                scales += 64
            p += block_nbytes

    return pack


def _make_finish(has_min: bool) -> Any:
    """finish(acc, total, scale, minimum, x_scale, x_sum): the two lines of the module's docstring, 16 rows."""

    @forceinline
    def finish(acc, total, scale, minimum, x_scale, x_sum):
        acc = fma_f32x16(to_f32x16(total), scale * splat_f32x16(load_f32(x_scale)), acc)
        if has_min:
            acc = fma_f32x16(minimum, splat_f32x16(load_f32(x_sum)), acc)
        return acc

    return finish


def _make_panel_times(has_min: bool) -> Any:
    """Panel times 4 tokens, and times 1: c[t] (16 floats) continues the sum over the panel's groups."""

    finish = _make_finish(has_min)

    @forceinline
    def times_four(scratch, n_groups, x, x_row, scale_at, sum_at, c, c_row, first):
        x1, x2, x3 = x + x_row, x + 2 * x_row, x + 3 * x_row
        f0 = f1 = f2 = f3 = zero_f32x16()
        if not first:
            f0, f1 = load_f32x16(c), load_f32x16(c + c_row)
            f2, f3 = load_f32x16(c + 2 * c_row), load_f32x16(c + 3 * c_row)
        panel, scales = scratch + PANEL, scratch + PANEL_SCALES
        for _ in range(n_groups):
            i0 = i1 = i2 = i3 = zero_i32x16()
            for pair in range(16):
                w = load_i16x32(panel + pair * 64)
                i0 = _pairs_times_splat(i0, w, x + pair * 4)
                i1 = _pairs_times_splat(i1, w, x1 + pair * 4)
                i2 = _pairs_times_splat(i2, w, x2 + pair * 4)
                i3 = _pairs_times_splat(i3, w, x3 + pair * 4)
            scale, minimum = load_f32x16(scales), load_f32x16(scales + PANEL_MINIMA - PANEL_SCALES)
            f0 = finish(f0, i0, scale, minimum, scale_at, sum_at)
            f1 = finish(f1, i1, scale, minimum, scale_at + x_row, sum_at + x_row)
            f2 = finish(f2, i2, scale, minimum, scale_at + 2 * x_row, sum_at + 2 * x_row)
            f3 = finish(f3, i3, scale, minimum, scale_at + 3 * x_row, sum_at + 3 * x_row)
            panel += GROUP_NBYTES
            scales += 64
            x, x1, x2, x3 = x + 64, x1 + 64, x2 + 64, x3 + 64
            scale_at += 4
            sum_at += 4
        store_f32x16(c, f0)
        store_f32x16(c + c_row, f1)
        store_f32x16(c + 2 * c_row, f2)
        store_f32x16(c + 3 * c_row, f3)

    @forceinline
    def times_one(scratch, n_groups, x, scale_at, sum_at, c, first):
        acc = zero_f32x16()
        if not first:
            acc = load_f32x16(c)
        panel, scales = scratch + PANEL, scratch + PANEL_SCALES
        for _ in range(n_groups):
            total = zero_i32x16()
            for pair in range(16):
                total = _pairs_times_splat(total, load_i16x32(panel + pair * 64), x + pair * 4)
            scale, minimum = load_f32x16(scales), load_f32x16(scales + PANEL_MINIMA - PANEL_SCALES)
            acc = finish(acc, total, scale, minimum, scale_at, sum_at)
            panel += GROUP_NBYTES
            scales += 64
            x += 64
            scale_at += 4
            sum_at += 4
        store_f32x16(c, acc)

    return times_four, times_one


def _make_many_tokens(weights: Any) -> Any:
    """The path for two tokens and more: panels of 16 rows, taken from the op's work counter."""
    pack = _make_pack(weights)
    times_four, times_one = _make_panel_times(weights.HAS_MIN)
    groups, block_nbytes = weights.GROUPS, weights.BLOCK_NBYTES

    @forceinline
    def multiply(op, n, row, c, c_row, scratch):
        """16 rows from ``row`` times n tokens; c is (n, 16) with rows c_row bytes apart."""
        x, x_row, n_groups = load_i64(op + X), load_i64(op + X_ROW_NBYTES), load_i64(op + N_GROUPS)
        w_row = load_i64(op + W_ROW_NBYTES)
        w = load_i64(op + W) + row * w_row
        scale_at = x + n_groups * 64
        sum_at = scale_at + n_groups * 4
        n_panels = (n_groups + PANEL_GROUPS - 1) // PANEL_GROUPS
        width = ((n_groups + n_panels - 1) // n_panels + groups - 1) // groups * groups  # equal parts, whole blocks
        for g in range(0, n_groups, width):
            here = min(width, n_groups - g)
            for half in range(2):
                pack(w + half * 8 * w_row + g // groups * block_nbytes, w_row, here, half, scratch)
            t = 0
            while t + 4 <= n:
                x_t, scale_t, sum_t = x + t * x_row + g * 64, scale_at + t * x_row + g * 4, sum_at + t * x_row + g * 4
                times_four(scratch, here, x_t, x_row, scale_t, sum_t, c + t * c_row, c_row, g == 0)
                t += 4
            while t < n:
                x_t, scale_t, sum_t = x + t * x_row + g * 64, scale_at + t * x_row + g * 4, sum_at + t * x_row + g * 4
                times_one(scratch, here, x_t, scale_t, sum_t, c + t * c_row, g == 0)
                t += 1

    @forceinline
    def many_tokens(op, n, scratch):
        n_out, out, out_row = load_i64(op + N_OUT), load_i64(op + OUT), load_i64(op + OUT_ROW_NBYTES)
        bias = load_i64(op + BIAS)
        row = atomic_add(op + at.COUNTER, 1) * PANEL_ROWS
        while row < n_out:
            if row + PANEL_ROWS <= n_out:
                multiply(op, n, row, out + row * 4, out_row, scratch)
            else:
                # the last rows once more with some before them, summed aside: another thread may own those
                first = max(0, n_out - PANEL_ROWS)
                multiply(op, n, first, scratch + EDGE, PANEL_ROWS * 4, scratch)
                for t in range(n):
                    for i in range(row - first, n_out - first):
                        value = load_f32(scratch + EDGE + t * PANEL_ROWS * 4 + i * 4)
                        store_f32(out + t * out_row + (first + i) * 4, value)
            if bias != 0:  # rows are padded to 16 floats
                for t in range(n):
                    c = out + t * out_row + row * 4
                    store_f32x16(c, load_f32x16(c) + load_f32x16(bias + row * 4))
            row = atomic_add(op + at.COUNTER, 1) * PANEL_ROWS

    return many_tokens


def _make_one_token(weights: Any) -> Any:
    """The path for one token: 8 rows at a time, in chunks taken from the op's work counter."""
    groups, block_nbytes, has_min = weights.GROUPS, weights.BLOCK_NBYTES, weights.HAS_MIN
    scale_step, sums, decode_scales, offset = weights.SCALE_STEP, weights.sums, weights.decode_scales, weights.OFFSET

    @forceinline
    def eight_rows(p, stride, n_groups, x, scratch):
        scale_at = x + n_groups * 64
        sum_at, total_at = scale_at + n_groups * 4, scale_at + n_groups * 8
        ahead = p + 8 * stride
        acc = zero_f32x8()
        for _ in range(n_groups // groups):
            for line in range(0, block_nbytes * 8, 64):
                prefetch(ahead + line)
            ahead += block_nbytes * 8
            decode_scales(p, stride, scratch + SCALES)
            for s in range(groups):
                total = sums(p, stride, s, x)
                if offset != 0:
                    total = total - splat_i32x8(load_i32(total_at) * types.int32(offset))
                scale = load_f32x8(scratch + SCALES + s * scale_step) * splat_f32x8(load_f32(scale_at))
                acc = fma_f32x8(to_f32x8(total), scale, acc)
                if has_min:
                    minimum = load_f32x8(scratch + SCALES + (groups + s) * 32)
                    acc = fma_f32x8(minimum, splat_f32x8(load_f32(sum_at)), acc)
                x += 64
                scale_at += 4
                sum_at += 4
                total_at += 4
            p += block_nbytes
        return acc

    @forceinline
    def one_token(op, n_threads, scratch):
        x, n_groups, w = load_i64(op + X), load_i64(op + N_GROUPS), load_i64(op + W)
        w_row, n_out, out = load_i64(op + W_ROW_NBYTES), load_i64(op + N_OUT), load_i64(op + OUT)
        bias = load_i64(op + BIAS)
        share = (n_out + n_threads - 1) // n_threads
        parts = (share + CHUNK_ROWS - 1) // CHUNK_ROWS
        n_rows = ((share + parts - 1) // parts + 7) // 8 * 8
        chunk = atomic_add(op + at.COUNTER, 1) * n_rows
        while chunk < n_out:
            for at_row in range(chunk, min(chunk + n_rows, n_out), 8):
                row = max(0, min(at_row, n_out - 8))  # the last eight may overlap the ones before: same bits
                acc = eight_rows(w + row * w_row, w_row, n_groups, x, scratch)
                if bias != 0:
                    acc = acc + load_f32x8(bias + row * 4)
                store_f32x8(out + row * 4, acc)
            chunk = atomic_add(op + at.COUNTER, 1) * n_rows

    return one_token


def make_matmul(quant: str) -> Any:
    """The kernel out = x @ weight.T (+ bias) for a quantized type."""
    weights = _weights(quant)
    one_token, many_tokens = _make_one_token(weights), _make_many_tokens(weights)

    def matmul(op, step, thread, n_threads):
        n = load_i64(step + load_i64(op + ROW_KIND))
        scratch = load_i64(step + at.SCRATCH) + thread * load_i64(step + at.SCRATCH_NBYTES)
        if n == 1:
            one_token(op, n_threads, scratch)
        elif n > 1:
            many_tokens(op, n, scratch)

    return matmul


def make_embed(quant: str) -> Any:
    """The kernel out[t] = scale * weight[token[t]] for a quantized type."""
    weights = _weights(quant)
    groups, block_nbytes, has_min = weights.GROUPS, weights.BLOCK_NBYTES, weights.HAS_MIN
    scale_step, unpack, decode_scales = weights.SCALE_STEP, weights.unpack, weights.decode_scales
    widen = simd.make_convert(simd.i16x16, simd.i32x16, "sext")

    def embed(op, step, thread, n_threads):
        scratch = load_i64(step + at.SCRATCH) + thread * load_i64(step + at.SCRATCH_NBYTES) + SCALES
        factor = splat_f32x16(simd.f32_of(load_f64(op + EMBED_SCALE)))
        for t in range(thread, load_i64(step + at.N_TOKENS), n_threads):
            token = load_i32(load_i64(step + at.TOKENS) + t * 4)
            p = load_i64(op + EMBED_W) + token * load_i64(op + EMBED_ROW_NBYTES)
            out = load_i64(op + EMBED_OUT) + t * load_i64(op + EMBED_OUT_ROW_NBYTES)
            for _ in range(load_i64(op + EMBED_GROUPS) // groups):
                decode_scales(p, 0, scratch)  # eight times the same row
                for s in range(groups):
                    q = unpack(p, s)
                    even, odd = simd.low_i16x32(q, q), simd.high_i16x32(q, q)
                    scale = splat_f32x16(load_f32(scratch + s * scale_step))
                    low = to_f32x16(widen(simd.interleave_low_i16x16(even, odd))) * scale
                    high = to_f32x16(widen(simd.interleave_high_i16x16(even, odd))) * scale
                    if has_min:
                        minimum = splat_f32x16(load_f32(scratch + (groups + s) * 32))
                        low, high = low + minimum, high + minimum
                    store_f32x16(out, low * factor)
                    store_f32x16(out + 64, high * factor)
                    out += 128
                p += block_nbytes

    return embed
