"""Write a GGUF file: whole under its name, or not at all.

The header is made first, so the length of the file is known and the disk's free space is proved before a byte is
written. Tensors then stream through, one after another. Parts cannot change together, so the old first part goes before
any new one takes its name, and the new first part comes last: a process that dies in between leaves a model that is
plainly incomplete, never one of two halves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.formats.gguf_header import MAX_ALIGNMENT, MAX_DIMS, MAX_NAME_NBYTES, VALUE_TYPES, TypedMetadata
from edgellm.formats.large_pages import LargePageWriter
from edgellm.formats.mapped_file import check_open_maps
from edgellm.formats.quant_types import QuantType
from edgellm.formats.split_files import part_name
from edgellm.machine.atomic import whole_file
from edgellm.machine.progress import Progress

VERSION = 3
ALIGNMENT = 32  # when general.alignment does not say
SPARE_NBYTES = 16 << 20  # stays free on the disk
MAX_PARTS = 65535  # split.count is a UINT16


_TYPE_IDS = {name: (type_id, form) for type_id, (name, form) in VALUE_TYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write.

    shape   outermost dimension first
    chunks  makes the tensor's bytes, piece by piece and in order; called once, when its turn comes
    """

    name: str
    shape: tuple[int, ...]
    quant: QuantType
    chunks: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.quant.nbytes(self.shape)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: TypedMetadata,
    tensors: Sequence[TensorPlan],
    *,
    max_part_nbytes: int | None = None,
    max_part_tensors: int | None = None,
    part_sizes: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the model to ``path`` and give the files that hold it, the first one first.

    With a limit for a part, tensors that exceed it go on in the next: ``name-00001-of-00003.gguf`` and on, in the
    folder of ``path``, as llama.cpp names them. A limit that everything fits in gives one file called ``path``.
    ``part_sizes`` says instead how many tensors each part has.
    EdgeLLMError ``WRITE_DISK`` when the disk is full, now or on the way, ``WRITE_FAILED`` for any other trouble with
    it, ``WRITE_TENSOR`` when chunks do not fit their tensor. Whatever happens, what stood under the name before stands
    there until the new model is whole, and nothing else is left behind.
    """
    target = Path(os.path.realpath(path))
    alignment = _alignment(metadata)
    if part_sizes:
        parts = _parts_of_sizes(tensors, part_sizes)
    else:
        parts = split_tensors(tensors, alignment, max_part_nbytes, max_part_tensors)
    targets = part_paths(target, len(parts))
    count, n_tensors = len(parts), len(tensors)
    headers = [_header(part_metadata(metadata, i, count, n_tensors), part, alignment) for i, part in enumerate(parts)]
    total = sum(len(header) + _padded_nbytes(part, alignment) for header, part in zip(headers, parts, strict=True))
    n_written, n_wanted = 0, sum(tensor.nbytes for tensor in tensors)

    def report(nbytes: int, name: str) -> None:
        nonlocal n_written
        n_written += nbytes
        if progress is not None:
            progress(n_written, n_wanted, name)

    try:
        for one in targets:
            _refuse_what_is_no_file(one)
        check_free_space(target.parent, total)
        with contextlib.ExitStack() as stack:
            for one, header, part in zip(targets, headers, parts, strict=True):  # named from the last to the first
                file = stack.enter_context(whole_file(one, writer=LargePageWriter))
                _write_part(file, header, part, alignment, report)
                file.flush()
                os.fsync(file.fileno())
            check_open_maps()
            if len(targets) > 1:
                targets[0].unlink(missing_ok=True)
    except OSError as error:
        check_open_maps()  # what was to be copied may be gone, and not the disk be full
        raise _disk_error(error, target) from error
    return targets


# -- what goes where -------------------------------------------------------------------------------------------------


def split_tensors(
    tensors: Sequence[TensorPlan], alignment: int, max_nbytes: int | None, max_tensors: int | None
) -> list[Sequence[TensorPlan]]:
    """The tensors of every part, in order; a tensor larger than the limit has a part of its own."""
    for name, limit in (("max_part_nbytes", max_nbytes), ("max_part_tensors", max_tensors)):
        if limit is not None and limit < 1:
            raise ParameterError(f"{name} is {limit}. It must be a whole number from 1.")
    if max_nbytes is None and max_tensors is None:
        return [tensors]
    parts: list[list[TensorPlan]] = [[]]
    nbytes = 0
    for tensor in tensors:
        size = _aligned(tensor.nbytes, alignment)
        too_long = max_nbytes is not None and nbytes + size > max_nbytes
        too_many = max_tensors is not None and len(parts[-1]) >= max_tensors
        if parts[-1] and (too_long or too_many):
            parts.append([])
            nbytes = 0
        parts[-1].append(tensor)
        nbytes += size
    if len(parts) > MAX_PARTS:
        raise ParameterError(f"The limits make {len(parts):,} parts, expected up to {MAX_PARTS:,}. Give larger ones.")
    return list(parts)


def _parts_of_sizes(tensors: Sequence[TensorPlan], sizes: Sequence[int]) -> list[Sequence[TensorPlan]]:
    assert sum(sizes) == len(tensors), f"parts of {list(sizes)} tensors, and there are {len(tensors)}"
    ends = np.cumsum(sizes).tolist()
    return [tensors[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def part_paths(target: Path, count: int) -> list[Path]:
    """The file of every part; ``target`` itself when there is one."""
    if count == 1:
        return [target]
    name = target.name.removesuffix(".gguf")
    return [target.with_name(part_name(name, no, count)) for no in range(1, count + 1)]


def part_metadata(metadata: TypedMetadata, no: int, count: int, n_tensors: int) -> TypedMetadata:
    """The keys of part ``no``: all in the first, those of the split in each; none of an earlier split."""
    kept = {key: typed for key, typed in metadata.items() if not key.startswith("split.")} if no == 0 else {}
    if count == 1:
        return kept
    if no and "general.alignment" in metadata:
        kept["general.alignment"] = metadata["general.alignment"]
    kept["split.no"] = (no, "UINT16")
    kept["split.count"] = (count, "UINT16")
    kept["split.tensors.count"] = (n_tensors, "INT32")
    return kept


def file_nbytes(metadata: TypedMetadata, tensors: Sequence[TensorPlan]) -> int:
    """Bytes of the file that ``write_gguf`` would write in one part."""
    alignment = _alignment(metadata)
    header = _header(part_metadata(metadata, 0, 1, len(tensors)), tensors, alignment)
    return len(header) + _padded_nbytes(tensors, alignment)


# -- bytes -----------------------------------------------------------------------------------------------------------


def _header(metadata: TypedMetadata, tensors: Sequence[TensorPlan], alignment: int) -> bytes:
    """Everything before the first tensor, padded to the alignment."""
    out = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, (value, kind) in metadata.items():
        out += [_name(key, "metadata key"), _typed_value(key, value, kind)]
    offset = 0
    names = set()
    for tensor in tensors:
        if not 1 <= len(tensor.shape) <= MAX_DIMS or not all(n >= 1 for n in tensor.shape):
            raise ParameterError(
                f"{tensor.name}: the shape is {tensor.shape}. It must have 1 to {MAX_DIMS} dimensions of 1 and more."
            )
        if tensor.name in names:
            raise ParameterError(f"{tensor.name}: there are two tensors of this name. Each needs a name of its own.")
        names.add(tensor.name)
        dims = tensor.shape[::-1]
        record = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.quant.id, offset)
        out += [_name(tensor.name, "tensor name"), record]
        offset += _aligned(tensor.nbytes, alignment)
    header = b"".join(out)
    return header.ljust(_aligned(len(header), alignment), b"\0")


def _name(name: str, what: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    if not 1 <= len(raw) <= MAX_NAME_NBYTES:
        raise ParameterError(f"A {what} has {len(raw):,} bytes. It must have 1 to {MAX_NAME_NBYTES:,}.")
    return struct.pack("<Q", len(raw)) + raw


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")  # as the reader keeps bytes that are no UTF-8
    return struct.pack("<Q", len(raw)) + raw


def _typed_value(key: str, value: Any, kind: str) -> bytes:
    """The type id of a value and its bytes."""
    element = kind[6:-1] if kind.startswith("ARRAY[") else kind
    if element not in _TYPE_IDS or element == "ARRAY":
        raise ParameterError(f"{key}: {kind!r} is no GGUF value type. It must be one of {', '.join(_TYPE_IDS)}.")
    type_id, form = _TYPE_IDS[element]
    try:
        if kind.startswith("ARRAY["):
            head = struct.pack("<IIQ", _TYPE_IDS["ARRAY"][0], type_id, len(value))
            if element == "STRING":
                return head + b"".join(_string(text) for text in value)
            return head + _numbers(value, form)
        if element == "STRING":
            return struct.pack("<I", type_id) + _string(value)
        return struct.pack("<I", type_id) + _numbers([value], form)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ParameterError(f"{key}: the value does not fit its type {kind}: {error}.") from error


def _numbers(values: Any, form: str) -> bytes:
    """Numbers as little-endian bytes; a value that the type cannot hold is an error, not another value."""
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "biuf"):
        raise TypeError("numbers were expected")
    wanted = np.dtype(form)
    if wanted.kind in "iu" and len(array):
        if array.dtype.kind == "f":
            raise TypeError("a whole number was expected")
        low, high = (np.iinfo(wanted).min, np.iinfo(wanted).max)
        if not low <= int(array.min()) <= int(array.max()) <= high:
            raise OverflowError(f"whole numbers from {low} to {high} were expected")
    with np.errstate(over="ignore"):
        return array.astype(wanted).tobytes()


def _alignment(metadata: TypedMetadata) -> int:
    value = metadata.get("general.alignment", (ALIGNMENT, ""))[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise ParameterError(f"general.alignment is {value!r}. It must be a power of two up to {MAX_ALIGNMENT:,}.")
    return value


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


def _padded_nbytes(tensors: Iterable[TensorPlan], alignment: int) -> int:
    return sum(_aligned(tensor.nbytes, alignment) for tensor in tensors)


def _write_part(
    file: LargePageWriter,
    header: bytes,
    tensors: Sequence[TensorPlan],
    alignment: int,
    report: Callable[[int, str], None],
) -> None:
    file.write(header)
    for tensor in tensors:
        remaining = tensor.nbytes
        for chunk in tensor.chunks():
            piece = memoryview(chunk).cast("B")
            remaining -= len(piece)
            if remaining < 0:
                break
            file.write(piece)
            report(len(piece), tensor.name)
        if remaining:
            found = "more" if remaining < 0 else f"{tensor.nbytes - remaining:,}"
            raise EdgeLLMError(
                f"{tensor.name}: {found} bytes came, and {tensor.quant.name} of shape {tensor.shape} has "
                f"{tensor.nbytes:,}. Nothing was written; the source may have changed on the way: try again.",
                code="WRITE_TENSOR",
            )
        file.write(bytes(_aligned(tensor.nbytes, alignment) - tensor.nbytes))


# -- files -----------------------------------------------------------------------------------------------------------


def check_free_space(folder: Path, nbytes: int) -> None:
    """EdgeLLMError ``WRITE_DISK`` when ``nbytes`` more do not fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE_NBYTES > free:
        raise EdgeLLMError(
            f"{folder}: the file needs {nbytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free. Make room, or write "
            "to a folder on a larger disk.",
            code="WRITE_DISK",
        )


def _refuse_what_is_no_file(target: Path) -> None:
    """A folder or a device is no place for a model."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(target.stat().st_mode):
            raise EdgeLLMError(
                f"{target}: is a folder or a device, and the name of a file was expected. Give the path of the .gguf "
                "file to write.",
                code="WRITE_FAILED",
            )


def _disk_error(error: OSError, target: Path) -> EdgeLLMError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = (
        "Make room, or write to a folder on a larger disk." if full else "Check the folder, its rights and the disk."
    )
    return EdgeLLMError(
        f"{error.filename or target}: {error.strerror or error}. A file that can be written was expected, and what was "
        f"there before is untouched. {advice}",
        code="WRITE_DISK" if full else "WRITE_FAILED",
    )


def rows_in_chunks(n_rows: int, row_nbytes: int, chunk_nbytes: int = 16 << 20) -> Iterator[tuple[int, int]]:
    """(start, stop) over all rows, ``chunk_nbytes`` of them at once and at least one row."""
    step = max(1, chunk_nbytes // max(1, row_nbytes))
    for start in range(0, n_rows, step):
        yield start, min(n_rows, start + step)
