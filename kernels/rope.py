"""Rotary position embedding: the angles, with every scaling of them that GGUF files ask for.

The executors rotate; this file says by how much. Angles are float32 products as transformers computes them, so that
a model sees the numbers it was trained with; sine and cosine are taken in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rope:
    """The rotation of the first ``2 * len(inv_freq)`` dimensions of a head; the rest stays.

    adjacent   True pairs dimensions (2i, 2i+1), False pairs (i, i + n_dims/2)
    inv_freq   (n_dims / 2,) float32, radians per position, scaling applied
    magnitude  multiplies sine and cosine (YaRN's attention factor)
    """

    adjacent: bool
    inv_freq: np.ndarray
    magnitude: float = 1.0

    @property
    def n_dims(self) -> int:
        """Rotated dimensions of a head."""
        return 2 * len(self.inv_freq)

    def table(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, each (n, n_dims / 2) float32, for int positions (n,)."""
        angles = (positions.astype(np.float32)[:, None] * self.inv_freq[None, :]).astype(np.float64)
        return (
            (np.cos(angles) * self.magnitude).astype(np.float32),
            (np.sin(angles) * self.magnitude).astype(np.float32),
        )
