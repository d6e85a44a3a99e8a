"""Keys and values into a cache of other types than float16, each token by itself (kernels/cache_types.py).

Two tokens may share a byte of values, and keys a word of fifth bits: a head's tokens are one thread's.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numba import types

from edgellm.formats.levels import IQ4
from edgellm.kernels.cpu.kernels.elementwise import half_bits
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

_store_u8, _store_u32 = v.make_store(types.uint8), v.make_store(types.uint32)


# ---- 32 numbers at x: scale, minimum, what codes are made with -------------------------------------------------------


@v.forceinline
def _reciprocal(d):
    return v.f32_of(1.0) / d if d != v.f32_of(0.0) else v.f32_of(0.0)


@v.forceinline
def _largest(x):
    """The first number with the largest magnitude."""
    found, size = v.load_f32(x), abs(v.load_f32(x))
    for i in range(4, 128, 4):
        value = v.load_f32(x + i)
        if abs(value) > size:
            found, size = value, abs(value)
    return found


@v.forceinline
def _fit_bytes(x):
    d = abs(_largest(x)) / v.f32_of(127.0)
    return d, v.f32_of(0.0), _reciprocal(d)


@v.forceinline
def _code_byte(value, minimum, factor):
    scaled = value * factor
    whole = int(scaled)
    if abs(scaled - np.float32(whole)) >= v.f32_of(0.5):  # halves away from zero
        whole += 1 if scaled > v.f32_of(0.0) else -1
    return whole & 255


def _make_signed(n_bits: int) -> tuple[Any, Any]:
    half = 1 << (n_bits - 1)

    @v.forceinline
    def fit(x):
        d = _largest(x) / v.f32_of(float(-half))
        return d, v.f32_of(0.0), _reciprocal(d)

    @v.forceinline
    def code(value, minimum, factor):
        return min(int(value * factor + v.f32_of(half + 0.5)), 2 * half - 1)

    return fit, code


def _make_affine(n_bits: int) -> tuple[Any, Any]:
    highest = (1 << n_bits) - 1

    @v.forceinline
    def fit(x):
        low = high = v.load_f32(x)
        for i in range(4, 128, 4):
            value = v.load_f32(x + i)
            if value < low:
                low = value
            if value > high:
                high = value
        d = (high - low) / v.f32_of(float(highest))
        return d, low, _reciprocal(d)

    @v.forceinline
    def code(value, minimum, factor):
        return min(int((value - minimum) * factor + v.f32_of(0.5)), highest)

    return fit, code


_LEVELS = tuple(float(level) for level in IQ4)
_MIDDLES = tuple((a + b) / 2 for a, b in itertools.pairwise(IQ4))


@v.forceinline
def _code_nonlinear(value, minimum, factor):
    scaled, index = value * factor, 0
    for middle in _MIDDLES:
        if scaled >= v.f32_of(middle):
            index += 1
    return index


@v.forceinline
def _fit_nonlinear(x):
    factor = _reciprocal(_largest(x) / v.f32_of(_LEVELS[0]))
    sum_qx = sum_q2 = d = v.f32_of(0.0)
    for i in range(0, 128, 4):
        value = v.load_f32(x + i)
        level = v.f32_of(_LEVELS[_code_nonlinear(value, d, factor)])
        weighed = value * value * level
        sum_qx, sum_q2 = sum_qx + weighed * value, sum_q2 + weighed * level
    if sum_q2 > v.f32_of(0.0):
        d = sum_qx / sum_q2
    return d, v.f32_of(0.0), factor


_FITS = {
    "q8_0": (_fit_bytes, _code_byte),
    "q4_0": _make_signed(4),
    "q5_0": _make_signed(5),
    "q4_1": _make_affine(4),
    "q5_1": _make_affine(5),
    "iq4_nl": (_fit_nonlinear, _code_nonlinear),
}


# ---- a token of a head into its block --------------------------------------------------------------------------------


def _make_put_quantized(name: str) -> Any:
    fit, code_of = _FITS[name]
    n_bits = {"q8": 8, "q5": 5}.get(name[:2], 4)
    has_minimum = name.endswith("_1")

    @v.forceinline
    def put_code(code, out, dim, dot, lane, lanes):
        if n_bits == 8:
            _store_u8(out + (dot // 2 * lanes + lane) * 2 + dot % 2, np.uint8(code))
        else:
            quad, high, j = dot // 4, dot % 4 // 2, dot % 2
            place = out + (quad * lanes + lane) * 2 + j
            _store_u8(place, np.uint8((v.load_u8(place) & (240 >> 4 * high)) | (code & 15) << 4 * high))
            if n_bits == 5:
                place = out + dim * 16 + ((quad * (lanes // 16) + lane // 16) * 2 + high) * 4
                bit = lane % 16 * 2 + j
                word = np.int64(v.load_u32(place))
                _store_u32(place, np.uint32((word & ~(1 << bit)) | (code >> 4) << bit))

    @v.forceinline
    def put(x, out, dim, slot, values):
        scales = out + dim * n_bits * 4 + slot * 2
        for g in range(dim // 32):
            d, minimum, factor = fit(x)
            total = v.f32_of(0.0)
            for i in range(32):
                value = v.load_f32(x + i * 4)
                total += abs(value)
                code = code_of(value, minimum, factor)
                if values != 0:
                    put_code(code, out, dim, slot, g * 32 + i, dim)
                else:
                    put_code(code, out, dim, g * 32 + i, slot, 32)
            v.store_u16(scales, half_bits(d + total * v.f32_of(0.0)))  # what is not finite has to stay visible
            if has_minimum:
                v.store_u16(scales + dim * 2, half_bits(minimum))
            x, scales = x + 128, scales + 64

    return put


@v.forceinline
def _bfloat_bits(value):
    bits = np.int64(v.load_u32(value))
    rounded = (bits + 32767 + (bits >> 16 & 1)) >> 16  # to nearest even
    if bits & 0x7FFFFFFF > 0x7F800000:
        rounded = bits >> 16 | 64
    return rounded


def _make_put_floats(name: str) -> Any:
    size = 4 if name == "f32" else 2

    @v.forceinline
    def put(x, out, dim, slot, values):
        for i in range(dim):
            place = out + (i * 32 + slot) * size
            if values != 0:
                place = out + (slot * dim + i) * size
            if name == "f32":
                v.store_f32(place, v.load_f32(x + i * 4))
            elif name == "bf16":
                v.store_u16(place, np.uint16(_bfloat_bits(x + i * 4)))
            else:
                v.store_u16(place, half_bits(v.load_f32(x + i * 4)))

    return put


def make_store(name: str) -> Any:
    """The kernel that puts every token's keys, or values, where its block table says."""
    put = _make_put_quantized(name) if name in _FITS else _make_put_floats(name)

    def store(op, step, thread, n_threads):
        args = v.arguments(op, at.STORE_TYPED)
        table = v.load_i64(step + at.TABLES) + args.table * 16
        blocks, row_length = v.load_i64(table), v.load_i64(table + 8)
        for head in range(thread, args.heads, n_threads):
            for t in range(v.load_i64(step + at.N_TOKENS)):
                position = v.load_i32(v.load_i64(step + at.POSITIONS) + t * 4)
                sequence = v.load_i32(v.load_i64(step + at.SEQUENCES) + t * 4)
                block = v.load_i32(blocks + (sequence * row_length + position // 32) * 4)
                out = args.pool + (block * args.heads + head) * args.head_nbytes
                put(args.x + t * args.x_row + head * args.dim * 4, out, args.dim, position % 32, args.values)

    return store
