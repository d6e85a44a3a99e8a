"""The gated delta rule, token by token: every 16 columns of a head's state go through the step by themselves.

A column of S needs the others of no token, so they are dealt to the threads, and the 16 that are in hand lie in the
thread's scratch. Sums run over the key's dimensions in a fixed order, whatever came in which step: a token has the same
bits in any chunking.
"""

from __future__ import annotations

from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import exp_f32x16, sigmoid_f32x16, softplus_f32x16

LANES = 64
"""Bytes of 16 columns in a row of the state."""


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
def _recall(state, k, dim):
    """S^T k for 16 columns, in four sums."""
    a = b = c = d = v.zero_f32x16()
    for i in range(0, dim, 4):
        s, x = state + i * LANES, k + i * 4
        a = v.fma_f32x16(v.splat_f32x16(v.load_f32(x)), v.load_f32x16(s), a)
        b = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + 4)), v.load_f32x16(s + LANES), b)
        c = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + 8)), v.load_f32x16(s + 2 * LANES), c)
        d = v.fma_f32x16(v.splat_f32x16(v.load_f32(x + 12)), v.load_f32x16(s + 3 * LANES), d)
    return (a + b) + (c + d)


@v.forceinline
def _learn_row(state, k, decay, delta):
    """A row of S: decay s + k delta."""
    s = v.fma_f32x16(v.splat_f32x16(v.load_f32(k)), delta, v.load_f32x16(state) * decay)
    v.store_f32x16(state, s)
    return s


@v.forceinline
def _learn(state, q, k, dim, decay, delta):
    """S = decay S + k delta^T for 16 columns; what S^T q is then."""
    a = b = c = d = v.zero_f32x16()
    for i in range(0, dim, 4):
        s, x, y = state + i * LANES, k + i * 4, q + i * 4
        a = v.fma_f32x16(v.splat_f32x16(v.load_f32(y)), _learn_row(s, x, decay, delta), a)
        b = v.fma_f32x16(v.splat_f32x16(v.load_f32(y + 4)), _learn_row(s + LANES, x + 4, decay, delta), b)
        c = v.fma_f32x16(v.splat_f32x16(v.load_f32(y + 8)), _learn_row(s + 2 * LANES, x + 8, decay, delta), c)
        d = v.fma_f32x16(v.splat_f32x16(v.load_f32(y + 12)), _learn_row(s + 3 * LANES, x + 12, decay, delta), d)
    return (a + b) + (c + d)


@v.forceinline
def _one_token(args, row, head, column, state):
    """A token's part of 16 columns of a head, from byte ``column`` of a row of the state on."""
    dim, eps = args.head_dim, v.f64_from_bits(args.eps)
    key_head = head // (args.n_v_heads // args.n_k_heads)
    if args.tiled != 0:
        key_head = head % args.n_k_heads
    q = args.qkv + row * args.qkv_row + key_head * dim * 4
    k = q + args.n_k_heads * dim * 4
    value = args.qkv + row * args.qkv_row + (2 * args.n_k_heads + head) * dim * 4 + column
    decay = v.splat_f32x16(v.load_f32(args.decay + row * args.decay_row + head * 4))
    rate = v.splat_f32x16(v.load_f32(args.rate + row * args.rate_row + head * 4))
    length = v.splat_f32x16(_unit(k, dim, eps))
    delta = rate * (v.load_f32x16(value) - _recall(state, k, dim) * (decay * length))
    scale = v.splat_f32x16(_unit(q, dim, eps) * v.f32_of(1.0 / float(dim) ** 0.5))
    out = _learn(state, q, k, dim, decay, delta * length) * scale
    v.store_f32x16(args.out + row * args.out_row + head * dim * 4 + column, out)


@v.forceinline
def _columns(args, step, head, column, state):
    """All tokens of the step for 16 columns of a head."""
    n, sequences, dim = v.load_i64(step + at.N_TOKENS), v.load_i64(step + at.SEQUENCES), args.head_dim
    slots = v.load_i64(v.load_i64(step + at.TABLES) + args.table * 16)
    row_nbytes, slot_nbytes = dim * 4, args.n_v_heads * dim * dim * 4
    start = 0
    while start < n:
        sequence, stop = v.load_i32(sequences + start * 4), start + 1
        while stop < n and v.load_i32(sequences + stop * 4) == sequence:
            stop += 1
        read, written = v.load_i32(slots + sequence * 8), v.load_i32(slots + sequence * 8 + 4)
        place = args.states + head * dim * row_nbytes + column
        for i in range(dim):
            kept = v.zero_f32x16()
            if read >= 0:
                kept = v.load_f32x16(place + read * slot_nbytes + i * row_nbytes)
            v.store_f32x16(state + i * LANES, kept)
        for row in range(start, stop):
            _one_token(args, row, head, column, state)
        for i in range(dim):
            v.store_f32x16(place + written * slot_nbytes + i * row_nbytes, v.load_f32x16(state + i * LANES))
        start = stop


def delta_rule(op, step, thread, n_threads):
    """out = S^T q / sqrt(head_dim) after S = decay S + k (rate (v - decay S^T k))^T, q and k of length 1"""
    args = v.arguments(op, at.DELTA_RULE)
    state = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
    blocks = args.head_dim // 16
    for item in range(thread, args.n_v_heads * blocks, n_threads):
        _columns(args, step, item // blocks, item % blocks * LANES, state)
