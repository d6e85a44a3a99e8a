"""Short convolutions: channels are dealt to the threads, tokens go one after the other.

A sum runs over the taps, oldest first, whatever came in which step: a token has the same bits in any chunking. What
stood before the step is read from one slot of the pool; what the next step needs goes to another, or to the same.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import silu_f32x16


def _make_channels(load: Any, store: Any, fma: Any, zero: Any, value: Any, finish: Any) -> Any:
    """All tokens of the step for the channels between two bytes of a row, so many at once as one load takes.

    value(args, row, i) is what is convolved, finish(args, row, i, acc) what becomes of a sum.
    """

    @v.forceinline
    def at_distance(args, before, start, row, i):
        """That of a row, which may lie before the first one of its sequence in this step; ``before`` 0 is zero."""
        if row >= start:
            return value(args, row, i)
        if before == 0:
            return zero()
        return load(before + (row - start + args.n_taps - 1) * args.width * 4 + i)

    @v.forceinline
    def early(args, before, start, row, i):
        """The sum of a token whose taps reach before the step."""
        acc = zero()
        for tap in range(args.n_taps):
            weight = load(args.w + tap * args.w_row + i)
            acc = fma(at_distance(args, before, start, row - args.n_taps + 1 + tap, i), weight, acc)
        return acc

    @v.forceinline
    def later(args, row, i):
        acc = zero()
        for tap in range(args.n_taps):
            acc = fma(value(args, row - args.n_taps + 1 + tap, i), load(args.w + tap * args.w_row + i), acc)
        return acc

    @v.forceinline
    def channels(args, step, first, last, nbytes):
        n, sequences = v.load_i64(step + at.N_TOKENS), v.load_i64(step + at.SEQUENCES)
        slots = v.load_i64(v.load_i64(step + at.TABLES) + args.table * 16)
        slot_nbytes = (args.n_taps - 1) * args.width * 4
        start = 0
        while start < n:
            sequence, stop = v.load_i32(sequences + start * 4), start + 1
            while stop < n and v.load_i32(sequences + stop * 4) == sequence:
                stop += 1
            read, written = v.load_i32(slots + sequence * 8), v.load_i32(slots + sequence * 8 + 4)
            before = (args.states + read * slot_nbytes) * (read >= 0)
            inside = min(start + args.n_taps - 1, stop)
            for row in range(start, inside):
                for i in range(first, last, nbytes):
                    store(args.out + row * args.out_row + i, finish(args, row, i, early(args, before, start, row, i)))
            for row in range(inside, stop):
                for i in range(first, last, nbytes):
                    store(args.out + row * args.out_row + i, finish(args, row, i, later(args, row, i)))
            for tap in range(args.n_taps - 1):  # oldest first: those that follow are not needed for it
                for i in range(first, last, nbytes):
                    kept = at_distance(args, before, start, stop - args.n_taps + 1 + tap, i)
                    store(args.states + written * slot_nbytes + tap * args.width * 4 + i, kept)
            start = stop

    return channels


@v.forceinline
def _zero_f32():
    return v.f32_of(0.0)


@v.forceinline
def _silu_f32(x):
    return v.first_lane(silu_f32x16(v.splat_f32x16(x)))


def _make_gated(load: Any) -> Any:
    """Of a row [b | c | x]: b * x, and c times the sum."""

    @v.forceinline
    def value(args, row, i):
        b = args.x + row * args.x_row + i
        return load(b) * load(b + args.width * 8)

    @v.forceinline
    def finish(args, row, i, acc):
        return load(args.x + row * args.x_row + args.width * 4 + i) * acc

    return value, finish


def _make_plain(load: Any, silu: Any) -> Any:
    """x itself, and the silu of the sum and the bias."""

    @v.forceinline
    def value(args, row, i):
        return load(args.x + row * args.x_row + i)

    @v.forceinline
    def finish(args, row, i, acc):
        return silu(acc + load(args.bias + i))

    return value, finish


_SIXTEEN = v.load_f32x16, v.store_f32x16, v.fma_f32x16, v.zero_f32x16
_ONE = v.load_f32, v.store_f32, v.fma_f32, _zero_f32
_sixteen_gated = _make_channels(*_SIXTEEN, *_make_gated(v.load_f32x16))
_one_gated = _make_channels(*_ONE, *_make_gated(v.load_f32))
_sixteen_plain = _make_channels(*_SIXTEEN, *_make_plain(v.load_f32x16, silu_f32x16))
_one_plain = _make_channels(*_ONE, *_make_plain(v.load_f32, _silu_f32))


RUN_NBYTES = 512
"""Channels that a thread takes at a time: neighbours, since the tokens of one channel lie a page and more apart."""


def _make_kernel(sixteen: Any, one: Any) -> Any:
    def convolve(op, step, thread, n_threads):
        args = v.arguments(op, at.SHORT_CONV)
        whole, width = args.width // 16 * 64, args.width * 4
        for first in range(thread * RUN_NBYTES, whole, n_threads * RUN_NBYTES):
            sixteen(args, step, first, min(first + RUN_NBYTES, whole), 64)
        if thread == n_threads - 1 and whole < width:
            one(args, step, whole, width, 4)

    return convolve


short_conv = _make_kernel(_sixteen_gated, _one_gated)
"""out = c * conv(b * x)"""
causal_conv = _make_kernel(_sixteen_plain, _one_plain)
"""out = silu(conv(x) + bias)"""
