"""Attention over the paged float16 cache: online softmax, grouped queries, causal or further, sliding window.

The context is cut at every 256 positions (128 under a window). A cut is summed from nothing, its scores with the cut's
own maximum, and the cuts of a row are merged first to last:

    m' = max(M, m);  L = L e^(M-m') + l e^(m-m');  A = A e^(M-m') + a e^(m-m');  M = m'

A tile is a few neighbouring tokens of one sequence; its rows are the tokens times the query heads that share a head of
the cache. A work item is a part of a tile's cuts for some heads of the cache (attention_work.py deals them out). A part
with all of its tile's cuts is merged as it goes. Otherwise the cuts are kept, and the thread that ends the last part
merges them. Both do the same operations in the same order, so the result does not depend on the batch.

A few rows take a block of 32 positions at once, so that a float16 key or value is widened once for all of them.
Keys lie transposed in a block: a register holds one dimension of neighbouring positions, and scores need no horizontal
sums. While the keys of a block are read, its values are fetched, and then the keys of the next cut: into the second
level, for a cut is more than the first holds. Keys that have their values in them lie row by row, and with many query
heads to each they are read from the second level: four positions have their sums folded at once.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import exp_f32x16, softcap_f32x16

BLOCK = 32
CUT_ROW = at.CUT_BLOCKS * BLOCK * 4
"""Bytes of one row's scores, later weights, in a cut."""

minus_infinity = v.make_const(v.f32x16, float("-inf"))
_NEG_INF = float("-inf")


@v.intrinsic
def lane_numbers(typing_context):
    """0 to 15."""

    def codegen(context, builder, sig, args):
        return v.ir.Constant(v.f32x16.ir, [float(i) for i in range(16)])

    return v.f32x16(), codegen


@v.forceinline
def state_nbytes_of(args):
    """A row's state: m, l, 14 unused, then the weighted sum of values, padded to 16."""
    return 64 + (args.dim_v + 15) // 16 * 64


@v.forceinline
def _clear(state, nbytes):
    v.store_f32(state, v.f32_of(_NEG_INF))
    v.store_f32(state + 4, v.f32_of(0.0))
    for i in range(64, nbytes, 64):
        v.store_f32x16(state + i, v.zero_f32x16())


@v.forceinline
def _merge(merged, cut, nbytes):
    """Add a cut's state to the merged one. A cut in which nothing was visible changes nothing."""
    m_cut, m_old = v.load_f32(cut), v.load_f32(merged)
    if v.load_f32(cut + 4) != v.f32_of(0.0):  # true of NaN, which has to stay visible
        m = max(m_old, m_cut)
        keep, take = exp_f32x16(v.splat_f32x16(m_old - m)), exp_f32x16(v.splat_f32x16(m_cut - m))
        v.store_f32(merged, m)
        old = v.load_f32(merged + 4) * v.first_lane(keep)
        v.store_f32(merged + 4, v.fma_f32(v.load_f32(cut + 4), v.first_lane(take), old))
        for i in range(64, nbytes, 64):
            v.store_f32x16(merged + i, v.fma_f32x16(v.load_f32x16(cut + i), take, v.load_f32x16(merged + i) * keep))


@v.forceinline
def _finish(merged, out, dim_v, sink):
    """out = weighted sum / l; a sink at an address other than 0 has its part in l."""
    total = v.load_f32(merged + 4)
    if sink != 0:
        total = total + v.first_lane(exp_f32x16(v.splat_f32x16(v.load_f32(sink) - v.load_f32(merged))))
    whole = dim_v // 16 * 16
    for i in range(0, whole, 16):
        v.store_f32x16(out + i * 4, v.load_f32x16(merged + 64 + i * 4) / v.splat_f32x16(total))
    for i in range(whole, dim_v):
        v.store_f32(out + i * 4, v.load_f32(merged + 64 + i * 4) / total)


@v.forceinline
def halves_at(p):
    """A line of 16 float16."""
    return v.half_f32x16(v.load_u16x16(p))


