"""The end of a step in one kernel: the largest logits in order, their sum as probabilities, and the draw of a token.

It is called by a sampler between two steps, while every core waits for the next token (numpy takes five times as
long), and by the team itself when it decodes several steps (team.py).
"""

from __future__ import annotations

from edgellm.kernels.cpu.kernels.draw import draw
from edgellm.kernels.cpu.lib import draw_layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import exp_f32x16

BLOCK = 64  # logits looked at together
SUM_BLOCK = 1024  # summed as float32


@v.forceinline
def _insert(value, position, count, k, positions, values):
    """Put a value behind its equals; the least of k goes."""
    i = min(count, k - 1)
    while i > 0 and v.load_f32(values + i * 4 - 4) < value:
        v.store_f32(values + i * 4, v.load_f32(values + i * 4 - 4))
        v.store_i64(positions + i * 8, v.load_i64(positions + i * 8 - 8))
        i -= 1
    v.store_f32(values + i * 4, value)
    v.store_i64(positions + i * 8, position)


@v.forceinline
def _find_largest(logits, n, k, positions, values):
    """The plain sum of the logits: not a number where one of them is none."""
    count, total = 0, v.zero_f32x16()
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        p = logits + start * 4
        if stop - start == BLOCK:
            a, b = v.load_f32x16(p), v.load_f32x16(p + 64)
            c, d = v.load_f32x16(p + 128), v.load_f32x16(p + 192)
            total = total + ((a + b) + (c + d))
            if count == k and v.maximum_f32x16(v.max_f32x16(v.max_f32x16(a, b), v.max_f32x16(c, d))) <= v.load_f32(
                values + k * 4 - 4
            ):
                continue
        for i in range(start, stop):
            value = v.load_f32(logits + i * 4)
            if count < k or value > v.load_f32(values + k * 4 - 4):
                _insert(value, i, count, k, positions, values)
                count = min(count + 1, k)
    plain_sum = v.sum_f32x16(total)
    for i in range(n // BLOCK * BLOCK, n):
        plain_sum = plain_sum + v.load_f32(logits + i * 4)
    return plain_sum


@v.forceinline
def _sum_of_exp(logits, n, largest):
    """The sum of exp(logit - largest)."""
    total = 0.0
    whole = n // 16 * 16
    offset = v.splat_f32x16(largest)
    for start in range(0, whole, SUM_BLOCK):
        part = v.zero_f32x16()
        for i in range(start, min(start + SUM_BLOCK, whole), 16):
            part = part + exp_f32x16(v.load_f32x16(logits + i * 4) - offset)
        total += v.sum_f32x16(part)
    for i in range(whole, n):
        total += v.first_lane(exp_f32x16(v.splat_f32x16(v.load_f32(logits + i * 4) - largest)))
    return total


@v.forceinline
def _move_on(record, k):
    """Let the addresses of results point to the next rows."""
    n_candidates, n_links = v.load_i64(record + at.N_CANDIDATES), v.load_i64(record + at.N_LINKS)
    v.store_i64(record + at.ROW, v.load_i64(record + at.ROW) + at.ROW_NBYTES)
    v.store_i64(record + at.POSITIONS, v.load_i64(record + at.POSITIONS) + 8 * k)
    v.store_i64(record + at.VALUES, v.load_i64(record + at.VALUES) + 4 * k)
    v.store_i64(record + at.SHAPED, v.load_i64(record + at.SHAPED) + 8 * n_candidates)
    v.store_i64(record + at.LEFT, v.load_i64(record + at.LEFT) + 8 * n_links)


def top_k(record, _step, _thread, _n_threads):
    """The k largest of n logits, 0 < k <= n, by falling value and rising position; the sum and a draw, if wanted."""
    logits, n, k = v.load_i64(record + at.LOGITS), v.load_i64(record + at.N_LOGITS), v.load_i64(record + at.K)
    row, positions, values = (
        v.load_i64(record + at.ROW),
        v.load_i64(record + at.POSITIONS),
        v.load_i64(record + at.VALUES),
    )
    plain_sum = _find_largest(logits, n, k, positions, values)
    v.store_f64(row + at.PLAIN_SUM, plain_sum)
    if v.load_i64(record + at.WANTS_SUM) != 0:
        v.store_f64(row + at.SUM, _sum_of_exp(logits, n, v.load_f32(values)))
    if v.load_i64(record + at.N_CANDIDATES) > 0:
        token, place, total = -1, 0, 0.0
        if plain_sum - plain_sum == 0.0:  # it is finite
            place, total = draw(record, k)
            token = v.load_i64(positions + place * 8)
        v.store_i64(row + at.TOKEN, token)
        v.store_i64(row + at.PLACE, place)
        v.store_f64(row + at.SHAPED_SUM, total)
    _move_on(record, k)
