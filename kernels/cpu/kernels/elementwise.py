"""The small kernels: everything that reads its input once. Rows or heads are dealt to the threads in turn.

Buffer rows are padded to 16 floats, so whole-row loops run over the padding; kernels on heads, whose length may be
odd, finish with a scalar loop.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels import byte_strips
from edgellm.kernels.cpu.kernels.amx_matmul import has_tiles, split_activations
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import (
    clamp_f32x16,
    clamped_swiglu_f32x16,
    gelu_erf_f32x16,
    gelu_f32x16,
    sigmoid_f32x16,
    silu_f32x16,
    softcap_f32x16,
    softplus_f32x16,
)

# ---- RMS norm --------------------------------------------------------------------------------------------------------


@v.forceinline
def sum_of_squares(x, n):
    """sum of x^2"""
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
    args = v.arguments(op, at.RMS_NORM)
    n, width, heads = v.load_i64(step + args.row_kind), args.width, args.heads
    w, eps = args.w, v.f64_from_bits(args.eps)
    whole = width // 16 * 16
    for item in range(thread, n * heads, n_threads):
        row, head = item // heads, item % heads
        x = args.x + row * args.x_row + head * width * 4
        out = args.out + row * args.out_row + head * width * 4
        factor = v.f32_of(1.0 / (sum_of_squares(x, width) / width + eps) ** 0.5)
        factors = v.splat_f32x16(factor)
        for i in range(0, whole, 16):
            v.store_f32x16(out + i * 4, v.load_f32x16(x + i * 4) * factors * v.load_f32x16(w + i * 4))
        for i in range(whole, width):
            v.store_f32(out + i * 4, v.load_f32(x + i * 4) * factor * v.load_f32(w + i * 4))


# ---- layer norm ------------------------------------------------------------------------------------------------------


@v.forceinline
def sum_of(x, n):
    """sum of x"""
    acc, whole = v.zero_f32x16(), n // 16 * 16
    for i in range(0, whole, 16):
        acc = acc + v.load_f32x16(x + i * 4)
    total = v.sum_f32x16(acc)
    for i in range(whole, n):
        total = total + v.load_f32(x + i * 4)
    return total


@v.forceinline
def sum_of_squared_distances(x, n, centre):
    """sum of (x - centre)^2"""
    acc, whole, centres = v.zero_f32x16(), n // 16 * 16, v.splat_f32x16(centre)
    for i in range(0, whole, 16):
        value = v.load_f32x16(x + i * 4) - centres
        acc = v.fma_f32x16(value, value, acc)
    total = v.sum_f32x16(acc)
    for i in range(whole, n):
        v1 = v.load_f32(x + i * 4) - centre
        total = total + v1 * v1
    return total


def layer_norm(op, step, thread, n_threads):
    """out = (x - mean(x)) / sqrt(var(x) + eps) * w + bias for each row."""
    args = v.arguments(op, at.LAYER_NORM)
    n, width, eps = v.load_i64(step + args.row_kind), args.width, v.f64_from_bits(args.eps)
    w, bias, whole = args.w, args.bias, args.width // 16 * 16
    for row in range(thread, n, n_threads):
        x, out = args.x + row * args.x_row, args.out + row * args.out_row
        mean = v.f32_of(sum_of(x, width) / width)
        factor = v.f32_of(1.0 / (sum_of_squared_distances(x, width, mean) / width + eps) ** 0.5)
        means, factors = v.splat_f32x16(mean), v.splat_f32x16(factor)
        for i in range(0, whole, 16):
            y = (v.load_f32x16(x + i * 4) - means) * factors * v.load_f32x16(w + i * 4)
            if bias != 0:
                y = y + v.load_f32x16(bias + i * 4)
            v.store_f32x16(out + i * 4, y)
        for i in range(whole, width):
            y1 = (v.load_f32(x + i * 4) - mean) * factor * v.load_f32(w + i * 4)
            if bias != 0:
                y1 = y1 + v.load_f32(bias + i * 4)
            v.store_f32(out + i * 4, y1)


# ---- quantize activations --------------------------------------------------------------------------------------------
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
    """32 float32 at x to int16 at out; scale and, behind digits, two sums go to arrays ``next_array`` bytes apart."""
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
    v.store_i32(scale_at + 2 * next_array, int(total))
    v.store_i32(scale_at + 3 * next_array, int(first))


_to_bytes, _from_bytes = v.make_convert(v.i32x8, v.i8x8, "trunc"), v.make_convert(v.i8x8, v.i32x8, "sext")
_store_bytes, _eight_bits = v.make_store(v.i8x8), v.make_const(v.i32x8, 8)


@v.forceinline
def _store_digits(sums, out):
    """The sums of eight groups, below 2^23, as signed bytes: eight lowest, eight next, eight highest."""
    rest = v.load_i32x8(sums)
    for digit in range(3):
        low = _to_bytes(rest)
        _store_bytes(out + digit * 8, low)
        rest = (rest - _from_bytes(low)) >> _eight_bits()


@v.forceinline
def _group_with(group, pair):
    """The group that a pair is in, from ``group`` on, and how many are."""
    while pair >= v.load_i32(group + at.GROUP_FIRST) + v.load_i32(group + at.GROUP_SIZE):
        group += at.EXPERTS_GROUP_NBYTES
    return group, v.load_i32(group + at.GROUP_SIZE)


def quantize(op, step, thread, n_threads):
    """Rows of float32 to int16 with one scale for a run of groups of 32, one or eight: q = round(x / scale).

    A row of the result: for every group its 16 even, then its 16 odd values; then the four arrays that layout.py draws.
    For tiles, and where Arm multiplies bytes, the int16 are split into bytes at last. With ``pairs`` the rows are made
    in that order, and are for tiles where the group has pairs enough.
    """
    args = v.arguments(op, at.QUANTIZE)
    n, groups, run = v.load_i64(step + args.row_kind) * args.slots, args.n_groups, args.run
    runs = groups // run
    parts = 1  # rows are dealt whole, but for a few tokens in parts
    if n < 4 * n_threads:
        parts = n_threads
    share = (runs + 2 * parts - 1) // (2 * parts) * 2  # even: tiles split groups by pairs
    n_alike, group_of_pairs = n, args.groups + at.GROUPS
    for item in range(thread, n * parts, n_threads):
        row, first = item // parts, item % parts * share
        x = args.x + row * args.x_row
        if args.pairs != 0:
            pair = v.load_i32(args.pairs + row * 4)
            x = args.x + pair // args.slots * args.x_row + pair % args.slots * args.x_slot
            if has_tiles() != 0:
                group_of_pairs, n_alike = _group_with(group_of_pairs, row)
        out = args.out + row * args.out_row
        for start in range(first * run, min(first + share, runs) * run, run):
            scale = _scale_of_run(x + start * 128, run * 32)
            factor = v.splat_f32x16(v.f32_of(1.0) / max(scale, v.f32_of(_tiny)))
            for group in range(start, start + run):
                at_group = out + groups * 64 + group * 4
                _quantize_group(x + group * 128, scale, factor, out + group * 64, at_group, groups * 4)
            if run > 1:
                at_run = out + groups * 64 + start * 4
                _store_digits(at_run + 2 * groups * 4, at_run + groups * 4)
        if has_tiles() != 0 and n_alike >= at.TILES_FROM:
            split_activations(out, first * run, min(first + share, runs) * run, groups)
        if byte_strips.splits_activations() != 0:
            byte_strips.split_activations(out, first * run, min(first + share, runs) * run)


# ---- rotary embedding ------------------------------------------------------------------------------------------------


def rope(op, step, thread, n_threads):
    """Rotate pairs of dimensions of every head by the angles of the token's position, in place."""
    args = v.arguments(op, at.ROPE)
    n, heads, half = v.load_i64(step + at.N_TOKENS), args.heads, args.half
    tables, adjacent = v.load_i64(step + at.ROPES) + args.index * 16, args.adjacent
    first, second = 4 + 4 * adjacent, 4 * half * (1 - adjacent) + 4 * adjacent
    for item in range(thread, n * heads, n_threads):
        row, head = item // heads, item % heads
        x = args.x + row * args.x_row + head * args.head_dim * 4
        cos, sin = v.load_i64(tables) + row * half * 4, v.load_i64(tables + 8) + row * half * 4
        for i in range(half):
            p = x + i * first
            a, b, c, s = v.load_f32(p), v.load_f32(p + second), v.load_f32(cos + i * 4), v.load_f32(sin + i * 4)
            v.store_f32(p, a * c - b * s)
            v.store_f32(p + second, a * s + b * c)


