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

from edgellm.kernels.cpu import layout as at
from edgellm.kernels.cpu import simd
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
    splat_i32x16,
    store_f32x8,
    store_f32x16,
    sums_of_eight,
    to_f32x8,
    to_f32x16,
    zero_f32x8,
    zero_f32x16,
    zero_i32x16,
)

ROWS = 16  # rows of a panel
PANEL_GROUPS = 16  # groups of 32 columns in a panel: 16 KiB of packed weights, half of an L1 cache
GROUP_NBYTES = 1024  # 16 pairs x 16 rows x 2 int16

# scratch of a thread, byte offsets
SCALES = 0  # decode_scales: 2 x 8 groups x 8 rows
PANEL = 1024
PANEL_SCALES = PANEL + PANEL_GROUPS * GROUP_NBYTES
PANEL_MINIMA = PANEL_SCALES + PANEL_GROUPS * ROWS * 4
EDGE = PANEL_MINIMA + PANEL_GROUPS * ROWS * 4  # (n_tokens, 16) float32 for the last, incomplete panel

# arguments of a matmul op
X, X_ROW_NBYTES, W, W_ROW_NBYTES, N_OUT, N_GROUPS, OUT, OUT_ROW_NBYTES, BIAS, ROW_KIND = (8 * i for i in range(1, 11))
# arguments of an embed op
EMBED_W, EMBED_ROW_NBYTES, EMBED_GROUPS, EMBED_OUT, EMBED_OUT_ROW_NBYTES, EMBED_SCALE = (8 * i for i in range(1, 7))


def scratch_nbytes(max_tokens: int) -> int:
    """Scratch that one thread needs."""
    return EDGE + max_tokens * ROWS * 4


