"""The small kernels: everything that reads its input once. Rows or heads are dealt to the threads in turn.

Buffer rows are padded to 16 floats, so whole-row loops run over the padding; kernels on heads, whose length may be
odd, finish with a scalar loop.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels.amx_matmul import has_tiles, split_activations
from edgellm.kernels.cpu.kernels.quantized_matmul import (
    EMBED_GROUPS,
    EMBED_OUT,
    EMBED_OUT_ROW_NBYTES,
    EMBED_ROW_NBYTES,
    EMBED_SCALE,
    EMBED_W,
)
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import gelu_f32x16, silu_f32x16

_arg = [8 * i for i in range(15)]

# ---- RMS norm: x, x_row, w, out, out_row, group, n_groups, eps, row_kind ---------------------------------------------
NORM_X, NORM_X_ROW, NORM_W, NORM_OUT, NORM_OUT_ROW, NORM_WIDTH, NORM_HEADS, NORM_EPS, NORM_KIND = _arg[1:10]


@v.forceinline
def _sum_of_squares(x, n):
    acc = v.zero_f32x16()
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        value = v.load_f32x16(x + i * 4)
        acc = v.fma_f32x16(value, value, acc)
    total = v.sum_f32x16(acc)
    for i in range(whole, n):
        v1 = v.load_f32(x + i * 4)
        total = total + v1 * v1
    return total


def rms_norm(op, step, thread, n_threads):
    """out = x / sqrt(mean(x^2) + eps) * w for each group of ``width`` values of each row."""
    n, width, heads = (
        v.load_i64(step + v.load_i64(op + NORM_KIND)),
        v.load_i64(op + NORM_WIDTH),
        v.load_i64(op + NORM_HEADS),
    )
    w, eps = v.load_i64(op + NORM_W), v.load_f64(op + NORM_EPS)
    whole = width // 16 * 16
    for item in range(thread, n * heads, n_threads):
        row, head = item // heads, item % heads
        x = v.load_i64(op + NORM_X) + row * v.load_i64(op + NORM_X_ROW) + head * width * 4
        out = v.load_i64(op + NORM_OUT) + row * v.load_i64(op + NORM_OUT_ROW) + head * width * 4
        factor = v.f32_of(1.0 / (_sum_of_squares(x, width) / width + eps) ** 0.5)
        factors = v.splat_f32x16(factor)
        for i in range(0, whole, 16):
            v.store_f32x16(out + i * 4, v.load_f32x16(x + i * 4) * factors * v.load_f32x16(w + i * 4))
        for i in range(whole, width):
            v.store_f32(out + i * 4, v.load_f32(x + i * 4) * factor * v.load_f32(w + i * 4))


# ---- quantize activations: x, x_row, out, out_row, n_groups, row_kind, run -------------------------------------------
QUANT_X, QUANT_X_ROW, QUANT_OUT, QUANT_OUT_ROW, QUANT_GROUPS, QUANT_KIND, QUANT_RUN = _arg[1:8]
LARGEST = 16383.0
LARGEST_SUM = 524000.0
"""Of all magnitudes under one scale: rounding adds at most 128, and 4096 (the largest folded weight) * 2^19 is 2^31."""

_magic = v.make_const(v.f32x16, 12582912.0)  # 1.5 * 2^23
_tiny = 1e-34  # a scale below this is zero: its reciprocal would be infinite
_low_halves = v.make_shuffle(v.f32x16, [*range(8), *range(16, 24)])
_high_halves = v.make_shuffle(v.f32x16, [*range(8, 16), *range(24, 32)])
_fours, _twos, _ones = (v.make_shuffle(v.f32x16, [lane ^ k for lane in range(16)]) for k in (4, 2, 1))
_ninth = v.make_shuffle(v.f32x16, [8] * 16)


@v.forceinline
def _scale_of_run(x, n):
    """The scale under which n values keep both bounds; NaN if a value is not finite."""
    largest = total = v.zero_f32x16()
    for i in range(0, n, 16):
        value = v.abs_f32x16(v.load_f32x16(x + i * 4))
        largest, total = v.max_f32x16(largest, value), total + value
    sum_of_all = v.sum_f32x16(total)
    scale = max(v.maximum_f32x16(largest) * v.f32_of(1.0 / LARGEST), sum_of_all * v.f32_of(1.0 / LARGEST_SUM))
    return scale + sum_of_all * v.f32_of(0.0)


@v.forceinline
def _quantize_group(x, scale, factor, out, scale_at, next_array):
    """32 float32 at x to int16 at out; scale, scale * sum, and two sums go to arrays ``next_array`` bytes apart."""
    qa = v.truncate_f32x16((v.load_f32x16(x) * factor + _magic()) - _magic())
    qb = v.truncate_f32x16((v.load_f32x16(x + 64) * factor + _magic()) - _magic())
    wa, wb = v.narrow_i32x16(qa), v.narrow_i32x16(qb)
    v.store_i16x16(out, v.even_i16x16(wa, wb))
    v.store_i16x16(out + 32, v.odd_i16x16(wa, wb))
    # both sums at once, exact: below 2^24
    fa, fb = v.to_f32x16(qa), v.to_f32x16(qb)
    sums = _low_halves(fa, fb) + _high_halves(fa, fb)
    sums = sums + _fours(sums, sums)
    sums = sums + _twos(sums, sums)
    sums = sums + _ones(sums, sums)
    first = v.first_lane(sums)
    total = first + v.first_lane(_ninth(sums, sums))
    v.store_f32(scale_at, scale)
    v.store_f32(scale_at + next_array, scale * total)
    v.store_i32(scale_at + 2 * next_array, int(total))
    v.store_i32(scale_at + 3 * next_array, int(first))


def quantize(op, step, thread, n_threads):
    """Rows of float32 to int16 with one scale for a run of groups of 32: q = round(x / scale).

    A row of the result: for every group its 16 even, then its 16 odd values; then, for all groups, float32 scales,
    float32 scale * sum(q), int32 sum(q), int32 sum of its first 16 q. For tiles the int16 are split into bytes at last.
    """
    n, groups = v.load_i64(step + v.load_i64(op + QUANT_KIND)), v.load_i64(op + QUANT_GROUPS)
    run = v.load_i64(op + QUANT_RUN)
    runs = groups // run
    parts = 1  # rows are dealt whole, but for a few tokens in parts
    if n < 4 * n_threads:
        parts = n_threads
    share = (runs + 2 * parts - 1) // (2 * parts) * 2  # even: tiles split groups by pairs
    for item in range(thread, n * parts, n_threads):
        row, first = item // parts, item % parts * share
        x = v.load_i64(op + QUANT_X) + row * v.load_i64(op + QUANT_X_ROW)
        out = v.load_i64(op + QUANT_OUT) + row * v.load_i64(op + QUANT_OUT_ROW)
        for start in range(first * run, min(first + share, runs) * run, run):
            scale = _scale_of_run(x + start * 128, run * 32)
            factor = v.splat_f32x16(v.f32_of(1.0) / max(scale, v.f32_of(_tiny)))
            for group in range(start, start + run):
                at_group = out + groups * 64 + group * 4
                _quantize_group(x + group * 128, scale, factor, out + group * 64, at_group, groups * 4)
        if has_tiles() != 0 and n >= at.TILE_TOKENS:
            split_activations(out, first * run, min(first + share, runs) * run, groups)


# ---- rotary embedding: x, x_row, n_heads, head_dim, half, rope_index, adjacent ---------------------------------------
ROPE_X, ROPE_X_ROW, ROPE_HEADS, ROPE_HEAD_DIM, ROPE_HALF, ROPE_INDEX, ROPE_ADJACENT = _arg[1:8]


def rope(op, step, thread, n_threads):
    """Rotate pairs of dimensions of every head by the angles of the token's position, in place."""
    n, heads, half = v.load_i64(step + at.N_TOKENS), v.load_i64(op + ROPE_HEADS), v.load_i64(op + ROPE_HALF)
    tables = v.load_i64(step + at.ROPES) + v.load_i64(op + ROPE_INDEX) * 16
    adjacent = v.load_i64(op + ROPE_ADJACENT)
    first, second = 4 + 4 * adjacent, 4 * half * (1 - adjacent) + 4 * adjacent
    for item in range(thread, n * heads, n_threads):
        row, head = item // heads, item % heads
        x = v.load_i64(op + ROPE_X) + row * v.load_i64(op + ROPE_X_ROW) + head * v.load_i64(op + ROPE_HEAD_DIM) * 4
        cos, sin = v.load_i64(tables) + row * half * 4, v.load_i64(tables + 8) + row * half * 4
        for i in range(half):
            p = x + i * first
            a, b, c, s = v.load_f32(p), v.load_f32(p + second), v.load_f32(cos + i * 4), v.load_f32(sin + i * 4)
            v.store_f32(p, a * c - b * s)
            v.store_f32(p + second, a * s + b * c)


