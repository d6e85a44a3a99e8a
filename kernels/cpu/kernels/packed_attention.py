"""Attention over blocks of 3 and 2 bits a number (kernels/cache_types.py), and over the first and the newest in 16.

Of packed keys each dimension has a scale and a minimum, in steps of scales, so these go into the query:

    q . k[p] = sum_d (q[d] scale[d]) code[d, p] + sum_d (q[d] scale[d]) minimum[d]

and of packed values, for 32 dimensions of a position, into the weights. What goes in becomes int16 by the largest of a
row in the block, so that what is left are integer products of codes (typed_attention.py). All rows of a part have their
own position in one block: from its run on keys and values are float16, as in the first.
"""

from __future__ import annotations

from typing import Any

from edgellm.formats.levels import KIVI2_FAR_STEP, KIVI2_KEYS, KIVI2_KNEE, KIVI2_VALUES
from edgellm.kernels.cpu.kernels.attention import (
    BLOCK,
    CUT_ROW,
    add_sums,
    fetch_bytes,
    halves_at,
    in_pool,
    make_rows,
    make_rows_at_once,
    number_of,
    put_scores,
    q_at,
    rows_of_head,
    state_nbytes_of,
)
from edgellm.kernels.cpu.kernels.typed_attention import LARGEST, TINY, pair_at, rounded, widen_bytes
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

_fold_nbytes = v.forceinline(at.fold_nbytes)

_words, _signed = v.make_convert(v.u8x16, v.u32x16, "zext"), v.make_convert(v.u32x16, v.i32x16, "bitcast")
_halfwords, _seven_bits = v.make_convert(v.u8x16, v.u16x16, "zext"), v.make_const(v.u16x16, 7)
_zero_at, _knee, _minus_knee, _more = (
    v.make_const(v.f32x16, float(n)) for n in (128, KIVI2_KNEE, -KIVI2_KNEE, KIVI2_FAR_STEP - 1)
)
_two, _three, _four, _six, _seven, _eight, _nine, _fifteen = (
    v.make_const(v.i16x32, n) for n in (2, 3, 4, 6, 7, 8, 9, 15)
)
_KEY_NBYTES, _VALUE_NBYTES = KIVI2_KEYS.codes_nbytes, KIVI2_VALUES.codes_nbytes  # of a dimension
_PER_STEP_K, _PER_STEP_V = 1 / KIVI2_KEYS.per_scale, 1 / KIVI2_VALUES.per_scale


# ---- products of codes -----------------------------------------------------------------------------------------------


def _make_add(n: int, apart: bool) -> Any:
    """add(...) of four pairs of dots of 16 lanes, for n rows; ``apart`` has sums of the even and of the odd pairs."""

    @v.forceinline
    def add_row(even, odd, x, v0, v1, v2, v3):
        even = v.madd_i16(even, pair_at(x), v0)
        if apart:
            odd = v.madd_i16(odd, pair_at(x + 4), v1)
            even = v.madd_i16(even, pair_at(x + 8), v2)
            odd = v.madd_i16(odd, pair_at(x + 12), v3)
        else:
            even = v.madd_i16(even, pair_at(x + 4), v1)
            even = v.madd_i16(even, pair_at(x + 8), v2)
            even = v.madd_i16(even, pair_at(x + 12), v3)
        return even, odd

    @v.forceinline
    def add(sums, x, x_row, v0, v1, v2, v3):
        a, b, c, d = sums
        a = add_row(a[0], a[1], x, v0, v1, v2, v3)
        if n > 1:
            b = add_row(b[0], b[1], x + x_row, v0, v1, v2, v3)
        if n > 2:
            c = add_row(c[0], c[1], x + 2 * x_row, v0, v1, v2, v3)
        if n > 3:
            d = add_row(d[0], d[1], x + 3 * x_row, v0, v1, v2, v3)
        return a, b, c, d

    return add


@v.forceinline
def _no_sums():
    zero = (v.zero_i32x16(), v.zero_i32x16())
    return zero, zero, zero, zero


@v.forceinline
def _totals(sums):
    a, b, c, d = sums
    return v.to_f32x16(a[0] + a[1]), v.to_f32x16(b[0] + b[1]), v.to_f32x16(c[0] + c[1]), v.to_f32x16(d[0] + d[1])


