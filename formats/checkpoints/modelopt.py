"""NVIDIA's Model Optimizer: four-bit floats or 8-bit floats, and scales.

NVFP4   weight (n_out, n_in / 2) uint8, weight_scale E4M3 for every 16 inputs, weight_scale_2 for all
        w = e2m1 * weight_scale * weight_scale_2
FP8     weight E4M3, weight_scale         w = float8 * scale

``input_scale`` and the scales of keys and values round what flows, not weights: they change nothing here.
"""

from __future__ import annotations

from typing import Any

from edgellm.formats.checkpoints.scaled import four_bit_floats, scaled
from edgellm.formats.checkpoints.weight import Parts, Weight


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every matrix that has a scale beside it."""
    return {f"{base}.weight": _weight(parts, base) for base in parts.bases(".weight_scale")}


def _weight(parts: Parts, base: str) -> Weight:
    name = f"{base}.weight"
    if f"{base}.weight_scale_2" not in parts.tensors:
        return scaled(parts, name, parts.need(name, "F8_E4M3"), f"{base}.weight_scale")
    whole = parts.flat(f"{base}.weight_scale_2", 1, "F32")
    return four_bit_floats(parts, name, f"{base}.weight_scale", 16, ("F8_E4M3",), lambda numbers: numbers * whole)
