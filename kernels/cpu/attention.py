"""Attention over the paged float16 cache: online softmax, causal, grouped queries, sliding window.

The context is cut at every 128 positions. A cut is summed from nothing, its scores with the cut's own maximum, and the
cuts of a row are merged first to last:

    m' = max(M, m);  L = L e^(M-m') + l e^(m-m');  A = A e^(M-m') + a e^(m-m');  M = m'

A tile is a few neighbouring tokens of one sequence; its rows are the tokens times the query heads that share a head of
the cache. A work item is a part of a tile's cuts, for one head of the cache (attention_work.py deals them out). A part
that is all of a tile is merged as it goes. Otherwise the cuts are kept, and the thread that finishes a tile's last part
merges them. Both do the same operations in the same order, so the result does not depend on the batch.

Three rows (or two) take a block of 32 positions at once, so that a float16 key or value is widened once for all three.
Keys lie transposed in a block: a register holds one dimension of neighbouring positions, and scores need no horizontal
sums. While the keys of a block are read, its values are fetched, and then the keys of the next cut.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu import layout as at
from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.layout import CUT_BLOCKS, PART_NBYTES
from edgellm.kernels.cpu.simd import (
    atomic_add,
    f32_of,
    fma_f32x16,
    forceinline,
    half_f32x16,
    load_f32,
    load_f32x16,
    load_f64,
    load_i32,
    load_i64,
    load_u16x16,
    max_f32x16,
    maximum_f32x16,
    prefetch,
    splat_f32x16,
    store_f32,
    store_f32x16,
    store_i64,
    sum_f32x16,
    where_less,
    zero_f32x16,
)
from edgellm.kernels.cpu.vector_math import exp_f32x16

BLOCK = 32
CUT_ROW = CUT_BLOCKS * BLOCK * 4
"""Bytes of one row's scores, later weights, in a cut."""
_arg = [8 * i for i in range(15)]
Q, Q_ROW, OUT, OUT_ROW, K_POOL, V_POOL, N_HEADS, N_KV_HEADS, DIM_K, DIM_V, WINDOW, TABLE, SCALE = _arg[1:14]

_minus_infinity = simd.make_const(simd.f32x16, float("-inf"))
_NEG_INF = float("-inf")


@simd.intrinsic
def _lane_numbers(typing_context):
    def codegen(context, builder, sig, args):
        return simd.ir.Constant(simd.f32x16.ir, [float(i) for i in range(16)])

    return simd.f32x16(), codegen


@forceinline
def _state_nbytes(op):
    """A row's state: m, l, 14 unused, then the weighted sum of values, padded to 16."""
    return 64 + (load_i64(op + DIM_V) + 15) // 16 * 64


@forceinline
def _clear(state, nbytes):
    store_f32(state, f32_of(_NEG_INF))
    store_f32(state + 4, f32_of(0.0))
    for i in range(64, nbytes, 64):
        store_f32x16(state + i, zero_f32x16())


@forceinline
def _merge(merged, cut, nbytes):
    """Add a cut's state to the merged one. A cut in which nothing was visible changes nothing."""
    m_cut, m_old = load_f32(cut), load_f32(merged)
    if load_f32(cut + 4) != f32_of(0.0):  # true of NaN, which has to stay visible
        m = max(m_old, m_cut)
        keep, take = exp_f32x16(splat_f32x16(m_old - m)), exp_f32x16(splat_f32x16(m_cut - m))
        store_f32(merged, m)
        old = load_f32(merged + 4) * simd.first_lane(keep)
        store_f32(merged + 4, simd.fma_f32(load_f32(cut + 4), simd.first_lane(take), old))
        for i in range(64, nbytes, 64):
            store_f32x16(merged + i, fma_f32x16(load_f32x16(cut + i), take, load_f32x16(merged + i) * keep))


@forceinline
def _finish(merged, out, dim_v):
    """out = weighted sum / l"""
    total = load_f32(merged + 4)
    whole = dim_v // 16 * 16
    for i in range(0, whole, 16):
        store_f32x16(out + i * 4, load_f32x16(merged + 64 + i * 4) / splat_f32x16(total))
    for i in range(whole, dim_v):
        store_f32(out + i * 4, load_f32(merged + 64 + i * 4) / total)


