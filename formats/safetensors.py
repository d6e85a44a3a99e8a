"""Open a safetensors file: a header of JSON, every number of it proved, over the mapped file.

    length of the header u64 | header: {"name": {"dtype", "shape", "data_offsets": [start, stop]}, ...} | tensor bytes

Offsets count from the end of the header. As the format demands, tensors neither overlap nor leave bytes between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.errors import FormatError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.json_text import parse_json
from edgellm.formats.mapped_file import FileMap
from edgellm.formats.stored_numbers import NUMBER_TYPES, NumberType, to_float32

MAX_HEADER_NBYTES = 100_000_000  # the format's own limit
LENGTH_NBYTES = 8
MAX_DIMS = 8
MAX_NAME_NBYTES = 1024


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a mapped file.

    shape   outermost dimension first, () for a scalar
    raw     (nbytes,) uint8, read-only
    """

    name: str
    kind: NumberType
    shape: tuple[int, ...]
    raw: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The numbers in their own type and shape; a view of the file. BF16 as uint16, 8-bit floats as uint8."""
        if self.kind.storage is None:
            return self.raw
        return self.raw.view(self.kind.storage).reshape(self.shape)

    def float32(self, rows: slice = slice(None)) -> np.ndarray:
        """float32 of some rows of it, of all by default."""
        values = self.values if not self.shape else self.values[rows]
        return to_float32(values, self.kind)


class SafetensorsFile:
    """An open file: ``tensors`` by name, in the order of their bytes; ``metadata`` is what the writer noted."""

    def __init__(self, path: Path, data: FileMap) -> None:
        self.path = path
        header, start = _read_header(path, data)
        noted = header.pop("__metadata__", None)
        self.metadata: Mapping[str, str] = noted if isinstance(noted, dict) else {}
        file = np.frombuffer(data, np.uint8)
        records = [_record(path, name, entry, len(data) - start) for name, entry in header.items()]
        records.sort(key=lambda record: (record.start, record.stop))
        _check_layout(path, records, len(data) - start)
        self.tensors = {
            r.name: StoredTensor(r.name, r.kind, r.shape, file[start + r.start : start + r.stop]) for r in records
        }

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Open and prove the file. FormatError ``SAFETENSORS_...`` or ``MODEL_TRUNCATED``."""
        return cls.open_in(CheckpointFolder(Path(path).parent), Path(path).name)

    @classmethod
    def open_in(cls, folder: CheckpointFolder, name: str) -> SafetensorsFile:
        """The same for a file of an open folder."""
        return cls(folder.path / name, folder.map(name, LENGTH_NBYTES))


@dataclass(frozen=True)
class _Record:
    name: str
    kind: NumberType
    shape: tuple[int, ...]
    start: int
    stop: int


def _fail(path: Path, code: str, message: str, advice: str = PULL_AGAIN) -> NoReturn:
    raise FormatError(f"{path.name}: {message}. {advice}", code=code)


def _read_header(path: Path, data: FileMap) -> tuple[dict[str, Any], int]:
    """The JSON object at the head, and the byte at which tensors begin."""
    length = int.from_bytes(data[:8], "little")
    start = bytes(data[:64])
    if start.startswith(b"version https://git-lfs"):
        _fail(
            path, "SAFETENSORS_HEADER", "is a Git LFS pointer, not the file it points to", "Download the file itself."
        )
    if start[8:9] != b"{":
        _fail(path, "SAFETENSORS_HEADER", "is no safetensors file: its ninth byte begins no JSON object")
    if length > MAX_HEADER_NBYTES:
        message = f"declares a header of {length:,} bytes, expected up to {MAX_HEADER_NBYTES:,}"
        _fail(path, "SAFETENSORS_HEADER", message)
    if length > len(data) - 8:
        message = f"the header of {length:,} bytes does not fit a file of {len(data):,}: its end is missing"
        _fail(path, "MODEL_TRUNCATED", message)
    header = parse_json(bytes(data[8 : 8 + length]), path.name, "SAFETENSORS_HEADER")
    if not isinstance(header, dict):
        _fail(path, "SAFETENSORS_HEADER", "the header is no JSON object of tensors")
    return header, 8 + length


def _record(path: Path, name: str, entry: Any, available: int) -> _Record:
    """One entry of the header, its types, its shape and its bytes proved."""

    def fail(code: str, message: str) -> NoReturn:
        _fail(path, code, f"{short(name)}: {message}")

    if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_NBYTES:
        fail("SAFETENSORS_HEADER", f"a name of 1 to {MAX_NAME_NBYTES} bytes was expected")
    if not isinstance(entry, dict):
        fail("SAFETENSORS_HEADER", "dtype, shape and data_offsets were expected")
    kind = NUMBER_TYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if kind is None:
        fail("CHECKPOINT_DTYPE", f"the dtype is {short(entry.get('dtype'))}; known: {', '.join(NUMBER_TYPES)}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        fail("SAFETENSORS_SHAPE", f"the shape is {short(shape)}, expected up to {MAX_DIMS} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        fail("SAFETENSORS_BOUNDS", f"data_offsets is {short(offsets)}, expected two whole numbers")
    start, stop = offsets
    n = math.prod(shape)
    if n * kind.n_bits % 8:
        fail("SAFETENSORS_SHAPE", f"{n:,} numbers of {kind.n_bits} bits are no whole number of bytes")
    if not start <= stop or stop - start != n * kind.n_bits // 8:
        shown = " x ".join(map(str, shape)) or "one number"
        fail("SAFETENSORS_BOUNDS", f"{stop - start:,} bytes are declared for {shown} of {kind.name}")
    if stop > available:
        message = f"ends at byte {stop:,} of the tensors, and the file has {available:,}: its end is missing"
        fail("MODEL_TRUNCATED", message)
    return _Record(name, kind, tuple(shape), start, stop)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_layout(path: Path, records: list[_Record], available: int) -> None:
    """Tensors follow one another; no byte belongs to two of them or to none."""
    expected, before = 0, ""
    for record in records:
        if record.start < expected:
            message = f"{short(record.name)}: shares {expected - record.start:,} bytes with {short(before)}"
            _fail(path, "SAFETENSORS_OVERLAP", message)
        if record.start > expected:
            message = f"{short(record.name)}: {record.start - expected:,} bytes before it belong to no tensor"
            _fail(path, "SAFETENSORS_BOUNDS", message)
        expected, before = record.stop, record.name
    if expected != available:
        _fail(path, "SAFETENSORS_BOUNDS", f"{available - expected:,} bytes at the end belong to no tensor")
