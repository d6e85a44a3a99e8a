"""The searches for a block's scale (and minimum) that ggml's quantizers are built on, eight blocks at a time.

Each follows one ``make_*_quants`` of ggml-quants.c number by number, quirks with numbers out of range included.

    x, w     panels of n values and weights
    levels   panel of n int32: the levels, from 0 up
"""

from __future__ import annotations

import numpy as np

from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.lib import simd as v

_nothing = lanes.constant(1e-15)  # a largest value below this is a block of zeros
_LOWEST = -(1 << 31)
_magic = lanes.constant(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest whole number
_one, _zero, _byte = lanes.constant(1.0), lanes.constant(0.0), lanes.integer(255)


@v.forceinline
def largest_value(x, n):
    """The value of the largest magnitude (the first of equals) and that magnitude."""
    value, magnitude = v.zero_f32x8(), v.zero_f32x8()
    for i in range(n):
        number = v.load_f32x8(x + i * 32)
        a = lanes.absolute(number)
        more = lanes.greater(a, magnitude)
        value, magnitude = lanes.where(more, number, value), lanes.where(more, a, magnitude)
    return value, magnitude


@v.forceinline
def signed_level(iscale, value, nmax):
    """The whole number nearest to iscale value, from -nmax to nmax - 1, as int32."""
    return lanes.clamp(lanes.nearest(iscale * value), v.splat_i32x8(np.int32(-nmax)), v.splat_i32x8(np.int32(nmax - 1)))


@v.forceinline
def _signed_sums(x, w, n, nmax, iscale):
    """sum w x l and sum w l^2 of the levels that iscale gives."""
    sum_xl, sum_l2 = v.zero_f32x8(), v.zero_f32x8()
    for i in range(n):
        value, weight = v.load_f32x8(x + i * 32), v.load_f32x8(w + i * 32)
        level = v.to_f32x8(signed_level(iscale, value, nmax))
        sum_xl = sum_xl + weight * value * level
        sum_l2 = sum_l2 + weight * level * level
    return sum_xl, sum_l2


@v.forceinline
def fit_signed(x, w, levels, n, nmax):
    """make_qx_quants: the scale for levels from -nmax to nmax - 1; 18 scales around -nmax / largest are tried.

    The levels are stored with nmax added; a block of zeros has only zeros.
    """
    value, magnitude = largest_value(x, n)
    empty = lanes.less(magnitude, _nothing())
    iscale = v.splat_f32x8(np.float32(-nmax)) / value
    sum_xl, sum_l2 = _signed_sums(x, w, n, nmax, iscale)
    scale = lanes.where(lanes.differs(sum_l2, _zero()), sum_xl / sum_l2, _zero())
    best = scale * sum_xl
    for step in range(-9, 10):
        if step != 0:
            tried = v.splat_f32x8(-(np.float32(nmax) + np.float32(0.1) * np.float32(step))) / value
            sum_xl, sum_l2 = _signed_sums(x, w, n, nmax, tried)
            better = lanes.greater(sum_l2, _zero()) & lanes.greater(sum_xl * sum_xl, best * sum_l2)
            new_scale = sum_xl / sum_l2
            scale, iscale = lanes.where(better, new_scale, scale), lanes.where(better, tried, iscale)
            best = lanes.where(better, new_scale * sum_xl, best)
    for i in range(n):
        level = signed_level(iscale, v.load_f32x8(x + i * 32), nmax) + v.splat_i32x8(np.int32(nmax))
        v.store_i32x8(levels + i * 32, lanes.where(empty, v.zero_i32x8(), level))
    return lanes.where(empty, _zero(), scale)


@v.forceinline
def fit_signed_refined(x, levels, n, nmax):
    """make_q3_quants: the same by five rounds of single changes, the weights being x^2."""
    value, magnitude = largest_value(x, n)
    empty = lanes.less(magnitude, _nothing())
    iscale = v.splat_f32x8(np.float32(-nmax)) / value
    sum_xl, sum_l2 = v.zero_f32x8(), v.zero_f32x8()
    for i in range(n):
        number = v.load_f32x8(x + i * 32)
        level, weight = v.to_f32x8(signed_level(iscale, number, nmax)), number * number
        v.store_f32x8(levels + i * 32, level)
        sum_xl, sum_l2 = sum_xl + weight * number * level, sum_l2 + weight * level * level
    for _ in range(5):
        changed = v.zero_i32x8()
        for i in range(n):
            number, level = v.load_f32x8(x + i * 32), v.load_f32x8(levels + i * 32)
            weight = number * number
            new_xl, new_l2 = sum_xl - weight * number * level, sum_l2 - weight * level * level
            possible = lanes.greater(new_xl, _zero())
            new_level = v.to_f32x8(signed_level(_one(), number * new_l2 / new_xl, nmax))
            possible = possible & lanes.differs(new_level, level)
            new_xl, new_l2 = new_xl + weight * number * new_level, new_l2 + weight * new_level * new_level
            better = lanes.greater(new_xl * new_xl * sum_l2, sum_xl * sum_xl * new_l2)
            better = possible & lanes.greater(new_l2, _zero()) & better
            v.store_f32x8(levels + i * 32, lanes.where(better, new_level, level))
            sum_xl, sum_l2 = lanes.where(better, new_xl, sum_xl), lanes.where(better, new_l2, sum_l2)
            changed = changed | better
        if lanes.any_lane(changed) == 0:  # a round without a change would only repeat itself
            break
    for i in range(n):
        level = lanes.to_int(v.load_f32x8(levels + i * 32)) + v.splat_i32x8(np.int32(nmax))
        v.store_i32x8(levels + i * 32, lanes.where(empty, v.zero_i32x8(), level))
    scale = lanes.where(lanes.greater(sum_l2, _zero()), sum_xl / sum_l2, _zero())
    return lanes.where(empty, _zero(), scale)


@v.forceinline
def _error(x, w, levels, n, scale, base, absolute_error):
    """sum w (scale l + base - x)^2, or of the magnitudes."""
    total = v.zero_f32x8()
    for i in range(n):
        difference = scale * v.load_f32x8(levels + i * 32) + base - v.load_f32x8(x + i * 32)
        if absolute_error:
            total = total + v.load_f32x8(w + i * 32) * lanes.absolute(difference)
        else:
            total = total + v.load_f32x8(w + i * 32) * (difference * difference)
    return total


@v.forceinline
def _level_above(iscale, base, value, nmax):
    """The whole number nearest to iscale (v - base), from 0 to nmax, as int32."""
    return lanes.clamp(lanes.nearest(iscale * (value - base)), v.zero_i32x8(), v.splat_i32x8(np.int32(nmax)))


@v.forceinline
def _limited_level(iscale, base, value, nmax):
    """The same, as float32, limited before it is rounded: right for any base."""
    value, highest = iscale * (value - base), v.splat_f32x8(np.float32(nmax))
    value = lanes.where(lanes.greater(value, _zero()), value, _zero())
    return (lanes.where(lanes.less(value, highest), value, highest) + _magic()) - _magic()


@v.forceinline
def _least_squares(x, w, levels, n, nmax, iscale, base, sum_w, sum_x, limited):
    """The scale and base that fit the levels of (iscale, base) best, and where the fit exists; fills ``levels``."""
    sum_l, sum_l2, sum_xl = v.zero_f32x8(), v.zero_f32x8(), v.zero_f32x8()
    for i in range(n):
        value = v.load_f32x8(x + i * 32)
        if limited:
            level = _limited_level(iscale, base, value, nmax)
        else:
            level = v.to_f32x8(_level_above(iscale, base, value, nmax))
        v.store_f32x8(levels + i * 32, level)
        weighted = v.load_f32x8(w + i * 32) * level
        sum_l, sum_l2, sum_xl = sum_l + weighted, sum_l2 + weighted * level, sum_xl + weighted * value
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    new_base = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = lanes.greater(new_base, _zero())
    scale, new_base = lanes.where(positive, sum_xl / sum_l2, scale), lanes.where(positive, _zero(), new_base)
    return scale, new_base, lanes.greater(determinant, _zero())


@v.forceinline
def fit_affine(x, w, levels, n, nmax, first, step, n_steps, absolute_error, limited):
    """make_qkx2_quants, and with ``limited`` make_qkx3_quants: scale and minimum (0 or less) for levels 0 to nmax.

    Scales (first + step i + nmax) / range for i = 0 to n_steps are tried, each followed by a least squares fit.
    """
    low = high = v.load_f32x8(x)
    sum_w = v.load_f32x8(w)
    sum_x = sum_w * low
    for i in range(1, n):
        value, weight = v.load_f32x8(x + i * 32), v.load_f32x8(w + i * 32)
        low = lanes.where(lanes.less(value, low), value, low)
        high = lanes.where(lanes.greater(value, high), value, high)
        sum_w, sum_x = sum_w + weight, sum_x + weight * value
    low = lanes.where(lanes.greater(low, _zero()), _zero(), low)
    flat = lanes.same(high, low)
    first_iscale = v.splat_f32x8(np.float32(nmax)) / (high - low)
    scale, base, iscale, level_base = _one() / first_iscale, low, first_iscale, low
    for i in range(n):
        v.store_f32x8(levels + i * 32, v.to_f32x8(_level_above(iscale, low, v.load_f32x8(x + i * 32), nmax)))
    best, improved = _error(x, w, levels, n, scale, base, absolute_error), v.zero_i32x8()
    for i in range(n_steps + 1):
        tried = v.splat_f32x8(first + step * np.float32(i) + np.float32(nmax)) / (high - base)
        new_scale, new_base, exists = _least_squares(x, w, levels, n, nmax, tried, base, sum_w, sum_x, limited)
        error = _error(x, w, levels, n, new_scale, new_base, absolute_error)
        better = exists & lanes.less(error, best)
        best, improved = lanes.where(better, error, best), improved | better
        iscale, level_base = lanes.where(better, tried, iscale), lanes.where(better, base, level_base)
        scale, base = lanes.where(better, new_scale, scale), lanes.where(better, new_base, base)
    for i in range(n):
        value = v.load_f32x8(x + i * 32)
        level = _level_above(iscale, level_base, value, nmax)
        if limited:
            level = lanes.where(improved, lanes.to_int(_limited_level(iscale, level_base, value, nmax)), level)
        v.store_i32x8(levels + i * 32, lanes.where(flat, v.zero_i32x8(), level))
    return lanes.where(flat, _zero(), scale), lanes.where(flat, low, base)


@v.forceinline
def _squared_error(x, w, n, nmax, iscale, limited):
    """sum w (x - scale l)^2 of the levels that iscale gives."""
    scale, total = _one() / iscale, v.zero_f32x8()
    lowest, highest = v.splat_i32x8(np.int32(_LOWEST)), v.splat_i32x8(np.int32(nmax))
    for i in range(n):
        value = v.load_f32x8(x + i * 32)
        level = lanes.nearest(iscale * value)
        level = lanes.clamp(level, lowest, highest) if limited else level & _byte()
        difference = value - scale * v.to_f32x8(level)
        total = total + v.load_f32x8(w + i * 32) * difference * difference
    return total


@v.forceinline
def fit_positive(x, w, levels, n, nmax):
    """make_qp_quants: the scale of values that are not negative, for levels 0 to nmax."""
    high = v.zero_f32x8()
    for i in range(n):
        value = v.load_f32x8(x + i * 32)
        high = lanes.where(lanes.greater(high, value), high, value)
    empty = lanes.less(high, _nothing())
    iscale = v.splat_f32x8(np.float32(nmax)) / high
    best = _squared_error(x, w, n, nmax, iscale, False)
    for step in range(-4, 5):
        if step != 0:
            tried = v.splat_f32x8(np.float32(0.1) * np.float32(step) + np.float32(nmax)) / high
            error = _squared_error(x, w, n, nmax, tried, True)
            better = lanes.less(error, best)
            best, iscale = lanes.where(better, error, best), lanes.where(better, tried, iscale)
    sum_xl, sum_l2 = v.zero_f32x8(), v.zero_f32x8()
    lowest, highest = v.splat_i32x8(np.int32(_LOWEST)), v.splat_i32x8(np.int32(nmax))
    for i in range(n):
        value, weight = v.load_f32x8(x + i * 32), v.load_f32x8(w + i * 32)
        whole = lanes.clamp(lanes.nearest(iscale * value), lowest, highest)
        level = v.to_f32x8(whole)
        v.store_f32x8(levels + i * 32, v.to_f32x8(whole & _byte()))
        sum_xl, sum_l2 = sum_xl + weight * value * level, sum_l2 + weight * level * level
    for _ in range(5):
        changed = v.zero_i32x8()
        for i in range(n):
            value, weight, level = v.load_f32x8(x + i * 32), v.load_f32x8(w + i * 32), v.load_f32x8(levels + i * 32)
            new_xl, new_l2 = sum_xl - weight * value * level, sum_l2 - weight * level * level
            possible = lanes.greater(new_xl, _zero()) & lanes.greater(new_l2, _zero())
            whole = lanes.clamp(lanes.nearest(value * new_l2 / new_xl), lowest, highest)
            new_level = v.to_f32x8(whole)
            possible = possible & lanes.differs(new_level, level)
            new_xl, new_l2 = new_xl + weight * value * new_level, new_l2 + weight * new_level * new_level
            better = possible & lanes.greater(new_xl * new_xl * sum_l2, sum_xl * sum_xl * new_l2)
            v.store_f32x8(levels + i * 32, lanes.where(better, v.to_f32x8(whole & _byte()), level))
            sum_xl, sum_l2 = lanes.where(better, new_xl, sum_xl), lanes.where(better, new_l2, sum_l2)
            changed = changed | better
        if lanes.any_lane(changed) == 0:
            break
    for i in range(n):
        level = lanes.to_int(v.load_f32x8(levels + i * 32))
        v.store_i32x8(levels + i * 32, lanes.where(empty, v.zero_i32x8(), level))
    scale = lanes.where(lanes.greater(sum_l2, _zero()), sum_xl / sum_l2, _zero())
    return lanes.where(empty, _zero(), scale)
