"""Keys and values in fewer bits (kernels/cache_types.py): what stores them, scores queries and weighs values.

Codes are never made floats. A query becomes int16 under one scale, and so do, for each 32 positions, a row's weights
times the scales of the values. Then a product is what the integer products of weights are: two codes of 16 lanes are
widened once for all rows, and one instruction multiplies and adds them. Sums of 32 are exact in int32.

A row's weights are scaled by the largest of them in the block, and values by the largest scale of the positions that
the row sees: neither depends on the batch, nor on what lies behind the text in its last block.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgellm.formats.levels import IQ4
from edgellm.kernels.cpu.kernels.attention import (
    BLOCK,
    CUT_ROW,
    block_of,
    fetch_bytes,
    halves_at,
    lane_numbers,
    last_seen,
    make_rows_at_once,
    make_score_cut,
    make_weigh_cut,
    q_at,
    rows_of_head,
    state_nbytes_of,
)
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

_query_nbytes, _relative_nbytes = v.forceinline(at.query_nbytes), v.forceinline(at.relative_nbytes)

LARGEST = 32767.0
TINY = 1e-34  # a scale below this is zero: its reciprocal would be infinite
_magic = v.make_const(v.f32x16, 12582912.0)  # 1.5 * 2^23

_i8x32 = v.Vec(types.int8, 32)
_load_i8x32 = v.make_load(_i8x32)
_sign_extend, widen_bytes = v.make_convert(_i8x32, v.i16x32, "sext"), v.make_convert(v.u8x32, v.i16x32, "zext")
_as_signed = v.make_convert(v.u8x32, _i8x32, "bitcast")
_nibble, _four = v.make_const(v.u8x32, 15), v.make_const(v.u8x32, 4)
_iq4 = v.make_constants(v.u8x16, [level & 255 for level in IQ4])


@intrinsic
def _fifth_bits(typing_context, word):
    """u8x32: 16 where a bit of the word is set."""

    def codegen(context, builder, sig, args):
        mask = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 32))
        kind = v.u8x32.ir
        return builder.select(mask, ir.Constant(kind, [16] * 32), ir.Constant(kind, [0] * 32))

    return v.u8x32(types.uint32), codegen


# ---- two dots of 16 lanes as int16 -----------------------------------------------------------------------------------


@v.forceinline
def _two_bytes(line, step, bits):
    return _sign_extend(_load_i8x32(line)), _sign_extend(_load_i8x32(line + step))


def _make_two_nibbles(name: str) -> Any:
    """Low and high nibbles of a line as int16 levels; ``bits`` is where their fifth bits are."""
    has_fifth, centre = name in ("q5_0", "q5_1"), {"q4_0": 8, "q5_0": 16}.get(name, 0)
    middle = v.make_const(v.i16x32, centre)

    @v.forceinline
    def two(line, step, bits):
        both = v.load_u8x32(line)
        low, high = both & _nibble(), both >> _four()
        if name == "iq4_nl":
            first = _sign_extend(_as_signed(v.lookup_u8x32(_iq4(), low)))
            second = _sign_extend(_as_signed(v.lookup_u8x32(_iq4(), high)))
        elif has_fifth:
            first = widen_bytes(low | _fifth_bits(v.load_u32(bits))) - middle()
            second = widen_bytes(high | _fifth_bits(v.load_u32(bits + 4))) - middle()
        else:
            first, second = widen_bytes(low) - middle(), widen_bytes(high) - middle()
        return first, second

    return two


@v.forceinline
def pair_at(x):
    """Two int16 in every pair of lanes."""
    return v.i32x16_as_i16x32(v.splat_i32x16(v.load_i32(x)))


def _make_dots_of(n: int, two: Any, lines: int, most: int) -> Any:
    """Sums over 32 dots of codes of 16 lanes times int16 x, for n rows; ``lines`` hold two dots of each lane."""
    apart = most > 3  # sums of the two, where there are registers for them: a sum waits four cycles for the last

    @v.forceinline
    def dots(line, step, bits, bits_step, x0, x1, x2, x3):
        a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = v.zero_i32x16()
        for i in range(0, 64, 8):
            first, second = two(line, step, bits)
            line, bits = line + lines * step, bits + bits_step
            a0 = v.madd_i16(a0, pair_at(x0 + i), first)
            if apart:
                a1 = v.madd_i16(a1, pair_at(x0 + i + 4), second)
            else:
                a0 = v.madd_i16(a0, pair_at(x0 + i + 4), second)
            if n > 1:
                b0 = v.madd_i16(b0, pair_at(x1 + i), first)
                if apart:
                    b1 = v.madd_i16(b1, pair_at(x1 + i + 4), second)
                else:
                    b0 = v.madd_i16(b0, pair_at(x1 + i + 4), second)
            if n > 2:
                c0 = v.madd_i16(c0, pair_at(x2 + i), first)
                if apart:
                    c1 = v.madd_i16(c1, pair_at(x2 + i + 4), second)
                else:
                    c0 = v.madd_i16(c0, pair_at(x2 + i + 4), second)
            if n > 3:
                d0 = v.madd_i16(d0, pair_at(x3 + i), first)
                if apart:
                    d1 = v.madd_i16(d1, pair_at(x3 + i + 4), second)
                else:
                    d0 = v.madd_i16(d0, pair_at(x3 + i + 4), second)
        return v.to_f32x16(a0 + a1), v.to_f32x16(b0 + b1), v.to_f32x16(c0 + c1), v.to_f32x16(d0 + d1)

    return dots


def _make_dots(name: str, most: int) -> Any:
    """dots(n, ...) of up to ``most`` rows."""
    two, lines = (_two_bytes, 2) if name == "q8_0" else (_make_two_nibbles(name), 1)
    dots_of_one, dots_of_two, dots_of_three, dots_of_four = (_make_dots_of(n, two, lines, most) for n in (1, 2, 3, 4))

    @v.forceinline
    def dots(n, line, step, bits, bits_step, x0, x1, x2, x3):
        if most > 3 and n == 4:
            a, b, c, d = dots_of_four(line, step, bits, bits_step, x0, x1, x2, x3)
        elif n == 3:
            a, b, c, d = dots_of_three(line, step, bits, bits_step, x0, x1, x2, x2)
        elif n == 2:
            a, b, c, d = dots_of_two(line, step, bits, bits_step, x0, x1, x1, x1)
        else:
            a, b, c, d = dots_of_one(line, step, bits, bits_step, x0, x0, x0, x0)
        return a, b, c, d

    return dots


# ---- float32 to int16 ------------------------------------------------------------------------------------------------


@v.forceinline
def rounded(x):
    """float32 below 2^22 to the nearest int32."""
    return v.truncate_f32x16((x + _magic()) - _magic())


@v.forceinline
def _quantize_query(x, dim, out):
    """A query as layout.query_nbytes has it; its scale is NaN if a number is not finite."""
    largest = total = v.zero_f32x16()
    for i in range(0, dim * 4, 64):
        value = v.abs_f32x16(v.load_f32x16(x + i))
        largest, total = v.max_f32x16(largest, value), total + value
    scale = v.maximum_f32x16(largest) * v.f32_of(1.0 / LARGEST)
    factor, sums = v.splat_f32x16(v.f32_of(1.0) / max(scale, v.f32_of(TINY))), out + 64 + dim * 2
    v.store_f32(out, scale + v.sum_f32x16(total) * v.f32_of(0.0))
    for i in range(0, dim, 32):
        first, second = rounded(v.load_f32x16(x + i * 4) * factor), rounded(v.load_f32x16(x + i * 4 + 64) * factor)
        v.store_i16x16(out + 64 + i * 2, v.narrow_i32x16(first))
        v.store_i16x16(out + 96 + i * 2, v.narrow_i32x16(second))
        v.store_f32(sums + i // 8, v.sum_f32x16(v.to_f32x16(first) + v.to_f32x16(second)))


@v.forceinline
def _weights_of_row(p, out):
    """32 weights by the largest of them, as float32 up to LARGEST; the largest behind them."""
    first, second = v.load_f32x16(p), v.load_f32x16(p + 64)
    largest = v.maximum_f32x16(v.max_f32x16(first, second))
    factor = v.splat_f32x16(v.f32_of(LARGEST) / max(largest, v.f32_of(TINY)))
    v.store_f32x16(out, first * factor)
    v.store_f32x16(out + 64, second * factor)
    v.store_f32(out + 192, largest * v.f32_of(1.0 / LARGEST))


@v.forceinline
def _seen_of(p, low, high, half):
    """16 float16, zero outside [low, high]."""
    index = lane_numbers() + v.splat_f32x16(v.f32_of(float(half * 16)))
    lowest, highest = v.splat_f32x16(v.f32_of(float(low))), v.splat_f32x16(v.f32_of(float(high)))
    x = v.where_less(index, lowest, v.zero_f32x16(), halves_at(p + half * 32))
    return v.where_less(highest, index, v.zero_f32x16(), x)


@v.forceinline
def _relative_scales(scales, minima, dim, low, high, out):
    """For each 32 dimensions: the scales of 32 positions by the largest of them, minima, the largest.

    Those of positions outside [low, high] are zero.
    """
    for g in range(dim // 32):
        first, second = _seen_of(scales + g * 64, low, high, 0), _seen_of(scales + g * 64, low, high, 1)
        size, other = v.abs_f32x16(first), v.abs_f32x16(second)
        largest = v.maximum_f32x16(v.max_f32x16(size, other))
        factor = v.splat_f32x16(v.f32_of(1.0) / max(largest, v.f32_of(TINY)))
        v.store_f32x16(out, first * factor)
        v.store_f32x16(out + 64, second * factor)
        if minima != 0:
            v.store_f32x16(out + 128, _seen_of(minima + g * 64, low, high, 0))
            v.store_f32x16(out + 192, _seen_of(minima + g * 64, low, high, 1))
        v.store_f32(out + 256, largest + v.sum_f32x16(size + other) * v.f32_of(0.0))  # NaN has to stay visible
        out += 320


@v.forceinline
def _share(nbytes, n):
    """Bytes of whole cache lines in one of n parts."""
    return (nbytes + 64 * n - 1) // (64 * n) * 64


# ---- scores ----------------------------------------------------------------------------------------------------------


def _places(name: str) -> tuple[int, int, int]:
    """In a block, for each dimension: bytes before the fifth bits, before the scales, before the minima."""
    bits = {"q8": 8, "q5": 5}.get(name[:2], 4)
    return 16, bits * 4, bits * 4 + 2


def _make_scores(name: str, most: int) -> Any:
    """scores(...): up to ``most`` rows of queries times the keys of 16 positions."""
    dots, has_minimum, line = _make_dots(name, most), name.endswith("_1"), 64
    group_nbytes = 16 * line if name == "q8_0" else 8 * line

    @v.forceinline
    def scores(n, dim, keys, bits, scales, minima, q, q_row):
        a = b = c = d = v.zero_f32x16()
        q1, q2, q3, sums = q + q_row, q + 2 * q_row, q + 3 * q_row, 64 + dim * 2
        for g in range(dim // 32):
            x = 64 + g * 64
            ia, ib, ic, id = dots(n, keys, line, bits, 16, q + x, q1 + x, q2 + x, q3 + x)
            scale = halves_at(scales + g * 64)
            a, b = v.fma_f32x16(ia, scale, a), v.fma_f32x16(ib, scale, b)
            c, d = v.fma_f32x16(ic, scale, c), v.fma_f32x16(id, scale, d)
            if has_minimum:
                m, of = halves_at(minima + g * 64), sums + g * 4
                a = v.fma_f32x16(v.splat_f32x16(v.load_f32(q + of)), m, a)
                if n > 1:
                    b = v.fma_f32x16(v.splat_f32x16(v.load_f32(q1 + of)), m, b)
                if n > 2:
                    c = v.fma_f32x16(v.splat_f32x16(v.load_f32(q2 + of)), m, c)
                if n > 3:
                    d = v.fma_f32x16(v.splat_f32x16(v.load_f32(q3 + of)), m, d)
            keys, bits = keys + group_nbytes, bits + 128
        return a, b, c, d

    return scores


def _make_score_quantized(name: str, most: int) -> Any:
    scores, rows_at_once = _make_scores(name, most), make_rows_at_once(most)
    bits_at, scales_at, minima_at = _places(name)

    @v.forceinline
    def put(out, total, q, scale):
        v.store_f32x16(out, total * v.splat_f32x16(v.load_f32(q) * scale))

    def score(op, step, cut, work):
        """Scores of all rows of a part in the blocks of one cut; fetches the cut's values."""
        args, part, weights = (
            v.arguments(op, at.ATTENTION),
            v.load_i64(cut + at.TYPED_PART),
            v.load_i64(cut + at.TYPED_WEIGHTS),
        )
        first_block, last_block = v.load_i64(cut + at.TYPED_FIRST), v.load_i64(cut + at.TYPED_LAST)
        dim, n_rows, first = args.dim_k, rows_of_head(args, part), v.load_i32(part)
        group = args.n_heads // args.n_kv_heads
        scale, q_row, share = v.f32_of(v.f64_from_bits(args.scale)), _query_nbytes(dim), _share(args.v_head, 2)
        first_head, n_heads = v.load_i32(part + at.PART_HEAD), v.load_i32(part + at.PART_HEADS)
        for i in range(n_rows * n_heads):
            _quantize_query(q_at(args, first, first_head + i // n_rows, i % n_rows, group), dim, work + i * q_row)
        for block in range(first_block, last_block + 1):
            where, out = block_of(args, step, part, block) + first_head, weights + (block - first_block) * BLOCK * 4
            q = work
            for head in range(where, where + n_heads):
                keys, ahead, row = args.k_pool + head * args.k_head, args.v_pool + head * args.v_head, 0
                while row < n_rows:
                    n = rows_at_once(n_rows - row)
                    for half in range(2):
                        if row == 0:
                            fetch_bytes(ahead + half * share, share)
                        bits, scales = keys + dim * bits_at + half * 8, keys + dim * scales_at + half * 32
                        minima = keys + dim * minima_at + half * 32
                        a, b, c, d = scores(n, dim, keys + half * 32, bits, scales, minima, q, q_row)
                        put(out + half * 64, a, q, scale)
                        if n > 1:
                            put(out + CUT_ROW + half * 64, b, q + q_row, scale)
                        if n > 2:
                            put(out + 2 * CUT_ROW + half * 64, c, q + 2 * q_row, scale)
                        if n > 3:
                            put(out + 3 * CUT_ROW + half * 64, d, q + 3 * q_row, scale)
                    row, out, q = row + n, out + n * CUT_ROW, q + n * q_row

    return score


# ---- weighted sums ---------------------------------------------------------------------------------------------------


def _make_weigh_rows(name: str, most: int) -> Any:
    """weigh_rows(...): add the values of a block, times the weights of n rows, to their states."""
    dots, has_minimum = _make_dots(name, most), name.endswith("_1")

    @v.forceinline
    def shared_minimum(w, relative):
        """Sum of weights times minima, of all 32 dimensions the same."""
        total = v.load_f32x16(w) * v.load_f32x16(relative + 128)
        return v.sum_f32x16(v.fma_f32x16(v.load_f32x16(w + 64), v.load_f32x16(relative + 192), total)) * v.load_f32(
            w + 192
        )

    @v.forceinline
    def add(to, codes, w, relative, extra):
        scale = v.splat_f32x16(v.load_f32(w + 192) * v.load_f32(relative + 256))
        total = v.fma_f32x16(codes, scale, v.load_f32x16(to))
        if has_minimum:
            total = total + v.splat_f32x16(extra)
        v.store_f32x16(to, total)

    @v.forceinline
    def weigh_rows(n, dim, values, bits, w, relative, relative_row, state, state_nbytes, ahead, share):
        step, row = dim * 2, at.TYPED_WEIGHT_ROW
        w1, w2, w3 = w + row, w + 2 * row, w + 3 * row
        for g in range(dim // 32):
            fetch_bytes(ahead + g * share, share)
            for i in range(n):
                of, by = w + i * row, relative + i * relative_row
                first = rounded(v.load_f32x16(of) * v.load_f32x16(by))
                second = rounded(v.load_f32x16(of + 64) * v.load_f32x16(by + 64))
                v.store_i16x16(of + 128, v.narrow_i32x16(first))
                v.store_i16x16(of + 160, v.narrow_i32x16(second))
            r1, r2, r3 = relative + relative_row, relative + 2 * relative_row, relative + 3 * relative_row
            ma = mb = mc = md = v.f32_of(0.0)
            if has_minimum:
                ma = shared_minimum(w, relative)
                if n > 1:
                    mb = shared_minimum(w1, r1)
                if n > 2:
                    mc = shared_minimum(w2, r2)
                if n > 3:
                    md = shared_minimum(w3, r3)
            for half in range(2):
                line, word, to = values + g * 64 + half * 32, bits + g * 16 + half * 8, state + 64 + g * 128 + half * 64
                a, b, c, d = dots(n, line, step, word, dim // 2, w + 128, w1 + 128, w2 + 128, w3 + 128)
                add(to, a, w, relative, ma)
                if n > 1:
                    add(to + state_nbytes, b, w1, r1, mb)
                if n > 2:
                    add(to + 2 * state_nbytes, c, w2, r2, mc)
                if n > 3:
                    add(to + 3 * state_nbytes, d, w3, r3, md)
            relative += 320

    return weigh_rows


@v.forceinline
def _sight(args, step, part, row):
    """First and last position that a row sees."""
    token = (v.load_i32(part) + row // (args.n_heads // args.n_kv_heads)) * 4
    low = 0
    if args.window > 0:
        low = max(0, v.load_i32(v.load_i64(step + at.POSITIONS) + token) - args.window + 1)
    return low, last_seen(args, part, v.load_i32(v.load_i64(step + at.SEES) + token))


def _make_weigh_quantized(name: str, most: int) -> Any:
    weigh_rows, rows_at_once = _make_weigh_rows(name, most), make_rows_at_once(most)
    bits_at, scales_at, minima_at = _places(name)
    has_minimum = int(name.endswith("_1"))

    def weigh(op, step, cut, work):
        """Weighted sums of a cut's values; fetches the keys of what comes next."""
        args, part, weights = (
            v.arguments(op, at.ATTENTION),
            v.load_i64(cut + at.TYPED_PART),
            v.load_i64(cut + at.TYPED_WEIGHTS),
        )
        first_block, last_block = v.load_i64(cut + at.TYPED_FIRST), v.load_i64(cut + at.TYPED_LAST)
        then, then_block = v.load_i64(cut + at.TYPED_THEN), v.load_i64(cut + at.TYPED_THEN_FIRST)
        then_last, dim, n_rows = v.load_i64(cut + at.TYPED_THEN_LAST), args.dim_v, rows_of_head(args, part)
        state_nbytes, relative_row = state_nbytes_of(args), _relative_nbytes(dim)
        relative = work + at.TYPED_ROWS * at.TYPED_WEIGHT_ROW
        _, highest = _sight(args, step, part, 0)
        lowest, _ = _sight(args, step, part, n_rows - 1)
        for block in range(first_block, last_block + 1):
            where = block_of(args, step, part, block) + v.load_i32(part + at.PART_HEAD)
            next_where = block_of(args, step, then, min(then_block + block - first_block, then_last))
            ahead = args.k_pool + (next_where + v.load_i32(then + at.PART_HEAD)) * args.k_head
            p, state = weights + (block - first_block) * BLOCK * 4, v.load_i64(cut + at.TYPED_STATES)
            is_whole = lowest <= block * BLOCK and highest >= block * BLOCK + BLOCK - 1  # for every row
            for head in range(where, where + v.load_i32(part + at.PART_HEADS)):
                values, row = args.v_pool + head * args.v_head, 0
                scales, minima = values + dim * scales_at, (values + dim * minima_at) * has_minimum
                share = _share(args.k_head, dim // 32)
                if is_whole:
                    _relative_scales(scales, minima, dim, 0, BLOCK - 1, relative)
                while row < n_rows:
                    n = rows_at_once(n_rows - row)
                    for i in range(n):
                        _weights_of_row(p + i * CUT_ROW, work + i * at.TYPED_WEIGHT_ROW)
                        if not is_whole:
                            low, high = _sight(args, step, part, row + i)
                            by = relative + i * relative_row
                            _relative_scales(scales, minima, dim, low - block * BLOCK, high - block * BLOCK, by)
                    apart = relative_row
                    if is_whole:
                        apart = 0
                    bits = values + dim * bits_at
                    weigh_rows(n, dim, values, bits, work, relative, apart, state, state_nbytes, ahead, share)
                    share = 0  # fetched once
                    row, p, state = row + n, p + n * CUT_ROW, state + n * state_nbytes
                ahead += args.k_head

    return weigh


# ---- the kernels of a type -------------------------------------------------------------------------------------------


@v.forceinline
def _floats_at(p):
    return v.load_f32x16(p)


_widen = v.make_convert(v.u16x16, v.u32x16, "zext")
_shift16 = v.make_const(v.u32x16, 16)
_as_floats = v.make_convert(v.u32x16, v.f32x16, "bitcast")


@v.forceinline
def _bfloats_at(p):
    return _as_floats(_widen(v.load_u16x16(p)) << _shift16())


_FLOATS = {"f16": (halves_at, 2), "f32": (_floats_at, 4), "bf16": (_bfloats_at, 2)}


def make_score(name: str, most: int) -> Any:
    """The kernel of the scores of a cut with keys of a type, of up to ``most`` rows at once."""
    if name not in _FLOATS:
        return _make_score_quantized(name, most)
    score_cut = make_score_cut(most, *_FLOATS[name])

    def score(op, step, cut, work):
        args, weights = v.arguments(op, at.ATTENTION), v.load_i64(cut + at.TYPED_WEIGHTS)
        first_block, last_block = v.load_i64(cut + at.TYPED_FIRST), v.load_i64(cut + at.TYPED_LAST)
        score_cut(args, step, v.load_i64(cut + at.TYPED_PART), first_block, last_block, weights)

    return score


def make_weigh(name: str, most: int) -> Any:
    """The kernel of the weighted sums of a cut with values of a type."""
    if name not in _FLOATS:
        return _make_weigh_quantized(name, most)
    weigh_cut = make_weigh_cut(most, *_FLOATS[name])

    def weigh(op, step, cut, work):
        args, part = v.arguments(op, at.ATTENTION), v.load_i64(cut + at.TYPED_PART)
        first_block, last_block = v.load_i64(cut + at.TYPED_FIRST), v.load_i64(cut + at.TYPED_LAST)
        sees, weights = v.load_i64(cut + at.TYPED_SEES), v.load_i64(cut + at.TYPED_WEIGHTS)
        states, then = v.load_i64(cut + at.TYPED_STATES), v.load_i64(cut + at.TYPED_THEN)
        then_first, then_last = v.load_i64(cut + at.TYPED_THEN_FIRST), v.load_i64(cut + at.TYPED_THEN_LAST)
        weigh_cut(args, step, part, first_block, last_block, sees, weights, states, then, then_first, then_last)

    return weigh
