"""Weights on the device: still quantized, their rows side by side word by word, in parts that one binding can hold.

A tensor is sent as it stands in the file, some megabytes at a time, and a shader puts each piece in its place, so no
more than a piece is ever there twice. A type that no shader reads is dequantized to F32 on the way, as on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.device import ALIGN, UPLOAD_NBYTES, Device

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor

GROUP = 32  # rows that lie side by side
_TAIL_NBYTES = 4 * GROUP  # a load that is not aligned reads one word more


class Part(NamedTuple):
    """Rows [first, first + n) of a matrix."""

    buffer: Any
    first: int
    n: int


class Matrix(NamedTuple):
    """A weight, or several of one type and width under each other.

    words    of 4 bytes in a row      pieces   of 32 weights in a row
    """

    quant: str
    n_out: int
    n_in: int
    words: int
    pieces: int
    parts: tuple[Part, ...]


def device_type(quant: str) -> str:
    """What a type is kept as."""
    return quant if quant in sources.TYPES else "F32"


def row_words(quant: str, n_in: int) -> int:
    """Words of 4 bytes of a row."""
    if quant in sources.WORDS_PER_ROW_PIECE:
        return sources.WORDS_PER_ROW_PIECE[quant] * -(-n_in // 32)
    return -(-QUANT_TYPES[quant].row_nbytes(n_in) // 4)


def matrix_nbytes(tensor: QuantizedTensor) -> int:
    """Bytes that a matrix will have on the device."""
    rows = -(-math.prod(tensor.shape[:-1]) // GROUP) * GROUP
    return rows * row_words(device_type(tensor.quant.name), tensor.shape[-1]) * 4 + _TAIL_NBYTES + ALIGN


def put_matrix(device: Device, tensors: list[QuantizedTensor]) -> Matrix:
    """Tensors of one type and width as one matrix, the rows of the first on top. The host waits for it."""
    quant, n_in = device_type(tensors[0].quant.name), tensors[0].shape[-1]
    words, n_out = row_words(quant, n_in), sum(math.prod(tensor.shape[:-1]) for tensor in tensors)
    most = (device.max_binding - _TAIL_NBYTES) // (words * 4) // GROUP * GROUP
    parts = [
        Part(device.buffer(-(-min(most, n_out - first) // GROUP) * GROUP * words * 4 + _TAIL_NBYTES), first,
             min(most, n_out - first))
        for first in range(0, n_out, most)
    ]  # fmt: skip
    row_nbytes = QUANT_TYPES[quant].row_nbytes(n_in)
    per_piece = max(GROUP, min(UPLOAD_NBYTES, device.max_binding - ALIGN) // row_nbytes // GROUP * GROUP)
    raw = device.buffer(min(per_piece, n_out) * row_nbytes + 8)
    shader = sources.source("repack")
    for part in parts:
        for first in range(part.first, part.first + part.n, per_piece):
            n = min(per_piece, part.first + part.n - first)
            device.write(raw, 0, np.concatenate(list(_rows(tensors, quant, first, n))))
            grid, group = (-(-words // 32), -(-n // GROUP), 1), (first - part.first) // GROUP
            device.run([device.dispatch(shader, [raw, part.buffer], "rw", grid, row_nbytes, words, n, group)])
            device.wait()
    device.free(raw)
    return Matrix(quant, n_out, n_in, words, -(-n_in // 32), tuple(parts))


def _rows(tensors: list[QuantizedTensor], quant: str, first: int, n: int) -> Iterable[np.ndarray]:
    """The bytes of n rows from ``first`` on."""
    for tensor in (piece for one in tensors for piece in one.pieces):
        n_rows = len(tensor.data)
        wanted = tensor.data[min(first, n_rows) : min(max(first + n, 0), n_rows)]
        if len(wanted):
            kept = wanted if tensor.quant.name == quant else tensor.quant.dequantize(np.ascontiguousarray(wanted))
            yield np.ascontiguousarray(kept).reshape(-1).view(np.uint8)
        n, first = n - len(wanted), max(first - n_rows, 0)
        if not n:
            return
