"""The gated delta rule, token by token: every 16 columns of a head's state go through the step by themselves.

A column of S needs the others of no token, so they are dealt to the threads, and the 16 that are in hand lie in the
thread's scratch, which is small enough for the first cache. One pass over them learns a token, answers its query, and
recalls what is kept under the key of the next: 4 multiply-adds for each number of the state where the form that takes
many tokens at once would need 3 and a triangular solve. Sums run over the key's dimensions in a fixed order, whatever
came in which step: a token has the same bits in any chunking.
"""

from __future__ import annotations

from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import exp_f32x16, sigmoid_f32x16, softplus_f32x16

LANES = 64
"""Bytes of 16 columns in a row of the state."""
BLOCKS = 4
"""So many times 16 columns of a head are one unit of work: what its q and k are divided by is found once for them."""
LENGTHS = at.DELTA_HEAD_DIM * LANES
"""In a thread's scratch, behind the state: two float32 for each token, what brings its k and its q to length 1."""


def delta_gates(op, step, thread, n_threads):
    """decay = e^(a softplus(alpha + dt_bias)), rate = sigmoid(beta)"""
    args = v.arguments(op, at.DELTA_GATES)
    n, lanes = v.load_i64(step + args.row_kind), (args.heads + 15) // 16
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 64
        x = v.load_f32x16(args.alpha + row * args.alpha_row + i) + v.load_f32x16(args.dt_bias + i)
        decay = exp_f32x16(v.load_f32x16(args.a + i) * softplus_f32x16(x))
        v.store_f32x16(args.decay + row * args.decay_row + i, decay)
        rate = sigmoid_f32x16(v.load_f32x16(args.beta + row * args.beta_row + i))
        v.store_f32x16(args.rate + row * args.rate_row + i, rate)


@v.forceinline
def _unit(x, dim, eps):
    """What brings x to length 1."""
    acc = v.zero_f32x16()
    for i in range(0, dim, 16):
        value = v.load_f32x16(x + i * 4)
        acc = v.fma_f32x16(value, value, acc)
    return v.f32_of(1.0 / (v.sum_f32x16(acc) + eps) ** 0.5)


@v.forceinline
def _lengths(args, start, stop, key_head, scratch):
    """For the tokens of a sequence what k and what q are multiplied by; q's has the scale of the answer."""
    dim, eps = args.head_dim, v.f64_from_bits(args.eps)
    scale = v.f32_of(1.0 / float(dim) ** 0.5)
    for row in range(start, stop):
        q = args.qkv + row * args.qkv_row + key_head * dim * 4
        v.store_f32(scratch + LENGTHS + row * 8, _unit(q + args.n_k_heads * dim * 4, dim, eps))
        v.store_f32(scratch + LENGTHS + row * 8 + 4, _unit(q, dim, eps) * scale)


@v.forceinline
def _recall(state, state_row, k, dim):
    """S^T k for 16 columns, in four sums."""
    a = b = c = d = v.zero_f32x16()
    for i in range(0, dim, 4):
        s, x = state + i * state_row, k + i * 4
        a = v.fma_f32x16(v.splat_f32x16(v.load_f32(x)), v.load_f32x16(s), a)
        b = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + 4)), v.load_f32x16(s + state_row), b)
        c = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + 8)), v.load_f32x16(s + 2 * state_row), c)
        d = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + 12)), v.load_f32x16(s + 3 * state_row), d)
    return (a + b) + (c + d)


@v.forceinline
def _learn_row(state, learned, k, decay, delta):
    """A row of S: decay s + k delta."""
    s = v.fma_f32x16(v.splat_f32x16(v.load_f32(k)), delta, v.load_f32x16(state) * decay)
    v.store_f32x16(learned, s)
    return s


