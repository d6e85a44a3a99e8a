"""Attention within a text, both ways, over rows of float32 that are nowhere else: what encoders have.

A work item is a tile of a text's tokens and a head of its keys. The text is cut at every 512 tokens. Of a cut the keys
are packed by groups of 64, transposed, so that a register holds one dimension of 16 keys, and the values line by line;
then the tile's rows, which are its tokens times the query heads that share the keys, go through it six at once:

    scores of a group of keys   sum over dimensions of q[row][d] * keys[d]
    a cut's own softmax         m = max s,  w = e^(s - m),  l = sum w
    what the cut adds           sum over its keys of w[row][j] * values[j]

and are merged first cut to last, as in attention.py. Rows do not depend on each other, and cuts begin where the text
does, so a text has the same bits in any batch.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels.attention import lane_numbers, minus_infinity
from edgellm.kernels.cpu.kernels.float_panels import make_tiles, moved, turn_16
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import exp_f32x16

ROWS = at.SELF_ROWS
SCORES_ROW = at.SELF_CUT * 4
KEYS_LINE = 256  # of a dimension of 64 keys
_NEG_INF = float("-inf")


@v.forceinline
def _state_nbytes(dim):
    """A row's state: m, l, 14 unused, then the weighted sum of values, padded to 16."""
    return 64 + (dim + 15) // 16 * 64


def _make_columns(is_wide):
    """columns(x, lines, line, group, n, low, high, out): for six rows, whose addresses are ``x`` and ``out``, the sums
    of x[i] * line[i][c] over n lines, ``line`` bytes apart, for the columns [low, high), 16 or more at once; columns 64
    to 127 lie ``group`` bytes behind the first 64, and so on."""

    one, two, four = make_tiles("F32")

    @v.forceinline
    def columns(x, lines, line, group, n, low, high, out):
        c = low
        while c < high:
            p, to = lines + c // 64 * group + c % 64 * 4, moved(out, c * 4)
            if is_wide and c % 64 == 0 and c + 48 < high:
                four(x, p, line, n, 0, to, True)
                c += 64
            elif is_wide and c % 64 <= 32 and c + 16 < high:
                two(x, p, line, n, to)
                c += 32
            else:
                one(x, p, line, n, 0, to, True)
                c += 16

    return columns


