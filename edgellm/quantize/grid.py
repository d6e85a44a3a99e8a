"""The grid of a tensor type: which values its blocks can hold once their scales are fixed, and how levels are packed.

Every type here is w = scale * level[q] + offset, scale and offset the same for a group of weights in a block. ``put``
makes the fields of blocks that hold q and leaves their scales alone, so scales and offsets are read back through the
type's own dequantizer. The bit layouts are drawn in formats/block_quants.py, k_quants.py and i_quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgellm.formats import levels
from edgellm.formats.quant_types import QUANT_TYPES, QuantType

Put = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Grid:
    """One type.

    levels   float32 (n_levels,), rising: what q stands for before scale and offset
    put      q (n, block_size) uint8 -> the fields of n blocks that hold it
    """

    quant: QuantType
    levels: np.ndarray
    put: Put

    @property
    def uniform(self) -> bool:
        """Whether the levels are 0, 1, 2 ... apart from an offset."""
        return bool((np.diff(self.levels) == 1).all())

    def scales(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """scale and offset of every weight, float32 (n, block_size) each, of blocks as uint8 (n, block_nbytes)."""
        ends = []
        for q in (0, len(self.levels) - 1):
            copy = blocks.copy()
            self.pack(copy, np.full((len(blocks), self.quant.block_size), q, np.uint8))
            ends.append(self.quant.dequantize(copy))
        scale = (ends[1] - ends[0]) / (self.levels[-1] - self.levels[0])
        return scale, ends[0] - scale * self.levels[0]

    def pack(self, blocks: np.ndarray, q: np.ndarray) -> None:
        """Put the levels (n, block_size) into blocks, uint8 (n, block_nbytes), C-contiguous."""
        view = blocks.reshape(-1).view(self.quant.layout)
        for name, packed in self.put(q).items():
            view[name] = packed.reshape(view[name].shape)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """The q whose level is nearest to each value."""
        if self.uniform:
            return np.clip(np.rint(values - self.levels[0]), 0, len(self.levels) - 1).astype(np.uint8)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return np.searchsorted(middles, values).astype(np.uint8)


def nibble_pairs(q: np.ndarray) -> np.ndarray:
    """(..., 2 k) values 0 to 15 as (..., k) bytes: the first half in the low nibbles."""
    half = q.shape[-1] // 2
    return q[..., :half] & 15 | (q[..., half:] & 15) << 4


def crumb_fours(q: np.ndarray) -> np.ndarray:
    """(..., 4 k) values 0 to 3 as (..., k) bytes, the first quarter in the lowest bits."""
    a, b, c, d = np.split(q & 3, 4, axis=-1)
    return a | b << 2 | c << 4 | d << 6


def planes(bit: np.ndarray) -> np.ndarray:
    """(n, 256) values 0 or 1 as (n, 32) bytes: 32 weights to a bit."""
    return np.packbits(bit.reshape(-1, 8, 32).swapaxes(1, 2), axis=-1, bitorder="little")[..., 0]


def _five_bits(q: np.ndarray) -> dict[str, np.ndarray]:
    return {"qs": nibble_pairs(q), "qh": np.packbits(q >> 4, axis=-1, bitorder="little")}


def _six_bits(q: np.ndarray) -> dict[str, np.ndarray]:
    halves = q.reshape(-1, 2, 128)
    return {"ql": nibble_pairs(halves), "qh": crumb_fours(halves >> 4)}


def _whole(n: int, least: int = 0) -> np.ndarray:
    return np.arange(least, least + n, dtype=np.float32)


def _table() -> dict[str, Grid]:
    nonlinear = np.array(levels.IQ4, np.float32)
    rows: list[tuple[str, np.ndarray, Put]] = [
        ("Q4_0", _whole(16, -8), lambda q: {"qs": nibble_pairs(q)}),
        ("Q4_1", _whole(16), lambda q: {"qs": nibble_pairs(q)}),
        ("Q5_0", _whole(32, -16), _five_bits),
        ("Q5_1", _whole(32), _five_bits),
        ("Q8_0", _whole(255, -127), lambda q: {"qs": (q.astype(np.int16) - 127).astype(np.int8)}),
        ("Q2_K", _whole(4), lambda q: {"qs": crumb_fours(q.reshape(-1, 2, 128))}),
        ("Q3_K", _whole(8, -4), lambda q: {"qs": crumb_fours(q.reshape(-1, 2, 128)), "hmask": planes(q >> 2)}),
        ("Q4_K", _whole(16), lambda q: {"qs": nibble_pairs(q.reshape(-1, 4, 64))}),
        ("Q5_K", _whole(32), lambda q: {"qs": nibble_pairs(q.reshape(-1, 4, 64)), "qh": planes(q >> 4)}),
        ("Q6_K", _whole(64, -32), _six_bits),
        ("IQ4_NL", nonlinear, lambda q: {"qs": nibble_pairs(q)}),
        ("IQ4_XS", nonlinear, lambda q: {"qs": nibble_pairs(q.reshape(-1, 8, 32))}),
    ]
    return {name: Grid(QUANT_TYPES[name], levels, put) for name, levels, put in rows}


GRIDS = _table()
"""The types that error compensation can round to, by name."""
