"""Mamba-2's state space, token by token: a head's columns of the state need no others, and heads are dealt to the
threads.

One token takes 64 columns at once straight from the slot that is read to the slot that is written: their rows lie side
by side, and each number of the state is touched once. Several tokens take 16 columns at a time, which stay in the
thread's scratch, in a small cache; four tokens go over a row of it while it is in registers. The numbers of a column
are the same either way, operation by operation: sums run over the state's rows in order, whatever came in which step,
so a token has the same bits in any chunking.
"""

from __future__ import annotations

from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import exp_f32x16, silu_f32x16, softplus_f32x16

LANES = 64
"""Bytes of 16 columns."""
UNIT = 4 * LANES
"""Bytes of the columns that a thread takes at a time."""


def ssm_gates(op, step, thread, n_threads):
    """rate = softplus(dt + dt_bias), decay = e^(a rate)"""
    args = v.arguments(op, at.SSM_GATES)
    n, lanes = v.load_i64(step + args.row_kind), (args.heads + 15) // 16
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 64
        rate = softplus_f32x16(v.load_f32x16(args.dt + row * args.dt_row + i) + v.load_f32x16(args.dt_bias + i))
        v.store_f32x16(args.rate + row * args.rate_row + i, rate)
        v.store_f32x16(args.decay + row * args.decay_row + i, exp_f32x16(v.load_f32x16(args.a + i) * rate))


@v.forceinline
def _splat(address):
    return v.splat_f32x16(v.load_f32(address))


@v.forceinline
def _taken_in(args, row, head, i):
    """rate x of 16 columns of a token, from byte i of its x on."""
    return _splat(args.rate + row * args.rate_row + head * 4) * v.load_f32x16(args.xbc + row * args.xbc_row + i)


@v.forceinline
def _answer(args, row, head, i, y):
    """out = y + d x"""
    x = v.load_f32x16(args.xbc + row * args.xbc_row + i)
    v.store_f32x16(args.out + row * args.out_row + i, v.fma_f32x16(_splat(args.d + head * 4), x, y))


@v.forceinline
def _four_blocks(args, head, row, i, old, new):
    """One token for 64 columns."""
    decay, state_row, n = _splat(args.decay + row * args.decay_row + head * 4), args.head_dim * 4, args.n_state
    x0, x1 = _taken_in(args, row, head, i), _taken_in(args, row, head, i + LANES)
    x2, x3 = _taken_in(args, row, head, i + 2 * LANES), _taken_in(args, row, head, i + 3 * LANES)
    b = args.xbc + row * args.xbc_row + _at_b(args, head)
    c = b + args.n_groups * n * 4
    y0 = y1 = y2 = y3 = v.zero_f32x16()
    for k in range(n):
        s, t = old + k * state_row, new + k * state_row
        bk, ck = _splat(b + k * 4), _splat(c + k * 4)
        s0 = v.fma_f32x16(bk, x0, v.load_f32x16(s) * decay)
        s1 = v.fma_f32x16(bk, x1, v.load_f32x16(s + LANES) * decay)
        s2 = v.fma_f32x16(bk, x2, v.load_f32x16(s + 2 * LANES) * decay)
        s3 = v.fma_f32x16(bk, x3, v.load_f32x16(s + 3 * LANES) * decay)
        v.store_f32x16(t, s0)
        v.store_f32x16(t + LANES, s1)
        v.store_f32x16(t + 2 * LANES, s2)
        v.store_f32x16(t + 3 * LANES, s3)
        y0, y1 = v.fma_f32x16(ck, s0, y0), v.fma_f32x16(ck, s1, y1)
        y2, y3 = v.fma_f32x16(ck, s2, y2), v.fma_f32x16(ck, s3, y3)
    _answer(args, row, head, i, y0)
    _answer(args, row, head, i + LANES, y1)
    _answer(args, row, head, i + 2 * LANES, y2)
    _answer(args, row, head, i + 3 * LANES, y3)


@v.forceinline
def _at_b(args, head):
    """Where a row of xbc has the B of a head."""
    group = head // (args.n_heads // args.n_groups)
    return (args.n_heads * args.head_dim + group * args.n_state) * 4


@v.forceinline
def _one_block(args, head, row, i, state, state_row, learned, learned_row):
    """One token for 16 columns, brought from one place to another."""
    decay, x = _splat(args.decay + row * args.decay_row + head * 4), _taken_in(args, row, head, i)
    b = args.xbc + row * args.xbc_row + _at_b(args, head)
    c = b + args.n_groups * args.n_state * 4
    y = v.zero_f32x16()
    for k in range(args.n_state):
        s = v.fma_f32x16(_splat(b + k * 4), x, v.load_f32x16(state + k * state_row) * decay)
        v.store_f32x16(learned + k * learned_row, s)
        y = v.fma_f32x16(_splat(c + k * 4), s, y)
    _answer(args, row, head, i, y)


