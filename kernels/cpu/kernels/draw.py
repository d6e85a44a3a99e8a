"""The usual chain of samplers on the few largest logits, and the draw, in float64 as Python does it.

The candidates are sorted, so a link only says how many of the first ones stay; a temperature scales them. Banned ids
are left out before.
"""

from __future__ import annotations

from math import factorial

from edgellm.kernels.cpu.lib import draw_layout as at
from edgellm.kernels.cpu.lib import simd as v

LARGEST = 1e300  # of a logit: many temperatures in a row would leave float64
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # the high part has 33 bits
C = tuple(1 / factorial(i) for i in range(14))  # of Taylor's series; |r| <= 0.35, so the next term is 5e-18


@v.forceinline
def exp_f64(x):
    """e^x for x <= 0, to a unit in the last place or two; 0 below -700."""
    if not x > -700.0:
        return 0.0
    n = int(x * 1.4426950408889634 - 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = (((C[13] * r + C[12]) * r + C[11]) * r + C[10]) * r + C[9]
    p = (((p * r + C[8]) * r + C[7]) * r + C[6]) * r + C[5]
    p = ((((p * r + C[4]) * r + C[3]) * r + C[2]) * r + 1.0) * r + 1.0
    return p * v.f64_from_bits((n + 1023) << 52)


@v.forceinline
def _sum_of_exp(values, n):
    """The sum of exp(value - the first), from the first on."""
    first, total = v.load_f64(values), 0.0
    for i in range(n):
        total += exp_f64(v.load_f64(values + i * 8) - first)
    return total


@v.forceinline
def _reaching(values, n, share):
    """How many of the first, n at most, have this share of the sum; ``share`` of it itself, not of one."""
    first, total, i = v.load_f64(values), 0.0, 0
    while i < n:
        total += exp_f64(v.load_f64(values + i * 8) - first)
        if total >= share:
            return i + 1
        i += 1
    return n


@v.forceinline
def _shorten(values, n, kind, amount, least):
    """How many of n stay after one link; a temperature changes them."""
    if kind == at.TOP_K:
        n = min(n, int(amount))
    elif kind == at.TOP_P:
        n = min(n, max(_reaching(values, n, amount * _sum_of_exp(values, n)), least))
    elif kind == at.MIN_P:
        threshold = v.load_f64(values) + amount
        while n > least and v.load_f64(values + n * 8 - 8) < threshold:
            n -= 1
    elif kind == at.TEMPERATURE:
        if not abs(v.load_f64(values)) < amount * LARGEST:
            n = 1
        else:
            for i in range(n):
                v.store_f64(values + i * 8, v.load_f64(values + i * 8) / amount)
    return n


@v.forceinline
def _is_banned(record, i):
    """Whether the i-th of the largest is."""
    token, banned = v.load_i64(v.load_i64(record + at.POSITIONS) + i * 8), v.load_i64(record + at.BANNED)
    found = False
    for j in range(v.load_i64(record + at.N_BANNED)):
        found = found or v.load_i64(banned + j * 8) == token
    return found


@v.forceinline
def _place_of(record, candidate):
    """Where a candidate stands among the largest."""
    place = 0
    while candidate > 0 or _is_banned(record, place):
        if not _is_banned(record, place):
            candidate -= 1
        place += 1
    return place


@v.forceinline
def draw(record, k):
    """(place of the chosen one, the sum of exp of what is left), of the k values that ``record`` points to."""
    values, shaped, left = v.load_i64(record + at.VALUES), v.load_i64(record + at.SHAPED), v.load_i64(record + at.LEFT)
    n, wanted = 0, v.load_i64(record + at.N_CANDIDATES)
    for i in range(k):
        if n < wanted and not _is_banned(record, i):
            v.store_f64(shaped + n * 8, v.load_f32(values + i * 4))
            n += 1
    links = v.load_i64(record + at.LINKS)
    for i in range(v.load_i64(record + at.N_LINKS)):
        link = links + i * at.LINK_NBYTES
        n = _shorten(shaped, n, int(v.load_f64(link)), v.load_f64(link + 8), int(v.load_f64(link + 16)))
        v.store_i64(left + i * 8, n)
    total, place = _sum_of_exp(shaped, n), 0
    if n > 1:
        share = v.load_f64(v.load_i64(record + at.UNIFORMS)) * total
        v.store_i64(record + at.UNIFORMS, v.load_i64(record + at.UNIFORMS) + 8)
        first, reached = v.load_f64(shaped), 1.0
        while place < n - 1 and reached <= share:
            place += 1
            reached += exp_f64(v.load_f64(shaped + place * 8) - first)
    return _place_of(record, place), total
