"""NVIDIA's Model Optimizer: four-bit floats or 8-bit floats, and scales.

NVFP4   weight (n_out, n_in / 2) uint8, weight_scale E4M3 for every 16 inputs, weight_scale_2 for all
        w = e2m1 * weight_scale * weight_scale_2
FP8     weight E4M3, weight_scale         w = float8 * scale

``input_scale`` and the scales of keys and values round what flows, not weights: they change nothing here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.checkpoints.scaled import e2m1_groups, scaled
from edgellm.formats.checkpoints.weight import Parts, Weight

GROUP = 16


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every matrix that has a scale beside it."""
    return {f"{base}.weight": _weight(parts, base) for base in parts.bases(".weight_scale")}


def _weight(parts: Parts, base: str) -> Weight:
    name = f"{base}.weight"
    if f"{base}.weight_scale_2" not in parts.tensors:
        return scaled(parts, name, parts.need(name, "F8_E4M3"), f"{base}.weight_scale")
    packed = parts.matrix(name, "U8")
    scale = parts.need(f"{base}.weight_scale", "F8_E4M3")
    parts.matrix(f"{base}.weight_scale", rows=len(packed), columns=packed.shape[1] * 2 // GROUP)
    whole = parts.scalar(f"{base}.weight_scale_2", "F32")
    if packed.shape[1] * 2 % GROUP:
        parts.fail(name, f"has rows of {packed.shape[1] * 2}, expected a multiple of {GROUP}", "MODEL_SHAPE")

    def numbers(start: int, stop: int) -> np.ndarray:
        return scale.float32(slice(start, stop)) * whole

    return Weight((len(packed), packed.shape[1] * 2), e2m1_groups(packed, numbers))