@v.forceinline
def _four_tokens(args, head, row, i, state, state_row, learned, learned_row):
    """Four tokens for 16 columns, likewise."""
    at_decay, by = args.decay + row * args.decay_row + head * 4, args.xbc_row
    d0, d1 = _splat(at_decay), _splat(at_decay + args.decay_row)
    d2, d3 = _splat(at_decay + 2 * args.decay_row), _splat(at_decay + 3 * args.decay_row)
    x0, x1 = _taken_in(args, row, head, i), _taken_in(args, row + 1, head, i)
    x2, x3 = _taken_in(args, row + 2, head, i), _taken_in(args, row + 3, head, i)
    b = args.xbc + row * by + _at_b(args, head)
    c = b + args.n_groups * args.n_state * 4
    y0 = y1 = y2 = y3 = v.zero_f32x16()
    for k in range(args.n_state):
        bk, ck = b + k * 4, c + k * 4
        s = v.fma_f32x16(_splat(bk), x0, v.load_f32x16(state + k * state_row) * d0)
        y0 = v.fma_f32x16(_splat(ck), s, y0)
        s = v.fma_f32x16(_splat(bk + by), x1, s * d1)
        y1 = v.fma_f32x16(_splat(ck + by), s, y1)
        s = v.fma_f32x16(_splat(bk + 2 * by), x2, s * d2)
        y2 = v.fma_f32x16(_splat(ck + 2 * by), s, y2)
        s = v.fma_f32x16(_splat(bk + 3 * by), x3, s * d3)
        y3 = v.fma_f32x16(_splat(ck + 3 * by), s, y3)
        v.store_f32x16(learned + k * learned_row, s)
    _answer(args, row, head, i, y0)
    _answer(args, row + 1, head, i, y1)
    _answer(args, row + 2, head, i, y2)
    _answer(args, row + 3, head, i, y3)


@v.forceinline
def _columns(args, head, start, stop, i, old, new, scratch):
    """All tokens of a sequence for 16 columns, from byte i of a row of x on."""
    state, state_row, row = old, args.head_dim * 4, start
    while row < stop:
        few = stop - row < 4
        following = row + 4 - 3 * few
        learned, learned_row = scratch, LANES
        if following == stop:
            learned, learned_row = new, args.head_dim * 4
        if few:
            _one_block(args, head, row, i, state, state_row, learned, learned_row)
        else:
            _four_tokens(args, head, row, i, state, state_row, learned, learned_row)
        state, state_row, row = scratch, LANES, following


@v.forceinline
def _sequences(args, step, head, first, last, scratch):
    """All sequences of the step for the columns from byte ``first`` to ``last`` of a head."""
    n, sequences, state_row = v.load_i64(step + at.N_TOKENS), v.load_i64(step + at.SEQUENCES), args.head_dim * 4
    slots = v.load_i64(v.load_i64(step + at.TABLES) + args.table * 16)
    of_head = args.n_state * state_row
    slot_nbytes, states = args.n_heads * of_head, args.states + head * of_head
    x = head * state_row
    start = 0
    while start < n:
        sequence, stop = v.load_i32(sequences + start * 4), start + 1
        while stop < n and v.load_i32(sequences + stop * 4) == sequence:
            stop += 1
        read, written = v.load_i32(slots + sequence * 8), v.load_i32(slots + sequence * 8 + 4)
        old, new = states + read * slot_nbytes, states + written * slot_nbytes
        if read < 0:
            old = new
            for k in range(args.n_state):
                for i in range(first, last, LANES):
                    v.store_f32x16(new + k * state_row + i, v.zero_f32x16())
        if stop - start == 1 and last - first == UNIT:
            _four_blocks(args, head, start, x + first, old + first, new + first)
        else:
            for i in range(first, last, LANES):
                _columns(args, head, start, stop, x + i, old + i, new + i, scratch)
        start = stop


def ssm_scan(op, step, thread, n_threads):
    """S = decay S + rate B x^T, out = S^T C + d x"""
    args = v.arguments(op, at.SSM_SCAN)
    scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
    width = args.head_dim * 4
    units = (width + UNIT - 1) // UNIT
    for item in range(thread, args.n_heads * units, n_threads):
        first = item % units * UNIT
        _sequences(args, step, item // units, first, min(first + UNIT, width), scratch)


def gated_norm(op, step, thread, n_threads):
    """out = y / sqrt(mean(y^2) + eps) * w of y = x silu(gate), for each group of ``width`` values of each row."""
    args = v.arguments(op, at.GATED_NORM)
    n, width, groups = v.load_i64(step + args.row_kind), args.width, args.groups
    whole, eps = width // 16 * 16, v.f64_from_bits(args.eps)
    for item in range(thread, n * groups, n_threads):
        row, column = item // groups, item % groups * width * 4
        x, gate = args.x + row * args.x_row + column, args.gate + row * args.gate_row + column
        w, out = args.w + column, args.out + row * args.out_row + column
        acc = v.zero_f32x16()
        for i in range(0, whole * 4, LANES):
            y = v.load_f32x16(x + i) * silu_f32x16(v.load_f32x16(gate + i))
            v.store_f32x16(out + i, y)
            acc = v.fma_f32x16(y, y, acc)
        total = v.sum_f32x16(acc)
        for i in range(whole * 4, width * 4, 4):
            y1 = v.load_f32(x + i) * v.first_lane(silu_f32x16(_splat(gate + i)))
            v.store_f32(out + i, y1)
            total = total + y1 * y1
        factor = v.f32_of(1.0 / (total / width + eps) ** 0.5)
        factors = v.splat_f32x16(factor)
        for i in range(0, whole * 4, LANES):
            v.store_f32x16(out + i, v.load_f32x16(out + i) * factors * v.load_f32x16(w + i))
        for i in range(whole * 4, width * 4, 4):
            v.store_f32(out + i, v.load_f32(out + i) * factor * v.load_f32(w + i))
