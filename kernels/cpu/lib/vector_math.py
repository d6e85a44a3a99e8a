"""Exponential of 16 lanes to about one unit in the last place, with the same bits on every CPU that fuses."""

from __future__ import annotations

from edgellm.kernels.cpu.lib import simd as v

_LOG2E = v.make_const(v.f32x16, 1.4426950408889634)
_MINUS_LN2_HIGH = v.make_const(v.f32x16, -0.693359375)  # 9 bits: its products with whole numbers are exact
_MINUS_LN2_LOW = v.make_const(v.f32x16, 2.12194440e-4)
_ROUND = v.make_const(v.f32x16, 12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest whole number
_LOWEST = v.make_const(v.f32x16, -87.0)
_HIGHEST = v.make_const(v.f32x16, 88.0)
_ONE = v.make_const(v.f32x16, 1.0)
# minimax polynomial of (e^r - 1 - r) / r^2 on [-ln2/2, ln2/2] (Cephes expf)
_C0, _C1, _C2 = (
    v.make_const(v.f32x16, 1.9875691500e-4),
    v.make_const(v.f32x16, 1.3981999507e-3),
    v.make_const(v.f32x16, 8.3334519073e-3),
)
_C3, _C4, _C5 = (
    v.make_const(v.f32x16, 4.1665795894e-2),
    v.make_const(v.f32x16, 1.6666665459e-1),
    v.make_const(v.f32x16, 5.0000001201e-1),
)
_SHIFT = v.make_const(v.i32x16, 23)


@v.forceinline
def exp_f32x16(x):
    """e^x; 0 below -87, e^88 above 88, NaN of NaN; exactly 1 at 0."""
    y = v.min_f32x16(_HIGHEST(), v.max_f32x16(_LOWEST(), x))  # in this order NaN stays NaN
    n = (y * _LOG2E() + _ROUND()) - _ROUND()
    r = v.fma_f32x16(n, _MINUS_LN2_LOW(), v.fma_f32x16(n, _MINUS_LN2_HIGH(), y))
    p = v.fma_f32x16(_C0(), r, _C1())
    p = v.fma_f32x16(p, r, _C2())
    p = v.fma_f32x16(p, r, _C3())
    p = v.fma_f32x16(p, r, _C4())
    p = v.fma_f32x16(p, r, _C5())
    p = v.fma_f32x16(p, r * r, r) + _ONE()
    power = v.f32x16_from_bits(v.f32x16_bits(p) + (v.truncate_f32x16(n) << _SHIFT()))
    return v.where_less(x, _LOWEST(), v.zero_f32x16(), power)


@v.forceinline
def sigmoid_f32x16(x):
    """1 / (1 + e^-x)"""
    return _ONE() / (_ONE() + exp_f32x16(v.zero_f32x16() - x))


@v.forceinline
def softcap_f32x16(x, cap):
    """cap tanh(x / cap), written as cap (1 - 2 / (e^(2x/cap) + 1))."""
    u = x / cap
    return cap - (cap + cap) / (exp_f32x16(u + u) + _ONE())


@v.forceinline
def silu_f32x16(x):
    """x / (1 + e^-x)"""
    return x / (_ONE() + exp_f32x16(v.zero_f32x16() - x))


_GELU_A, _GELU_B = v.make_const(v.f32x16, 0.7978845608028654), v.make_const(v.f32x16, 0.044715)
_HALF = v.make_const(v.f32x16, 0.5)


@v.forceinline
def gelu_f32x16(x):
    """x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written as x (1 - 1 / (e^2u + 1))."""
    u = _GELU_A() * (x + _GELU_B() * x * x * x)
    return x - x / (exp_f32x16(u + u) + _ONE())


# erfc(z) = t (A1 + t (A2 + ...)) e^-z^2 of t = 1 / (1 + P z), to 1.5e-7: Abramowitz and Stegun 7.1.26
_ERF_P, _SQRT_HALF = v.make_const(v.f32x16, 0.3275911), v.make_const(v.f32x16, 0.7071067811865476)
_ERF_A1, _ERF_A2, _ERF_A3, _ERF_A4, _ERF_A5 = (
    v.make_const(v.f32x16, a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)


@v.forceinline
def gelu_erf_f32x16(x):
    """x / 2 (1 + erf(x / sqrt 2)), by erfc of the magnitude, which is exact where it is small."""
    z = v.abs_f32x16(x) * _SQRT_HALF()
    t = _ONE() / v.fma_f32x16(_ERF_P(), z, _ONE())
    p = v.fma_f32x16(_ERF_A5(), t, _ERF_A4())
    p = v.fma_f32x16(p, t, _ERF_A3())
    p = v.fma_f32x16(p, t, _ERF_A2())
    p = v.fma_f32x16(p, t, _ERF_A1())
    tail = _HALF() * x * (p * t * exp_f32x16(v.zero_f32x16() - z * z))
    return v.where_less(x, v.zero_f32x16(), tail, x - tail)


_SEVEN, _MINUS_SEVEN = v.make_const(v.f32x16, 7.0), v.make_const(v.f32x16, -7.0)
_STEEPER = v.make_const(v.f32x16, 1.702)


@v.forceinline
def clamped_swiglu_f32x16(gate, up):
    """g sigmoid(1.702 g) (u + 1) of g = min(gate, 7) and u = up between -7 and 7."""
    g = v.min_f32x16(_SEVEN(), gate)  # in this order NaN stays NaN
    u = v.min_f32x16(_SEVEN(), v.max_f32x16(_MINUS_SEVEN(), up))
    return g / (_ONE() + exp_f32x16(v.zero_f32x16() - _STEEPER() * g)) * (u + _ONE())


@v.forceinline
def clamp_f32x16(x, limit):
    """x between -limit and limit."""
    return v.min_f32x16(limit, v.max_f32x16(v.zero_f32x16() - limit, x))  # in this order NaN stays NaN


_THIRD, _FIFTH, _SEVENTH, _NINTH, _ELEVENTH, _THIRTEENTH, _FIFTEENTH = (
    v.make_const(v.f32x16, 1.0 / n) for n in (3, 5, 7, 9, 11, 13, 15)
)


@v.forceinline
def softplus_f32x16(x):
    """log(1 + e^x) = max(x, 0) + log(1 + y) of y = e^-|x|, as 2 atanh(y / (2 + y)): the odd powers to the 15th."""
    y = exp_f32x16(v.zero_f32x16() - v.abs_f32x16(x))
    z = y / (y + _ONE() + _ONE())
    z2 = z * z
    p = v.fma_f32x16(_FIFTEENTH(), z2, _THIRTEENTH())
    p = v.fma_f32x16(p, z2, _ELEVENTH())
    p = v.fma_f32x16(p, z2, _NINTH())
    p = v.fma_f32x16(p, z2, _SEVENTH())
    p = v.fma_f32x16(p, z2, _FIFTH())
    p = v.fma_f32x16(p, z2, _THIRD())
    half = v.fma_f32x16(p, z2 * z, z)
    return v.max_f32x16(v.zero_f32x16(), x) + half + half