# ---- gated unit: gate, gate_row, up, up_row, out, out_row, width, row_kind -------------------------------------------
GATE, GATE_ROW, UP, UP_ROW, UNIT_OUT, UNIT_OUT_ROW, UNIT_WIDTH, UNIT_KIND = _arg[1:9]


def make_gated_unit(activation: str) -> Any:
    """The kernel out = activation(gate) * up."""
    function = {"silu": silu_f32x16, "gelu": gelu_f32x16}[activation]

    def gated_unit(op, step, thread, n_threads):
        n, lanes = v.load_i64(step + v.load_i64(op + UNIT_KIND)), (v.load_i64(op + UNIT_WIDTH) + 15) // 16
        for item in range(thread, n * lanes, n_threads):
            row, i = item // lanes, item % lanes * 64
            gate = v.load_f32x16(v.load_i64(op + GATE) + row * v.load_i64(op + GATE_ROW) + i)
            up = v.load_f32x16(v.load_i64(op + UP) + row * v.load_i64(op + UP_ROW) + i)
            v.store_f32x16(v.load_i64(op + UNIT_OUT) + row * v.load_i64(op + UNIT_OUT_ROW) + i, function(gate) * up)

    return gated_unit


# ---- add: x, x_row, y, y_row, out, out_row, width --------------------------------------------------------------------
ADD_X, ADD_X_ROW, ADD_Y, ADD_Y_ROW, ADD_OUT, ADD_OUT_ROW, ADD_WIDTH, ADD_KIND = _arg[1:9]


