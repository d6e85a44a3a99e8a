"""The tensor types of ggml, one row each: name, id, bytes of a block, and how to make float32 of it.

A row of a tensor is a whole number of blocks; a block holds ``block_size`` weights in ``block_nbytes`` bytes. The bit
layouts are drawn in the files that unpack them. All numbers are little endian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgellm.formats import block_quants as bq
from edgellm.formats import i_quants as iq
from edgellm.formats import k_quants as kq
from edgellm.formats import small_quants as sq
from edgellm.formats.errors import UnsupportedError

CHUNK_NBYTES = 1 << 20  # of float32 made at once: the intermediate arrays stay in the cache


@dataclass(frozen=True)
class QuantType:
    """One ggml tensor type.

    layout    numpy dtype of a block
    unpack    blocks (n,) of ``layout`` -> float32 (n, block_size); None where no one has defined it
    """

    name: str
    id: int
    block_size: int
    layout: np.dtype
    unpack: bq.Dequantize | None

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block."""
        return self.layout.itemsize

    def row_nbytes(self, n: int) -> int:
        """Bytes of a row of n weights; n must be a multiple of ``block_size``."""
        assert n % self.block_size == 0, f"{n} weights are no whole number of {self.name} blocks"
        return n // self.block_size * self.block_nbytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor, its rows in the last dimension."""
        return math.prod(shape[:-1]) * self.row_nbytes(shape[-1])

    def dequantize(self, data: np.ndarray) -> np.ndarray:
        """float32 (..., n) of uint8 (..., row_nbytes). Raises UnsupportedError for a type without a known meaning."""
        if self.unpack is None:
            raise UnsupportedError(
                f"{self.name} holds intermediate results of ggml and has no fixed layout, so it cannot be turned into"
                " float32. No model file should contain it: convert the model again.",
                code="GGUF_TENSOR_TYPE",
            )
        assert data.dtype == np.uint8, f"{self.name}: bytes expected, not {data.dtype}"
        if self.layout.kind == "f" and self.unpack is _plain:
            return np.ascontiguousarray(data).view(self.layout).astype(np.float32)
        blocks = np.ascontiguousarray(data).reshape(-1).view(self.layout)
        out = np.empty((len(blocks), self.block_size), np.float32)
        step = max(1, CHUNK_NBYTES // (4 * self.block_size))
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinite scales of a damaged file
            for i in range(0, len(blocks), step):
                out[i : i + step] = self.unpack(blocks[i : i + step])
        return out.reshape(*data.shape[:-1], data.shape[-1] // self.block_nbytes * self.block_size)

    def times(self, scale: float) -> QuantType:
        """The type of blocks whose weights are all to be multiplied by ``scale``."""
        unpack = self.unpack
        if unpack is None:
            return self
        factor = np.float32(scale)
        return replace(self, name=f"{self.name} x {scale:g}", unpack=lambda blocks: unpack(blocks) * factor)

    def finite(self, data: np.ndarray) -> np.ndarray:
        """(n_blocks,) bool of uint8 (n_blocks * block_nbytes,): whether the scales, or the weights, are finite."""
        blocks = data.view(self.layout)
        if self.layout.kind == "f":
            return np.isfinite(blocks)
        fields: Mapping[str, tuple[Any, ...]] = self.layout.fields or {}
        scales = [name for name, field in fields.items() if field[0].kind == "f"]
        if scales:
            return np.logical_and.reduce([np.isfinite(blocks[name]) for name in scales])
        if (self.layout.kind in "iu" and self.block_size == 1 and self.unpack is _plain) or self.unpack is None:
            return np.ones(len(blocks), bool)
        return np.isfinite(self.dequantize(data.reshape(len(blocks), -1))).all(axis=-1)


def _plain(blocks: np.ndarray) -> np.ndarray:
    """Numbers (n,) of any plain type as float32 (n, 1)."""
    return blocks.astype(np.float32)[:, None]


def _bf16(blocks: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers."""
    return (blocks.astype(np.uint32) << 16).view(np.float32)[:, None]


PLAIN: tuple[bq.Row, ...] = (
    ("F32", 0, 1, "<f4", _plain),
    ("F16", 1, 1, "<f2", _plain),
    ("Q8_1", 9, 32, "V40", None),  # written by no version of ggml that still runs; its fields changed over time
    ("I8", 24, 1, "i1", _plain),
    ("I16", 25, 1, "<i2", _plain),
    ("I32", 26, 1, "<i4", _plain),
    ("I64", 27, 1, "<i8", _plain),
    ("F64", 28, 1, "<f8", _plain),
    ("BF16", 30, 1, "<u2", _bf16),
)

QUANT_TYPES: dict[str, QuantType] = {
    name: QuantType(name, number, block_size, np.dtype(layout), unpack)
    for name, number, block_size, layout, unpack in sorted(
        (*PLAIN, *bq.TYPES, *kq.TYPES, *iq.TYPES, *sq.TYPES), key=lambda row: row[1]
    )
}
QUANT_TYPES_BY_ID: dict[int, QuantType] = {row.id: row for row in QUANT_TYPES.values()}