def _make_sums(n: int, line_at: Any) -> Any:
    """Weighted sums of lines of 16 numbers, as ``line_at`` reads them, for n rows of weights, four at most.

    Two sums for each row, of the even and of the odd lines: with three rows that is what fills 16 AVX2 registers.
    """

    @v.forceinline
    def sums(line, step, n_lines, x0, x1, x2, x3, fetch):
        """sum_i x[row][i] * line[i] for ``n`` rows; lines are ``step`` bytes apart. Fetches half a line for each."""
        a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = v.zero_f32x16()
        for i in range(0, n_lines // 2 * 8, 8):
            v.fetch(fetch + i * 8)
            v0, v1 = line_at(line), line_at(line + step)
            a0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x0 + i)), v0, a0)
            a1 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x0 + i + 4)), v1, a1)
            if n > 1:
                b0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x1 + i)), v0, b0)
                b1 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x1 + i + 4)), v1, b1)
            if n > 2:
                c0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x2 + i)), v0, c0)
                c1 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x2 + i + 4)), v1, c1)
            if n > 3:
                d0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x3 + i)), v0, d0)
                d1 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x3 + i + 4)), v1, d1)
            line += 2 * step
        if n_lines % 2:
            i, v0 = (n_lines - 1) * 4, line_at(line)
            a0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x0 + i)), v0, a0)
            if n > 1:
                b0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x1 + i)), v0, b0)
            if n > 2:
                c0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x2 + i)), v0, c0)
            if n > 3:
                d0 = v.fma_f32x16(v.splat_f32x16(v.load_f32(x3 + i)), v0, d0)
        return a0 + a1, b0 + b1, c0 + c1, d0 + d1

    return sums


def _make_wide_sums(n: int, line_at: Any, size: int) -> Any:
    """The same of lines of 32 numbers, in twice as many registers: a weight is loaded once for two multiply-adds.

    With lines of 16 the loads, of which a CPU does two a cycle, are more than the multiply-adds.
    """
    second = 16 * size

    @v.forceinline
    def add(x, i, v0, v1, w0, w1, old):
        even, odd = v.splat_f32x16(v.load_f32(x + i)), v.splat_f32x16(v.load_f32(x + i + 4))
        return (
            v.fma_f32x16(even, v0, old[0]), v.fma_f32x16(odd, v1, old[1]),
            v.fma_f32x16(even, w0, old[2]), v.fma_f32x16(odd, w1, old[3]),
        )  # fmt: skip

    @v.forceinline
    def add_last(x, i, v0, w0, old):
        last = v.splat_f32x16(v.load_f32(x + i))
        return v.fma_f32x16(last, v0, old[0]), old[1], v.fma_f32x16(last, w0, old[2]), old[3]

    @v.forceinline
    def sums(line, step, n_lines, x0, x1, x2, x3, fetch):
        """The rows' sums of the first 16 numbers, and of the others."""
        zero = v.zero_f32x16()
        a = b = c = d = (zero, zero, zero, zero)
        for i in range(0, n_lines // 2 * 8, 8):
            v.fetch(fetch + i * 16)
            v.fetch(fetch + i * 16 + 64)
            v0, v1, w0, w1 = line_at(line), line_at(line + step), line_at(line + second), line_at(line + step + second)
            a = add(x0, i, v0, v1, w0, w1, a)
            if n > 1:
                b = add(x1, i, v0, v1, w0, w1, b)
            if n > 2:
                c = add(x2, i, v0, v1, w0, w1, c)
            if n > 3:
                d = add(x3, i, v0, v1, w0, w1, d)
            line += 2 * step
        if n_lines % 2:
            i, v0, w0 = (n_lines - 1) * 4, line_at(line), line_at(line + second)
            a = add_last(x0, i, v0, w0, a)
            if n > 1:
                b = add_last(x1, i, v0, w0, b)
            if n > 2:
                c = add_last(x2, i, v0, w0, c)
            if n > 3:
                d = add_last(x3, i, v0, w0, d)
        first = (a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1])
        return first, (a[2] + a[3], b[2] + b[3], c[2] + c[3], d[2] + d[3])

    return sums


def make_rows_at_once(most: int) -> Any:
    """How many rows are taken at once of so many that are left; ``most`` is three or four."""

    @v.forceinline
    def rows_at_once(n_left):
        n = min(most, n_left)
        if most < n_left and n_left < 2 * most:  # two and two instead of three and one
            n = (n_left + 1) // 2
        return n

    return rows_at_once


