"""The searches for a block's scale (and minimum) that ggml's quantizers are built on, eight blocks at a time.

Each follows one ``make_*_quants`` of ggml-quants.c number by number, quirks with numbers out of range included.

    x, w     panels of n values and weights
    levels   panel of n int32: the levels, from 0 up
"""

from __future__ import annotations

import numpy as np

from edgellm.kernels.cpu.encoders.lanes import (
    absolute,
    any_lane,
    clamp,
    constant,
    differs,
    greater,
    integer,
    less,
    nearest,
    same,
    to_f32,
    to_int,
    where,
)
from edgellm.kernels.cpu.lib.simd import (
    forceinline,
    load_f32x8,
    splat_f32x8,
    splat_i32x8,
    store_f32x8,
    store_i32x8,
    zero_f32x8,
    zero_i32x8,
)

_nothing = constant(1e-15)  # a largest value below this is a block of zeros
_LOWEST = -(1 << 31)
_magic = constant(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest whole number
_one, _zero, _byte = constant(1.0), constant(0.0), integer(255)


@forceinline
def largest_value(x, n):
    """The value of the largest magnitude (the first of equals) and that magnitude."""
    value, magnitude = zero_f32x8(), zero_f32x8()
    for i in range(n):
        v = load_f32x8(x + i * 32)
        a = absolute(v)
        more = greater(a, magnitude)
        value, magnitude = where(more, v, value), where(more, a, magnitude)
    return value, magnitude


@forceinline
def signed_level(iscale, v, nmax):
    """The whole number nearest to iscale v, from -nmax to nmax - 1, as int32."""
    return clamp(nearest(iscale * v), splat_i32x8(np.int32(-nmax)), splat_i32x8(np.int32(nmax - 1)))


@forceinline
def _signed_sums(x, w, n, nmax, iscale):
    """sum w x l and sum w l^2 of the levels that iscale gives."""
    sum_xl, sum_l2 = zero_f32x8(), zero_f32x8()
    for i in range(n):
        v, weight = load_f32x8(x + i * 32), load_f32x8(w + i * 32)
        level = to_f32(signed_level(iscale, v, nmax))
        sum_xl = sum_xl + weight * v * level
        sum_l2 = sum_l2 + weight * level * level
    return sum_xl, sum_l2


@forceinline
def fit_signed(x, w, levels, n, nmax):
    """make_qx_quants: the scale for levels from -nmax to nmax - 1; 18 scales around -nmax / largest are tried.

    The levels are stored with nmax added; a block of zeros has only zeros.
    """
    value, magnitude = largest_value(x, n)
    empty = less(magnitude, _nothing())
    iscale = splat_f32x8(np.float32(-nmax)) / value
    sum_xl, sum_l2 = _signed_sums(x, w, n, nmax, iscale)
    scale = where(differs(sum_l2, _zero()), sum_xl / sum_l2, _zero())
    best = scale * sum_xl
    for step in range(-9, 10):
        if step != 0:
            tried = splat_f32x8(-(np.float32(nmax) + np.float32(0.1) * np.float32(step))) / value
            sum_xl, sum_l2 = _signed_sums(x, w, n, nmax, tried)
            better = greater(sum_l2, _zero()) & greater(sum_xl * sum_xl, best * sum_l2)
            new_scale = sum_xl / sum_l2
            scale, iscale = where(better, new_scale, scale), where(better, tried, iscale)
            best = where(better, new_scale * sum_xl, best)
    for i in range(n):
        level = signed_level(iscale, load_f32x8(x + i * 32), nmax) + splat_i32x8(np.int32(nmax))
        store_i32x8(levels + i * 32, where(empty, zero_i32x8(), level))
    return where(empty, _zero(), scale)


@forceinline
def fit_signed_refined(x, levels, n, nmax):
    """make_q3_quants: the same by five rounds of single changes, the weights being x^2."""
    value, magnitude = largest_value(x, n)
    empty = less(magnitude, _nothing())
    iscale = splat_f32x8(np.float32(-nmax)) / value
    sum_xl, sum_l2 = zero_f32x8(), zero_f32x8()
    for i in range(n):
        v = load_f32x8(x + i * 32)
        level, weight = to_f32(signed_level(iscale, v, nmax)), v * v
        store_f32x8(levels + i * 32, level)
        sum_xl, sum_l2 = sum_xl + weight * v * level, sum_l2 + weight * level * level
    for _ in range(5):
        changed = zero_i32x8()
        for i in range(n):
            v, level = load_f32x8(x + i * 32), load_f32x8(levels + i * 32)
            weight = v * v
            new_xl, new_l2 = sum_xl - weight * v * level, sum_l2 - weight * level * level
            possible = greater(new_xl, _zero())
            new_level = to_f32(signed_level(_one(), v * new_l2 / new_xl, nmax))
            possible = possible & differs(new_level, level)
            new_xl, new_l2 = new_xl + weight * v * new_level, new_l2 + weight * new_level * new_level
            better = greater(new_xl * new_xl * sum_l2, sum_xl * sum_xl * new_l2)
            better = possible & greater(new_l2, _zero()) & better
            store_f32x8(levels + i * 32, where(better, new_level, level))
            sum_xl, sum_l2 = where(better, new_xl, sum_xl), where(better, new_l2, sum_l2)
            changed = changed | better
        if any_lane(changed) == 0:  # a round without a change would only repeat itself
            break
    for i in range(n):
        level = to_int(load_f32x8(levels + i * 32)) + splat_i32x8(np.int32(nmax))
        store_i32x8(levels + i * 32, where(empty, zero_i32x8(), level))
    scale = where(greater(sum_l2, _zero()), sum_xl / sum_l2, _zero())
    return where(empty, _zero(), scale)


@forceinline
def _error(x, w, levels, n, scale, base, absolute_error):
    """sum w (scale l + base - x)^2, or of the magnitudes."""
    total = zero_f32x8()
    for i in range(n):
        difference = scale * load_f32x8(levels + i * 32) + base - load_f32x8(x + i * 32)
        if absolute_error:
            total = total + load_f32x8(w + i * 32) * absolute(difference)
        else:
            total = total + load_f32x8(w + i * 32) * (difference * difference)
    return total


@forceinline
def _level_above(iscale, base, v, nmax):
    """The whole number nearest to iscale (v - base), from 0 to nmax, as int32."""
    return clamp(nearest(iscale * (v - base)), zero_i32x8(), splat_i32x8(np.int32(nmax)))


@forceinline
def _limited_level(iscale, base, v, nmax):
    """The same, as float32, limited before it is rounded: right for any base."""
    v, highest = iscale * (v - base), splat_f32x8(np.float32(nmax))
    v = where(greater(v, _zero()), v, _zero())
    return (where(less(v, highest), v, highest) + _magic()) - _magic()


@forceinline
def _least_squares(x, w, levels, n, nmax, iscale, base, sum_w, sum_x, limited):
    """The scale and base that fit the levels of (iscale, base) best, and where the fit exists; fills ``levels``."""
    sum_l, sum_l2, sum_xl = zero_f32x8(), zero_f32x8(), zero_f32x8()
    for i in range(n):
        v = load_f32x8(x + i * 32)
        if limited:
            level = _limited_level(iscale, base, v, nmax)
        else:
            level = to_f32(_level_above(iscale, base, v, nmax))
        store_f32x8(levels + i * 32, level)
        weighted = load_f32x8(w + i * 32) * level
        sum_l, sum_l2, sum_xl = sum_l + weighted, sum_l2 + weighted * level, sum_xl + weighted * v
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    new_base = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = greater(new_base, _zero())
    scale, new_base = where(positive, sum_xl / sum_l2, scale), where(positive, _zero(), new_base)
    return scale, new_base, greater(determinant, _zero())


@forceinline
def fit_affine(x, w, levels, n, nmax, first, step, n_steps, absolute_error, limited):
    """make_qkx2_quants, and with ``limited`` make_qkx3_quants: scale and minimum (0 or less) for levels 0 to nmax.

    Scales (first + step i + nmax) / range for i = 0 to n_steps are tried, each followed by a least squares fit.
    """
    low = high = load_f32x8(x)
    sum_w = load_f32x8(w)
    sum_x = sum_w * low
    for i in range(1, n):
        v, weight = load_f32x8(x + i * 32), load_f32x8(w + i * 32)
        low, high = where(less(v, low), v, low), where(greater(v, high), v, high)
        sum_w, sum_x = sum_w + weight, sum_x + weight * v
    low = where(greater(low, _zero()), _zero(), low)
    flat = same(high, low)
    first_iscale = splat_f32x8(np.float32(nmax)) / (high - low)
    scale, base, iscale, level_base = _one() / first_iscale, low, first_iscale, low
    for i in range(n):
        store_f32x8(levels + i * 32, to_f32(_level_above(iscale, low, load_f32x8(x + i * 32), nmax)))
    best, improved = _error(x, w, levels, n, scale, base, absolute_error), zero_i32x8()
    for i in range(n_steps + 1):
        tried = splat_f32x8(first + step * np.float32(i) + np.float32(nmax)) / (high - base)
        new_scale, new_base, exists = _least_squares(x, w, levels, n, nmax, tried, base, sum_w, sum_x, limited)
        error = _error(x, w, levels, n, new_scale, new_base, absolute_error)
        better = exists & less(error, best)
        best, improved = where(better, error, best), improved | better
        iscale, level_base = where(better, tried, iscale), where(better, base, level_base)
        scale, base = where(better, new_scale, scale), where(better, new_base, base)
    for i in range(n):
        v = load_f32x8(x + i * 32)
        level = _level_above(iscale, level_base, v, nmax)
        if limited:
            level = where(improved, to_int(_limited_level(iscale, level_base, v, nmax)), level)
        store_i32x8(levels + i * 32, where(flat, zero_i32x8(), level))
    return where(flat, _zero(), scale), where(flat, low, base)


@forceinline
def _squared_error(x, w, n, nmax, iscale, limited):
    """sum w (x - scale l)^2 of the levels that iscale gives."""
    scale, total = _one() / iscale, zero_f32x8()
    lowest, highest = splat_i32x8(np.int32(_LOWEST)), splat_i32x8(np.int32(nmax))
    for i in range(n):
        v = load_f32x8(x + i * 32)
        level = nearest(iscale * v)
        level = clamp(level, lowest, highest) if limited else level & _byte()
        difference = v - scale * to_f32(level)
        total = total + load_f32x8(w + i * 32) * difference * difference
    return total


@forceinline
def fit_positive(x, w, levels, n, nmax):
    """make_qp_quants: the scale of values that are not negative, for levels 0 to nmax."""
    high = zero_f32x8()
    for i in range(n):
        v = load_f32x8(x + i * 32)
        high = where(greater(high, v), high, v)
    empty = less(high, _nothing())
    iscale = splat_f32x8(np.float32(nmax)) / high
    best = _squared_error(x, w, n, nmax, iscale, False)
    for step in range(-4, 5):
        if step != 0:
            tried = splat_f32x8(np.float32(0.1) * np.float32(step) + np.float32(nmax)) / high
            error = _squared_error(x, w, n, nmax, tried, True)
            better = less(error, best)
            best, iscale = where(better, error, best), where(better, tried, iscale)
    sum_xl, sum_l2 = zero_f32x8(), zero_f32x8()
    lowest, highest = splat_i32x8(np.int32(_LOWEST)), splat_i32x8(np.int32(nmax))
    for i in range(n):
        v, weight = load_f32x8(x + i * 32), load_f32x8(w + i * 32)
        whole = clamp(nearest(iscale * v), lowest, highest)
        level = to_f32(whole)
        store_f32x8(levels + i * 32, to_f32(whole & _byte()))
        sum_xl, sum_l2 = sum_xl + weight * v * level, sum_l2 + weight * level * level
    for _ in range(5):
        changed = zero_i32x8()
        for i in range(n):
            v, weight, level = load_f32x8(x + i * 32), load_f32x8(w + i * 32), load_f32x8(levels + i * 32)
            new_xl, new_l2 = sum_xl - weight * v * level, sum_l2 - weight * level * level
            possible = greater(new_xl, _zero()) & greater(new_l2, _zero())
            whole = clamp(nearest(v * new_l2 / new_xl), lowest, highest)
            new_level = to_f32(whole)
            possible = possible & differs(new_level, level)
            new_xl, new_l2 = new_xl + weight * v * new_level, new_l2 + weight * new_level * new_level
            better = possible & greater(new_xl * new_xl * sum_l2, sum_xl * sum_xl * new_l2)
            store_f32x8(levels + i * 32, where(better, to_f32(whole & _byte()), level))
            sum_xl, sum_l2 = where(better, new_xl, sum_xl), where(better, new_l2, sum_l2)
            changed = changed | better
        if any_lane(changed) == 0:
            break
    for i in range(n):
        level = to_int(load_f32x8(levels + i * 32))
        store_i32x8(levels + i * 32, where(empty, zero_i32x8(), level))
    scale = where(greater(sum_l2, _zero()), sum_xl / sum_l2, _zero())
    return where(empty, _zero(), scale)
