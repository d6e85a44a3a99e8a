"""Streams of AltUp, and activations of which few are not 0 (``ops/altup.py``, ``ops/sparsity.py``).

A stream may begin anywhere in a row: 16 columns at once while there are as many, then one by one.
"""

from __future__ import annotations

from edgellm.kernels.cpu.kernels.elementwise import sum_of, sum_of_squared_distances, sum_of_squares
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

LEAST = 1e-5  # as in ops/altup.py


def mix_streams(op, step, thread, n_threads):
    """out_i = x_i + sum over j of coefs[i n + j] x_j"""
    args = v.arguments(op, at.MIX_STREAMS)
    n, width, streams = v.load_i64(step + args.row_kind), args.width, args.streams
    lanes, whole = (width + 15) // 16, width // 16 * 16
    for item in range(thread, n * lanes, n_threads):
        row, first = item // lanes, item % lanes * 16
        x, out, coefs = args.x + row * args.x_row, args.out + row * args.out_row, args.coefs + row * args.coefs_row
        for i in range(streams):
            factors = coefs + i * streams * 4
            if first < whole:
                mixed = v.load_f32x16(x + (i * width + first) * 4)
                for j in range(streams):
                    factor = v.splat_f32x16(v.load_f32(factors + j * 4))
                    mixed = v.fma_f32x16(factor, v.load_f32x16(x + (j * width + first) * 4), mixed)
                v.store_f32x16(out + (i * width + first) * 4, mixed)
            else:
                for k in range(first, width):
                    one = v.load_f32(x + (i * width + k) * 4)
                    for j in range(streams):
                        one = one + v.load_f32(factors + j * 4) * v.load_f32(x + (j * width + k) * 4)
                    v.store_f32(out + (i * width + k) * 4, one)


def add_to_streams(op, step, thread, n_threads):
    """out_i = x_i + (1 + coefs_i) y, from stream ``first`` on; those before it are copied"""
    args = v.arguments(op, at.ADD_TO_STREAMS)
    n, width, streams = v.load_i64(step + args.row_kind), args.width, args.streams
    whole = width // 16 * 16
    for item in range(thread, n * streams, n_threads):
        row, i = item // streams, item % streams
        x, out = args.x + row * args.x_row + i * width * 4, args.out + row * args.out_row + i * width * 4
        y, factor = args.y + row * args.y_row, v.f32_of(1.0)
        if args.coefs != 0:
            factor = factor + v.load_f32(args.coefs + row * args.coefs_row + i * 4)
        if i < args.first:
            factor = v.f32_of(0.0)
        factors = v.splat_f32x16(factor)
        for k in range(0, whole, 16):
            v.store_f32x16(out + k * 4, v.fma_f32x16(factors, v.load_f32x16(y + k * 4), v.load_f32x16(x + k * 4)))
        for k in range(whole, width):
            v.store_f32(out + k * 4, v.load_f32(x + k * 4) + factor * v.load_f32(y + k * 4))


def match_magnitude(op, step, thread, n_threads):
    """out_i = x_i sqrt(mean(of^2) / max(mean(x_i^2), 1e-5))"""
    args = v.arguments(op, at.MATCH_MAGNITUDE)
    n, width, streams = v.load_i64(step + args.row_kind), args.width, args.streams
    whole = width // 16 * 16
    for item in range(thread, n * streams, n_threads):
        row, i = item // streams, item % streams
        x, out = args.x + row * args.x_row + i * width * 4, args.out + row * args.out_row + i * width * 4
        wanted = sum_of_squares(args.of + row * args.of_row, width) / width
        factor = v.f32_of((wanted / max(sum_of_squares(x, width) / width, LEAST)) ** 0.5)
        factors = v.splat_f32x16(factor)
        for k in range(0, whole, 16):
            v.store_f32x16(out + k * 4, v.load_f32x16(x + k * 4) * factors)
        for k in range(whole, width):
            v.store_f32(out + k * 4, v.load_f32(x + k * 4) * factor)


def scale_columns(op, step, thread, n_threads):
    """out = x * w"""
    args = v.arguments(op, at.SCALE_COLUMNS)
    n, lanes = v.load_i64(step + args.row_kind), (args.width + 15) // 16
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 64
        x = v.load_f32x16(args.x + row * args.x_row + i)
        v.store_f32x16(args.out + row * args.out_row + i, x * v.load_f32x16(args.w + i))


def gaussian_top_k(op, step, thread, n_threads):
    """out = max(x - (mean(x) + factor * deviation(x)), 0) for each row"""
    args = v.arguments(op, at.GAUSSIAN_TOP_K)
    n, width, times = v.load_i64(step + args.row_kind), args.width, v.f64_from_bits(args.factor)
    whole = width // 16 * 16
    for row in range(thread, n, n_threads):
        x, out = args.x + row * args.x_row, args.out + row * args.out_row
        mean = v.f32_of(sum_of(x, width) / width)
        deviation = (sum_of_squared_distances(x, width, mean) / width) ** 0.5
        cutoff = v.f32_of(mean + times * deviation)
        cutoffs = v.splat_f32x16(cutoff)
        for k in range(0, whole, 16):
            v.store_f32x16(out + k * 4, v.max_f32x16(v.zero_f32x16(), v.load_f32x16(x + k * 4) - cutoffs))
        for k in range(whole, width):
            v.store_f32(out + k * 4, max(v.load_f32(x + k * 4) - cutoff, v.f32_of(0.0)))