# ---- a rotation without angles ---------------------------------------------------------------------------------------

_butterflies = [v.make_shuffle(v.f32x16, [lane ^ k for lane in range(16)]) for k in (1, 2, 4, 8)]
_swap1, _swap2, _swap4, _swap8 = _butterflies
_signs = [v.make_constants(v.f32x16, [-1.0 if lane & k else 1.0 for lane in range(16)]) for k in (1, 2, 4, 8)]
_sign1, _sign2, _sign4, _sign8 = _signs


def hadamard(op, step, thread, n_threads):
    """Each ``size`` numbers times the orthogonal Walsh-Hadamard matrix, in place: sums and differences of neighbours 1,
    2, 4 ... apart."""
    args = v.arguments(op, at.HADAMARD)
    n, size, scale = v.load_i64(step + args.row_kind), args.size, v.splat_f32x16(v.f32_of(v.f64_from_bits(args.scale)))
    for item in range(thread, n * args.groups, n_threads):
        x = args.x + item // args.groups * args.x_row + item % args.groups * size * 4
        for i in range(0, size * 4, 64):
            a = v.load_f32x16(x + i)
            a = _swap1(a, a) + a * _sign1()
            a = _swap2(a, a) + a * _sign2()
            a = _swap4(a, a) + a * _sign4()
            v.store_f32x16(x + i, _swap8(a, a) + a * _sign8())
        half = 64
        while half < size * 4:
            for first in range(0, size * 4, 2 * half):
                for i in range(x + first, x + first + half, 64):
                    a, b = v.load_f32x16(i), v.load_f32x16(i + half)
                    v.store_f32x16(i, a + b)
                    v.store_f32x16(i + half, a - b)
            half *= 2
        for i in range(0, size * 4, 64):
            v.store_f32x16(x + i, v.load_f32x16(x + i) * scale)


