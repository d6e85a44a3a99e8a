"""The i-quants: super-blocks of 256 weights whose codes name points of a grid (see ``i_quant_grids``).

    IQ2_XXS   66 bytes   d f16 | 8 groups of 32 weights: codes 4 x u8, signs u32
    IQ2_XS    74 bytes   d f16 | codes 32 x u16 | scales 8
    IQ2_S     82 bytes   d f16 | codes 32 | signs 32 | qh 8 | scales 8
    IQ3_XXS   98 bytes   d f16 | codes 64 | signs 8 x u32
    IQ3_S    110 bytes   d f16 | codes 64 | qh 8 | signs 32 | scales 4
    IQ1_S     50 bytes   d f16 | codes 32 | qh 8 x u16
    IQ1_M     56 bytes   codes 32 | qh 16 | scales 4 x u16
    IQ4_NL    18 bytes   d f16 | qs 16                                   32 weights
    IQ4_XS   136 bytes   d f16 | scales_h u16 | scales_l 4 | qs 128

A grid of 2 bits names 8 weights with a code, one of 3 bits 4 weights. Signs: a bit of 1 is negative; where only seven
bits are stored the eighth sign follows from them.

    XXS signs, u32   SSSS dddddddcccccccbbbbbbbaaaaaaa   scale of the group; seven signs of weights 0-7 (a) to 24-31 (d)
    IQ2_XS code      sssssss ccccccccc                   seven signs, code of nine bits
    scales           HHHH LLLL                           first (L) and second (H) group of the pair
    IQ2_S qh         dd cc bb aa                         bits 9-8 of four codes, first code lowest
    IQ3_S qh         hgfedcba                            bit 8 of eight codes, first code lowest
    IQ1_S qh, u16    D SSS ddd ccc bbb aaa               delta negative; scale; bits 10-8 of four codes
    IQ1_M qh         E bbb D aaa                         bits 10-8 of two codes, each with the sign of its delta
    IQ1_M scales     HHHH ddd ccc bbb aaa                four scales of 16 weights; H: a nibble of d, lowest first
    IQ4_XS           scales_h: two bits a group, first lowest; scales_l: a nibble a group, L first; 32 is subtracted

Every function takes blocks (n,) of its layout and gives float32 (n, weights of a block). Factors are multiplied in the
order that the judge uses, because float32 products depend on it.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats import levels
from edgellm.formats.block_quants import bits, column, nibbles
from edgellm.formats.i_quant_grids import grid, signs

IQ2_XXS = np.dtype([("d", "<f2"), ("groups", [("codes", "u1", 4), ("signs", "<u4")], 8)])
IQ2_XS = np.dtype([("d", "<f2"), ("codes", "<u2", 32), ("scales", "u1", 8)])
IQ2_S = np.dtype([("d", "<f2"), ("codes", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
IQ3_XXS = np.dtype([("d", "<f2"), ("codes", "u1", 64), ("signs", "<u4", 8)])
IQ3_S = np.dtype([("d", "<f2"), ("codes", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])
IQ1_S = np.dtype([("d", "<f2"), ("codes", "u1", 32), ("qh", "<u2", 8)])
IQ1_M = np.dtype([("codes", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
IQ4_NL = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
IQ4_XS = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", (8, 16))])

# what the 16 codes of IQ4_NL and IQ4_XS stand for
_IQ4 = np.array(levels.IQ4, np.float32)
IQ1_DELTA = np.float32(0.125)


def fields(packed: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """(..., k) numbers as (..., k * len(shifts)): the bit fields of each number side by side."""
    parts = packed[..., None] >> np.array(shifts, packed.dtype) & packed.dtype.type(mask)
    return parts.reshape(*packed.shape[:-1], -1)


def _signed(scales: np.ndarray, points: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(n, 256) of scales (n, groups), points (n, codes, weights of a code) and signs of 1 or -1 (n, 256)."""
    n, groups = scales.shape
    w = scales[:, :, None] * points.reshape(n, groups, 256 // groups) * negative.reshape(n, groups, 256 // groups)
    return w.reshape(n, 256)


def _sign_bits(packed: np.ndarray) -> np.ndarray:
    """(n, 32) bytes as (n, 256) of 1 or -1."""
    return np.float32(1) - np.float32(2) * bits(packed).astype(np.float32)


def dequantize_iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    """w = d (s + 1/2) / 4 * point * sign"""
    packed = blocks["groups"]["signs"]
    scales = column(blocks["d"]) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.25)
    points = grid("IQ2_XXS")[blocks["groups"]["codes"].reshape(-1, 32)]
    return _signed(scales, points, signs()[fields(packed, (0, 7, 14, 21), 127)])


