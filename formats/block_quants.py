"""Blocks of 32 weights (64 for Q2_0, 128 for Q1_0) with one or two float16 scales: ggml's plain quantizations.

    Q4_0   18 bytes   d f16 | qs 16             w = d (q - 8)
    Q4_1   20 bytes   d f16 | m f16 | qs 16     w = d q + m
    Q5_0   22 bytes   d f16 | qh 4 | qs 16      w = d (q - 16)
    Q5_1   24 bytes   d f16 | m f16 | qh 4 | qs 16   w = d q + m
    Q8_0   34 bytes   d f16 | qs 32 x int8      w = d q
    Q1_0   18 bytes   d f16 | qs 16             w = d where the bit is 1, -d where it is 0
    Q2_0   18 bytes   d f16 | qs 16             w = d (q - 1)

Byte i of ``qs`` holds weight i in its low and weight i + 16 in its high nibble; bit i of ``qh`` (one little-endian
u32) is the fifth bit of weight i. Q1_0 has bit j of byte i for weight 8 i + j, Q2_0 bits 2 j and 2 j + 1 of byte i for
weight 4 i + j.

    qs[i]   HHHH LLLL          L: weight i        H: weight i + 16
    qh      bit 31 ... bit 0   bit i: weight i

``TYPES`` has a row for each; what stands there takes blocks (n,) and gives float32 (n, weights of a block).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Dequantize = Callable[[np.ndarray], np.ndarray]
Row = tuple[str, int, int, Any, "Dequantize | None"]
"""Name, ggml's number, weights of a block, layout of a block as numpy describes it, blocks -> weights."""


def column(scales: np.ndarray) -> np.ndarray:
    """float16 scales (n,) as a float32 column (n, 1)."""
    return scales.astype(np.float32)[:, None]


def nibbles(packed: np.ndarray) -> np.ndarray:
    """(..., k) bytes as (..., 2 k) values 0 to 15: all low nibbles, then all high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def bits(packed: np.ndarray) -> np.ndarray:
    """(..., k) bytes as (..., 8 k) values 0 or 1, lowest bit first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def fields(packed: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """(..., k) numbers as (..., k * len(shifts)): the bit fields of each number side by side."""
    parts = packed[..., None] >> np.array(shifts, packed.dtype) & packed.dtype.type(mask)
    return parts.reshape(*packed.shape[:-1], -1)


def times_d(blocks: np.ndarray, q: np.ndarray, offset: int = 0) -> np.ndarray:
    """d (q + offset), float32, for whole numbers q."""
    values = q.astype(np.float32)
    return column(blocks["d"]) * (values + np.float32(offset) if offset else values)


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    return nibbles(blocks["qs"]) | bits(blocks["qh"]) << 4


_D, _M, _QH, _QS = ("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)
TYPES: tuple[Row, ...] = (
    ("Q4_0", 2, 32, [_D, _QS], lambda b: times_d(b, nibbles(b["qs"]), -8)),
    ("Q4_1", 3, 32, [_D, _M, _QS], lambda b: times_d(b, nibbles(b["qs"])) + column(b["m"])),
    ("Q5_0", 6, 32, [_D, _QH, _QS], lambda b: times_d(b, _five_bits(b), -16)),
    ("Q5_1", 7, 32, [_D, _M, _QH, _QS], lambda b: times_d(b, _five_bits(b)) + column(b["m"])),
    ("Q8_0", 8, 32, [_D, ("qs", "i1", 32)], lambda b: times_d(b, b["qs"])),
    ("Q1_0", 41, 128, [_D, _QS], lambda b: np.where(bits(b["qs"]) == 1, column(b["d"]), -column(b["d"]))),
    ("Q2_0", 42, 64, [_D, _QS], lambda b: times_d(b, fields(b["qs"], (0, 2, 4, 6), 3), -1)),
)