def add(op, step, thread, n_threads):
    """out = x + y"""
    n, lanes = v.load_i64(step + v.load_i64(op + ADD_KIND)), (v.load_i64(op + ADD_WIDTH) + 15) // 16
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 64
        x = v.load_f32x16(v.load_i64(op + ADD_X) + row * v.load_i64(op + ADD_X_ROW) + i)
        y = v.load_f32x16(v.load_i64(op + ADD_Y) + row * v.load_i64(op + ADD_Y_ROW) + i)
        v.store_f32x16(v.load_i64(op + ADD_OUT) + row * v.load_i64(op + ADD_OUT_ROW) + i, x + y)


# ---- select outputs: x, x_row, out, out_row, width -------------------------------------------------------------------
SELECT_X, SELECT_X_ROW, SELECT_OUT, SELECT_OUT_ROW, SELECT_WIDTH = _arg[1:6]


def select_outputs(op, step, thread, n_threads):
    """out[i] = x[output_rows[i]]"""
    lanes = (v.load_i64(op + SELECT_WIDTH) + 15) // 16
    for i in range(thread, v.load_i64(step + at.N_OUTPUTS), n_threads):
        row = v.load_i32(v.load_i64(step + at.OUTPUT_ROWS) + i * 4)
        x = v.load_i64(op + SELECT_X) + row * v.load_i64(op + SELECT_X_ROW)
        out = v.load_i64(op + SELECT_OUT) + i * v.load_i64(op + SELECT_OUT_ROW)
        for lane in range(lanes):
            v.store_f32x16(out + lane * 64, v.load_f32x16(x + lane * 64))


