"""Open a GGUF file: metadata and tensors as two plain dicts, over the mapped file.

Opening reads and proves the header and touches no tensor data. Whatever this returns may be used without another
check of a length or an offset; the meaning of keys and shapes is for the architecture to check.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import REBUILD, Finding, override_error
from edgellm.formats.gguf_header import TensorRecord
from edgellm.formats.model_file import ModelFile
from edgellm.formats.quant_types import QUANT_TYPES_BY_ID, QuantType
from edgellm.formats.validate import Part, prove

T = TypeVar("T")
_MISSING: Any = object()


_PROJECTOR = (
    "the part of a model that makes tokens of pictures or sound (a projector, mmproj)",
    "Give the model's other file, which reads and writes text.",
)
# general.type or general.architecture of files that are no models: what they are, what to do
NOT_A_MODEL: dict[str, tuple[str, str]] = {
    "adapter": (
        "an adapter (LoRA) for a model",
        "Give its model, and the adapter with --lora. Merge it, in its checkpoint, where no adapter can be given.",
    ),
    "clip": _PROJECTOR,
    "clip-vision": _PROJECTOR,
    "mmproj": _PROJECTOR,
    "imatrix": (
        "an importance matrix, measured for quantizing",
        "Give it to `edgellm quantize --imatrix`, and a model here.",
    ),
    "controlvector": ("a control vector for a model", "Give the model itself, and the vector with --control-vector."),
    "vocab": ("a vocabulary without weights", "Give the file of the whole model."),
}


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in the mapped file.

    shape   outermost dimension first: a matmul weight is (n_out, n_in)
    data    (n_rows, row_nbytes) uint8, read-only; n_rows is the product of all dimensions but the last
    """

    name: str
    shape: tuple[int, ...]
    quant: QuantType
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes

    @property
    def pieces(self) -> tuple[QuantizedTensor, ...]:
        """What lies in one piece in a file: the tensor itself, or those of a stack."""
        return (self,)

    def stored(self, start: int, stop: int) -> np.ndarray:
        """The bytes of some rows, (stop - start, row_nbytes)."""
        return self.data[start:stop]

    def dequantize(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """float32 (n_rows, n_in) of the chosen rows, of all by default."""
        return self.quant.dequantize(self.data if rows is None else self.data[rows])

    def times(self, scale: float) -> QuantizedTensor:
        """The tensor whose weights are all to be multiplied by ``scale``."""
        return replace(self, quant=self.quant.times(scale))

    def times_each(self, scales: Sequence[float]) -> TensorStack:
        """The tensor whose weights at index i of the first dimension are all to be multiplied by ``scales[i]``."""
        each, parts = len(self.data) // self.shape[0], self.pieces
        if len(parts) == 1:
            runs = [self.data[i * each : (i + 1) * each] for i in range(self.shape[0])]
            parts = tuple(QuantizedTensor(self.name, self.shape[1:], self.quant, data) for data in runs)
        return TensorStack.of(self.name, [part.times(scale) for part, scale in zip(parts, scales, strict=True)])


@dataclass(frozen=True)
class TensorStack(QuantizedTensor):
    """Tensors of one shape as one, each an index of its first dimension. They may lie anywhere: ``data`` is empty.

    quant   that of the first; another one may be the same times a factor
    """

    parts: tuple[QuantizedTensor, ...] = ()

    @classmethod
    def of(cls, name: str, parts: Sequence[QuantizedTensor]) -> TensorStack:
        """Tensors of the same shape and blocks."""
        shape, first = parts[0].shape, parts[0]
        return cls(name, (len(parts), *shape), first.quant, first.data[:0], tuple(parts))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def pieces(self) -> tuple[QuantizedTensor, ...]:
        return self.parts

    def stored(self, start: int, stop: int) -> np.ndarray:
        return self._of_parts(start, stop, lambda part, rows: part.data[rows])

    def dequantize(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        each = len(self.parts[0].data)
        if isinstance(rows, np.ndarray):
            found = [self.parts[i // each].dequantize(slice(i % each, i % each + 1)) for i in rows.tolist()]
            return np.concatenate(found)
        start, stop, _ = (rows or slice(None)).indices(each * len(self.parts))
        return self._of_parts(start, stop, lambda part, rows: part.dequantize(rows))

    def times(self, scale: float) -> TensorStack:
        return TensorStack.of(self.name, [part.times(scale) for part in self.parts])

    def _of_parts(self, start: int, stop: int, take: Callable[[QuantizedTensor, slice], np.ndarray]) -> np.ndarray:
        """What ``take`` gives of the rows from ``start`` on; a view where they are of one part."""
        each = len(self.parts[0].data)
        found = [
            take(part, slice(max(start - first, 0), min(stop - first, each)))
            for first, part in zip(range(0, each * len(self.parts), each), self.parts, strict=True)
            if first < stop and start < first + each
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)


_ONE_EXPERT = re.compile(r"(blk\.\d{1,9}\.ffn_(?:gate|up|down))\.(\d{1,9})\.weight")


def stacked_experts(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors in which those of a layer's experts stand as one, as files have had them since 2024.

    Older ones have ``blk.N.ffn_gate.E.weight`` for each expert E. A stack stands where its first expert stood; experts
    that do not go together are left as they are.
    """
    experts: dict[str, dict[int, QuantizedTensor]] = {}
    for name, tensor in tensors.items():
        if found := _ONE_EXPERT.fullmatch(name):
            experts.setdefault(f"{found[1]}_exps.weight", {})[int(found[2])] = tensor
    stacks: dict[str, TensorStack] = {}
    for name, by_number in experts.items():
        parts = [by_number[i] for i in sorted(by_number)]
        alike = {(part.shape, part.quant.name) for part in parts}
        if sorted(by_number) == list(range(len(parts))) and len(alike) == 1 and name not in tensors:
            stacks[name] = TensorStack.of(name, parts)
    stack_of = {part.name: stack for stack in stacks.values() for part in stack.parts}
    return {
        (stack or tensor).name: stack or tensor for tensor in tensors.values() for stack in [stack_of.get(tensor.name)]
    }


class GGUFFile:
    """An open model file, or all parts of a split one.

    path         the (first) file
    metadata     scalars as Python values, numeric arrays as read-only numpy arrays, string arrays as list[str]
    value_types  key -> "UINT32", "STRING", "ARRAY[FLOAT32]" ...
    tensors      name -> QuantizedTensor, in file order
    part_sizes   tensors of each part
    overrides    the metadata values that the caller gave in place of the file's
    """

    def __init__(self, parts: list[Part], overrides: Mapping[str, Any] | None = None) -> None:
        header = parts[0].header
        self.path = parts[0].path
        self.paths = [part.path for part in parts]
        self.version = header.version
        self.metadata = header.metadata
        self.value_types = header.types
        self.nbytes = sum(part.header.nbytes for part in parts)
        self.tensors: dict[str, QuantizedTensor] = {}
        self.overrides = dict(overrides or {})
        self.part_sizes = [len(part.header.tensors) for part in parts]
        self._positions = header.positions
        self._maps = [part.data for part in parts]
        for part in parts:
            file = np.frombuffer(part.data, np.uint8)
            for record in part.header.tensors.values():
                self.tensors[record.name] = _tensor(file, part.header.data_start, record)

    @classmethod
    def open(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> GGUFFile:
        """Open and prove the file, or the first part of a split model and all others with it.

        overrides   metadata values in place of the file's; they are checked as if they stood in the file

        Raises EdgeLLMError with a named code, mostly a FormatError; the message says what to do. ParameterError for an
        override that is out of range.
        """
        return cls(prove(Path(path), overrides=overrides), overrides)

    @property
    def architecture(self) -> str:
        """``general.architecture``, such as ``llama``."""
        if "general.architecture" not in self.metadata:
            check_is_model(self)
        return self.require("general.architecture", str)

    @overload
    def get(self, key: str, kind: type[T]) -> T | None: ...

    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, or ``default`` when it is missing.

        kind is int, float, str, bool, list (an array of strings) or np.ndarray (an array of numbers). A value of
        another kind raises FormatError ``GGUF_KEY_TYPE``.
        """
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            message = f"is {self.value_types[key]}, expected {_KINDS.get(kind, kind.__name__)}"
            if key in self.overrides:
                raise override_error(key, message, "GGUF_KEY_TYPE")
            position = self._positions.get(key)
            raise Finding("GGUF_KEY_TYPE", message, REBUILD, self.path.name, position, key).error()
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """The value of a key that must be there. Raises FormatError ``MODEL_HPARAMS`` when it is not; see ``get``."""
        value = self.get(key, kind, _MISSING)
        if value is _MISSING:
            message = f"is missing, expected {_KINDS.get(kind, kind.__name__)}"
            raise Finding("MODEL_HPARAMS", message, file=self.path.name, name=key).error()
        return value

    def close(self) -> None:
        """Let go of the file. Tensors still held elsewhere stay readable until they are let go of too."""
        self.tensors = {}
        for mapped in self._maps:
            with contextlib.suppress(BufferError):  # a tensor is still held; the map goes with it
                mapped.close()
        self._maps = []

    def check(self) -> None:
        """EdgeLLMError ``MODEL_FILE_CHANGED`` when a file is no longer whole: what was read does not count then."""
        for mapped in self._maps:
            mapped.check()

    def release(self, tensor: QuantizedTensor) -> None:
        """Give back the memory that reading a tensor took, where the system can; it stays readable."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for piece in tensor.pieces:
                self._release(piece.data)

    def _release(self, data: np.ndarray) -> None:
        for mapped in self._maps:
            start = data.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
            if 0 <= start < len(mapped):
                first = start // mmap.PAGESIZE * mmap.PAGESIZE
                with contextlib.suppress(OSError):
                    mapped.madvise(mmap.MADV_DONTNEED, first, min(start + data.nbytes, len(mapped)) - first)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.check()
        finally:
            self.close()


def check_is_model(gguf: ModelFile) -> None:
    """UnsupportedError ``GGUF_NOT_A_MODEL`` for what goes with a model in a file of its own, and has its form."""
    for key in ("general.type", "general.architecture"):
        kind = gguf.metadata.get(key)
        if isinstance(kind, str) and kind in NOT_A_MODEL:
            break
    else:
        kind = "" if gguf.tensors else "vocab"
    if kind:
        what, advice = NOT_A_MODEL[kind]
        raise UnsupportedError(f"{Path(gguf.path).name}: is {what}, no model. {advice}", code="GGUF_NOT_A_MODEL")


_KINDS: dict[type, str] = {
    int: "an integer",
    float: "a FLOAT32 or FLOAT64",
    str: "a STRING",
    bool: "a BOOL",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}


def _tensor(file: np.ndarray, data_start: int, record: TensorRecord) -> QuantizedTensor:
    """A view of a proved record into the bytes of its file."""
    quant = QUANT_TYPES_BY_ID[record.type_id]
    shape = record.dims[::-1]
    start = data_start + record.offset
    data = file[start : start + quant.nbytes(shape)].reshape(-1, quant.row_nbytes(shape[-1]))
    return QuantizedTensor(record.name, shape, quant, data)