def activation_row_nbytes(n_in: int) -> int:
    """Bytes of one quantized row: int16 values, then float32 scales, then float32 scale * sum, padded to 64."""
    return -(-(n_in * 2 + n_in // 32 * 8) // 64) * 64


def _weights(quant: str) -> Any:
    return importlib.import_module(f"edgellm.kernels.cpu.weights.{quant.lower()}")


_inter_low = simd.make_shuffle(simd.i32x8, [0, 8, 1, 9, 4, 12, 5, 13])
_inter_high = simd.make_shuffle(simd.i32x8, [2, 10, 3, 11, 6, 14, 7, 15])
_pair_low = simd.make_shuffle(simd.i32x8, [0, 1, 8, 9, 4, 5, 12, 13])
_pair_high = simd.make_shuffle(simd.i32x8, [2, 3, 10, 11, 6, 7, 14, 15])
_half_low = simd.make_shuffle(simd.i32x8, [0, 1, 2, 3, 8, 9, 10, 11])
_half_high = simd.make_shuffle(simd.i32x8, [4, 5, 6, 7, 12, 13, 14, 15])


@forceinline
def _store_transposed(a, b, c, d, e, f, g, h, out):  # type: ignore[no-untyped-def]
    """Store column j of the 8x8 int32 matrix with rows a..h at out + 64 j."""
    ab0, ab1, cd0, cd1 = _inter_low(a, b), _inter_high(a, b), _inter_low(c, d), _inter_high(c, d)
    ef0, ef1, gh0, gh1 = _inter_low(e, f), _inter_high(e, f), _inter_low(g, h), _inter_high(g, h)
    r0, r1, r2, r3 = _pair_low(ab0, cd0), _pair_high(ab0, cd0), _pair_low(ab1, cd1), _pair_high(ab1, cd1)
    s0, s1, s2, s3 = _pair_low(ef0, gh0), _pair_high(ef0, gh0), _pair_low(ef1, gh1), _pair_high(ef1, gh1)
    simd.store_i32x8(out, _half_low(r0, s0))
    simd.store_i32x8(out + 64, _half_low(r1, s1))
    simd.store_i32x8(out + 128, _half_low(r2, s2))
    simd.store_i32x8(out + 192, _half_low(r3, s3))
    simd.store_i32x8(out + 256, _half_high(r0, s0))
    simd.store_i32x8(out + 320, _half_high(r1, s1))
    simd.store_i32x8(out + 384, _half_high(r2, s2))
    simd.store_i32x8(out + 448, _half_high(r3, s3))


@forceinline
def _pairs_times_splat(acc, w, x):  # type: ignore[no-untyped-def]
    """acc += w * the int16 pair at x, in all 16 rows."""
    return madd_i16(acc, w, simd.i32x16_as_i16x32(splat_i32x16(load_i32(x))))


def _make_pack(weights: Any) -> Any:
    """pack(p0..p7, n_groups, half, scratch): eight rows become half of the panel's lanes."""
    groups, block_nbytes, has_min = weights.GROUPS, weights.BLOCK_NBYTES, weights.HAS_MIN
    scale_step, unpack, decode_scales = weights.SCALE_STEP, weights.unpack, weights.decode_scales

    @forceinline
    def pairs(block, s):  # type: ignore[no-untyped-def]
        return simd.i16x32_as_i32x16(unpack(block, s))

    @forceinline
    def pack(p0, p1, p2, p3, p4, p5, p6, p7, n_groups, half, scratch):  # type: ignore[no-untyped-def]
        panel, scales = scratch + PANEL + half * 32, scratch + PANEL_SCALES + half * 32
        for _ in range(n_groups // groups):
            decode_scales(p0, p1, p2, p3, p4, p5, p6, p7, scratch + SCALES)
            for s in range(groups):
                a, b, c, d = pairs(p0, s), pairs(p1, s), pairs(p2, s), pairs(p3, s)
                e, f, g, h = pairs(p4, s), pairs(p5, s), pairs(p6, s), pairs(p7, s)
                low, high = simd.low_i32x16, simd.high_i32x16
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
            p0 += block_nbytes
            p1 += block_nbytes
            p2 += block_nbytes
            p3 += block_nbytes
            p4 += block_nbytes
            p5 += block_nbytes
            p6 += block_nbytes
            p7 += block_nbytes

    return pack


def _make_panel_times(has_min: bool) -> Any:
    """Panel times 4 tokens, and times 1: c[t] (16 floats) continues the sum over the panel's groups."""

    @forceinline
    def finish(acc, total, scale, minimum, x_scale, x_sum):  # type: ignore[no-untyped-def]
        acc = fma_f32x16(to_f32x16(total), scale * splat_f32x16(load_f32(x_scale)), acc)
        if has_min:
            acc = fma_f32x16(minimum, splat_f32x16(load_f32(x_sum)), acc)
        return acc

    @forceinline
    def times_four(scratch, n_groups, x, x_row, scale_at, sum_at, c, c_row, first):  # type: ignore[no-untyped-def]
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
    def times_one(scratch, n_groups, x, scale_at, sum_at, c, first):  # type: ignore[no-untyped-def]
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
    def pack_rows(w, row_nbytes, row, last, n_groups, scratch):  # type: ignore[no-untyped-def]
        for half in range(2):
            r = row + half * 8
            pack(
                w + min(r, last) * row_nbytes, w + min(r + 1, last) * row_nbytes,
                w + min(r + 2, last) * row_nbytes, w + min(r + 3, last) * row_nbytes,
                w + min(r + 4, last) * row_nbytes, w + min(r + 5, last) * row_nbytes,
                w + min(r + 6, last) * row_nbytes, w + min(r + 7, last) * row_nbytes,
                n_groups, half, scratch,
            )  # fmt: skip

    @forceinline
    def multiply(op, n, row, c, c_row, scratch):  # type: ignore[no-untyped-def]
        x, x_row, n_groups = load_i64(op + X), load_i64(op + X_ROW_NBYTES), load_i64(op + N_GROUPS)
        w, w_row, last = load_i64(op + W), load_i64(op + W_ROW_NBYTES), load_i64(op + N_OUT) - 1
        scale_at = x + n_groups * 64
        sum_at = scale_at + n_groups * 4
        for g in range(0, n_groups, PANEL_GROUPS):
            here = min(PANEL_GROUPS, n_groups - g)
            pack_rows(w + g // groups * block_nbytes, w_row, row, last, here, scratch)
            t = 0
            while t + 4 <= n:
                xt = t * x_row + g * 4
                times_four(
                    scratch, here, x + t * x_row + g * 64, x_row, scale_at + xt, sum_at + xt, c + t * c_row, c_row, g == 0
                )
                t += 4
            while t < n:
                xt = t * x_row + g * 4
                times_one(scratch, here, x + t * x_row + g * 64, scale_at + xt, sum_at + xt, c + t * c_row, g == 0)
                t += 1

    @forceinline
    def many_tokens(op, n, scratch):  # type: ignore[no-untyped-def]
        n_out, out, out_row = load_i64(op + N_OUT), load_i64(op + OUT), load_i64(op + OUT_ROW_NBYTES)
        bias = load_i64(op + BIAS)
        row = atomic_add(op + at.COUNTER, 1) * ROWS
        while row < n_out:
            # buffer rows are padded to 16 floats, so the last panel may write its idle lanes there
            c = out + row * 4
            multiply(op, n, row, c, out_row, scratch)
            if bias != 0:
                for t in range(n):
                    store_f32x16(c + t * out_row, load_f32x16(c + t * out_row) + load_f32x16(bias + row * 4))
            row = atomic_add(op + at.COUNTER, 1) * ROWS

    return many_tokens


def _make_one_token(weights: Any) -> Any:
    """The path for one token: 8 rows at a time, in chunks of 64 rows taken from the op's work counter."""
    groups, block_nbytes, has_min = weights.GROUPS, weights.BLOCK_NBYTES, weights.HAS_MIN
    scale_step, unpack, decode_scales = weights.SCALE_STEP, weights.unpack, weights.decode_scales

    @forceinline
    def dot(block, s, x):  # type: ignore[no-untyped-def]
        total = madd_i16(zero_i32x16(), unpack(block, s), x)
        return simd.low_i32x16(total, total) + simd.high_i32x16(total, total)

    @forceinline
    def eight_rows(p0, p1, p2, p3, p4, p5, p6, p7, ahead, n_groups, x, scratch):  # type: ignore[no-untyped-def]
        scale_at = x + n_groups * 64
        sum_at = scale_at + n_groups * 4
        acc = zero_f32x8()
        for _ in range(n_groups // groups):
            decode_scales(p0, p1, p2, p3, p4, p5, p6, p7, scratch + SCALES)
            for s in range(groups):
                v = load_i16x32(x)
                total = sums_of_eight(
                    dot(p0, s, v), dot(p1, s, v), dot(p2, s, v), dot(p3, s, v),
                    dot(p4, s, v), dot(p5, s, v), dot(p6, s, v), dot(p7, s, v),
                )  # fmt: skip
                scale = load_f32x8(scratch + SCALES + s * scale_step) * splat_f32x8(load_f32(scale_at))
                acc = fma_f32x8(to_f32x8(total), scale, acc)
                if has_min:
                    minimum = load_f32x8(scratch + SCALES + (groups + s) * 32)
                    acc = fma_f32x8(minimum, splat_f32x8(load_f32(sum_at)), acc)
                x += 64
                scale_at += 4
                sum_at += 4
            for line in range(0, block_nbytes * 8, 64):
                prefetch(ahead + line)
            ahead += block_nbytes * 8
            p0 += block_nbytes
            p1 += block_nbytes
            p2 += block_nbytes
            p3 += block_nbytes
            p4 += block_nbytes
            p5 += block_nbytes
            p6 += block_nbytes
            p7 += block_nbytes
        return acc

    @forceinline
    def one_token(op, scratch):  # type: ignore[no-untyped-def]
        x, n_groups, w = load_i64(op + X), load_i64(op + N_GROUPS), load_i64(op + W)
        w_row, n_out, out = load_i64(op + W_ROW_NBYTES), load_i64(op + N_OUT), load_i64(op + OUT)
        bias = load_i64(op + BIAS)
        last = n_out - 1
        chunk = atomic_add(op + at.COUNTER, 1) * 64
        while chunk < n_out:
            for row in range(chunk, min(chunk + 64, n_out), 8):
                acc = eight_rows(
                    w + row * w_row, w + min(row + 1, last) * w_row, w + min(row + 2, last) * w_row,
                    w + min(row + 3, last) * w_row, w + min(row + 4, last) * w_row, w + min(row + 5, last) * w_row,
                    w + min(row + 6, last) * w_row, w + min(row + 7, last) * w_row,
                    w + (row + 8) * w_row, n_groups, x, scratch,
                )  # fmt: skip
                if bias != 0:
                    acc = acc + load_f32x8(bias + row * 4)
                store_f32x8(out + row * 4, acc)
            chunk = atomic_add(op + at.COUNTER, 1) * 64

    return one_token


def make_matmul(quant: str) -> Any:
    """The kernel out = x @ weight.T (+ bias) for a quantized type."""
    weights = _weights(quant)
    one_token, many_tokens = _make_one_token(weights), _make_many_tokens(weights)

    def matmul(op, step, thread, n_threads):  # type: ignore[no-untyped-def]
        n = load_i64(step + load_i64(op + ROW_KIND))
        scratch = load_i64(step + at.SCRATCH) + thread * load_i64(step + at.SCRATCH_NBYTES)
        if n == 1:
            one_token(op, scratch)
        elif n > 1:
            many_tokens(op, n, scratch)

    return matmul


def make_embed(quant: str) -> Any:
    """The kernel out[t] = scale * weight[token[t]] for a quantized type."""
    weights = _weights(quant)
    groups, block_nbytes, has_min = weights.GROUPS, weights.BLOCK_NBYTES, weights.HAS_MIN
    scale_step, unpack, decode_scales = weights.SCALE_STEP, weights.unpack, weights.decode_scales
    sign_low = simd.make_convert(simd.i16x16, simd.i32x16, "sext")

    def embed(op, step, thread, n_threads):  # type: ignore[no-untyped-def]
        scratch = load_i64(step + at.SCRATCH) + thread * load_i64(step + at.SCRATCH_NBYTES) + SCALES
        factor = splat_f32x16(simd.f32_of(load_f64(op + EMBED_SCALE)))
        for t in range(thread, load_i64(step + at.N_TOKENS), n_threads):
            token = load_i32(load_i64(step + at.TOKENS) + t * 4)
            p = load_i64(op + EMBED_W) + token * load_i64(op + EMBED_ROW_NBYTES)
            out = load_i64(op + EMBED_OUT) + t * load_i64(op + EMBED_OUT_ROW_NBYTES)
            for _ in range(load_i64(op + EMBED_GROUPS) // groups):
                decode_scales(p, p, p, p, p, p, p, p, scratch)
                for s in range(groups):
                    q = unpack(p, s)
                    scale = splat_f32x16(load_f32(scratch + s * scale_step))
                    low = to_f32x16(sign_low(simd.low_i16x32(q, q))) * scale
                    high = to_f32x16(sign_low(simd.high_i16x32(q, q))) * scale
                    if has_min:
                        minimum = splat_f32x16(load_f32(scratch + (groups + s) * 32))
                        low, high = low + minimum, high + minimum
                    store_f32x16(out, low * factor)
                    store_f32x16(out + 64, high * factor)
                    out += 128
                p += block_nbytes

    return embed

