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

Every function takes blocks (n,) of its layout and gives float32 (n, weights of a block).
"""

from __future__ import annotations

import numpy as np

Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
Q1_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q2_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])


def column(scales: np.ndarray) -> np.ndarray:
    """float16 scales (n,) as a float32 column (n, 1)."""
    return scales.astype(np.float32)[:, None]


def nibbles(packed: np.ndarray) -> np.ndarray:
    """(..., k) bytes as (..., 2 k) values 0 to 15: all low nibbles, then all high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def bits(packed: np.ndarray) -> np.ndarray:
    """(..., k) bytes as (..., 8 k) values 0 or 1, lowest bit first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def dequantize_q4_0(blocks: np.ndarray) -> np.ndarray:
    """w = d (q - 8)"""
    return column(blocks["d"]) * (nibbles(blocks["qs"]).astype(np.float32) - np.float32(8))


def dequantize_q4_1(blocks: np.ndarray) -> np.ndarray:
    """w = d q + m"""
    return column(blocks["d"]) * nibbles(blocks["qs"]).astype(np.float32) + column(blocks["m"])


def dequantize_q5_0(blocks: np.ndarray) -> np.ndarray:
    """w = d (q - 16)"""
    q = nibbles(blocks["qs"]) | bits(blocks["qh"]) << 4
    return column(blocks["d"]) * (q.astype(np.float32) - np.float32(16))


def dequantize_q5_1(blocks: np.ndarray) -> np.ndarray:
    """w = d q + m"""
    q = nibbles(blocks["qs"]) | bits(blocks["qh"]) << 4
    return column(blocks["d"]) * q.astype(np.float32) + column(blocks["m"])


def dequantize_q8_0(blocks: np.ndarray) -> np.ndarray:
    """w = d q"""
    return column(blocks["d"]) * blocks["qs"].astype(np.float32)


def dequantize_q1_0(blocks: np.ndarray) -> np.ndarray:
    """w = d or -d"""
    d = column(blocks["d"])
    return np.where(bits(blocks["qs"]) == 1, d, -d)


def dequantize_q2_0(blocks: np.ndarray) -> np.ndarray:
    """w = d (q - 1)"""
    q = (blocks["qs"][:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(-1, 64)
    return column(blocks["d"]) * (q.astype(np.float32) - np.float32(1))
