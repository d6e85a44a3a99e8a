"""Rotary position embedding: the angles, with every scaling of them that GGUF files ask for.

The executors rotate; this file says by how much. Angles are float32 products as transformers computes them, so that
a model sees the numbers it was trained with; sine and cosine are taken in float64 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Rope:
    """The rotation of the first ``2 * len(inv_freq)`` dimensions of a head; the rest stays.

    adjacent   True pairs dimensions (2i, 2i+1), False pairs (i, i + n_dims/2)
    inv_freq   (n_dims / 2,) float32, radians per position, scaling applied
    magnitude  multiplies sine and cosine (YaRN's attention factor)
    part_of    (n_dims / 2,) int, which part of a position of several (time, height, width) turns the dimension
    beyond     (length, inv_freq), where a context of more than so many tokens has other frequencies (LongRoPE)
    warmth     (rate, length): 1 + rate log(1 + floor(position / length)) multiplies, too, as Llama 4 scales queries
    """

    adjacent: bool
    inv_freq: np.ndarray
    magnitude: float = 1.0
    part_of: np.ndarray | None = None
    beyond: tuple[int, np.ndarray] | None = None
    warmth: tuple[float, int] | None = None

    @property
    def n_dims(self) -> int:
        """Rotated dimensions of a head."""
        return 2 * len(self.inv_freq)

    def table(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, each (n, n_dims / 2) float32, for int positions (n,), or (n_parts, n)."""
        if positions.ndim == 1:
            turning = positions[:, None]
        else:
            part_of = np.zeros(len(self.inv_freq), int) if self.part_of is None else self.part_of
            turning = np.ascontiguousarray(positions[part_of].T)
        angles = (turning.astype(np.float32) * self.inv_freq[None, :]).astype(np.float64)
        magnitude: float | np.ndarray = self.magnitude
        if self.warmth is not None:
            rate, length = self.warmth
            first = positions if positions.ndim == 1 else positions[0]
            magnitude = magnitude * (1 + rate * np.log1p(first // length))[:, None]
        return (np.cos(angles) * magnitude).astype(np.float32), (np.sin(angles) * magnitude).astype(np.float32)

    def for_context(self, n_ctx: int) -> Rope:
        """The rotation of a context of so many tokens."""
        if self.beyond is None or n_ctx <= self.beyond[0]:
            return self
        return replace(self, inv_freq=self.beyond[1], beyond=None)


def frequencies(n_dims: int, base: float) -> np.ndarray:
    """base^(-2i / n_dims), (n_dims / 2,) float32; the exponent is rounded to float32 first, as transformers does."""
    exponents = np.arange(0, n_dims, 2, dtype=np.float32) / np.float32(n_dims)
    return np.float32(1.0) / (base ** exponents.astype(np.float64)).astype(np.float32)


def linear_scaling(inv_freq: np.ndarray, factor: float) -> np.ndarray:
    """Position interpolation: ``factor`` positions turn as one did, (n_dims / 2,) float32 as ``inv_freq``
    (https://arxiv.org/abs/2306.15595)."""
    return inv_freq / np.float32(factor)


def yarn_scaling(
    inv_freq: np.ndarray,
    base: float,
    factor: float,
    original_context_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    extrapolation: float = 1.0,
    truncate: bool = True,
) -> np.ndarray:
    """YaRN (https://arxiv.org/abs/2309.00071): slow dimensions are interpolated, fast ones stay as they were.

    A dimension that turns more than ``beta_fast`` times within the original context stays, one that turns less than
    ``beta_slow`` times is divided by ``factor``, and a ramp lies between. ``extrapolation`` 1 keeps the fast ones
    whole, 0 interpolates everything. ``truncate`` lets the ramp begin and end at whole dimensions.
    """
    n_dims = 2 * len(inv_freq)

    def dimension_of(turns: float) -> float:
        return n_dims * math.log(original_context_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_dims - 1)
    ramp = (np.arange(n_dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 0.001))
    stays = (1 - np.clip(ramp, 0, 1)) * np.float32(extrapolation)
    return linear_scaling(inv_freq, factor) * (1 - stays) + inv_freq * stays


def yarn_magnitude(factor: float, multiplier: float = 1.0) -> float:
    """What YaRN multiplies queries and keys with: 0.1 ln(factor) + 1, or with a multiplier of the first term."""
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1.0 else 1.0
