"""Branches of adapters: products with matrices of few rows, or few columns, for the tokens that have the adapter.

Weights are packed so that neighbours in memory are neighbours in what is made: A in chunks of 16 rows, (n_in, 16) each,
B in strips of 64 rows, (rank, 64) each. So every number is one chain of fused multiply-adds, or two that are added at
last, and does not depend on which tokens go together.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels.float_matmul import vector_loads
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

TOKENS = 32  # of a piece of work: as many share what is fetched of the weights


@v.forceinline
def _scale_of(step, row_kind, row, adapter):
    """The scale of an adapter for the token of a row."""
    token = row
    if row_kind == at.N_OUTPUTS:
        token = v.load_i32(v.load_i64(step + at.OUTPUT_ROWS) + row * 4) + 0
    scales = v.load_i64(step + at.ADAPTERS) + token * v.load_i64(step + at.ADAPTERS_ROW)
    return v.load_f32(scales + adapter * 4)


@v.forceinline
def _expert_of(ids, ids_row, row, slot):
    """Which of a part's matrices is that of a slot; the only one where there are no experts."""
    expert = 0
    if ids != 0:
        expert = v.load_i32(ids + row * ids_row + slot * 4) + 0
    return expert


def make_adapter_down(quant: str) -> Any:
    """The kernel h = A x of each part, for A in this type."""
    vector_at, _ = vector_loads(quant)

    @v.forceinline
    def times(x, w, n_in, out):
        a = b = v.zero_f32x16()
        for k in range(0, n_in // 2 * 2, 2):
            a = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + k * 4)), vector_at(w, k * 16), a)
            b = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + k * 4 + 4)), vector_at(w, k * 16 + 16), b)
        if n_in % 2 != 0:
            a = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + n_in * 4 - 4)), vector_at(w, n_in * 16 - 16), a)
        v.store_f32x16(out, a + b)

    def adapter_down(op, step, thread, n_threads):
        a = v.arguments(op, at.ADAPTER_DOWN)
        n = v.load_i64(step + a.row_kind)
        n_pieces = (n + TOKENS - 1) // TOKENS
        piece = v.atomic_add(op + at.COUNTER, 1)
        while piece < a.n_chunks * n_pieces:
            chunk, first = a.chunks + piece // n_pieces * at.ADAPTER_NBYTES, piece % n_pieces * TOKENS
            adapter, w = v.load_i64(chunk + at.ADAPTER), v.load_i64(chunk + at.ADAPTER_WEIGHTS)
            out, of_expert = a.out + v.load_i64(chunk + at.ADAPTER_FIRST), v.load_i64(chunk + at.ADAPTER_EXPERT)
            for row in range(first, min(first + TOKENS, n)):
                has = _scale_of(step, a.row_kind, row, adapter) != 0.0
                for slot in range(a.n_used):
                    h = out + row * a.out_row + slot * a.out_slot
                    if has:
                        matrix = w + _expert_of(a.ids, a.ids_row, row, slot) * of_expert
                        times(a.x + row * a.x_row + slot * a.x_slot, matrix, a.n_in, h)
                    else:
                        v.store_f32x16(h, v.zero_f32x16())
            piece = v.atomic_add(op + at.COUNTER, 1)

    return adapter_down


