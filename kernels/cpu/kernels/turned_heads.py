"""Heads by the transposed of rows that lie in a file as they are: what an old file has of latent attention's keys.

Blocks of rows cannot be turned. A unit of work is a head: the kernel that looks rows up unpacks its rows into a
thread's scratch, and each of them, times a token's number for it, is added to the token's sums, first row to last. A
token has the same bits with any others, and six of them share what was unpacked.
"""

from __future__ import annotations

from edgellm.kernels.cpu.kernels.float_panels import TOKENS, make_tiles, rows_of_six
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

_ONE_BITS = 0x3FF0000000000000  # of 1.0 as float64
_one = make_tiles("F32").one


@v.forceinline
def _unpack(a, head, record, rows, line, scratch, step_nbytes):
    """The rows of a head, by a row of the op table and a step that are made up for the kernel which looks rows up."""
    op, step, numbers = record, record + at.OP_NBYTES, record + at.OP_NBYTES + at.STEP_FIELDS * 8
    fields = op + at.ARGUMENTS
    v.store_i64(fields, a.w + (head * a.each + a.first) * a.w_row)
    v.store_i64(fields + 8, a.w_row)
    v.store_i64(fields + 16, a.n_out)
    v.store_i64(fields + 24, rows)
    v.store_i64(fields + 32, line)
    v.store_i64(fields + 40, _ONE_BITS)
    v.store_i64(step + at.N_TOKENS, a.n_in)
    v.store_i64(step + at.TOKENS, numbers)
    v.store_i64(step + at.SCRATCH, scratch)
    v.store_i64(step + at.SCRATCH_NBYTES, step_nbytes)
    for row in range(a.n_in):
        v.store_i32(numbers + row * 4, v.i32_of(row))
    v.call_kernel(a.unpack, op, step, 0, 1)


def head_matmul_turned(op, step, thread, n_threads):
    """out[head] = x[head] @ rows[head]; a head has ``n_in`` rows of ``n_out`` weights."""
    a = v.arguments(op, at.TURNED_HEADS)
    n, line, whole = v.load_i64(step + a.row_kind), (a.n_out + 15) // 16 * 64, a.n_out // 16 * 16
    scratch_nbytes = v.load_i64(step + at.SCRATCH_NBYTES)
    scratch = v.load_i64(step + at.SCRATCH) + thread * scratch_nbytes
    record = scratch + at.EDGE
    rows = record + (at.OP_NBYTES + at.STEP_FIELDS * 8 + a.n_in * 4 + 63) // 64 * 64
    head = v.atomic_add(op + at.COUNTER, 1)
    while head < a.n_heads:
        _unpack(a, head, record, rows, line, scratch, scratch_nbytes)
        x, out = a.x + head * a.n_in * 4, a.out + head * a.n_out * 4
        for t in range(0, n, TOKENS):
            of_six = rows_of_six(x, a.x_row, t, n - 1)
            for i in range(0, whole * 4, 64):
                _one(of_six, rows + i, line, a.n_in, 0, rows_of_six(out + i, a.out_row, t, n - 1), True)
        for t in range(n):
            for i in range(whole * 4, a.n_out * 4, 4):
                total = v.f32_of(0.0)
                for row in range(a.n_in):
                    total = v.fma_f32(v.load_f32(x + t * a.x_row + row * 4), v.load_f32(rows + row * line + i), total)
                v.store_f32(out + t * a.out_row + i, total)
        head = v.atomic_add(op + at.COUNTER, 1)
