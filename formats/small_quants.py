"""Ternary weights and four-bit floats.

    TQ1_0   54 bytes   qs 48 | qh 4 | d f16     256 weights of -1, 0, 1: five in a byte (four in those of qh)
    TQ2_0   66 bytes   qs 64 | d f16            256 weights of -1, 0, 1: four in a byte
    MXFP4   17 bytes   e u8 | qs 16             32 weights, scale 2^(e - 128)
    NVFP4   36 bytes   d 4 | qs 32              64 weights, a scale for each 16

A byte b of TQ1_0 is a fraction b / 256 written in base 3: multiplied by 3 its digits come out one by one, each minus 1
a weight. Digit t of byte i is weight 32 t + i for the bytes 0 to 31, 160 + 16 t + (i - 32) for 32 to 47, and
240 + 4 t + i for qh.

    TQ2_0 qs   DD CC BB AA   byte i of half h (32 bytes): weight 128 h + 32 k + i, k = 0 (A) to 3 (D), minus 1
    MXFP4 qs   HHHH LLLL     weight i (L), weight i + 16 (H)
    NVFP4 qs   HHHH LLLL     8 bytes for each 16 weights: weight i (L), weight i + 8 (H)
    a weight   S EE M        float of 1 + 2 + 1 bits; LEVELS holds them doubled, the scales are halved to match
    NVFP4 d    - EEEE MMM    float of 4 + 3 bits, bias 7, no sign; 0x7F means 0

``TYPES`` has a row for each, as in ``block_quants``.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats import levels
from edgellm.formats.block_quants import Row, nibbles, times_d
from edgellm.formats.k_quants import crumbs
from edgellm.formats.stored_numbers import float8_table

_E2M1 = np.array(levels.E2M1_DOUBLED, np.float32)
_E8M0 = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)  # halves; the two smallest are subnormal
_UE4M3 = float8_table(4, 3, 7)[np.arange(256) & 0x7F] / 2  # the top bit is ignored but for 0x7F, which is 0
_UE4M3[0x7F] = 0


def _base3(packed: np.ndarray, n_digits: int) -> np.ndarray:
    """(n, k) bytes as (n, n_digits * k) digits 0 to 2: the first digit of every byte, then the second ..."""
    fraction = packed[:, None, :] * np.array([1, 3, 9, 27, 81], np.uint8)[:n_digits, None]  # wraps: keeps the fraction
    return (fraction.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    """w = d (q - 1)"""
    qs = blocks["qs"]
    q = np.concatenate([_base3(qs[:, :32], 5), _base3(qs[:, 32:], 5), _base3(blocks["qh"], 4)], axis=1)
    return times_d(blocks, q, -1)


_D = ("d", "<f2")
TYPES: tuple[Row, ...] = (
    ("TQ1_0", 34, 256, [("qs", "u1", 48), ("qh", "u1", 4), _D], _tq1_0),
    ("TQ2_0", 35, 256, [("qs", "u1", (2, 32)), _D], lambda b: times_d(b, crumbs(b["qs"]).reshape(-1, 256), -1)),
    ("MXFP4", 39, 32, [("e", "u1"), ("qs", "u1", 16)], lambda b: _E8M0[b["e"]][:, None] * _E2M1[nibbles(b["qs"])]),
    ("NVFP4", 40, 64, [("d", "u1", 4), ("qs", "u1", (4, 8))],
     lambda b: (_UE4M3[b["d"]][:, :, None] * _E2M1[nibbles(b["qs"])]).reshape(-1, 64)),
)  # fmt: skip