def make_adapter_up(quant: str) -> Any:
    """The kernel out += scale (B h) of each part in turn, for B in this type."""
    vector_at, nbytes = vector_loads(quant)

    @v.forceinline
    def add_64(h, w, rank, scale, out):
        a = b = c = d = v.zero_f32x16()
        for k in range(rank):
            low, i = v.splat_f32x16(v.load_f32(h + k * 4)), k * at.STRIP
            a = v.fma_f32x16(low, vector_at(w, i), a)
            b = v.fma_f32x16(low, vector_at(w, i + 16), b)
            c = v.fma_f32x16(low, vector_at(w, i + 32), c)
            d = v.fma_f32x16(low, vector_at(w, i + 48), d)
        scales = v.splat_f32x16(scale)
        v.store_f32x16(out, v.fma_f32x16(scales, a, v.load_f32x16(out)))
        v.store_f32x16(out + 64, v.fma_f32x16(scales, b, v.load_f32x16(out + 64)))
        v.store_f32x16(out + 128, v.fma_f32x16(scales, c, v.load_f32x16(out + 128)))
        v.store_f32x16(out + 192, v.fma_f32x16(scales, d, v.load_f32x16(out + 192)))

    @v.forceinline
    def add_16(h, w, rank, scale, out):
        a = v.zero_f32x16()
        for k in range(rank):
            a = v.fma_f32x16(v.splat_f32x16(v.load_f32(h + k * 4)), vector_at(w, k * at.STRIP), a)
        v.store_f32x16(out, v.fma_f32x16(v.splat_f32x16(scale), a, v.load_f32x16(out)))

    @v.forceinline
    def add_strip(h, w, rank, scale, out, width):
        if width >= at.STRIP:
            add_64(h, w, rank, scale, out)
        else:
            for i in range(0, width, 16):
                add_16(h, w + i * nbytes, rank, scale, out + i * 4)

    def adapter_up(op, step, thread, n_threads):
        a = v.arguments(op, at.ADAPTER_UP)
        n = v.load_i64(step + a.row_kind)
        n_pieces = (n + TOKENS - 1) // TOKENS
        n_strips = (a.n_out + at.STRIP - 1) // at.STRIP
        piece = v.atomic_add(op + at.COUNTER, 1)
        while piece < n_strips * n_pieces:
            column, first = piece // n_pieces * at.STRIP, piece % n_pieces * TOKENS
            width = min(a.n_out - column, at.STRIP)
            for row in range(first, min(first + TOKENS, n)):
                for part in range(a.parts, a.parts + a.n_parts * at.ADAPTER_NBYTES, at.ADAPTER_NBYTES):
                    scale = _scale_of(step, a.row_kind, row, v.load_i64(part + at.ADAPTER))
                    if scale != 0.0:
                        scale = scale * v.f32_of(v.load_f64(part + at.ADAPTER_FACTOR))
                        rank = v.load_i64(part + at.ADAPTER_RANK)
                        w = v.load_i64(part + at.ADAPTER_WEIGHTS) + column * rank * nbytes
                        for slot in range(a.n_used):
                            expert = _expert_of(a.ids, a.ids_row, row, slot) * v.load_i64(part + at.ADAPTER_EXPERT)
                            h = a.h + row * a.h_row + slot * a.h_slot + v.load_i64(part + at.ADAPTER_FIRST)
                            out = a.out + row * a.out_row + slot * a.out_slot + column * 4
                            add_strip(h, w + expert, rank, scale, out, width)
            piece = v.atomic_add(op + at.COUNTER, 1)

    return adapter_up


def add_direction(op, step, thread, n_threads):
    """x += scale v of each part in turn."""
    a = v.arguments(op, at.ADD_DIRECTION)
    for row in range(thread, v.load_i64(step + a.row_kind), n_threads):
        for part in range(a.parts, a.parts + a.n_parts * at.ADAPTER_NBYTES, at.ADAPTER_NBYTES):
            scale = _scale_of(step, a.row_kind, row, v.load_i64(part + at.ADAPTER))
            if scale != 0.0:
                w = v.load_i64(part + at.ADAPTER_WEIGHTS)
                scales = v.splat_f32x16(scale * v.f32_of(v.load_f64(part + at.ADAPTER_FACTOR)))
                for i in range(0, (a.width + 15) // 16 * 64, 64):
                    x = a.x + row * a.x_row + i
                    v.store_f32x16(x, v.fma_f32x16(scales, v.load_f32x16(w + i), v.load_f32x16(x)))
