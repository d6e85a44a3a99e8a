"""8-bit floats (E4M3, E5M2) with a scale for all, for each row, or for each block of 128 x 128.

weight_scale_inv, or weight_scale   w = float8 * scale
"""

from __future__ import annotations

from typing import Any

from edgellm.formats.checkpoints.scaled import scaled
from edgellm.formats.checkpoints.weight import Parts, Weight, pair

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALE_NAMES = (".weight_scale_inv", ".weight_scale", ".scale")


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every matrix of 8-bit floats, with its scale."""
    given = config.get("weight_block_size")
    block = pair(given)
    if given is not None and block is None:
        parts.fail("weight_block_size", f"is {given}, expected two numbers")
    found = {}
    for name, tensor in parts.tensors.items():
        if tensor.kind.name not in FLOAT8:
            continue
        base = name.removesuffix(".weight")
        scale = next((base + suffix for suffix in SCALE_NAMES if base + suffix in parts.tensors), None)
        if scale is None:
            parts.fail(name, "has no scale beside it", "CHECKPOINT_TENSOR")
        parts.used.add(name)
        found[name] = scaled(parts, name, tensor, scale, block)
    return found