def _make_dots_of_three_bits(n: int, apart: bool) -> Any:
    add = _make_add(n, apart)

    @v.forceinline
    def dots(line, step, n_dots, x, x_row):
        """sum_i x[row][i] * codes[i] of 16 lanes for ``n`` rows of int16; lines lie ``step`` bytes apart."""
        sums = _no_sums()
        for _ in range(0, n_dots, 16):
            upper = widen_bytes(v.load_u8x32(line + 2 * step))
            codes = widen_bytes(v.load_u8x32(line)) | (upper & _fifteen()) << _eight()
            a, b, c = codes & _seven(), codes >> _three() & _seven(), codes >> _six() & _seven()
            sums = add(sums, x, x_row, a, b, c, codes >> _nine())
            codes = widen_bytes(v.load_u8x32(line + step)) | upper >> _four() << _eight()
            a, b, c = codes & _seven(), codes >> _three() & _seven(), codes >> _six() & _seven()
            sums = add(sums, x + 16, x_row, a, b, c, codes >> _nine())
            line, x = line + 3 * step, x + 32
        return _totals(sums)

    return dots


def _make_dots_of_two_bits(n: int, apart: bool) -> Any:
    add = _make_add(n, apart)

    @v.forceinline
    def dots(line, step, n_dots, x, x_row):
        """The same of two bits."""
        sums = _no_sums()
        for _ in range(0, n_dots, 8):
            codes = widen_bytes(v.load_u8x32(line))
            a, b, c = codes & _three(), codes >> _two() & _three(), codes >> _four() & _three()
            sums = add(sums, x, x_row, a, b, c, codes >> _six())
            line, x = line + step, x + 16
        return _totals(sums)

    return dots


def _make_dots(bits: int, most: int) -> Any:
    """dots(n, ...) of up to ``most`` rows."""
    of_bits = {2: _make_dots_of_two_bits, 3: _make_dots_of_three_bits}[bits]
    dots_of_one, dots_of_two, dots_of_three, dots_of_four = (of_bits(n, most > 3) for n in (1, 2, 3, 4))

    @v.forceinline
    def dots(n, line, step, n_dots, x, x_row):
        if most > 3 and n == 4:
            a, b, c, d = dots_of_four(line, step, n_dots, x, x_row)
        elif n == 3:
            a, b, c, d = dots_of_three(line, step, n_dots, x, x_row)
        elif n == 2:
            a, b, c, d = dots_of_two(line, step, n_dots, x, x_row)
        else:
            a, b, c, d = dots_of_one(line, step, n_dots, x, x_row)
        return a, b, c, d

    return dots


# ---- scales and minima -----------------------------------------------------------------------------------------------


@v.forceinline
def _decode(scales, minima, n, per_step, out):
    """``n`` scales as float32; behind them as many minima, in scales."""
    for i in range(0, n, 16):
        scale = v.half_f32x16(_halfwords(v.load_u8x16(scales + i)) << _seven_bits())
        v.store_f32x16(out + i * 4, scale)
        steps = v.to_f32x16(_signed(_words(v.load_u8x16(minima + i)))) - _zero_at()
        near = v.min_f32x16(v.max_f32x16(steps, _minus_knee()), _knee())
        least = v.fma_f32x16(steps - near, _more(), steps) * v.splat_f32x16(per_step)
        v.store_f32x16(out + (n + i) * 4, least)


@v.forceinline
def _fold(x, scales, minima, n, out):
    """``n`` numbers times their scales, as int16 by the largest of them; at the end that, and what they make of minima.

    out   float32 products, int16 behind these, then the two
    """
    total = largest = v.zero_f32x16()
    for i in range(0, n * 4, 64):
        scaled = v.load_f32x16(x + i) * v.load_f32x16(scales + i)
        v.store_f32x16(out + i, scaled)
        largest = v.max_f32x16(largest, v.abs_f32x16(scaled))
        total = v.fma_f32x16(scaled, v.load_f32x16(minima + i), total)
    scale, codes = v.maximum_f32x16(largest) * v.f32_of(1.0 / LARGEST), out + n * 4
    factor = v.splat_f32x16(v.f32_of(1.0) / max(scale, v.f32_of(TINY)))
    for i in range(0, n, 16):
        v.store_i16x16(codes + i * 2, v.narrow_i32x16(rounded(v.load_f32x16(out + i * 4) * factor)))
    v.store_f32(codes + n * 2, scale)
    v.store_f32(codes + n * 2 + 4, v.sum_f32x16(total))


# ---- scores ----------------------------------------------------------------------------------------------------------


@v.forceinline
def _first_newest(args, step, part):
    """The first block of the run that a part's own position is in."""
    position = v.load_i32(v.load_i64(step + at.POSITIONS) + v.load_i32(part) * 4)
    return position // BLOCK // args.run_blocks * args.run_blocks


@v.forceinline
def _is_packed(number, own):
    return number > 0 and number < own


@v.forceinline
def _numbers(sums, of):
    """What sums of codes stand for, by what ``_fold`` left at ``of``."""
    return v.fma_f32x16(sums, v.splat_f32x16(v.load_f32(of)), v.splat_f32x16(v.load_f32(of + 4)))