# ---- embedding rows of float types -----------------------------------------------------------------------------------


@v.forceinline
def _f32_at(p, i):
    return v.load_f32(p + i * 4)


@v.forceinline
def _f16_at(p, i):
    return v.first_lane(v.half_f32x8(v.splat_u16x8(v.load_u16(p + i * 2))))


@v.forceinline
def _bf16_at(p, i):
    return v.f32_from_bits(v.load_u16(p + i * 2) << 16)


FLOAT_AT = {"F32": _f32_at, "F16": _f16_at, "BF16": _bf16_at}


def make_float_embed(quant: str) -> Any:
    """The kernel out[t] = scale * weight[token[t]] for F32, F16 and BF16; EMBED_GROUPS is the width here."""
    value_at = FLOAT_AT[quant]

    def embed(op, step, thread, n_threads):
        factor = v.f32_of(v.load_f64(op + EMBED_SCALE))
        for t in range(thread, v.load_i64(step + at.N_TOKENS), n_threads):
            token = v.load_i32(v.load_i64(step + at.TOKENS) + t * 4)
            w = v.load_i64(op + EMBED_W) + token * v.load_i64(op + EMBED_ROW_NBYTES)
            out = v.load_i64(op + EMBED_OUT) + t * v.load_i64(op + EMBED_OUT_ROW_NBYTES)
            for i in range(v.load_i64(op + EMBED_GROUPS)):
                v.store_f32(out + i * 4, value_at(w, i) * factor)

    return embed


# ---- store keys and values: k, k_row, v, v_row, k_pool, v_pool, n_kv_heads, dim_k, dim_v, window index ---------------
KV_K, KV_K_ROW, KV_V, KV_V_ROW, KV_K_POOL, KV_V_POOL, KV_HEADS, KV_DIM_K, KV_DIM_V, KV_TABLE = _arg[1:11]


@v.forceinline
def half_bits(value):
    """float16 bits of one float32."""
    return v.first_lane(v.round_half_f32x16(v.splat_f32x16(value)))


def store_kv(op, step, thread, n_threads):
    """Round every token's keys and values to float16 and put them where its block table says (layout in kv.py)."""
    n, heads = v.load_i64(step + at.N_TOKENS), v.load_i64(op + KV_HEADS)
    dim_k, dim_v = v.load_i64(op + KV_DIM_K), v.load_i64(op + KV_DIM_V)
    table = v.load_i64(step + at.TABLES) + v.load_i64(op + KV_TABLE) * 16
    blocks, row_length = v.load_i64(table), v.load_i64(table + 8)
    for item in range(thread, n * heads, n_threads):
        t, head = item // heads, item % heads
        position = v.load_i32(v.load_i64(step + at.POSITIONS) + t * 4)
        sequence = v.load_i32(v.load_i64(step + at.SEQUENCES) + t * 4)
        block = v.load_i32(blocks + (sequence * row_length + position // 32) * 4)
        slot = position % 32
        k = v.load_i64(op + KV_K) + t * v.load_i64(op + KV_K_ROW) + head * dim_k * 4
        value = v.load_i64(op + KV_V) + t * v.load_i64(op + KV_V_ROW) + head * dim_v * 4
        k_out = v.load_i64(op + KV_K_POOL) + (block * heads + head) * dim_k * 64 + slot * 2
        v_out = v.load_i64(op + KV_V_POOL) + ((block * heads + head) * 32 + slot) * dim_v * 2
        for d in range(dim_k):
            v.store_u16(k_out + d * 64, half_bits(v.load_f32(k + d * 4)))
        for d in range(dim_v):
            v.store_u16(v_out + d * 2, half_bits(v.load_f32(value + d * 4)))
