"""Attention over the paged float16 cache: online softmax, causal, grouped queries, sliding window.

A work item is a tile of neighbouring tokens of one sequence and one head of the cache; its rows are the tile's tokens
times the query heads that share that head. Rows go through a block of 32 positions four at a time, so that a float16
key or value is widened once for four of them. Keys lie transposed in a block: a register holds one dimension of 16
positions, and scores need no horizontal sums.

The context is cut at every 256 positions. Each cut is summed from nothing, and the cuts are merged first to last:

    m' = max(M, m);  L = L e^(M-m') + l e^(m-m');  A = A e^(M-m') + a e^(m-m');  M = m'

Few tokens over a long context: the threads share the cuts and ``attention_merge`` merges them. Otherwise an item
merges its own. Both do the same operations in the same order, so the result does not depend on the batch.
"""

from __future__ import annotations

from edgellm.kernels.cpu import layout as at
from edgellm.kernels.cpu import simd
from edgellm.kernels.cpu.layout import CUT_BLOCKS
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
    splat_f32x16,
    store_f32,
    store_f32x16,
    sum_f32x16,
    where_less,
    zero_f32x16,
)
from edgellm.kernels.cpu.vector_math import exp_f32x16

BLOCK = 32
_arg = [8 * i for i in range(15)]
Q, Q_ROW, OUT, OUT_ROW, K_POOL, V_POOL, N_HEADS, N_KV_HEADS, DIM_K, DIM_V, WINDOW, TABLE, SCALE = _arg[1:14]

# in the step's PARTIALS record (int64): address of the partial rows, cuts kept for each (token, head)
PARTIAL_ROWS, PARTIAL_CUTS = 0, 8

_minus_infinity = simd.make_const(simd.f32x16, float("-inf"))
_NEG_INF = float("-inf")


@simd.intrinsic
def _lane_numbers(typing_context):
    def codegen(context, builder, sig, args):
        return simd.ir.Constant(simd.f32x16.ir, [float(i) for i in range(16)])

    return simd.f32x16(), codegen


@forceinline
def _clear(state, dim_v):
    store_f32(state, f32_of(_NEG_INF))
    store_f32(state + 4, f32_of(0.0))
    for i in range(0, dim_v, 16):
        store_f32x16(state + 64 + i * 4, zero_f32x16())


@forceinline
def _merge(merged, cut, dim_v):
    """Add a cut's state to the merged one. A cut in which nothing was visible changes nothing."""
    m_cut, m_old = load_f32(cut), load_f32(merged)
    if load_f32(cut + 4) != f32_of(0.0):  # true of NaN, which has to stay visible
        m = max(m_old, m_cut)
        keep, take = exp_f32x16(splat_f32x16(m_old - m)), exp_f32x16(splat_f32x16(m_cut - m))
        store_f32(merged, m)
        old = load_f32(merged + 4) * simd.first_lane(keep)
        store_f32(merged + 4, simd.fma_f32(load_f32(cut + 4), simd.first_lane(take), old))
        for i in range(64, 64 + dim_v * 4, 64):
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


@forceinline
def _masked(s, scale, first_index, lowest, highest):
    """Scaled scores of 16 positions, minus infinity outside [lowest, highest]."""
    index = _lane_numbers() + splat_f32x16(f32_of(float(first_index)))
    s = where_less(index, splat_f32x16(f32_of(float(lowest))), _minus_infinity(), s * scale)
    return where_less(splat_f32x16(f32_of(float(highest))), index, _minus_infinity(), s)


