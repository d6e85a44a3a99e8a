"""Attention over blocks of 2 bits a number (kernels/cache_types.py), and over the first and the newest in 16.

Of packed keys each dimension has a scale and a minimum, in scales, for 16 positions, so these go into the query:

    q . k[p] = sum_d (q[d] scale[d]) code[d, p] + sum_d (q[d] scale[d]) minimum[d]

and of packed values, for 16 dimensions of a position, into the weights. What is left are sums of codes as floats. All
rows of a part have their own position in one block: from its run on keys and values are float16, as in the first.
"""

from __future__ import annotations

from typing import Any

from edgellm.formats.levels import KIVI2_FAR_STEP, KIVI2_KNEE
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
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

_words, _signed = v.make_convert(v.u8x16, v.u32x16, "zext"), v.make_convert(v.u32x16, v.i32x16, "bitcast")
_three, _two, _four, _six = (v.make_const(v.u32x16, n) for n in (3, 2, 4, 6))
_halfwords, _seven = v.make_convert(v.u8x16, v.u16x16, "zext"), v.make_const(v.u16x16, 7)
_zero_at, _knee, _minus_knee, _more = (
    v.make_const(v.f32x16, float(n)) for n in (128, KIVI2_KNEE, -KIVI2_KNEE, KIVI2_FAR_STEP - 1)
)


@v.forceinline
def _four_lines(line):
    """Four dots of 16 lanes, as floats."""
    codes = _words(v.load_u8x16(line))
    a, b = codes & _three(), (codes >> _two()) & _three()
    c, d = (codes >> _four()) & _three(), codes >> _six()
    return v.to_f32x16(_signed(a)), v.to_f32x16(_signed(b)), v.to_f32x16(_signed(c)), v.to_f32x16(_signed(d))


def _make_sums_of(n: int) -> Any:
    @v.forceinline
    def add(x, i, v0, v1, v2, v3, even, odd):
        even = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + i)), v0, even)
        odd = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + i + 4)), v1, odd)
        even = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + i + 8)), v2, even)
        odd = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + i + 12)), v3, odd)
        return even, odd

    @v.forceinline
    def sums(line, step, n_quads, x, x_row):
        """sum_i x[row][i] * codes[i] for ``n`` rows; four dots of 16 lanes lie ``step`` bytes from the next."""
        a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = v.zero_f32x16()
        for i in range(0, n_quads * 16, 16):
            v0, v1, v2, v3 = _four_lines(line)
            a0, a1 = add(x, i, v0, v1, v2, v3, a0, a1)
            if n > 1:
                b0, b1 = add(x + x_row, i, v0, v1, v2, v3, b0, b1)
            if n > 2:
                c0, c1 = add(x + 2 * x_row, i, v0, v1, v2, v3, c0, c1)
            if n > 3:
                d0, d1 = add(x + 3 * x_row, i, v0, v1, v2, v3, d0, d1)
            line += step
        return a0 + a1, b0 + b1, c0 + c1, d0 + d1

    return sums


def _make_sums(most: int) -> Any:
    """sums(n, ...) of up to ``most`` rows."""
    sums_of_one, sums_of_two, sums_of_three, sums_of_four = map(_make_sums_of, (1, 2, 3, 4))

    @v.forceinline
    def sums(n, line, step, n_quads, x, x_row):
        if most > 3 and n == 4:
            a, b, c, d = sums_of_four(line, step, n_quads, x, x_row)
        elif n == 3:
            a, b, c, d = sums_of_three(line, step, n_quads, x, x_row)
        elif n == 2:
            a, b, c, d = sums_of_two(line, step, n_quads, x, x_row)
        else:
            a, b, c, d = sums_of_one(line, step, n_quads, x, x_row)
        return a, b, c, d

    return sums


@v.forceinline
def _fold(x, scales, minima, n, out):
    """``n`` numbers times their scales; behind them, what they make of the minima."""
    total = v.zero_f32x16()
    for i in range(0, n, 16):
        scaled = v.load_f32x16(x + i * 4) * v.half_f32x16(_halfwords(v.load_u8x16(scales + i)) << _seven())
        v.store_f32x16(out + i * 4, scaled)
        steps = v.to_f32x16(_signed(_words(v.load_u8x16(minima + i)))) - _zero_at()
        near = v.min_f32x16(v.max_f32x16(steps, _minus_knee()), _knee())
        total = v.fma_f32x16(scaled, v.fma_f32x16(steps - near, _more(), steps), total)
    v.store_f32(out + n * 4, v.sum_f32x16(total) * v.f32_of(0.125))


@v.forceinline
def _first_newest(args, step, part):
    """The first block of the run that a part's own position is in."""
    position = v.load_i32(v.load_i64(step + at.POSITIONS) + v.load_i32(part) * 4)
    return position // BLOCK // args.run_blocks * args.run_blocks


@v.forceinline
def _is_packed(number, own):
    return number > 0 and number < own


@v.forceinline
def _put(out, sums, bias, scale):
    v.store_f32x16(out, (sums + v.splat_f32x16(bias)) * scale)


def _make_score_packed(most: int) -> Any:
    rows_at_once, sums = make_rows_at_once(most), _make_sums(most)

    @v.forceinline
    def score_packed(args, keys, ahead, first, head, n_rows, group, out, work, scale):
        dim, row, fold = args.dim_k, 0, args.dim_k * 4 + 64
        fetch_bytes(ahead, args.v_head)
        while row < n_rows:
            n = rows_at_once(n_rows - row)
            bias = work + dim * 4
            for half in range(2):
                scales = keys + dim * (8 + half)
                for i in range(n):
                    q = q_at(args, first, head, row + i, group)
                    _fold(q, scales, scales + dim * 2, dim, work + i * fold)
                a, b, c, d = sums(n, keys + half * 16, 32, dim // 4, work, fold)
                _put(out + half * 64, a, v.load_f32(bias), scale)
                if n > 1:
                    _put(out + CUT_ROW + half * 64, b, v.load_f32(bias + fold), scale)
                if n > 2:
                    _put(out + 2 * CUT_ROW + half * 64, c, v.load_f32(bias + 2 * fold), scale)
                if n > 3:
                    _put(out + 3 * CUT_ROW + half * 64, d, v.load_f32(bias + 3 * fold), scale)
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


@v.forceinline
def _add(state, sums, bias):
    v.store_f32x16(state, v.load_f32x16(state) + (sums + v.splat_f32x16(bias)))


def _make_weigh_packed(most: int) -> Any:
    rows_at_once, sums, fold = make_rows_at_once(most), _make_sums(most), BLOCK * 4 + 64

    @v.forceinline
    def weigh_packed(args, values, n_rows, w, state, state_nbytes, work):
        dim, row, bias = args.dim_v, 0, work + BLOCK * 4
        while row < n_rows:
            n = rows_at_once(n_rows - row)
            for g in range(dim // 16):
                scales, to = values + dim * 8 + g * 32, state + 64 + g * 64
                for i in range(n):
                    _fold(w + i * CUT_ROW, scales, scales + dim * 2, BLOCK, work + i * fold)
                a, b, c, d = sums(n, values + g * 16, dim, BLOCK // 4, work, fold)
                _add(to, a, v.load_f32(bias))
                if n > 1:
                    _add(to + state_nbytes, b, v.load_f32(bias + fold))
                if n > 2:
                    _add(to + 2 * state_nbytes, c, v.load_f32(bias + 2 * fold))
                if n > 3:
                    _add(to + 3 * state_nbytes, d, v.load_f32(bias + 3 * fold))
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
