"""MXFP4 as gpt-oss keeps it: 4-bit floats in blocks of 32 with a power of two for a scale.

X_blocks  (..., n_in / 32, 16) uint8   two numbers a byte, the earlier one in the lower half
X_scales  (..., n_in / 32) uint8       w = e2m1 * 2^(scale - 127)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgellm.formats.checkpoints.scaled import e2m1_groups
from edgellm.formats.checkpoints.weight import Parts, Weight

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
    scales = replace(scales, shape=(-1, blocks.shape[-2]))
    return Weight((*blocks.shape[:-2], n_in), e2m1_groups(blocks.values.reshape(-1, n_in // 2), scales))