@v.forceinline
def _learn(state, state_row, learned, learned_row, k, q, following, dim, decay, delta):
    """S = decay S + k delta^T for 16 columns, brought from one place to another; S^T q and S^T following are then."""
    a = b = c = d = v.zero_f32x16()
    e = f = g = h = v.zero_f32x16()
    for i in range(0, dim, 4):
        s, t, x, y, z = state + i * state_row, learned + i * learned_row, k + i * 4, q + i * 4, following + i * 4
        r = _learn_row(s, t, x, decay, delta)
        a = v.fma_f32x16(v.splat_f32x16(v.load_f32(y)), r, a)
        e = v.fma_f32x16(v.splat_f32x16(v.load_f32(z)), r, e)
        r = _learn_row(s + state_row, t + learned_row, x + 4, decay, delta)
        b = v.fma_f32x16(v.splat_f32x16(v.load_f32(y + 4)), r, b)
        f = v.fma_f32x16(v.splat_f32x16(v.load_f32(z + 4)), r, f)
        r = _learn_row(s + 2 * state_row, t + 2 * learned_row, x + 8, decay, delta)
        c = v.fma_f32x16(v.splat_f32x16(v.load_f32(y + 8)), r, c)
        g = v.fma_f32x16(v.splat_f32x16(v.load_f32(z + 8)), r, g)
        r = _learn_row(s + 3 * state_row, t + 3 * learned_row, x + 12, decay, delta)
        d = v.fma_f32x16(v.splat_f32x16(v.load_f32(y + 12)), r, d)
        h = v.fma_f32x16(v.splat_f32x16(v.load_f32(z + 12)), r, h)
    return (a + b) + (c + d), (e + f) + (g + h)


@v.forceinline
def _columns(args, head, key_head, column, start, stop, old, new, scratch):
    """All tokens of a sequence for 16 columns of a head, from byte ``column`` of a row of the state on.

    old, new   where these columns stood before the step, 0 for zeros, and where they go
    """
    dim, state_row = args.head_dim, args.head_dim * 4
    q = args.qkv + start * args.qkv_row + key_head * dim * 4
    k = q + args.n_k_heads * dim * 4
    state, recalled = old, v.zero_f32x16()
    if old == 0:
        state, state_row = scratch, LANES
        for i in range(dim):
            v.store_f32x16(scratch + i * LANES, v.zero_f32x16())
    else:
        recalled = _recall(old, state_row, k, dim)
    value = args.qkv + (2 * args.n_k_heads + head) * dim * 4 + column
    for row in range(start, stop):
        learned, learned_row, following = scratch, LANES, k + args.qkv_row
        if row == stop - 1:
            learned, learned_row, following = new, dim * 4, k
        decay = v.splat_f32x16(v.load_f32(args.decay + row * args.decay_row + head * 4))
        rate = v.splat_f32x16(v.load_f32(args.rate + row * args.rate_row + head * 4))
        length = v.splat_f32x16(v.load_f32(scratch + LENGTHS + row * 8))
        scale = v.splat_f32x16(v.load_f32(scratch + LENGTHS + row * 8 + 4))
        delta = rate * (v.load_f32x16(value + row * args.qkv_row) - recalled * (decay * length))
        answer, recalled = _learn(state, state_row, learned, learned_row, k, q, following, dim, decay, delta * length)
        v.store_f32x16(args.out + row * args.out_row + head * dim * 4 + column, answer * scale)
        state, state_row, k, q = scratch, LANES, following, q + args.qkv_row


@v.forceinline
def _sequences(args, step, head, first, last, scratch):
    """All sequences of the step for the columns from byte ``first`` to ``last`` of a head."""
    n, sequences, dim = v.load_i64(step + at.N_TOKENS), v.load_i64(step + at.SEQUENCES), args.head_dim
    slots = v.load_i64(v.load_i64(step + at.TABLES) + args.table * 16)
    slot_nbytes, of_head = args.n_v_heads * dim * dim * 4, args.states + head * dim * dim * 4
    key_head = head // (args.n_v_heads // args.n_k_heads)
    if args.tiled != 0:
        key_head = head % args.n_k_heads
    start = 0
    while start < n:
        sequence, stop = v.load_i32(sequences + start * 4), start + 1
        while stop < n and v.load_i32(sequences + stop * 4) == sequence:
            stop += 1
        read, written = v.load_i32(slots + sequence * 8), v.load_i32(slots + sequence * 8 + 4)
        _lengths(args, start, stop, key_head, scratch)
        for column in range(first, last, LANES):
            old = (of_head + read * slot_nbytes + column) * (read >= 0)
            new = of_head + written * slot_nbytes + column
            _columns(args, head, key_head, column, start, stop, old, new, scratch)
        start = stop


def delta_rule(op, step, thread, n_threads):
    """out = S^T q / sqrt(head_dim) after S = decay S + k (rate (v - decay S^T k))^T, q and k of length 1"""
    args = v.arguments(op, at.DELTA_RULE)
    scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
    width, unit = args.head_dim * 4, BLOCKS * LANES
    units = (width + unit - 1) // unit
    for item in range(thread, args.n_v_heads * units, n_threads):
        first = item % units * unit
        _sequences(args, step, item // units, first, min(first + unit, width), scratch)
