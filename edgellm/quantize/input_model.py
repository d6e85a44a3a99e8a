"""A model to convert or quantize, whatever it is stored as: typed metadata, and tensors that decode row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgellm.formats import bus_error
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.gguf_writer import rows_in_chunks
from edgellm.formats.quant_types import QuantType

Rows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class InputTensor:
    """A tensor of a model to convert.

    name       as GGUF calls it
    shape      outermost dimension first
    quant      the type that ``stored`` gives
    decode     (start, stop) -> float32 (stop - start, n_in)
    stored     (start, stop) -> uint8 (stop - start, row_nbytes): the same rows as they are kept, nothing rounded
    release    lets go of the memory that reading it has brought in
    quantized  whether rounding to a few bits has happened before; float types have not been through it
    """

    name: str
    shape: tuple[int, ...]
    quant: QuantType
    decode: Rows
    stored: Rows
    quantized: bool = False
    release: Callable[[], None] = lambda: None

    @property
    def n_rows(self) -> int:
        """Product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def n_in(self) -> int:
        """Weights of a row."""
        return self.shape[-1]

    @property
    def n_elements(self) -> int:
        """Weights in all."""
        return self.n_rows * self.n_in

    @property
    def nbytes(self) -> int:
        """Bytes in the type it is stored as."""
        return self.quant.nbytes(self.shape)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32 (stop - start, n_in) of the rows from ``start``, decoded now; all of them by default."""
        return self.decode(start, self.n_rows if stop is None else stop)

    def dequantize(self, rows: np.ndarray | None = None) -> np.ndarray:
        """The rows of these numbers, all of them by default."""
        return self.rows() if rows is None else np.concatenate([self.rows(row, row + 1) for row in rows.tolist()])

    def times(self, scale: float) -> InputTensor:
        """The tensor whose numbers are all multiplied by ``scale``."""
        return replace(self, decode=lambda start, stop: self.decode(start, stop) * np.float32(scale))

    def times_each(self, scales: Sequence[float]) -> InputTensor:
        """The tensor whose numbers at index i of the first dimension are all multiplied by ``scales[i]``."""
        factors = np.repeat(np.array(scales, np.float32), self.n_rows // self.shape[0])[:, None]
        return replace(self, decode=lambda start, stop: self.decode(start, stop) * factors[start:stop])

    def data(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """uint8 (stop - start, row_nbytes) of the same rows as they are stored, fit to be copied into a file."""
        return self.stored(start, self.n_rows if stop is None else stop)

    def stored_chunks(self) -> Iterator[np.ndarray]:
        """The tensor's bytes as they are stored, some rows at a time: ``TensorPlan.chunks`` of a copy."""
        for start, stop in rows_in_chunks(self.n_rows, self.quant.row_nbytes(self.n_in)):
            yield np.ascontiguousarray(self.data(start, stop)).reshape(-1)


@dataclass
class InputModel:
    """An open model to convert.

    path      the file or folder it comes from
    kind      ``gguf`` or ``checkpoint``
    metadata  key -> (value, GGUF type name), in the order of the file; what ``write_gguf`` takes
    tensors   name -> InputTensor, in the order of the file
    n_parts   files it came in, for a GGUF model; part_sizes: tensors of each, in the order of ``tensors``
    scheme    how a checkpoint is quantized ("gptq", "awq", "fp8" ...); "" for one that is not
    notes     what the user should know before relying on the result
    gguf      the open file, for a GGUF model
    """

    path: Path
    kind: str
    metadata: TypedMetadata
    tensors: dict[str, InputTensor]
    n_parts: int = 1
    part_sizes: list[int] = field(default_factory=list)
    scheme: str = ""
    notes: list[str] = field(default_factory=list)
    gguf: GGUFFile | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        bus_error.install()

    @property
    def architecture(self) -> str:
        """``general.architecture``; every source has one."""
        return str(self.metadata["general.architecture"][0])

    @property
    def n_elements(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the types they are stored as."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        """Let go of the files."""
        if self.gguf is not None:
            self.gguf.close()

    def __enter__(self) -> InputModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
