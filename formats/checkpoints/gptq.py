"""GPTQ: 2, 3, 4 or 8 bits, a scale and a zero point for each group of inputs and output.

    qweight  (n_in * bits / 32, n_out) int32   inputs packed from the lowest bit on
    qzeros   (n_groups, n_out * bits / 32) int32   outputs packed
    scales   (n_groups, n_out)
    g_idx    (n_in,) int32   the group of every input; without it groups follow one another

    w[out, in] = scales[g, out] * (q[in, out] - z[g, out]),  g = g_idx[in]

The first format stores z - 1, and its readers take (stored + 1) modulo 2^bits; ``gptq_v2`` stores z itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.checkpoints.bit_packing import n_words, unpack_words
from edgellm.formats.checkpoints.weight import Parts, Weight
from edgellm.formats.safetensors import StoredTensor
from edgellm.formats.stored_numbers import FLOATS

BITS = (2, 3, 4, 8)


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every packed module's weight. The number of bits is read off the shapes, for it may differ between modules."""
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        parts.refuse("checkpoint_format", f"is {form!r}, expected 'gptq' or 'gptq_v2'")
    zero_shift = 1 if form == "gptq" else 0
    return {f"{base}.weight": _weight(config, parts, base, zero_shift) for base in parts.bases(".qweight")}


def _weight(config: dict[str, Any], parts: Parts, base: str, zero_shift: int) -> Weight:
    qweight = parts.matrix(f"{base}.qweight", "I32")
    n_out = qweight.shape[1]
    scales = parts.need(f"{base}.scales", *FLOATS)
    parts.matrix(f"{base}.scales", columns=n_out)
    n_groups = scales.shape[0]
    groups = parts.find(f"{base}.g_idx", "I32", "I64")
    n_in, bits = _sizes(config, parts, base, qweight.shape[0], groups)
    qzeros = parts.matrix(f"{base}.qzeros", "I32", rows=n_groups, columns=n_words(n_out, bits))
    size = config.get("group_size")
    group_of = parts.groups(groups, f"{base}.scales", n_in if size == -1 else size, n_in, n_groups)

    def decode(start: int, stop: int) -> np.ndarray:
        q = unpack_words(qweight[:, start:stop], bits, 0, n_in)
        z = unpack_words(qzeros.T, bits, start, stop).T
        z = z + np.uint8(zero_shift) & np.uint8((1 << bits) - 1)
        scale = scales.float32()[:, start:stop]
        return ((q.astype(np.float32) - z[group_of]) * scale[group_of]).T

    return Weight((n_out, n_in), decode)


def _sizes(
    config: dict[str, Any], parts: Parts, base: str, n_rows: int, groups: StoredTensor | None
) -> tuple[int, int]:
    """Inputs and bits of a module."""
    bits = config.get("bits")
    if groups is not None and groups.shape and groups.shape[0]:
        n_in = groups.shape[0]
        bits = next((b for b in BITS if n_words(n_in, b) == n_rows), None)
    elif bits in BITS:
        n_in = n_rows * 32 // bits
    else:
        n_in = 0
    if bits not in BITS or n_words(n_in, bits) != n_rows:
        parts.fail(f"{base}.qweight", f"has {n_rows} rows of words, expected those of 2, 3, 4 or 8 bits", "MODEL_SHAPE")
    return n_in, bits
