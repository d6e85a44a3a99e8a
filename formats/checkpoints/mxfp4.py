"""MXFP4 as gpt-oss keeps it: 4-bit floats in blocks of 32 with a power of two for a scale.

X_blocks  (..., n_in / 32, 16) uint8   two numbers a byte, the earlier one in the lower half
X_scales  (..., n_in / 32) uint8       w = e2m1 * 2^(scale - 127)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.checkpoints.weight import Parts, Weight
from edgellm.formats.stored_numbers import FLOAT8, FP4_E2M1

BLOCK_NBYTES = 16


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every weight that is kept in blocks."""
    return {base: _weight(parts, base) for base in parts.bases("_blocks")}


def _weight(parts: Parts, base: str) -> Weight:
    blocks = parts.need(f"{base}_blocks", "U8")
    scales = parts.need(f"{base}_scales", "U8", "F8_E8M0")
    if len(blocks.shape) < 3 or blocks.shape[-1] != BLOCK_NBYTES or blocks.shape[:-1] != scales.shape:
        parts.fail(base, f"blocks and scales have the shapes {blocks.shape} and {scales.shape}", "MODEL_SHAPE")
    n_in = blocks.shape[-2] * 2 * BLOCK_NBYTES
    return Weight((*blocks.shape[:-2], n_in), e2m1_rows(blocks.raw, scales.raw, n_in))


def e2m1_rows(codes: np.ndarray, scales: np.ndarray, n_in: int) -> Any:
    """A decoder of rows of n_in 4-bit floats, 32 to a scale; both arrays are flat bytes."""
    n_blocks = n_in // (2 * BLOCK_NBYTES)
    codes = codes.reshape(-1, n_blocks, BLOCK_NBYTES)
    powers = scales.reshape(-1, n_blocks)

    def decode(start: int, stop: int) -> np.ndarray:
        both = np.stack((codes[start:stop] & 15, codes[start:stop] >> 4), axis=-1).reshape(stop - start, n_blocks, -1)
        return (FP4_E2M1[both] * FLOAT8["F8_E8M0"][powers[start:stop]][..., None]).reshape(stop - start, n_in)

    return decode