def _make_any_rows(most: int, of_rows: Any) -> Any:
    """sums(n, ...) of n rows, up to ``most``, by ``of_rows(n)``."""
    sums_of_one, sums_of_two, sums_of_three, sums_of_four = (of_rows(n) for n in (1, 2, 3, 4))

    @v.forceinline
    def sums(n, line, step, n_lines, x0, x1, x2, x3, fetch):
        if most > 3 and n == 4:
            result = sums_of_four(line, step, n_lines, x0, x1, x2, x3, fetch)
        elif n == 3:
            result = sums_of_three(line, step, n_lines, x0, x1, x2, x2, fetch)
        elif n == 2:
            result = sums_of_two(line, step, n_lines, x0, x1, x1, x1, fetch)
        else:
            result = sums_of_one(line, step, n_lines, x0, x0, x0, x0, fetch)
        return result

    return sums


def make_rows(most: int, line_at: Any) -> tuple[Any, Any]:
    """(how many rows are taken at once, their sums)."""
    return make_rows_at_once(most), _make_any_rows(most, lambda n: _make_sums(n, line_at))


def _make_wide_rows(most: int, line_at: Any, size: int) -> Any:
    """The sums of lines of 32 numbers of ``size`` bytes."""
    return _make_any_rows(most, lambda n: _make_wide_sums(n, line_at, size))


@v.forceinline
def _softmax_row(weights, first, n, lowest, highest, state):
    """Scores of ``n`` positions from ``first`` on become e^(s - m), 0 outside [lowest, highest]; stores m and l."""
    if lowest > first or highest < first + n - 1:
        low, high = v.splat_f32x16(v.f32_of(float(lowest - first))), v.splat_f32x16(v.f32_of(float(highest - first)))
        for i in range(0, n, 16):
            index = lane_numbers() + v.splat_f32x16(v.f32_of(float(i)))
            s = v.where_less(index, low, minus_infinity(), v.load_f32x16(weights + i * 4))
            v.store_f32x16(weights + i * 4, v.where_less(high, index, minus_infinity(), s))
    largest = minus_infinity()
    for i in range(0, n * 4, 64):
        largest = v.max_f32x16(v.load_f32x16(weights + i), largest)
    m = v.maximum_f32x16(largest)
    total = v.zero_f32x16()
    if m != v.f32_of(_NEG_INF):
        for i in range(0, n * 4, 64):
            w = exp_f32x16(v.load_f32x16(weights + i) - v.splat_f32x16(m))
            v.store_f32x16(weights + i, w)
            total = total + w
    else:  # nothing visible, or nothing but NaN, which has to stay visible
        for i in range(0, n * 4, 64):
            s = v.load_f32x16(weights + i)
            w = v.where_less(s, v.zero_f32x16(), v.zero_f32x16(), s)
            v.store_f32x16(weights + i, w)
            total = total + w
    v.store_f32(state, m)
    v.store_f32(state + 4, v.sum_f32x16(total))


@v.forceinline
def q_at(args, first, head, row, group):
    """Address of the query of a head's row."""
    token, dim_k = first + row // group, args.dim_k
    return args.q + token * args.q_row + (head * group + row % group) * dim_k * 4


@v.forceinline
def number_of(args, part, block):
    """Which block of its text a part's block is: where blocks are chosen, one of these."""
    number = block
    if v.load_i32(part + at.PART_CHOSEN) != 0:
        of_token = args.chosen + v.load_i32(part) * args.chosen_row
        number = v.load_i32(of_token + (v.load_i32(part + at.PART_HEAD) * args.n_chosen + block) * 4)
    return number


@v.forceinline
def in_pool(args, step, part, table, number):
    """Index of a block of a part's text in the pool, by a block table."""
    table = v.load_i64(step + at.TABLES) + table * 16
    blocks = v.load_i64(table) + v.load_i32(part + at.PART_SEQUENCE) * v.load_i64(table + 8) * 4
    return v.load_i32(blocks + number * 4) * args.n_kv_heads


