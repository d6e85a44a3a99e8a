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

``TYPES`` has a row for each, as in ``block_quants``.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.block_quants import Row, bits, column, nibbles, times_d


def crumbs(packed: np.ndarray) -> np.ndarray:
    """(..., k) bytes as (..., 4 k) values 0 to 3: all lowest bit pairs, then the next ones."""
    return np.concatenate([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], axis=-1)


def bit_planes(packed: np.ndarray) -> np.ndarray:
    """(n, 32) bytes as (n, 256) values 0 or 1: bit 0 of every byte, then bit 1 of every byte, ..."""
    return bits(packed[..., None]).swapaxes(-1, -2).reshape(len(packed), 256)


def _scaled(scales: np.ndarray, q: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """scale * q (- minimum): scales and minima (n, groups) float32, q n * 256 of any integer type."""
    n, groups = scales.shape
    w = scales[:, :, None] * q.astype(np.float32).reshape(n, groups, 256 // groups)
    if minima is not None:
        w -= minima[:, :, None]
    return w.reshape(n, 256)


def _affine(blocks: np.ndarray, q: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """w = (d s) q - (dmin m)"""
    return _scaled(times_d(blocks, s), q, column(blocks["dmin"]) * m.astype(np.float32))


def _six_bit_affine(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The same with the scales and minima of Q4_K and Q5_K."""
    s, m, both = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([s & 63, both & 15 | s >> 6 << 4], axis=1)
    return _affine(blocks, q, scales, np.concatenate([m & 63, both >> 4 | m >> 6 << 4], axis=1))


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    """w = (d s) q, s from -32 to 31, q from -4 to 3"""
    six_bits = nibbles(blocks["scales"][:, :8]) | crumbs(blocks["scales"][:, 8:]) << 4
    q = (crumbs(blocks["qs"]).reshape(-1, 256) | bit_planes(blocks["hmask"]) << 2).astype(np.int8) - 4
    return _scaled(times_d(blocks, six_bits, -32), q)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    return _six_bit_affine(blocks, nibbles(blocks["qs"]).reshape(-1, 256) | bit_planes(blocks["qh"]) << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """w = (d s) q, q from -32 to 31"""
    q = (nibbles(blocks["ql"]) | crumbs(blocks["qh"]) << 4).astype(np.int8) - 32
    return _scaled(times_d(blocks, blocks["scales"]), q)


_D, _DMIN, _SIX_BITS, _QH = ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32)
_HALVES, _QUARTERS = ("qs", "u1", (2, 32)), ("qs", "u1", (4, 32))
TYPES: tuple[Row, ...] = (
    ("Q2_K", 10, 256, [("scales", "u1", 16), _HALVES, _D, _DMIN],
     lambda b: _affine(b, crumbs(b["qs"]), b["scales"] & 15, b["scales"] >> 4)),
    ("Q3_K", 11, 256, [("hmask", "u1", 32), _HALVES, _SIX_BITS, _D], _q3_k),
    ("Q4_K", 12, 256, [_D, _DMIN, _SIX_BITS, _QUARTERS], lambda b: _six_bit_affine(b, nibbles(b["qs"]))),
    ("Q5_K", 13, 256, [_D, _DMIN, _SIX_BITS, _QH, _QUARTERS], _q5_k),
    ("Q6_K", 14, 256, [("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), _D], _q6_k),
    ("Q8_K", 15, 256, [("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)], lambda b: times_d(b, b["qs"])),
)  # fmt: skip