def _make_rows(third: bool) -> Any:
    """A block for three rows, or for two: scores(k, ...) and add_values(v, ...).

    Two sums for each row, of the even and of the odd terms: with three rows that is what fills 16 AVX2 registers.
    """

    @forceinline
    def scores(k, dim_k, scale, q0, q1, q2, out, ahead):
        """out[row] = scale * q . k at 32 positions; fetches the block at ``ahead``."""
        for half in range(2):
            line, fetch = k + half * 32, ahead + half * 64
            a0 = a1 = b0 = b1 = c0 = c1 = zero_f32x16()
            for d in range(0, dim_k // 2 * 2, 2):
                prefetch(fetch + d * 64)
                k0, k1 = half_f32x16(load_u16x16(line + d * 64)), half_f32x16(load_u16x16(line + d * 64 + 64))
                a0 = fma_f32x16(splat_f32x16(load_f32(q0 + d * 4)), k0, a0)
                b0 = fma_f32x16(splat_f32x16(load_f32(q1 + d * 4)), k0, b0)
                a1 = fma_f32x16(splat_f32x16(load_f32(q0 + d * 4 + 4)), k1, a1)
                b1 = fma_f32x16(splat_f32x16(load_f32(q1 + d * 4 + 4)), k1, b1)
                if third:
                    c0 = fma_f32x16(splat_f32x16(load_f32(q2 + d * 4)), k0, c0)
                    c1 = fma_f32x16(splat_f32x16(load_f32(q2 + d * 4 + 4)), k1, c1)
            if dim_k % 2:
                d = dim_k - 1
                k0 = half_f32x16(load_u16x16(line + d * 64))
                a0 = fma_f32x16(splat_f32x16(load_f32(q0 + d * 4)), k0, a0)
                b0 = fma_f32x16(splat_f32x16(load_f32(q1 + d * 4)), k0, b0)
                if third:
                    c0 = fma_f32x16(splat_f32x16(load_f32(q2 + d * 4)), k0, c0)
            store_f32x16(out, (a0 + a1) * scale)
            store_f32x16(out + CUT_ROW, (b0 + b1) * scale)
            if third:
                store_f32x16(out + 2 * CUT_ROW, (c0 + c1) * scale)
            out += 64

    @forceinline
    def add_values(v, dim_v, n_positions, weights, state, state_nbytes, ahead):
        """state[row] += weights[row] . values; fetches the block at ``ahead``."""
        a, b, c = state + 64, state + state_nbytes + 64, state + 2 * state_nbytes + 64
        row, odd = dim_v * 2, 0
        for i in range(0, row, 32):
            a0, b0, c0, a1, b1, c1 = (
                load_f32x16(a),
                load_f32x16(b),
                zero_f32x16(),
                zero_f32x16(),
                zero_f32x16(),
                zero_f32x16(),
            )
            if third:
                c0 = load_f32x16(c)
            value, w, fetch = v + i, weights, ahead + i + odd * row
            for _ in range(n_positions // 2):
                prefetch(fetch)
                v0, v1 = half_f32x16(load_u16x16(value)), half_f32x16(load_u16x16(value + row))
                a0 = fma_f32x16(splat_f32x16(load_f32(w)), v0, a0)
                b0 = fma_f32x16(splat_f32x16(load_f32(w + CUT_ROW)), v0, b0)
                a1 = fma_f32x16(splat_f32x16(load_f32(w + 4)), v1, a1)
                b1 = fma_f32x16(splat_f32x16(load_f32(w + CUT_ROW + 4)), v1, b1)
                if third:
                    c0 = fma_f32x16(splat_f32x16(load_f32(w + 2 * CUT_ROW)), v0, c0)
                    c1 = fma_f32x16(splat_f32x16(load_f32(w + 2 * CUT_ROW + 4)), v1, c1)
                value, w, fetch = value + 2 * row, w + 8, fetch + 2 * row
            if n_positions % 2:
                v0 = half_f32x16(load_u16x16(value))
                a0 = fma_f32x16(splat_f32x16(load_f32(w)), v0, a0)
                b0 = fma_f32x16(splat_f32x16(load_f32(w + CUT_ROW)), v0, b0)
                if third:
                    c0 = fma_f32x16(splat_f32x16(load_f32(w + 2 * CUT_ROW)), v0, c0)
            store_f32x16(a, a0 + a1)
            store_f32x16(b, b0 + b1)
            if third:
                store_f32x16(c, c0 + c1)
            a, b, c, odd = a + 64, b + 64, c + 64, 1 - odd

    return scores, add_values


_scores_of_two, _add_values_of_two = _make_rows(False)
_scores_of_three, _add_values_of_three = _make_rows(True)


@forceinline
def _softmax_row(weights, first, n, lowest, highest, state):
    """Scores of ``n`` positions from ``first`` on become e^(s - m), 0 outside [lowest, highest]; stores m and l."""
    if lowest > first or highest < first + n - 1:
        low, high = splat_f32x16(f32_of(float(lowest - first))), splat_f32x16(f32_of(float(highest - first)))
        for i in range(0, n, 16):
            index = _lane_numbers() + splat_f32x16(f32_of(float(i)))
            s = where_less(index, low, _minus_infinity(), load_f32x16(weights + i * 4))
            store_f32x16(weights + i * 4, where_less(high, index, _minus_infinity(), s))
    largest = _minus_infinity()
    for i in range(0, n * 4, 64):
        largest = max_f32x16(load_f32x16(weights + i), largest)
    m = maximum_f32x16(largest)
    total = zero_f32x16()
    if m != f32_of(_NEG_INF):
        for i in range(0, n * 4, 64):
            w = exp_f32x16(load_f32x16(weights + i) - splat_f32x16(m))
            store_f32x16(weights + i, w)
            total = total + w
    else:  # nothing visible, or nothing but NaN, which has to stay visible
        for i in range(0, n * 4, 64):
            s = load_f32x16(weights + i)
            w = where_less(s, zero_f32x16(), zero_f32x16(), s)
            store_f32x16(weights + i, w)
            total = total + w
    store_f32(state, m)
    store_f32(state + 4, sum_f32x16(total))


@forceinline
def _q_at(op, first, row, n_rows, group, head):
    """Address of a row's query; rows past the last repeat it."""
    r = min(row, n_rows - 1)
    token, dim_k = first + r // group, load_i64(op + DIM_K)
    return load_i64(op + Q) + token * load_i64(op + Q_ROW) + (head * group + r % group) * dim_k * 4


@forceinline
def _rows_at_once(left):
    """Three rows, or two where that leaves no row alone."""
    three = 3
    if left == 2 or left == 4 or left == 1:
        three = 2
    return three


@forceinline
def _block(op, step, sequence, block, head):
    """Index of a head's share of a block, in heads."""
    table = load_i64(step + at.TABLES) + load_i64(op + TABLE) * 16
    blocks = load_i64(table) + sequence * load_i64(table + 8) * 4
    return load_i32(blocks + block * 4) * load_i64(op + N_KV_HEADS) + head


@forceinline
def _cut(op, step, part, head, first_block, last_block, last, weights, states):
    """All rows of a tile over the blocks [first_block, last_block] of one cut, into ``states``."""
    first, n_tokens, sequence = load_i32(part), load_i32(part + at.PART_TOKENS), load_i32(part + at.PART_SEQUENCE)
    dim_k, dim_v, window = load_i64(op + DIM_K), load_i64(op + DIM_V), load_i64(op + WINDOW)
    group = load_i64(op + N_HEADS) // load_i64(op + N_KV_HEADS)
    n_rows, state_nbytes = n_tokens * group, _state_nbytes(op)
    k_pool, v_pool = load_i64(op + K_POOL), load_i64(op + V_POOL)
    scale = splat_f32x16(f32_of(load_f64(op + SCALE)))
    for block in range(first_block, last_block + 1):
        where = _block(op, step, sequence, block, head)
        k, v = k_pool + where * dim_k * 64, v_pool + where * dim_v * 64
        row, out = 0, weights + (block - first_block) * BLOCK * 4
        while row < n_rows:
            q0, q1 = _q_at(op, first, row, n_rows, group, head), _q_at(op, first, row + 1, n_rows, group, head)
            if _rows_at_once(n_rows - row) == 3:
                q2 = _q_at(op, first, row + 2, n_rows, group, head)
                _scores_of_three(k, dim_k, scale, q0, q1, q2, out + row * CUT_ROW, v)
                row += 3
            else:
                _scores_of_two(k, dim_k, scale, q0, q1, q1, out + row * CUT_ROW, v)
                row += 2
    positions, base = load_i64(step + at.POSITIONS) + first * 4, first_block * BLOCK
    for row in range(n_rows):
        position, lowest = load_i32(positions + row // group * 4), 0
        if window > 0:
            lowest = position - window + 1
        state, n = states + row * state_nbytes, (last_block - first_block + 1) * BLOCK
        _clear(state, state_nbytes)
        _softmax_row(weights + row * CUT_ROW, base, n, lowest, position, state)
    for block in range(first_block, last_block + 1):
        v = v_pool + _block(op, step, sequence, block, head) * dim_v * 64
        ahead = k_pool + _block(op, step, sequence, min(block + CUT_BLOCKS, last // BLOCK), head) * dim_k * 64
        n_positions, row = min(BLOCK, last - block * BLOCK + 1), 0
        w = weights + (block - first_block) * BLOCK * 4
        while row < n_rows:
            if _rows_at_once(n_rows - row) == 3:
                state = states + row * state_nbytes
                _add_values_of_three(v, dim_v, n_positions, w + row * CUT_ROW, state, state_nbytes, ahead)
                row += 3
            else:
                state = states + row * state_nbytes
                _add_values_of_two(v, dim_v, n_positions, w + row * CUT_ROW, state, state_nbytes, ahead)
                row += 2


@forceinline
def _finish_rows(op, part, head, states):
    """The merged rows of a tile to the output."""
    dim_v, n_heads, state_nbytes = load_i64(op + DIM_V), load_i64(op + N_HEADS), _state_nbytes(op)
    group = n_heads // load_i64(op + N_KV_HEADS)
    for row in range(load_i32(part + at.PART_TOKENS) * group):
        out = load_i64(op + OUT) + (load_i32(part) + row // group) * load_i64(op + OUT_ROW)
        _finish(states + row * state_nbytes, out + (head * group + row % group) * dim_v * 4, dim_v)


@forceinline
def _merge_parts(op, step, part, head, rows, merged):
    """Merge all cuts of a tile, first to last."""
    n_rows = load_i32(part + at.PART_TOKENS) * (load_i64(op + N_HEADS) // load_i64(op + N_KV_HEADS))
    state_nbytes, unit = _state_nbytes(op), load_i64(step + at.PARTIAL_NBYTES) * load_i32(part + at.PART_TOKENS)
    for row in range(n_rows):
        _clear(merged + row * state_nbytes, state_nbytes)
    for _ in range(load_i32(part + at.PART_TILE_CUTS)):
        for row in range(n_rows):
            _merge(merged + row * state_nbytes, rows + (head * n_rows + row) * state_nbytes, state_nbytes)
        rows += unit


@forceinline
def _item(op, step, part, head, scratch):
    """One head's share of a part: its cuts, merged if they are all that the tile has, else kept until all are there."""
    group = load_i64(op + N_HEADS) // load_i64(op + N_KV_HEADS)
    n_tokens, window, state_nbytes = load_i32(part + at.PART_TOKENS), load_i64(op + WINDOW), _state_nbytes(op)
    n_rows = n_tokens * group
    positions = load_i64(step + at.POSITIONS) + load_i32(part) * 4
    last, lowest = load_i32(positions + (n_tokens - 1) * 4), 0
    if window > 0:
        lowest = max(0, load_i32(positions) - window + 1) // BLOCK
    cut, n_parts = load_i32(part + at.PART_CUT), load_i32(part + at.PART_OF)
    states = scratch + (n_rows + 1) * CUT_ROW
    merged = states + (n_rows + 1) * state_nbytes
    unit = load_i64(step + at.PARTIAL_NBYTES)
    rows = load_i64(step + at.PARTIALS) + load_i32(part + at.PART_PARTIAL) * unit
    for row in range(n_rows):
        _clear(merged + row * state_nbytes, state_nbytes)
    for c in range(cut, cut + load_i32(part + at.PART_CUTS)):
        a, b = max(c * CUT_BLOCKS, lowest), min((c + 1) * CUT_BLOCKS - 1, last // BLOCK)
        _cut(op, step, part, head, a, b, last, scratch, states)
        if n_parts == 1:
            for row in range(n_rows):
                _merge(merged + row * state_nbytes, states + row * state_nbytes, state_nbytes)
        else:
            place = rows + (c - load_i32(part + at.PART_TILE_CUT)) * n_tokens * unit + head * n_rows * state_nbytes
            for i in range(0, n_rows * state_nbytes, 64):
                store_f32x16(place + i, load_f32x16(states + i))
    if n_parts > 1:
        done = load_i64(step + at.PARTS_DONE) + (load_i32(part + at.PART_DONE) + head) * 8
        if atomic_add(done, 1) == n_parts - 1:
            store_i64(done, 0)
            _merge_parts(op, step, part, head, rows, merged)
            _finish_rows(op, part, head, merged)
    else:
        _finish_rows(op, part, head, merged)


def attention(op, step, thread, n_threads):
    """out = softmax(scale * q k^T, masked) v"""
    scratch = load_i64(step + at.SCRATCH) + thread * load_i64(step + at.SCRATCH_NBYTES)
    parts, heads = load_i64(step + at.PARTS) + load_i64(op + TABLE) * 16, load_i64(op + N_KV_HEADS)
    items = load_i64(parts + 8) * heads
    item = atomic_add(op + at.COUNTER, 1)
    while item < items:
        # one head after another: neighbouring items read different memory
        _item(op, step, load_i64(parts) + item // heads * PART_NBYTES, item % heads, scratch)
        item = atomic_add(op + at.COUNTER, 1)