@v.forceinline
def _put(out, sums, of, scale):
    v.store_f32x16(out, _numbers(sums, of) * scale)


def _make_score_packed(most: int) -> Any:
    rows_at_once, dots = make_rows_at_once(most), _make_dots(KIVI2_KEYS.bits, most)

    @v.forceinline
    def score_packed(args, keys, ahead, first, head, n_rows, group, out, work, scale):
        dim, row, fold = args.dim_k, 0, _fold_nbytes(args.dim_k)
        fetch_bytes(ahead, args.v_head)
        scales, folds = keys + dim * _KEY_NBYTES, work + dim * 8
        _decode(scales, scales + dim, dim, v.f32_of(_PER_STEP_K), work)
        while row < n_rows:
            n, x, of = rows_at_once(n_rows - row), folds + dim * 4, folds + dim * 6
            for i in range(n):
                _fold(q_at(args, first, head, row + i, group), work, work + dim * 4, dim, folds + i * fold)
            for half in range(2):
                a, b, c, d = dots(n, keys + half * 32, 64, dim, x, fold)
                _put(out + half * 64, a, of, scale)
                if n > 1:
                    _put(out + CUT_ROW + half * 64, b, of + fold, scale)
                if n > 2:
                    _put(out + 2 * CUT_ROW + half * 64, c, of + 2 * fold, scale)
                if n > 3:
                    _put(out + 3 * CUT_ROW + half * 64, d, of + 3 * fold, scale)
            row, out = row + n, out + n * CUT_ROW

    return score_packed


def _make_score_newest(most: int) -> Any:
    rows_at_once, sums_of_halves = make_rows(most, halves_at)

    @v.forceinline
    def score_newest(args, keys, ahead, first, head, n_rows, group, out, scale):
        row, dim = 0, args.dim_k
        while row < n_rows:
            n = rows_at_once(n_rows - row)
            q0, q1 = q_at(args, first, head, row, group), q_at(args, first, head, row + 1, group)
            q2, q3 = q_at(args, first, head, row + 2, group), q_at(args, first, head, row + 3, group)
            for half in range(2):
                fetch = ahead + half * dim * 32
                sums = sums_of_halves(n, keys + half * 32, 64, dim, q0, q1, q2, q3, fetch)
                put_scores(out + half * 64, n, sums, scale)
            row, out = row + n, out + n * CUT_ROW

    return score_newest


def make_score(name: str, most: int) -> Any:
    """The kernel of the scores of a cut, of up to ``most`` rows at once."""
    score_packed, score_newest = _make_score_packed(most), _make_score_newest(most)

    def score(op, step, cut, work):
        """Scores of all rows of a part in the blocks of one cut; fetches the cut's values."""
        args, part, weights = (
            v.arguments(op, at.ATTENTION),
            v.load_i64(cut + at.TYPED_PART),
            v.load_i64(cut + at.TYPED_WEIGHTS),
        )
        first_block, last_block = v.load_i64(cut + at.TYPED_FIRST), v.load_i64(cut + at.TYPED_LAST)
        n_rows, first, group = rows_of_head(args, part), v.load_i32(part), args.n_heads // args.n_kv_heads
        scale, own = v.splat_f32x16(v.f32_of(v.f64_from_bits(args.scale))), _first_newest(args, step, part)
        first_head, n_heads = v.load_i32(part + at.PART_HEAD), v.load_i32(part + at.PART_HEADS)
        for block in range(first_block, last_block + 1):
            number, out = number_of(args, part, block), weights + (block - first_block) * BLOCK * 4
            if _is_packed(number, own):
                where = in_pool(args, step, part, v.load_i32(part + at.PART_TABLE), number) + first_head
                for i in range(n_heads):
                    keys, ahead = args.k_pool + (where + i) * args.k_head, args.v_pool + (where + i) * args.v_head
                    to = out + i * n_rows * CUT_ROW
                    score_packed(args, keys, ahead, first, first_head + i, n_rows, group, to, work, scale)
            else:
                where = in_pool(args, step, part, args.newest_table, number) + first_head
                for i in range(n_heads):
                    keys, ahead = (
                        args.newest_k + (where + i) * args.dim_k * 64,
                        args.newest_v + (where + i) * args.dim_v * 64,
                    )
                    to = out + i * n_rows * CUT_ROW
                    score_newest(args, keys, ahead, first, first_head + i, n_rows, group, to, scale)

    return score


# ---- weighted sums ---------------------------------------------------------------------------------------------------


@v.forceinline
def _add(state, sums, of):
    v.store_f32x16(state, v.load_f32x16(state) + _numbers(sums, of))


