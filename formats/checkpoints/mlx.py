"""MLX: whole numbers of a few bits with a scale and a bias for each group of inputs; embeddings are packed too.

X.weight            (n_out, words) uint32   inputs one after another from the lowest bit on
X.scales, X.biases  (n_out, n_groups)       w = q * scale + bias

config.json has ``quantization`` with group_size and bits for all, and under a module's name what it has of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.checkpoints.bit_packing import n_words, unpack_words
from edgellm.formats.checkpoints.weight import Parts, Weight
from edgellm.formats.findings import short
from edgellm.formats.stored_numbers import FLOATS

BITS = (2, 3, 4, 5, 6, 8)


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every matrix that has scales beside it."""
    return {f"{base}.weight": _weight(parts, base, config) for base in parts.bases(".scales")}


def _weight(parts: Parts, base: str, config: dict[str, Any]) -> Weight:
    own = config.get(base)
    settings = config | own if isinstance(own, dict) else config
    bits, size, mode = settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine")
    if mode != "affine":
        parts.refuse(base, f"is packed in the mode {short(mode)}; edgellm decodes the mode affine")
    if type(bits) is not int or bits not in BITS or type(size) is not int or not 1 <= size <= 1 << 16:
        parts.fail(
            base, f"has {short(bits)} bits in groups of {short(size)}, expected {', '.join(map(str, BITS))} bits"
        )
    packed = parts.matrix(f"{base}.weight", "U32")
    scale = parts.need(f"{base}.scales", *FLOATS)
    n_out, n_groups = parts.matrix(f"{base}.scales", rows=len(packed)).shape
    parts.matrix(f"{base}.biases", rows=n_out, columns=n_groups)
    bias = parts.need(f"{base}.biases", *FLOATS)
    n_in = n_groups * size
    if packed.shape[1] != n_words(n_in, bits) or n_in * bits % 32:
        message = (
            f"has rows of {packed.shape[1]} words, expected {n_words(n_in, bits)} for {n_in} inputs of {bits} bits"
        )
        parts.fail(f"{base}.weight", message, "MODEL_SHAPE")

    def decode(start: int, stop: int) -> np.ndarray:
        words = np.ascontiguousarray(packed[start:stop].T)
        q = unpack_words(words, bits, 0, n_in).T.astype(np.float32).reshape(stop - start, n_groups, size)
        rows = slice(start, stop)
        return (q * scale.float32(rows)[..., None] + bias.float32(rows)[..., None]).reshape(stop - start, n_in)

    return Weight((n_out, n_in), decode)