# ---- gated unit ------------------------------------------------------------------------------------------------------


def _make_unit(function: Any) -> Any:
    @v.forceinline
    def unit(gate, up):
        return function(gate) * up

    return unit


_UNITS = {
    "silu": _make_unit(silu_f32x16),
    "gelu": _make_unit(gelu_f32x16),
    "gelu_erf": _make_unit(gelu_erf_f32x16),
    "clamped_swiglu": clamped_swiglu_f32x16,
}


def make_gated_unit(activation: str) -> Any:
    """The kernel out = activation(gate) * up."""
    unit = _UNITS[activation]

    def gated_unit(op, step, thread, n_threads):
        args = v.arguments(op, at.GATED_UNIT)
        n, lanes = v.load_i64(step + args.row_kind), (args.width + 15) // 16
        for item in range(thread, n * lanes, n_threads):
            row, i = item // lanes, item % lanes * 64
            gate = v.load_f32x16(args.gate + row * args.gate_row + i)
            up = v.load_f32x16(args.up + row * args.up_row + i)
            v.store_f32x16(args.out + row * args.out_row + i, unit(gate, up))

    return gated_unit


@v.forceinline
def _relu_squared(x):
    positive = v.max_f32x16(v.zero_f32x16(), x)
    return positive * positive


_CURVES = {"gelu": gelu_f32x16, "gelu_erf": gelu_erf_f32x16, "relu_squared": _relu_squared}


def make_activate(activation: str) -> Any:
    """The kernel out = activation(x)."""
    curve = _CURVES[activation]

    def activate(op, step, thread, n_threads):
        args = v.arguments(op, at.ACTIVATE)
        n, lanes = v.load_i64(step + args.row_kind), (args.width + 15) // 16
        for item in range(thread, n * lanes, n_threads):
            row, i = item // lanes, item % lanes * 64
            v.store_f32x16(args.out + row * args.out_row + i, curve(v.load_f32x16(args.x + row * args.x_row + i)))

    return activate