def _make_weigh_packed(most: int) -> Any:
    rows_at_once, dots = make_rows_at_once(most), _make_dots(KIVI2_VALUES.bits, most)
    fold = at.fold_nbytes(BLOCK)

    @v.forceinline
    def weigh_packed(args, values, n_rows, w, state, state_nbytes, work):
        dim, row = args.dim_v, 0
        scales, folds = values + dim * _VALUE_NBYTES, work + dim * 8
        _decode(scales, scales + dim, dim, v.f32_of(_PER_STEP_V), work)
        x, of = folds + BLOCK * 4, folds + BLOCK * 6
        while row < n_rows:
            n = rows_at_once(n_rows - row)
            for g in range(dim // 32):
                for i in range(n):
                    by = work + g * BLOCK * 4
                    _fold(w + i * CUT_ROW, by, by + dim * 4, BLOCK, folds + i * fold)
                for half in range(2):
                    line, to = values + g * 64 + half * 32, state + 64 + g * 128 + half * 64
                    a, b, c, d = dots(n, line, dim * 2, BLOCK, x, fold)
                    _add(to, a, of)
                    if n > 1:
                        _add(to + state_nbytes, b, of + fold)
                    if n > 2:
                        _add(to + 2 * state_nbytes, c, of + 2 * fold)
                    if n > 3:
                        _add(to + 3 * state_nbytes, d, of + 3 * fold)
            row, w, state = row + n, w + n * CUT_ROW, state + n * state_nbytes

    return weigh_packed


def _make_weigh_newest(most: int) -> Any:
    rows_at_once, sums_of_halves = make_rows(most, halves_at)

    @v.forceinline
    def weigh_newest(args, values, n_positions, n_rows, w, state, state_nbytes):
        dim, row = args.dim_v, 0
        while row < n_rows:
            n = rows_at_once(n_rows - row)
            for i in range(0, dim, 16):
                w1, w2, w3, to = w + CUT_ROW, w + 2 * CUT_ROW, w + 3 * CUT_ROW, state + 64 + i * 4
                sums = sums_of_halves(n, values + i * 2, dim * 2, n_positions, w, w1, w2, w3, values)
                add_sums(to, state_nbytes, n, sums)
            row, w, state = row + n, w + n * CUT_ROW, state + n * state_nbytes

    return weigh_newest


def make_weigh(name: str, most: int) -> Any:
    """The kernel of the weighted sums of a cut."""
    weigh_packed, weigh_newest = _make_weigh_packed(most), _make_weigh_newest(most)

    def weigh(op, step, cut, work):
        """Weighted sums of a cut's values; fetches the keys of what comes next, where they are packed."""
        args, part, weights = (
            v.arguments(op, at.ATTENTION),
            v.load_i64(cut + at.TYPED_PART),
            v.load_i64(cut + at.TYPED_WEIGHTS),
        )
        first_block, last_block = v.load_i64(cut + at.TYPED_FIRST), v.load_i64(cut + at.TYPED_LAST)
        then, then_block = v.load_i64(cut + at.TYPED_THEN), v.load_i64(cut + at.TYPED_THEN_FIRST)
        then_last, n_rows = v.load_i64(cut + at.TYPED_THEN_LAST), rows_of_head(args, part)
        states, state_nbytes = v.load_i64(cut + at.TYPED_STATES), state_nbytes_of(args)
        own, last = _first_newest(args, step, part), v.load_i64(cut + at.TYPED_SEES)
        first_head, n_heads = v.load_i32(part + at.PART_HEAD), v.load_i32(part + at.PART_HEADS)
        for block in range(first_block, last_block + 1):
            number, w = number_of(args, part, block), weights + (block - first_block) * BLOCK * 4
            next_number = number_of(args, then, min(then_block + block - first_block, then_last))
            if _is_packed(next_number, _first_newest(args, step, then)):
                ahead = in_pool(args, step, then, v.load_i32(then + at.PART_TABLE), next_number)
                keys = args.k_pool + (ahead + v.load_i32(then + at.PART_HEAD)) * args.k_head
                fetch_bytes(keys, n_heads * args.k_head)
            if _is_packed(number, own):
                where = in_pool(args, step, part, v.load_i32(part + at.PART_TABLE), number) + first_head
                for i in range(n_heads):
                    values, at_row = args.v_pool + (where + i) * args.v_head, i * n_rows
                    state = states + at_row * state_nbytes
                    weigh_packed(args, values, n_rows, w + at_row * CUT_ROW, state, state_nbytes, work)
            else:
                where = in_pool(args, step, part, args.newest_table, number) + first_head
                n_positions = min(BLOCK, last - block * BLOCK + 1)
                for i in range(n_heads):
                    values, at_row = args.newest_v + (where + i) * args.dim_v * 64, i * n_rows
                    state = states + at_row * state_nbytes
                    weigh_newest(args, values, n_positions, n_rows, w + at_row * CUT_ROW, state, state_nbytes)

    return weigh
