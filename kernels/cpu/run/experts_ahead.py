"""A mixture of experts that is larger than memory: the experts stay in the file, and those of a step are fetched ahead.

As soon as a layer's router has chosen, the system is asked for all pages of the chosen experts at once (WILLNEED), so
the disk works on many of them at a time; a page that is missing when a kernel reads it would come alone. Nothing else
of the file is read ahead (RANDOM), and what memory has room for stays there.

POSIX systems only; elsewhere the pages come as they are read.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgellm.formats.gguf import QuantizedTensor
from edgellm.kernels.cpu.lib import layout


@dataclass(frozen=True)
class Routed:
    """The products of a layer's experts.

    row      of the op table, behind which it is known which experts they are with
    groups   the pairs by expert, as layout.GROUPS has them, int32
    pieces   of each product's weight (n_expert, 2): address and bytes of each expert's part
    """

    row: int
    groups: np.ndarray
    pieces: list[np.ndarray]

    def chosen(self) -> np.ndarray:
        """The experts that any token of the step is sent to, after ``row``."""
        first, each = layout.GROUPS // 4, layout.EXPERTS_GROUP_NBYTES // 4
        n = int(self.groups[0])
        return self.groups[first : first + n * each].reshape(n, each)[:, layout.GROUP_EXPERT // 4]

    def fetch(self) -> None:
        """Ask for the pages of the experts that were chosen."""
        chosen = self.chosen()
        for pieces in self.pieces:
            advise(pieces[chosen].tolist(), "MADV_WILLNEED")


def pieces_of(tensor: QuantizedTensor) -> np.ndarray:
    """Address and bytes of each expert's part of a tensor that lies in a file, (n_expert, 2) int64."""
    n = tensor.shape[0]
    if len(tensor.pieces) == 1:
        address, nbytes = tensor.data.ctypes.data, tensor.nbytes // n
        return np.array([(address + i * nbytes, nbytes) for i in range(n)])
    return np.array([(piece.data.ctypes.data, piece.nbytes) for piece in tensor.pieces])


def keep_in_file(tensors: Iterable[QuantizedTensor]) -> None:
    """Tell the system that pages of these are read here and there: it reads nothing around the one that is wanted."""
    for tensor in tensors:
        pieces = [(piece.data.ctypes.data, piece.nbytes) for piece in tensor.pieces]
        advise(pieces, "MADV_NOHUGEPAGE")
        advise(pieces, "MADV_RANDOM")


def advise(pieces: Iterable[tuple[int, int]], advice: str) -> None:
    """madvise() of runs of bytes, (address, bytes), as far as their pages go; nothing where the system has no such."""
    number = getattr(mmap, advice, None)
    libc = _libc()
    if number is None or libc is None:
        return
    for address, nbytes in pieces:
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + nbytes - first), number)


def _libc() -> ctypes.CDLL | None:
    """The C library where it has madvise()."""
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.madvise else None
    except (AttributeError, OSError, TypeError):  # Windows
        return None
