"""AWQ in the GEMM layout: 4 bits, eight outputs to a word in an order of their own.

    qweight  (n_in, n_out / 8) int32
    qzeros   (n_groups, n_out / 8) int32
    scales   (n_groups, n_out)

    w[out, in] = scales[g, out] * (q[in, out] - z[g, out]),  g = in // group_size

Output j of a word lies in its nibble 0 4 1 5 2 6 3 7 [j], counted from the lowest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.checkpoints.weight import Parts, Weight
from edgellm.formats.stored_numbers import FLOATS

NIBBLE_OF_OUTPUT = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every packed module's weight."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or config.get("bits", config.get("w_bit", 4)) != 4:
        parts.refuse("version, bits", f"are {version!r}, {config.get('bits')!r}, expected 'gemm' and 4")
    return {f"{base}.weight": _weight(parts, base) for base in parts.bases(".qweight")}


def _weight(parts: Parts, base: str) -> Weight:
    qweight = parts.matrix(f"{base}.qweight", "I32")
    n_in, n_out = qweight.shape[0], qweight.shape[1] * 8
    scales = parts.need(f"{base}.scales", *FLOATS)
    parts.matrix(f"{base}.scales", columns=n_out)
    n_groups = scales.shape[0]
    if not n_groups or n_in % n_groups:
        parts.fail(f"{base}.scales", f"has {n_groups} groups for {n_in} inputs", "MODEL_SHAPE")
    qzeros = parts.matrix(f"{base}.qzeros", "I32", rows=n_groups, columns=n_out // 8)
    size = n_in // n_groups

    def decode(start: int, stop: int) -> np.ndarray:
        q = _outputs(qweight, start, stop).reshape(n_groups, size, -1)
        z = _outputs(qzeros, start, stop)[:, None]
        scale = scales.float32()[:, None, start:stop]
        return ((q - z) * scale).reshape(n_in, -1).T

    return Weight((n_out, n_in), decode)


def _outputs(words: np.ndarray, start: int, stop: int) -> np.ndarray:
    """(n, stop - start) float32 of the outputs from ``start`` on."""
    first, last = start // 8, -(-stop // 8)
    nibbles = words[:, first:last].view(np.uint32)[:, :, None] >> (4 * NIBBLE_OF_OUTPUT) & 15
    return nibbles.reshape(len(words), -1)[:, start - first * 8 : stop - first * 8].astype(np.float32)