# ---- add -------------------------------------------------------------------------------------------------------------


def add(op, step, thread, n_threads):
    """out = x + y"""
    args = v.arguments(op, at.ADD)
    n, lanes = v.load_i64(step + args.row_kind), (args.width + 15) // 16
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 64
        x = v.load_f32x16(args.x + row * args.x_row + i)
        y = v.load_f32x16(args.y + row * args.y_row + i)
        v.store_f32x16(args.out + row * args.out_row + i, x + y)


def add_scaled(op, step, thread, n_threads):
    """out = x + scale * y"""
    args = v.arguments(op, at.ADD)
    n, lanes = v.load_i64(step + args.row_kind), (args.width + 15) // 16
    scale = v.splat_f32x16(v.f32_of(v.f64_from_bits(args.scale)))
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 64
        x = v.load_f32x16(args.x + row * args.x_row + i)
        y = v.load_f32x16(args.y + row * args.y_row + i)
        v.store_f32x16(args.out + row * args.out_row + i, v.fma_f32x16(scale, y, x))


def add_rows(op, step, thread, n_threads):
    """out[t] = x[t] + w[number of t], of the first row where ``numbers`` is below 0"""
    args = v.arguments(op, at.ADD_ROWS)
    lanes, numbers = (args.width + 15) // 16, v.load_i64(step + max(args.numbers, 0))
    for t in range(thread, v.load_i64(step + at.N_TOKENS), n_threads):
        w = args.w
        if args.numbers >= 0:
            w += v.load_i32(numbers + t * 4) * args.w_row
        for i in range(0, lanes * 64, 64):
            x = v.load_f32x16(args.x + t * args.x_row + i)
            v.store_f32x16(args.out + t * args.out_row + i, x + v.load_f32x16(w + i))


def scale(op, step, thread, n_threads):
    """out = factor * x"""
    args = v.arguments(op, at.SCALE)
    n, lanes = v.load_i64(step + args.row_kind), (args.width + 15) // 16
    factor = v.splat_f32x16(v.f32_of(v.f64_from_bits(args.factor)))
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 64
        v.store_f32x16(args.out + row * args.out_row + i, v.load_f32x16(args.x + row * args.x_row + i) * factor)


# ---- gates and caps --------------------------------------------------------------------------------------------------


_GATES = {"sigmoid": sigmoid_f32x16, "softplus": softplus_f32x16}


def make_gate(kind: str) -> Any:
    """The kernel out = x * curve(gate), a value of the gate for ``span`` neighbours of x."""
    curve = _GATES[kind]

    def gate(op, step, thread, n_threads):
        args = v.arguments(op, at.GATE)
        n, span = v.load_i64(step + args.row_kind), args.span
        if span == 1:
            lanes = (args.width + 15) // 16
            for item in range(thread, n * lanes, n_threads):
                row, i = item // lanes, item % lanes * 64
                factor = curve(v.load_f32x16(args.gate + row * args.gate_row + i))
                v.store_f32x16(args.out + row * args.out_row + i, v.load_f32x16(args.x + row * args.x_row + i) * factor)
        else:
            n_gates, whole = args.width // span, span // 16 * 16
            for item in range(thread, n * n_gates, n_threads):
                row, number = item // n_gates, item % n_gates
                factor = curve(v.splat_f32x16(v.load_f32(args.gate + row * args.gate_row + number * 4)))
                x = args.x + row * args.x_row + number * span * 4
                out = args.out + row * args.out_row + number * span * 4
                for i in range(0, whole, 16):
                    v.store_f32x16(out + i * 4, v.load_f32x16(x + i * 4) * factor)
                for i in range(whole, span):
                    v.store_f32(out + i * 4, v.load_f32(x + i * 4) * v.first_lane(factor))

    return gate


@v.forceinline
def _copy(source, target, n):
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        v.store_f32x16(target + i * 4, v.load_f32x16(source + i * 4))
    for i in range(whole, n):
        v.store_f32(target + i * 4, v.load_f32(source + i * 4))