@forceinline
def _softmax_row(s0, s1, state, weights):
    """Online softmax of 32 scores: new m and l, the 32 weights stored; returns what the old sum is multiplied by."""
    m_old = load_f32(state)
    largest = maximum_f32x16(max_f32x16(s0, s1))
    m = m_old
    if largest > m_old:
        m = largest
    keep = splat_f32x16(f32_of(1.0))
    if largest != f32_of(_NEG_INF):  # true of NaN, which has to stay visible
        w0, w1 = exp_f32x16(s0 - splat_f32x16(m)), exp_f32x16(s1 - splat_f32x16(m))
        keep = exp_f32x16(splat_f32x16(m_old - m))
        store_f32(state, m)
        store_f32(state + 4, simd.fma_f32(load_f32(state + 4), simd.first_lane(keep), sum_f32x16(w0 + w1)))
        store_f32x16(weights, w0)
        store_f32x16(weights + 64, w1)
    else:
        store_f32x16(weights, zero_f32x16())
        store_f32x16(weights + 64, zero_f32x16())
    return keep


@forceinline
def _scores(k, dim_k, q0, q1, q2, q3):
    """q . k of four rows with 16 positions, one dimension after another."""
    s0 = s1 = s2 = s3 = zero_f32x16()
    for d in range(dim_k):
        kd = half_f32x16(load_u16x16(k + d * 64))
        s0 = fma_f32x16(splat_f32x16(load_f32(q0 + d * 4)), kd, s0)
        s1 = fma_f32x16(splat_f32x16(load_f32(q1 + d * 4)), kd, s1)
        s2 = fma_f32x16(splat_f32x16(load_f32(q2 + d * 4)), kd, s2)
        s3 = fma_f32x16(splat_f32x16(load_f32(q3 + d * 4)), kd, s3)
    return s0, s1, s2, s3


@forceinline
def _add_values(v, dim_v, n_positions, weights, states, state_nbytes, keep0, keep1, keep2, keep3):
    """Each row's sum = keep * sum + weights . values, one position after another."""
    a, b, c, d = states + 64, states + state_nbytes + 64, states + 2 * state_nbytes + 64, states + 3 * state_nbytes + 64
    for i in range(0, dim_v, 16):
        o = i * 4
        s0, s1 = load_f32x16(a + o) * keep0, load_f32x16(b + o) * keep1
        s2, s3 = load_f32x16(c + o) * keep2, load_f32x16(d + o) * keep3
        for j in range(n_positions):
            value = half_f32x16(load_u16x16(v + (j * dim_v + i) * 2))
            w = weights + j * 4
            s0 = fma_f32x16(splat_f32x16(load_f32(w)), value, s0)
            s1 = fma_f32x16(splat_f32x16(load_f32(w + 128)), value, s1)
            s2 = fma_f32x16(splat_f32x16(load_f32(w + 256)), value, s2)
            s3 = fma_f32x16(splat_f32x16(load_f32(w + 384)), value, s3)
        store_f32x16(a + o, s0)
        store_f32x16(b + o, s1)
        store_f32x16(c + o, s2)
        store_f32x16(d + o, s3)


@forceinline
def _q_at(op, first, row, n_rows, group, head):
    """Address of a row's query; rows past the last repeat it."""
    r = min(row, n_rows - 1)
    token, dim_k = first + r // group, load_i64(op + DIM_K)
    return load_i64(op + Q) + token * load_i64(op + Q_ROW) + (head * group + r % group) * dim_k * 4