@v.forceinline
def block_of(args, step, part, block):
    """Index of a part's block in the pool."""
    return in_pool(args, step, part, v.load_i32(part + at.PART_TABLE), number_of(args, part, block))


@v.forceinline
def last_seen(args, part, position):
    """The last position that is seen, counted in the blocks that the part has."""
    last = position
    if v.load_i32(part + at.PART_CHOSEN) != 0:
        last = (args.n_chosen - 1) * BLOCK + position % BLOCK
    return last


@v.forceinline
def _visible(args, step, part):
    """First and last block that a part's tile sees, and the last position."""
    first, window = v.load_i32(part) * 4, args.window
    last_token = first + (v.load_i32(part + at.PART_TOKENS) - 1) * 4
    last, lowest = last_seen(args, part, v.load_i32(v.load_i64(step + at.SEES) + last_token)), 0
    if window > 0:
        lowest = max(0, v.load_i32(v.load_i64(step + at.POSITIONS) + first) - window + 1) // BLOCK
    return lowest, last // BLOCK, last


@v.forceinline
def rows_of_head(args, part):
    """Tokens of a part's tile times the query heads that share a head of the cache."""
    return v.load_i32(part + at.PART_TOKENS) * (args.n_heads // args.n_kv_heads)


@v.forceinline
def fetch_bytes(address, nbytes):
    """Bring so many bytes near."""
    for i in range(0, nbytes, 64):
        v.fetch(address + i)


@v.forceinline
def put_scores(out, n, sums, scale):
    """The scores of n rows in 16 positions."""
    v.store_f32x16(out, sums[0] * scale)
    if n > 1:
        v.store_f32x16(out + CUT_ROW, sums[1] * scale)
    if n > 2:
        v.store_f32x16(out + 2 * CUT_ROW, sums[2] * scale)
    if n > 3:
        v.store_f32x16(out + 3 * CUT_ROW, sums[3] * scale)


def make_score_cut(most: int, line_at: Any, size: int) -> Any:
    """score_cut(...) of keys of ``size`` bytes a number."""
    rows_at_once, sums = make_rows(most, line_at)
    wide_sums, is_wide, line = _make_wide_rows(most, line_at, size), most > 3, 16 * size

    @v.forceinline
    def score_cut(args, step, part, first_block, last_block, weights):
        """Scores of all rows of a part in the blocks of one cut; fetches the cut's values."""
        dim_k, n_rows = args.dim_k, rows_of_head(args, part)
        first, group = v.load_i32(part), args.n_heads // args.n_kv_heads
        scale = v.splat_f32x16(v.f32_of(v.f64_from_bits(args.scale)))
        for block in range(first_block, last_block + 1):
            where, out = block_of(args, step, part, block), weights + (block - first_block) * BLOCK * 4
            first_head = v.load_i32(part + at.PART_HEAD)
            for head in range(first_head, first_head + v.load_i32(part + at.PART_HEADS)):
                k, ahead, row = (
                    args.k_pool + (where + head) * args.k_head,
                    args.v_pool + (where + head) * args.v_head,
                    0,
                )
                while row < n_rows:
                    n = rows_at_once(n_rows - row)
                    q0, q1 = q_at(args, first, head, row, group), q_at(args, first, head, row + 1, group)
                    q2, q3 = q_at(args, first, head, row + 2, group), q_at(args, first, head, row + 3, group)
                    if is_wide:
                        first_half, last_half = wide_sums(n, k, 2 * line, dim_k, q0, q1, q2, q3, ahead)
                        put_scores(out, n, first_half, scale)
                        put_scores(out + 64, n, last_half, scale)
                    else:
                        for half in range(2):
                            to_fetch = ahead + half * dim_k * line
                            put_scores(
                                out + half * 64, n,
                                sums(n, k + half * line, 2 * line, dim_k, q0, q1, q2, q3, to_fetch), scale,
                            )  # fmt: skip
                    row, out = row + n, out + n * CUT_ROW

    return score_cut


_interleave = tuple(
    v.make_shuffle(v.f32x16, [lane + i for lane in range(0, 16, 4) for i in order])
    for order in ((0, 16, 1, 17), (2, 18, 3, 19), (0, 1, 16, 17), (2, 3, 18, 19))
)
_low_first, _high_first, _low_pairs, _high_pairs = _interleave
_low_f32x16, _high_f32x16 = (v.make_shuffle(v.f32x16, list(range(i, i + 8))) for i in (0, 8))
_low_f32x8, _high_f32x8 = (v.make_shuffle(v.f32x8, list(range(i, i + 4))) for i in (0, 4))


@v.forceinline
def _four_sums(a, b, c, d):
    """The sums of 16 lanes of each, as four lanes."""
    ab = _low_first(a, b) + _high_first(a, b)
    cd = _low_first(c, d) + _high_first(c, d)
    each = _low_pairs(ab, cd) + _high_pairs(ab, cd)
    half = _low_f32x16(each, each) + _high_f32x16(each, each)
    return _low_f32x8(half, half) + _high_f32x8(half, half)


def _make_products(n: int) -> Any:
    @v.forceinline
    def products(k, k_row, n_dims, q0, q1, q2, q3):
        """q[row] * k[position], in 16 lanes, of ``n`` rows of float32 and two neighbouring rows of float16."""
        a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = v.zero_f32x16()
        for i in range(0, n_dims * 4, 64):
            k0, k1 = v.half_f32x16(v.load_u16x16(k)), v.half_f32x16(v.load_u16x16(k + k_row))
            x = v.load_f32x16(q0 + i)
            a0, a1 = v.fma_f32x16(x, k0, a0), v.fma_f32x16(x, k1, a1)
            if n > 1:
                x = v.load_f32x16(q1 + i)
                b0, b1 = v.fma_f32x16(x, k0, b0), v.fma_f32x16(x, k1, b1)
            if n > 2:
                x = v.load_f32x16(q2 + i)
                c0, c1 = v.fma_f32x16(x, k0, c0), v.fma_f32x16(x, k1, c1)
            if n > 3:
                x = v.load_f32x16(q3 + i)
                d0, d1 = v.fma_f32x16(x, k0, d0), v.fma_f32x16(x, k1, d1)
            k += 32
        return a0, a1, b0, b1, c0, c1, d0, d1

    @v.forceinline
    def score_four(k, k_row, n_dims, q0, q1, q2, q3, out, scale):
        """Scores of ``n`` rows at four neighbouring positions."""
        a0, a1, b0, b1, c0, c1, d0, d1 = products(k, k_row, n_dims, q0, q1, q2, q3)
        a2, a3, b2, b3, c2, c3, d2, d3 = products(k + 2 * k_row, k_row, n_dims, q0, q1, q2, q3)
        v.store_f32x4(out, _four_sums(a0, a1, a2, a3) * scale)
        if n > 1:
            v.store_f32x4(out + CUT_ROW, _four_sums(b0, b1, b2, b3) * scale)
        if n > 2:
            v.store_f32x4(out + 2 * CUT_ROW, _four_sums(c0, c1, c2, c3) * scale)
        if n > 3:
            v.store_f32x4(out + 3 * CUT_ROW, _four_sums(d0, d1, d2, d3) * scale)

    return score_four


_score_one, _score_two, _score_three, _score_four = (_make_products(n) for n in (1, 2, 3, 4))


def _make_score_latent_cut(most: int, rows_at_once: Any) -> Any:
    @v.forceinline
    def score_cut(args, step, part, first_block, last_block, weights):
        """Scores of all rows of a part in the blocks of one cut, whose keys lie row by row."""
        dim_k, n_rows = args.dim_k, rows_of_head(args, part)
        first, group, k_row = v.load_i32(part), args.n_heads // args.n_kv_heads, dim_k * 2
        scale = v.splat_f32x4(v.f32_of(v.f64_from_bits(args.scale)))
        for block in range(first_block, last_block + 1):
            where, out = block_of(args, step, part, block), weights + (block - first_block) * BLOCK * 4
            first_head = v.load_i32(part + at.PART_HEAD)
            for head in range(first_head, first_head + v.load_i32(part + at.PART_HEADS)):
                keys, row = args.k_pool + (where + head) * dim_k * 64, 0
                while row < n_rows:
                    n = rows_at_once(n_rows - row)
                    q0, q1 = q_at(args, first, head, row, group), q_at(args, first, head, row + 1, group)
                    q2, q3 = q_at(args, first, head, row + 2, group), q_at(args, first, head, row + 3, group)
                    for i in range(0, BLOCK, 4):
                        k, place = keys + i * k_row, out + i * 4
                        if most > 3 and n == 4:
                            _score_four(k, k_row, dim_k, q0, q1, q2, q3, place, scale)
                        elif n == 3:
                            _score_three(k, k_row, dim_k, q0, q1, q2, q2, place, scale)
                        elif n == 2:
                            _score_two(k, k_row, dim_k, q0, q1, q1, q1, place, scale)
                        else:
                            _score_one(k, k_row, dim_k, q0, q0, q0, q0, place, scale)
                    row, out = row + n, out + n * CUT_ROW

    return score_cut


@v.forceinline
def _cap_row(scores, n, cap):
    for i in range(0, n * 4, 64):
        v.store_f32x16(scores + i, softcap_f32x16(v.load_f32x16(scores + i), cap))


@v.forceinline
def _soften_cut(args, step, part, first_block, last_block, weights, states):
    """The softmax of a cut by itself: scores become weights, states begin."""
    window, state_nbytes, n_rows = args.window, state_nbytes_of(args), rows_of_head(args, part)
    positions, sees = v.load_i64(step + at.POSITIONS), v.load_i64(step + at.SEES)
    first, group = v.load_i32(part), n_rows // v.load_i32(part + at.PART_TOKENS)
    for row in range(n_rows * v.load_i32(part + at.PART_HEADS)):
        token = (first + row % n_rows // group) * 4
        highest, lowest = last_seen(args, part, v.load_i32(sees + token)), 0
        if window > 0:
            lowest = v.load_i32(positions + token) - window + 1
        state, n = states + row * state_nbytes, (last_block - first_block + 1) * BLOCK
        _clear(state, state_nbytes)
        if args.softcap != 0:
            _cap_row(weights + row * CUT_ROW, n, v.splat_f32x16(v.f32_of(v.f64_from_bits(args.softcap))))
        _softmax_row(weights + row * CUT_ROW, first_block * BLOCK, n, lowest, highest, state)


@v.forceinline
def _add_to(place, value):
    v.store_f32x16(place, v.load_f32x16(place) + value)


@v.forceinline
def add_sums(to, state_nbytes, n, sums):
    """The sums of n rows to their states."""
    _add_to(to, sums[0])
    if n > 1:
        _add_to(to + state_nbytes, sums[1])
    if n > 2:
        _add_to(to + 2 * state_nbytes, sums[2])
    if n > 3:
        _add_to(to + 3 * state_nbytes, sums[3])


def make_weigh_cut(most: int, line_at: Any, size: int, *, latent: bool = False) -> Any:
    """weigh_cut(...) of values of ``size`` bytes a number; ``latent`` ones are the beginning of keys."""
    rows_at_once, sums = make_rows(most, line_at)
    wide_sums, is_wide = _make_wide_rows(most, line_at, size), most > 3

    @v.forceinline
    def weigh_cut(args, step, part, first_block, last_block, last, weights, states, then, then_block, then_last):
        """Weighted sums of a cut's values; fetches the keys of the part ``then`` from the block ``then_block`` on."""
        dim_v, n_rows, state_nbytes = args.dim_v, rows_of_head(args, part), state_nbytes_of(args)
        row_dims = dim_v
        if latent:
            row_dims = args.dim_k
        for block in range(first_block, last_block + 1):
            where, n_positions = block_of(args, step, part, block), min(BLOCK, last - block * BLOCK + 1)
            next_where = block_of(args, step, then, min(then_block + block - first_block, then_last))
            w, state = weights + (block - first_block) * BLOCK * 4, states
            for head in range(v.load_i32(part + at.PART_HEADS)):
                values = args.v_pool + (where + v.load_i32(part + at.PART_HEAD) + head) * args.v_head
                ahead = args.k_pool + (next_where + v.load_i32(then + at.PART_HEAD) + head) * args.k_head
                row = 0
                while row < n_rows:
                    n = rows_at_once(n_rows - row)
                    w1, w2, w3, done = w + CUT_ROW, w + 2 * CUT_ROW, w + 3 * CUT_ROW, 0
                    if is_wide:
                        done = dim_v // 32 * 32
                        for i in range(0, done, 32):
                            p, to, to_fetch = values + i * size, state + 64 + i * 4, ahead + i * 32 * size
                            low, high = wide_sums(n, p, row_dims * size, n_positions, w, w1, w2, w3, to_fetch)
                            add_sums(to, state_nbytes, n, low)
                            add_sums(to + 64, state_nbytes, n, high)
                    for i in range(done, dim_v, 16):
                        p, to, to_fetch = values + i * size, state + 64 + i * 4, ahead + i * 32 * size
                        add_sums(to, state_nbytes, n, sums(n, p, row_dims * size, n_positions, w, w1, w2, w3, to_fetch))
                    row, w, state = row + n, w + n * CUT_ROW, state + n * state_nbytes

    return weigh_cut


@v.forceinline
def _finish_rows(args, part, states):
    """The merged rows of a part to the output."""
    dim_v, n_heads, state_nbytes = args.dim_v, args.n_heads, state_nbytes_of(args)
    group = n_heads // args.n_kv_heads
    n_rows = v.load_i32(part + at.PART_TOKENS) * group
    for row in range(n_rows * v.load_i32(part + at.PART_HEADS)):
        head, r = v.load_i32(part + at.PART_HEAD) + row // n_rows, row % n_rows
        out = args.out + (v.load_i32(part) + r // group) * args.out_row
        number = head * group + r % group
        sink = (args.sinks + number * 4) * (args.sinks != 0)
        _finish(states + row * state_nbytes, out + number * dim_v * 4, dim_v, sink)


@v.forceinline
def _merge_cut(merged, states, nbytes, state_nbytes):
    """Merge the states of all rows, ``nbytes`` together."""
    for i in range(0, nbytes, state_nbytes):
        _merge(merged + i, states + i, state_nbytes)


@v.forceinline
def _clear_rows(merged, nbytes, state_nbytes):
    for i in range(0, nbytes, state_nbytes):
        _clear(merged + i, state_nbytes)


def _make_do_part(score_cut: Any, weigh_cut: Any) -> Any:
    @v.forceinline
    def do_part(op, args, step, part, then, scratch):
        """A part's cuts, merged if they are all that the tile has, else kept until all are there."""
        n_rows, state_nbytes, head = rows_of_head(args, part), state_nbytes_of(args), v.load_i32(part + at.PART_HEAD)
        all_rows, unit = n_rows * v.load_i32(part + at.PART_HEADS), v.load_i64(step + at.PARTIAL_NBYTES)
        lowest, highest, last = _visible(args, step, part)
        then_lowest, then_highest, _ = _visible(args, step, then)
        states, nbytes = scratch + all_rows * CUT_ROW, all_rows * state_nbytes
        merged, work = states + nbytes, states + 2 * nbytes
        kept = v.load_i64(step + at.PARTIALS) + v.load_i32(part + at.PART_PARTIAL) * unit + head * n_rows * state_nbytes
        n_parts, unit = v.load_i32(part + at.PART_OF), unit * v.load_i32(part + at.PART_TOKENS)
        _clear_rows(merged, nbytes, state_nbytes)
        end, size = v.load_i32(part + at.PART_CUT) + v.load_i32(part + at.PART_CUTS), at.CUT_BLOCKS
        if args.window > 0:
            size = at.CUT_BLOCKS // 2
        for cut in range(v.load_i32(part + at.PART_CUT), end):
            first_block, last_block = max(cut * size, lowest), min((cut + 1) * size - 1, highest)
            after, after_block, after_last = part, (cut + 1) * size, highest
            if cut + 1 == end:
                after, after_block = then, max(v.load_i32(then + at.PART_CUT) * size, then_lowest)
                after_last = then_highest
            score_cut(op, args, step, part, first_block, last_block, scratch, work)
            _soften_cut(args, step, part, first_block, last_block, scratch, states)
            weigh_cut(
                op,
                args,
                step,
                part,
                first_block,
                last_block,
                last,
                scratch,
                states,
                after,
                after_block,
                after_last,
                work,
            )
            if n_parts == 1:
                _merge_cut(merged, states, nbytes, state_nbytes)
            else:
                place = kept + (cut - v.load_i32(part + at.PART_TILE_CUT)) * unit
                for i in range(0, nbytes, 64):
                    v.store_f32x16(place + i, v.load_f32x16(states + i))
        finished = n_parts == 1
        if not finished:
            done = v.load_i64(step + at.PARTS_DONE) + v.load_i32(part + at.PART_DONE) * 8
            if v.atomic_add(done, 1) == n_parts - 1:
                v.store_i64(done, 0)
                finished = True
                for _ in range(v.load_i32(part + at.PART_TILE_CUTS)):
                    for i in range(0, nbytes, 64):
                        v.fetch_first(kept + 2 * unit + i)
                    _merge_cut(merged, kept, nbytes, state_nbytes)
                    kept += unit
        if finished:
            _finish_rows(args, part, merged)

    return do_part


def _make_attention(score_cut: Any, weigh_cut: Any) -> Any:
    do_part = _make_do_part(score_cut, weigh_cut)

    def attention(op, step, thread, n_threads):
        """out = softmax(scale * q k^T, masked) v"""
        args = v.arguments(op, at.ATTENTION)
        scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
        table = v.load_i64(step + at.PARTS) + args.shape * 16
        parts, n_parts = v.load_i64(table), v.load_i64(table + 8)
        item = v.atomic_add(op + at.COUNTER, 1)
        while item < n_parts:
            after = v.atomic_add(op + at.COUNTER, 1)  # known early: its first keys are fetched in time
            then = parts + min(after, n_parts - 1) * at.PART_NBYTES
            do_part(op, args, step, parts + item * at.PART_NBYTES, then, scratch)
            item = after

    return attention


def _make_inline(score_of: Any, weigh_of: Any) -> Any:
    """The kernel with both in it."""

    @v.forceinline
    def score_cut(op, args, step, part, first_block, last_block, weights, work):
        score_of(args, step, part, first_block, last_block, weights)

    @v.forceinline
    def weigh_cut(
        op, args, step, part, first_block, last_block, last, weights, states, then, then_block, then_last, work
    ):
        weigh_of(args, step, part, first_block, last_block, last, weights, states, then, then_block, then_last)

    return _make_attention(score_cut, weigh_cut)


def make_attention(most: int) -> Any:
    """The kernel of attention, of up to ``most`` rows at once: three, or four where there are 32 wide registers."""
    return _make_inline(make_score_cut(most, halves_at, 2), make_weigh_cut(most, halves_at, 2))


def make_latent_attention(most: int) -> Any:
    """The same over keys that have their values in them; sizes of heads are multiples of 16."""
    score_cut = _make_score_latent_cut(most, make_rows_at_once(most))
    return _make_inline(score_cut, make_weigh_cut(most, halves_at, 2, latent=True))


# ---- of keys and values of other types: what reads them are kernels of their own (typed_attention.py) ----------------


@v.forceinline
def _score_typed(op, args, step, part, first_block, last_block, weights, work):
    v.store_i64(work + at.TYPED_PART, part)
    v.store_i64(work + at.TYPED_FIRST, first_block)
    v.store_i64(work + at.TYPED_LAST, last_block)
    v.store_i64(work + at.TYPED_WEIGHTS, weights)
    v.call_kernel(args.score, op, step, work, work + at.TYPED_NBYTES)


@v.forceinline
def _weigh_typed(
    op, args, step, part, first_block, last_block, last, weights, states, then, then_block, then_last, work
):
    v.store_i64(work + at.TYPED_SEES, last)
    v.store_i64(work + at.TYPED_STATES, states)
    v.store_i64(work + at.TYPED_THEN, then)
    v.store_i64(work + at.TYPED_THEN_FIRST, then_block)
    v.store_i64(work + at.TYPED_THEN_LAST, then_last)
    v.call_kernel(args.weigh, op, step, work, work + at.TYPED_NBYTES)


attention_typed = _make_attention(_score_typed, _weigh_typed)