def dequantize_iq2_xs(blocks: np.ndarray) -> np.ndarray:
    """w = d (s + 1/2) / 4 * point * sign"""
    codes = blocks["codes"]
    scales = fields(blocks["scales"], (0, 4), 15).astype(np.float32)
    scales = column(blocks["d"]) * (np.float32(0.5) + scales) * np.float32(0.25)
    return _signed(scales, grid("IQ2_XS")[codes & 511], signs()[codes >> 9])


def dequantize_iq2_s(blocks: np.ndarray) -> np.ndarray:
    """w = d (s + 1/2) / 4 * point * sign"""
    codes = blocks["codes"] | fields(blocks["qh"], (0, 2, 4, 6), 3).astype(np.uint16) << 8
    scales = fields(blocks["scales"], (0, 4), 15).astype(np.float32)
    scales = column(blocks["d"]) * (np.float32(0.5) + scales) * np.float32(0.25)
    return _signed(scales, grid("IQ2_S")[codes], _sign_bits(blocks["signs"]))


def dequantize_iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    """w = d (s + 1/2) / 2 * point * sign"""
    packed = blocks["signs"]
    scales = column(blocks["d"]) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.5)
    return _signed(scales, grid("IQ3_XXS")[blocks["codes"]], signs()[fields(packed, (0, 7, 14, 21), 127)])


def dequantize_iq3_s(blocks: np.ndarray) -> np.ndarray:
    """w = d (2 s + 1) * point * sign"""
    codes = blocks["codes"] | bits(blocks["qh"]).astype(np.uint16) << 8
    scales = fields(blocks["scales"], (0, 4), 15).astype(np.float32)
    scales = column(blocks["d"]) * (np.float32(1) + np.float32(2) * scales)
    return _signed(scales, grid("IQ3_S")[codes], _sign_bits(blocks["signs"]))


def dequantize_iq1_s(blocks: np.ndarray) -> np.ndarray:
    """w = d (2 s + 1) * (point + delta)"""
    qh = blocks["qh"]
    scales = column(blocks["d"]) * (2 * (qh >> 12 & 7) + 1).astype(np.float32)
    codes = blocks["codes"] | fields(qh, (0, 3, 6, 9), 7) << 8
    delta = np.where(qh >> 15 == 0, IQ1_DELTA, -IQ1_DELTA)
    points = grid("IQ1_S")[codes].reshape(-1, 8, 32) + delta[:, :, None]
    return (scales[:, :, None] * points).reshape(-1, 256)


def iq1_m_scale(blocks: np.ndarray) -> np.ndarray:
    """The float16 (n,) whose four nibbles stand on top of the four scales."""
    d = blocks["scales"] >> 12 << np.array([0, 4, 8, 12], np.uint16)
    return np.bitwise_or.reduce(d, axis=1).view(np.float16)


def dequantize_iq1_m(blocks: np.ndarray) -> np.ndarray:
    """w = d (2 s + 1) * (point + delta), a delta for each code"""
    qh = fields(blocks["qh"], (0, 4), 15)
    scales = (2 * fields(blocks["scales"], (0, 3, 6, 9), 7) + 1).astype(np.float32)
    codes = blocks["codes"] | (qh & 7).astype(np.uint16) << 8
    delta = np.where(qh >> 3 == 0, IQ1_DELTA, -IQ1_DELTA)
    points = (grid("IQ1_S")[codes] + delta[:, :, None]).reshape(-1, 16, 16)
    return ((column(iq1_m_scale(blocks)) * scales)[:, :, None] * points).reshape(-1, 256)


def dequantize_iq4_nl(blocks: np.ndarray) -> np.ndarray:
    """w = d level"""
    return column(blocks["d"]) * _IQ4[nibbles(blocks["qs"])]


def dequantize_iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """w = d (s - 32) level"""
    high = fields(blocks["scales_h"][:, None], tuple(range(0, 16, 2)), 3)
    six_bits = fields(blocks["scales_l"], (0, 4), 15) | high << 4
    scales = column(blocks["d"]) * (six_bits.astype(np.float32) - np.float32(32))
    return (scales[:, :, None] * _IQ4[nibbles(blocks["qs"])]).reshape(-1, 256)
