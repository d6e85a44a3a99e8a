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

    IQ2, IQ3_XXS     w = d (s + 1/2) * point * sign, by 1/4 and 1/2
    IQ3_S, IQ1       w = d (2 s + 1) * point * sign, d (2 s + 1) * (point + delta)

``TYPES`` has a row for each, as in ``block_quants``. Factors are multiplied in the order that the judge uses, because
float32 products depend on it.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats import levels
from edgellm.formats.block_quants import Row, bits, column, fields, nibbles, times_d
from edgellm.formats.i_quant_grids import grid, signs

# what the 16 codes of IQ4_NL and IQ4_XS stand for
_IQ4 = np.array(levels.IQ4, np.float32)
IQ1_DELTA = np.float32(0.125)


def _signed(scales: np.ndarray, points: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(n, 256) of scales (n, groups), points (n, codes, weights of a code) and signs of 1 or -1 (n, 256)."""
    n, groups = scales.shape
    w = scales[:, :, None] * points.reshape(n, groups, 256 // groups) * negative.reshape(n, groups, 256 // groups)
    return w.reshape(n, 256)


def _sign_bits(packed: np.ndarray) -> np.ndarray:
    """(n, 32) bytes as (n, 256) of 1 or -1."""
    return np.float32(1) - np.float32(2) * bits(packed).astype(np.float32)


def _seven_signs(packed: np.ndarray) -> np.ndarray:
    """(n, k) u32 as (n, 4 k, 8) of 1 or -1."""
    return signs()[fields(packed, (0, 7, 14, 21), 127)]


def _pairs(packed: np.ndarray) -> np.ndarray:
    return fields(packed, (0, 4), 15)


def _scales(blocks: np.ndarray, s: np.ndarray, factor: float) -> np.ndarray:
    """d (s + 1/2) factor"""
    return column(blocks["d"]) * (np.float32(0.5) + s.astype(np.float32)) * np.float32(factor)


def _iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    packed, codes = blocks["groups"]["signs"], blocks["groups"]["codes"].reshape(-1, 32)
    return _signed(_scales(blocks, packed >> 28, 0.25), grid("IQ2_XXS")[codes], _seven_signs(packed))


def _iq2_xs(blocks: np.ndarray) -> np.ndarray:
    codes, scales = blocks["codes"], _scales(blocks, _pairs(blocks["scales"]), 0.25)
    return _signed(scales, grid("IQ2_XS")[codes & 511], signs()[codes >> 9])


def _iq2_s(blocks: np.ndarray) -> np.ndarray:
    codes = blocks["codes"] | fields(blocks["qh"], (0, 2, 4, 6), 3).astype(np.uint16) << 8
    return _signed(_scales(blocks, _pairs(blocks["scales"]), 0.25), grid("IQ2_S")[codes], _sign_bits(blocks["signs"]))


def _iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    packed = blocks["signs"]
    return _signed(_scales(blocks, packed >> 28, 0.5), grid("IQ3_XXS")[blocks["codes"]], _seven_signs(packed))


def _iq3_s(blocks: np.ndarray) -> np.ndarray:
    codes = blocks["codes"] | bits(blocks["qh"]).astype(np.uint16) << 8
    return _signed(times_d(blocks, 2 * _pairs(blocks["scales"]), 1), grid("IQ3_S")[codes], _sign_bits(blocks["signs"]))


def _iq1_s(blocks: np.ndarray) -> np.ndarray:
    """w = d (2 s + 1) * (point + delta)"""
    qh = blocks["qh"]
    codes = blocks["codes"] | fields(qh, (0, 3, 6, 9), 7) << 8
    delta = np.where(qh >> 15 == 0, IQ1_DELTA, -IQ1_DELTA)
    points = grid("IQ1_S")[codes].reshape(-1, 8, 32) + delta[:, :, None]
    return (times_d(blocks, 2 * (qh >> 12 & 7), 1)[:, :, None] * points).reshape(-1, 256)


def _iq1_m(blocks: np.ndarray) -> np.ndarray:
    """The same with a delta for each code; d are the nibbles on top of the four scales."""
    qh, nibbles_of_d = _pairs(blocks["qh"]), blocks["scales"] >> 12 << np.array([0, 4, 8, 12], np.uint16)
    scales = (2 * fields(blocks["scales"], (0, 3, 6, 9), 7) + 1).astype(np.float32)
    codes = blocks["codes"] | (qh & 7).astype(np.uint16) << 8
    delta = np.where(qh >> 3 == 0, IQ1_DELTA, -IQ1_DELTA)
    points = (grid("IQ1_S")[codes] + delta[:, :, None]).reshape(-1, 16, 16)
    d = column(np.bitwise_or.reduce(nibbles_of_d, axis=1).view(np.float16))
    return ((d * scales)[:, :, None] * points).reshape(-1, 256)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """w = d (s - 32) level"""
    high = fields(blocks["scales_h"][:, None], tuple(range(0, 16, 2)), 3)
    scales = times_d(blocks, _pairs(blocks["scales_l"]) | high << 4, -32)
    return (scales[:, :, None] * _IQ4[nibbles(blocks["qs"])]).reshape(-1, 256)


_D, _CODES, _SIGNS = ("d", "<f2"), ("codes", "u1", 32), ("signs", "u1", 32)
TYPES: tuple[Row, ...] = (
    ("IQ2_XXS", 16, 256, [_D, ("groups", [("codes", "u1", 4), ("signs", "<u4")], 8)], _iq2_xxs),
    ("IQ2_XS", 17, 256, [_D, ("codes", "<u2", 32), ("scales", "u1", 8)], _iq2_xs),
    ("IQ3_XXS", 18, 256, [_D, ("codes", "u1", 64), ("signs", "<u4", 8)], _iq3_xxs),
    ("IQ1_S", 19, 256, [_D, _CODES, ("qh", "<u2", 8)], _iq1_s),
    ("IQ4_NL", 20, 32, [_D, ("qs", "u1", 16)], lambda b: column(b["d"]) * _IQ4[nibbles(b["qs"])]),
    ("IQ3_S", 21, 256, [_D, ("codes", "u1", 64), ("qh", "u1", 8), _SIGNS, ("scales", "u1", 4)], _iq3_s),
    ("IQ2_S", 22, 256, [_D, _CODES, _SIGNS, ("qh", "u1", 8), ("scales", "u1", 8)], _iq2_s),
    ("IQ4_XS", 23, 256, [_D, ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", (8, 16))], _iq4_xs),
    ("IQ1_M", 29, 256, [_CODES, ("qh", "u1", 16), ("scales", "<u2", 4)], _iq1_m),
)