@v.forceinline
def _pack(args, first, n, head, keys, values):
    """The keys of n tokens from ``first`` on as (groups, dim, 64), their values as (n, dim padded)."""
    dim = args.head_dim
    whole, line = dim // 16 * 16, (dim + 15) // 16 * 64
    own = args.k + first * args.k_row + head * dim * 4
    for t in range(0, n // 16 * 16, 16):
        for d in range(0, whole, 16):
            turn_16(
                own + t * args.k_row + d * 4,
                args.k_row,
                keys + t // 64 * dim * KEYS_LINE + d * KEYS_LINE + t % 64 * 4,
                KEYS_LINE,
            )
    for t in range(n):
        target = keys + t // 64 * dim * KEYS_LINE + t % 64 * 4
        for d in range(whole * (t < n // 16 * 16), dim):
            v.store_f32(target + d * KEYS_LINE, v.load_f32(own + t * args.k_row + d * 4))
    for t in range(n):
        x, target = args.v + (first + t) * args.v_row + head * dim * 4, values + t * line
        for d in range(0, whole, 16):
            v.store_f32x16(target + d * 4, v.load_f32x16(x + d * 4))
        for d in range(whole, dim):
            v.store_f32(target + d * 4, v.load_f32(x + d * 4))


@v.forceinline
def _query(args, first, head, group, row, n_rows):
    """Address of a row's query; rows past the last are the last."""
    r = min(row, n_rows - 1)
    return args.q + (first + r // group) * args.q_row + (head * group + r % group) * args.head_dim * 4


@v.forceinline
def _six(p, step):
    """Addresses of six rows."""
    return p, p + step, p + 2 * step, p + 3 * step, p + 4 * step, p + 5 * step


@v.forceinline
def _fade(scores, first, n, scale, slope, position):
    """Scores of n positions from ``first`` on lose ``slope`` for each token of the distance to ``position``."""
    cost = v.splat_f32x16(slope)
    for i in range(0, n, 16):
        distance = v.abs_f32x16(lane_numbers() + v.splat_f32x16(v.f32_of(float(first + i - position))))
        v.store_f32x16(scores + i * 4, v.load_f32x16(scores + i * 4) * scale - cost * distance)


@v.forceinline
def _soften(scores, first, n, low, high, scale, state):
    """Scores of n positions from ``first`` on become e^(scale s - m), 0 outside [low, high]; stores m and l."""
    lowest, highest = v.splat_f32x16(v.f32_of(float(low - first))), v.splat_f32x16(v.f32_of(float(high - first)))
    largest = minus_infinity()
    for i in range(0, n, 16):
        s = v.load_f32x16(scores + i * 4) * scale
        if first + i < low or first + i + 15 > high:
            index = lane_numbers() + v.splat_f32x16(v.f32_of(float(i)))
            s = v.where_less(index, lowest, minus_infinity(), s)
            s = v.where_less(highest, index, minus_infinity(), s)
        v.store_f32x16(scores + i * 4, s)
        largest = v.max_f32x16(s, largest)
    m, total = v.maximum_f32x16(largest), v.zero_f32x16()
    base = v.splat_f32x16(m)
    if m == v.f32_of(_NEG_INF):  # nothing is visible, or nothing but NaN, which has to stay visible
        base = v.zero_f32x16()
    for i in range(0, n * 4, 64):
        w = exp_f32x16(v.load_f32x16(scores + i) - base)
        v.store_f32x16(scores + i, w)
        total = total + w
    v.store_f32(state, m)
    v.store_f32(state + 4, v.sum_f32x16(total))


@v.forceinline
def _merge(merged, cut, sums, nbytes):
    """Add a cut's sums to those of the row; ``cut`` has its m and l. One without a visible key changes nothing."""
    l_cut = v.load_f32(cut + 4)
    if l_cut != v.f32_of(0.0) and v.load_f32(merged) == v.f32_of(_NEG_INF):  # the first: as the steps below make it
        for i in range(0, 64 + nbytes, 64):
            v.store_f32x16(merged + i, v.load_f32x16(cut + i))
    elif l_cut != v.f32_of(0.0):  # true of NaN
        m_old, m_cut = v.load_f32(merged), v.load_f32(cut)
        m = max(m_old, m_cut)
        keep, take = exp_f32x16(v.splat_f32x16(m_old - m)), exp_f32x16(v.splat_f32x16(m_cut - m))
        v.store_f32(merged, m)
        v.store_f32(merged + 4, v.fma_f32(l_cut, v.first_lane(take), v.load_f32(merged + 4) * v.first_lane(keep)))
        for i in range(0, nbytes, 64):
            old = v.load_f32x16(merged + 64 + i) * keep
            v.store_f32x16(merged + 64 + i, v.fma_f32x16(v.load_f32x16(sums + i), take, old))


@v.forceinline
def _do_rows(columns, args, tile, head, row, n_rows, begin, n, where):
    """Six rows of a tile through the cut of n keys from ``begin`` on, counted from the text's start."""
    text, text_n, first = v.load_i32(tile), v.load_i32(tile + 4), v.load_i32(tile + 8)
    dim, group, reach = args.head_dim, args.n_heads // args.n_kv_heads, args.reach
    line, state_nbytes = (dim + 15) // 16 * 64, _state_nbytes(dim)
    keys, values, scores, sums, states = where
    queries = (
        _query(args, first, head, group, row, n_rows), _query(args, first, head, group, row + 1, n_rows),
        _query(args, first, head, group, row + 2, n_rows), _query(args, first, head, group, row + 3, n_rows),
        _query(args, first, head, group, row + 4, n_rows), _query(args, first, head, group, row + 5, n_rows),
    )  # fmt: skip
    last_row = min(row + ROWS, n_rows) - 1
    low, high = 0, n
    if reach > 0:  # groups of keys that one of the rows sees
        low = max(0, first - text + row // group - reach - begin) // 16 * 16
        high = min(n, first - text + last_row // group + reach - begin + 1)
    if low < high:
        columns(queries, keys, KEYS_LINE, dim * KEYS_LINE, dim, low, high, _six(scores, SCORES_ROW))
        scale, seen = v.splat_f32x16(v.f32_of(v.f64_from_bits(args.scale))), (high - low + 15) // 16 * 16
        for r in range(last_row - row + 1):
            position = first - text + (row + r) // group
            near, far = 0, text_n - 1
            if reach > 0:
                near, far = max(near, position - reach), min(far, position + reach)
            far = min(far, begin + n - 1)
            of_row = scores + low * 4 + r * SCORES_ROW
            times = scale
            if args.slopes != 0:
                slope = v.load_f32(args.slopes + (head * group + (row + r) % group) * 4)
                _fade(of_row, begin + low, seen, scale, slope, position)
                times = v.splat_f32x16(v.f32_of(1.0))
            _soften(of_row, begin + low, seen, near, far, times, sums + r * at.SELF_SUMS)
        weights, out = _six(scores + low * 4, SCORES_ROW), _six(sums + 64, at.SELF_SUMS)
        columns(weights, values + low * line, line, 256, high - low, 0, line // 4, out)
        for r in range(last_row - row + 1):
            _merge(states + (row + r) * state_nbytes, sums + r * at.SELF_SUMS, sums + r * at.SELF_SUMS + 64, line)


@v.forceinline
def _finish(args, tile, head, n_rows, states):
    """out = weighted sum / l for every row."""
    first, dim, group = v.load_i32(tile + 8), args.head_dim, args.n_heads // args.n_kv_heads
    whole = dim // 16 * 16
    for row in range(n_rows):
        state = states + row * _state_nbytes(dim)
        out = args.out + (first + row // group) * args.out_row + (head * group + row % group) * dim * 4
        total = v.load_f32(state + 4)
        for i in range(0, whole, 16):
            v.store_f32x16(out + i * 4, v.load_f32x16(state + 64 + i * 4) / v.splat_f32x16(total))
        for i in range(whole, dim):
            v.store_f32(out + i * 4, v.load_f32(state + 64 + i * 4) / total)


@v.forceinline
def _do_tile(columns, args, tile, head, scratch):
    dim, group, reach = args.head_dim, args.n_heads // args.n_kv_heads, args.reach
    text, text_n, first = v.load_i32(tile), v.load_i32(tile + 4), v.load_i32(tile + 8)
    n_rows, state_nbytes = v.load_i32(tile + 12) * group, _state_nbytes(dim)
    keys = scratch
    values = keys + at.SELF_CUT * dim * 4
    scores = values + at.SELF_CUT * ((dim + 15) // 16 * 64)
    sums = scores + ROWS * SCORES_ROW
    states = sums + ROWS * at.SELF_SUMS
    for row in range(n_rows):
        state = states + row * state_nbytes
        v.store_f32(state, v.f32_of(_NEG_INF))
        v.store_f32(state + 4, v.f32_of(0.0))
        for i in range(64, state_nbytes, 64):
            v.store_f32x16(state + i, v.zero_f32x16())
    for begin in range(0, text_n, at.SELF_CUT):
        n = min(at.SELF_CUT, text_n - begin)
        from_first = first - text
        sees = reach == 0 or (
            begin <= from_first + v.load_i32(tile + 12) - 1 + reach and begin + n > from_first - reach
        )
        if sees:
            _pack(args, text + begin, n, head, keys, values)
            for row in range(0, n_rows, ROWS):
                _do_rows(columns, args, tile, head, row, n_rows, begin, n, (keys, values, scores, sums, states))
    _finish(args, tile, head, n_rows, states)


def make_self_attention(form: str | None = None) -> Any:
    """The kernel out = softmax(scale * q k^T) v within each text."""
    columns = _make_columns(form in ("amx", "avx512_vnni"))

    def self_attention(op, step, thread, n_threads):
        args = v.arguments(op, at.SELF_ATTENTION)
        scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
        tiles, heads = v.load_i64(step + at.TEXT_TILES), args.n_kv_heads
        n_items = v.load_i64(step + at.N_TEXT_TILES) * heads
        item = v.atomic_add(op + at.COUNTER, 1)
        while item < n_items:
            _do_tile(columns, args, tiles + item // heads * at.TEXT_TILE_NBYTES, item % heads, scratch)
            item = v.atomic_add(op + at.COUNTER, 1)

    return self_attention
