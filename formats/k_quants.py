"""The k-quants: super-blocks of 256 weights whose scales are themselves quantized.

    Q2_K    84 bytes   scales 16 | qs 64 | d f16 | dmin f16                  16 groups of 16
    Q3_K   110 bytes   hmask 32 | qs 64 | scales 12 | d f16                  16 groups of 16
    Q4_K   144 bytes   d f16 | dmin f16 | scales 12 | qs 128                  8 groups of 32
    Q5_K   176 bytes   d f16 | dmin f16 | scales 12 | qh 32 | qs 128          8 groups of 32
    Q6_K   210 bytes   ql 128 | qh 64 | scales 16 x int8 | d f16             16 groups of 16
    Q8_K   292 bytes   d f32 | qs 256 x int8 | bsums 16 x int16               activations of ggml, w = d q

Weights of a group with scale s (and minimum m): w = d s q - dmin m, or w = d s q without one.

Six-bit scales s and minima m of Q4_K and Q5_K, groups 0 to 7, in 12 bytes; the two high bits of groups 4 to 7 stand
on top of groups 0 to 3:

    byte 0-3    44 s0 s0 s0 s0 s0 s0      s0..s3 in six bits, above them bits 5-4 of s4..s7
    byte 4-7    44 m0 m0 m0 m0 m0 m0      m0..m3 in six bits, above them bits 5-4 of m4..m7
    byte 8-11   m4 m4 m4 m4 s4 s4 s4 s4   bits 3-0 of m4..m7 (high nibble) and s4..s7 (low nibble)

Six-bit scales of Q3_K, groups 0 to 15, stored with 32 added, in 12 bytes:

    byte i = 0-7     hi nibble: bits 3-0 of scale i + 8    lo nibble: bits 3-0 of scale i
    byte 8 + j       bits 7-6: s(j+12)  bits 5-4: s(j+8)  bits 3-2: s(j+4)  bits 1-0: s(j), each bits 5-4 of it

Low bits of the weights (qs):

    Q2_K, Q3_K   two halves of 32 bytes; byte i of half h:  DD CC BB AA   weight 128 h + 32 k + i, k = 0 (A) to 3 (D)
    Q4_K, Q5_K   four parts of 32 bytes; byte i of part p:  HHHH LLLL     weight 64 p + i (L), 64 p + 32 + i (H)
    Q6_K (ql)    two halves of 64 bytes; byte i of half h:  HHHH LLLL     weight 128 h + i (L), 128 h + 64 + i (H)

High bits:

    Q3_K hmask   bit k of byte i: weight 32 k + i; 0 means subtract 4
    Q5_K qh      bit k of byte i: the fifth bit of weight 32 k + i
    Q6_K qh      two halves of 32 bytes; byte i of half h: DD CC BB AA, bits 5-4 of weight 128 h + 32 k + i

Every function takes super-blocks (n,) of its layout and gives float32 (n, 256).
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.block_quants import bits, column, nibbles

Q2_K = np.dtype([("scales", "u1", 16), ("qs", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2")])
Q3_K = np.dtype([("hmask", "u1", 32), ("qs", "u1", (2, 32)), ("scales", "u1", 12), ("d", "<f2")])
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", (4, 32))])
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", (4, 32))])
Q6_K = np.dtype([("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])
Q8_K = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])


def crumbs(packed: np.ndarray) -> np.ndarray:
    """(..., k) bytes as (..., 4 k) values 0 to 3: all lowest bit pairs, then the next ones."""
    return np.concatenate([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], axis=-1)


def bit_planes(packed: np.ndarray) -> np.ndarray:
    """(n, 32) bytes as (n, 256) values 0 or 1: bit 0 of every byte, then bit 1 of every byte, ..."""
    return bits(packed[..., None]).swapaxes(-1, -2).reshape(len(packed), 256)


def scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The six-bit scales and minima, each (n, 8) uint8, of the 12 bytes of Q4_K and Q5_K."""
    s, m, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([s & 63, both & 15 | s >> 6 << 4], axis=1)
    minima = np.concatenate([m & 63, both >> 4 | m >> 6 << 4], axis=1)
    return scales, minima


def _scaled(scales: np.ndarray, q: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """scale * q (- minimum): scales and minima (n, groups) float32, q (n, 256) of any integer type."""
    n, groups = scales.shape
    w = scales[:, :, None] * q.astype(np.float32).reshape(n, groups, 256 // groups)
    if minima is not None:
        w -= minima[:, :, None]
    return w.reshape(n, 256)


def dequantize_q2_k(blocks: np.ndarray) -> np.ndarray:
    """w = (d s) q - (dmin m), s and m of four bits"""
    packed = blocks["scales"]
    scales = column(blocks["d"]) * (packed & 15).astype(np.float32)
    minima = column(blocks["dmin"]) * (packed >> 4).astype(np.float32)
    return _scaled(scales, crumbs(blocks["qs"]).reshape(-1, 256), minima)


def dequantize_q3_k(blocks: np.ndarray) -> np.ndarray:
    """w = (d s) q, s from -32 to 31, q from -4 to 3"""
    packed = blocks["scales"]
    six_bits = nibbles(packed[:, :8]) | crumbs(packed[:, 8:]) << 4
    scales = column(blocks["d"]) * (six_bits.astype(np.float32) - np.float32(32))
    q = (crumbs(blocks["qs"]).reshape(-1, 256) | bit_planes(blocks["hmask"]) << 2).astype(np.int8) - 4
    return _scaled(scales, q)


def dequantize_q4_k(blocks: np.ndarray) -> np.ndarray:
    """w = (d s) q - (dmin m)"""
    s, m = scales_and_minima(blocks["scales"])
    scales, minima = column(blocks["d"]) * s.astype(np.float32), column(blocks["dmin"]) * m.astype(np.float32)
    return _scaled(scales, nibbles(blocks["qs"]).reshape(-1, 256), minima)


def dequantize_q5_k(blocks: np.ndarray) -> np.ndarray:
    """w = (d s) q - (dmin m)"""
    s, m = scales_and_minima(blocks["scales"])
    scales, minima = column(blocks["d"]) * s.astype(np.float32), column(blocks["dmin"]) * m.astype(np.float32)
    q = nibbles(blocks["qs"]).reshape(-1, 256) | bit_planes(blocks["qh"]) << 4
    return _scaled(scales, q, minima)


def dequantize_q6_k(blocks: np.ndarray) -> np.ndarray:
    """w = (d s) q, q from -32 to 31"""
    scales = column(blocks["d"]) * blocks["scales"].astype(np.float32)
    q = (nibbles(blocks["ql"]) | crumbs(blocks["qh"]) << 4).reshape(-1, 256).astype(np.int8) - 32
    return _scaled(scales, q)


def dequantize_q8_k(blocks: np.ndarray) -> np.ndarray:
    """w = d q"""
    return blocks["d"][:, None] * blocks["qs"].astype(np.float32)