def split_heads(op, step, thread, n_threads):
    """Heads [first | second] to heads of two buffers."""
    args = v.arguments(op, at.SPLIT_HEADS)
    n, first_dim, second_dim = v.load_i64(step + args.row_kind), args.first_dim, args.second_dim
    for item in range(thread, n * args.heads, n_threads):
        row, head = item // args.heads, item % args.heads
        x = args.x + row * args.x_row + head * (first_dim + second_dim) * 4
        _copy(x, args.first + row * args.first_row + head * first_dim * 4, first_dim)
        _copy(x + first_dim * 4, args.second + row * args.second_row + head * second_dim * 4, second_dim)


def join_heads(op, step, thread, n_threads):
    """Heads of two buffers to heads [first | second]."""
    args = v.arguments(op, at.JOIN_HEADS)
    n, first_dim, second_dim = v.load_i64(step + args.row_kind), args.first_dim, args.second_dim
    for item in range(thread, n * args.heads, n_threads):
        row, head = item // args.heads, item % args.heads
        out = args.out + row * args.out_row + head * (first_dim + second_dim) * 4
        _copy(args.first + row * args.first_row + head * first_dim * 4, out, first_dim)
        _copy(args.second + row * args.second_row + head * second_dim * 4, out + first_dim * 4, second_dim)


_CAPS = {"softcap": softcap_f32x16, "clamp": clamp_f32x16}


def make_cap(kind: str) -> Any:
    """The kernel out = x brought between -cap and cap."""
    capped = _CAPS[kind]

    def cap(op, step, thread, n_threads):
        args = v.arguments(op, at.CAP)
        n, lanes = v.load_i64(step + args.row_kind), (args.width + 15) // 16
        caps = v.splat_f32x16(v.f32_of(v.f64_from_bits(args.cap)))
        for item in range(thread, n * lanes, n_threads):
            row, i = item // lanes, item % lanes * 64
            x = v.load_f32x16(args.x + row * args.x_row + i)
            v.store_f32x16(args.out + row * args.out_row + i, capped(x, caps))

    return cap


# ---- select outputs --------------------------------------------------------------------------------------------------


def select_outputs(op, step, thread, n_threads):
    """out[i] = x[output_rows[i]]"""
    args = v.arguments(op, at.SELECT_OUTPUTS)
    lanes = (args.width + 15) // 16
    for i in range(thread, v.load_i64(step + at.N_OUTPUTS), n_threads):
        row = v.load_i32(v.load_i64(step + at.OUTPUT_ROWS) + i * 4)
        x = args.x + row * args.x_row
        out = args.out + i * args.out_row
        for lane in range(lanes):
            v.store_f32x16(out + lane * 64, v.load_f32x16(x + lane * 64))


# ---- store keys and values -------------------------------------------------------------------------------------------


@v.forceinline
def half_bits(value):
    """float16 bits of one float32."""
    return v.first_lane(v.round_half_f32x16(v.splat_f32x16(value)))


def store_kv(op, step, thread, n_threads):
    """Round every token's keys and values to float16 and put them where its block table says (layout in kv.py)."""
    args = v.arguments(op, at.STORE_KV)
    n, heads, dim_k, dim_v = v.load_i64(step + at.N_TOKENS), args.heads, args.dim_k, args.dim_v
    table = v.load_i64(step + at.TABLES) + args.table * 16
    blocks, row_length = v.load_i64(table), v.load_i64(table + 8)
    for item in range(thread, n * heads, n_threads):
        t, head = item // heads, item % heads
        position = v.load_i32(v.load_i64(step + at.POSITIONS) + t * 4)
        sequence = v.load_i32(v.load_i64(step + at.SEQUENCES) + t * 4)
        block = v.load_i32(blocks + (sequence * row_length + position // 32) * 4)
        slot = position % 32
        k = args.k + t * args.k_row + head * dim_k * 4
        values = args.v + t * args.v_row + head * dim_v * 4
        k_out = args.k_pool + (block * heads + head) * dim_k * 64 + slot * 2
        v_out = args.v_pool + ((block * heads + head) * 32 + slot) * dim_v * 2
        for d in range(dim_k):
            v.store_u16(k_out + d * 64, half_bits(v.load_f32(k + d * 4)))
        for d in range(dim_v):
            v.store_u16(v_out + d * 2, half_bits(v.load_f32(values + d * 4)))
