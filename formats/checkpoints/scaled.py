"""Matrices of small numbers (8-bit floats, int8) times scales: one for all, one a row, one a group or a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgellm.formats.checkpoints.weight import Parts, Rows, Weight
from edgellm.formats.safetensors import StoredTensor
from edgellm.formats.stored_numbers import FLOATS, FP4_E2M1, NUMBER_TYPES

SCALES = (*FLOATS, "F8_E8M0")

Change = Callable[[np.ndarray], np.ndarray]


def scaled(
    parts: Parts,
    name: str,
    values: StoredTensor,
    scale_name: str,
    block: tuple[int, int] | None = None,
    zero_name: str | None = None,
) -> Weight:
    """w = (value - zero) * scale, both spread over the matrix by the shape of ``scale``.

    block   (rows, columns) that share a scale, where the last ones may be cut short; None: the shape says it all
    """
    if len(values.shape) != 2:
        parts.fail(name, f"has the shape {values.shape}, expected a matrix", "MODEL_SHAPE")
    n_out, n_in = values.shape
    scale = _Spread(parts, scale_name, n_out, n_in, block, SCALES)
    zero = _Spread(parts, zero_name, n_out, n_in, block, (*SCALES, "I8", "I32")) if zero_name else None

    def decode(start: int, stop: int) -> np.ndarray:
        rows = values.float32(slice(start, stop))
        if zero is not None:
            rows = rows - zero(start, stop)
        return rows * scale(start, stop)

    return Weight((n_out, n_in), decode)


def four_bit_floats(
    parts: Parts,
    name: str,
    scale_name: str,
    size: int,
    kinds: tuple[str, ...],
    change: Change = lambda numbers: numbers,
) -> Weight:
    """A matrix (n_out, n_in / 2) uint8 of E2M1, with a scale for ``size`` inputs that ``change`` makes another of."""
    packed = parts.matrix(name, "U8")
    n_out, n_in = packed.shape[0], packed.shape[1] * 2
    scale = parts.need(scale_name, *kinds)
    parts.matrix(scale_name, rows=n_out, columns=n_in // size)
    if n_in % size:
        parts.fail(name, f"has rows of {n_in}, expected a multiple of {size}", "MODEL_SHAPE")
    return Weight((n_out, n_in), e2m1_groups(packed, scale, change))


def e2m1_groups(packed: np.ndarray, scale: StoredTensor, change: Change = lambda numbers: numbers) -> Rows:
    """A decoder of 4-bit floats times a scale for each group of inputs.

    packed   (n_out, n_in / 2) uint8, the earlier number in the lower half
    scale    (n_out, n_groups); plain bytes are powers of two, E8M0
    """
    if scale.kind.name == "U8":
        scale = replace(scale, kind=NUMBER_TYPES["F8_E8M0"])

    def decode(start: int, stop: int) -> np.ndarray:
        codes, numbers = packed[start:stop], change(scale.float32(slice(start, stop)))
        both = np.stack((codes & 15, codes >> 4), axis=-1).reshape(stop - start, numbers.shape[1], -1)
        return (FP4_E2M1[both] * numbers[..., None]).reshape(stop - start, -1)

    return decode


class _Spread:
    """A small matrix of scales, as rows for the whole one."""

    def __init__(
        self, parts: Parts, name: str, n_out: int, n_in: int, block: tuple[int, int] | None, kinds: tuple[str, ...]
    ) -> None:
        tensor = parts.need(name, *kinds)
        shape = tensor.shape if len(tensor.shape) == 2 else (tensor.raw.size * 8 // tensor.kind.n_bits, 1)
        self.tensor, self.n_in = tensor, n_in
        rows, columns = shape
        if block is not None and rows * columns > 1:
            self.block = block
            fits = shape == (-(-n_out // block[0]), -(-n_in // block[1]))
        else:
            self.block = (-(-n_out // max(1, rows)), -(-n_in // max(1, columns)))
            fits = rows in (1, n_out) and columns >= 1 and n_in % columns == 0
        if not fits:
            parts.fail(name, f"has the shape {tensor.shape} for a matrix of {n_out} x {n_in}", "MODEL_SHAPE")
        self.shape = shape

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """float32 that broadcasts to (stop - start, n_in)."""
        numbers = self.tensor.float32().reshape(self.shape)
        if self.shape[0] > 1:
            numbers = numbers[np.arange(start, stop) // self.block[0]]
        if self.shape[1] > 1:
            numbers = np.repeat(numbers, self.block[1], axis=1)[:, : self.n_in]
        return numbers