@forceinline
def _position(step, first, row, n_rows, group):
    return load_i32(load_i64(step + at.POSITIONS) + (first + min(row, n_rows - 1) // group) * 4)


@forceinline
def _four_rows(op, step, first, row, n_rows, group, head, k, v, base, n_positions, states, weights):
    """Four rows of a tile through one block of the cache."""
    dim_k, dim_v, window = load_i64(op + DIM_K), load_i64(op + DIM_V), load_i64(op + WINDOW)
    scale = splat_f32x16(f32_of(load_f64(op + SCALE)))
    state_nbytes = (16 + (dim_v + 15) // 16 * 16) * 4
    q0, q1 = _q_at(op, first, row, n_rows, group, head), _q_at(op, first, row + 1, n_rows, group, head)
    q2, q3 = _q_at(op, first, row + 2, n_rows, group, head), _q_at(op, first, row + 3, n_rows, group, head)
    a0, a1, a2, a3 = _scores(k, dim_k, q0, q1, q2, q3)
    b0, b1, b2, b3 = a0, a1, a2, a3
    if n_positions > 16:
        b0, b1, b2, b3 = _scores(k + 32, dim_k, q0, q1, q2, q3)
    p0, p1 = _position(step, first, row, n_rows, group), _position(step, first, row + 1, n_rows, group)
    p2, p3 = _position(step, first, row + 2, n_rows, group), _position(step, first, row + 3, n_rows, group)
    span = 1 << 30
    if window > 0:
        span = window
    l0, l1, l2, l3 = p0 - span + 1, p1 - span + 1, p2 - span + 1, p3 - span + 1
    s = states + row * state_nbytes
    r = base + 16
    k0 = _softmax_row(_masked(a0, scale, base, l0, p0), _masked(b0, scale, r, l0, p0), s, weights)
    s += state_nbytes
    k1 = _softmax_row(_masked(a1, scale, base, l1, p1), _masked(b1, scale, r, l1, p1), s, weights + 128)
    s += state_nbytes
    k2 = _softmax_row(_masked(a2, scale, base, l2, p2), _masked(b2, scale, r, l2, p2), s, weights + 256)
    s += state_nbytes
    k3 = _softmax_row(_masked(a3, scale, base, l3, p3), _masked(b3, scale, r, l3, p3), s, weights + 384)
    _add_values(v, dim_v, n_positions, weights, states + row * state_nbytes, state_nbytes, k0, k1, k2, k3)


@forceinline
def _cut(op, step, span, head, cut, states, weights):
    """All rows of a tile over the blocks of one cut, into ``states``. The tile is an int32 triple at ``span``."""
    first, n_tokens, sequence = load_i32(span), load_i32(span + 4), load_i32(span + 8)
    n_kv_heads, dim_k, dim_v = load_i64(op + N_KV_HEADS), load_i64(op + DIM_K), load_i64(op + DIM_V)
    group = load_i64(op + N_HEADS) // n_kv_heads
    n_rows = n_tokens * group
    state_nbytes = (16 + (dim_v + 15) // 16 * 16) * 4
    for row in range((n_rows + 3) // 4 * 4):
        _clear(states + row * state_nbytes, dim_v)
    table = load_i64(step + at.TABLES) + load_i64(op + TABLE) * 16
    blocks = load_i64(table) + sequence * load_i64(table + 8) * 4
    first_block, last = _visible(op, step, span)
    for block in range(max(cut * CUT_BLOCKS, first_block), min((cut + 1) * CUT_BLOCKS, last // BLOCK + 1)):
        where = load_i32(blocks + block * 4) * n_kv_heads + head
        k, v = load_i64(op + K_POOL) + where * dim_k * 64, load_i64(op + V_POOL) + where * dim_v * 64
        base = block * BLOCK
        n_positions = min(BLOCK, last - base + 1)
        for row in range(0, n_rows, 4):
            _four_rows(op, step, first, row, n_rows, group, head, k, v, base, n_positions, states, weights)


@forceinline
def _visible(op, step, span):
    """First block that a tile sees, and the last position."""
    positions, window = load_i64(step + at.POSITIONS) + load_i32(span) * 4, load_i64(op + WINDOW)
    last = load_i32(positions + (load_i32(span + 4) - 1) * 4)
    first_block = 0
    if window > 0:
        first_block = max(0, load_i32(positions) - window + 1) // BLOCK
    return first_block, last


@forceinline
def _whole_item(op, step, span, head, scratch):
    """A tile over all its cuts, merged here."""
    dim_v, n_heads = load_i64(op + DIM_V), load_i64(op + N_HEADS)
    group = n_heads // load_i64(op + N_KV_HEADS)
    first, n_rows = load_i32(span), load_i32(span + 4) * group
    state_nbytes = (16 + (dim_v + 15) // 16 * 16) * 4
    weights, states = scratch, scratch + 4 * BLOCK * 4
    merged = states + (n_rows + 3) // 4 * 4 * state_nbytes
    for row in range(n_rows):
        _clear(merged + row * state_nbytes, dim_v)
    first_block, last = _visible(op, step, span)
    for cut in range(first_block // CUT_BLOCKS, last // (BLOCK * CUT_BLOCKS) + 1):
        _cut(op, step, span, head, cut, states, weights)
        for row in range(n_rows):
            _merge(merged + row * state_nbytes, states + row * state_nbytes, dim_v)
    for row in range(n_rows):
        out = load_i64(op + OUT) + (first + row // group) * load_i64(op + OUT_ROW)
        _finish(merged + row * state_nbytes, out + (head * group + row % group) * dim_v * 4, dim_v)


@forceinline
def _one_cut_item(op, step, span, head, cut, partials, scratch):
    """A tile over one cut; the rows' states go to the partials of (token, head, cut)."""
    dim_v, n_heads = load_i64(op + DIM_V), load_i64(op + N_HEADS)
    group = n_heads // load_i64(op + N_KV_HEADS)
    first, n_rows = load_i32(span), load_i32(span + 4) * group
    state_nbytes = (16 + (dim_v + 15) // 16 * 16) * 4
    states = scratch + 4 * BLOCK * 4
    _cut(op, step, span, head, cut, states, scratch)
    rows, cuts = load_i64(partials + PARTIAL_ROWS), load_i64(partials + PARTIAL_CUTS)
    for row in range(n_rows):
        place = ((first + row // group) * n_heads + head * group + row % group) * cuts + cut
        for i in range(0, state_nbytes, 64):
            store_f32x16(rows + place * state_nbytes + i, load_f32x16(states + row * state_nbytes + i))


def attention(op, step, thread, n_threads):
    """out = softmax(scale * q k^T, masked) v; with PARTIALS in the step only the cuts, which attention_merge merges."""
    scratch = load_i64(step + at.SCRATCH) + thread * load_i64(step + at.SCRATCH_NBYTES)
    partials, heads = load_i64(step + at.PARTIALS), load_i64(op + N_KV_HEADS)
    cuts = 1
    if partials != 0:
        cuts = load_i64(partials + PARTIAL_CUTS)
    items = load_i64(step + at.N_SPANS) * heads * cuts
    item = items - 1 - atomic_add(op + at.COUNTER, 1)  # the last tiles see the most: begin with them
    while item >= 0:
        span = load_i64(step + at.SPANS) + item // (heads * cuts) * 12
        head = item // cuts % heads
        if partials == 0:
            _whole_item(op, step, span, head, scratch)
        else:
            _one_cut_item(op, step, span, head, item % cuts, partials, scratch)
        item = items - 1 - atomic_add(op + at.COUNTER, 1)


def attention_merge(op, step, thread, n_threads):
    """Merge the cuts of every (token, head), first to last. The op's arguments are those of ``attention``."""
    partials = load_i64(step + at.PARTIALS)
    if partials != 0:
        rows, cuts = load_i64(partials + PARTIAL_ROWS), load_i64(partials + PARTIAL_CUTS)
        dim_v, n_heads = load_i64(op + DIM_V), load_i64(op + N_HEADS)
        state_nbytes = (16 + (dim_v + 15) // 16 * 16) * 4
        merged = load_i64(step + at.SCRATCH) + thread * load_i64(step + at.SCRATCH_NBYTES)
        for item in range(thread, load_i64(step + at.N_TOKENS) * n_heads, n_threads):
            _clear(merged, dim_v)
            for cut in range(cuts):
                _merge(merged, rows + (item * cuts + cut) * state_nbytes, dim_v)
            out = load_i64(op + OUT) + item // n_heads * load_i64(op + OUT_ROW)
            _finish(merged, out + item % n_heads * dim_v * 4, dim_v)
