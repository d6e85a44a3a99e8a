"""How the CPU kernels write quantized weights: float32 rows to blocks, byte for byte as ggml's reference quantizer.

    lanes.py         eight blocks side by side: the vector operations, panels
    searches.py      ggml's searches for a scale, a block in a lane
    common.py        what a kernel is given
    blocks_of_32.py  Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4
    super_blocks.py  the way of a k-quant; affine_k.py: Q2_K Q4_K Q5_K; signed_k.py: Q3_K Q6_K
    nonlinear.py     IQ4_NL IQ4_XS
    ternary.py       TQ1_0 TQ2_0
    floats.py        F16 BF16

A type that uses an importance matrix has two kernels, ``encode_q4_k`` and ``encode_q4_k_weighted``.
"""

from __future__ import annotations

from typing import Any

_Row = tuple[str, str, Any]

_PLAIN: dict[str, _Row] = {
    "F16": ("floats", "make_float_encoder", "F16"),
    "BF16": ("floats", "make_float_encoder", "BF16"),
    "Q8_0": ("blocks_of_32", "encode_q8_0", None),
    "MXFP4": ("blocks_of_32", "encode_mxfp4", None),
    "TQ1_0": ("ternary", "encode_tq1_0", None),
    "TQ2_0": ("ternary", "encode_tq2_0", None),
}
_BLOCKS = {"Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (5, False), "Q5_1": (5, True)}


def _two_rows(quant: str, weighted: bool) -> _Row:
    if quant in _BLOCKS:
        return "blocks_of_32", "make_block_encoder", (*_BLOCKS[quant], weighted)
    if quant in ("Q2_K", "Q4_K", "Q5_K"):
        return "affine_k", "make_affine_k_encoder", (quant, weighted)
    if quant in ("Q3_K", "Q6_K"):
        return "signed_k", "make_signed_k_encoder", (quant, weighted)
    return "nonlinear", f"make_{quant.lower()}_encoder", weighted


WEIGHTED = (*_BLOCKS, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types whose quantizer uses the importance of each column."""

ENCODED = ("F32", *_PLAIN, *WEIGHTED)
"""Types that ``encode`` writes."""

ENCODERS: dict[str, _Row] = {
    **{f"encode_{quant.lower()}": row for quant, row in _PLAIN.items()},
    **{f"encode_{quant.lower()}": _two_rows(quant, False) for quant in WEIGHTED},
    **{f"encode_{quant.lower()}_weighted": _two_rows(quant, True) for quant in WEIGHTED},
}
"""Kernel name -> module here, function, argument of a make_ function or None."""


def kernel_name(quant: str, weighted: bool) -> str:
    """The kernel that writes a type, with or without an importance."""
    return f"encode_{quant.lower()}" + ("_weighted" if weighted and quant in WEIGHTED else "")
