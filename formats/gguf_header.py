"""Parse the header of one GGUF file: counts, metadata, tensor records. Every length is proved before it is used.

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv      x  key string | type u32 | value
    n_tensors x  name string | n_dims u32 | dims u64 x n_dims, innermost first | type u32 | offset u64
    padding to general.alignment | tensor data, offsets counted from here

A string is a u64 length and its bytes; an array is an element type u32, a u64 count and the elements. All numbers are
little endian. A length that the whole file could not hold is a lie and has an error of its own; one that only the
rest of the file cannot hold is a missing tail.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from edgellm.formats.findings import PULL_AGAIN, REBUILD, Finding, Report, raise_finding, short

MIN_KV_NBYTES = 8 + 1 + 4 + 1  # length of the key, one letter, type, one byte
MIN_TENSOR_NBYTES = 8 + 1 + 4 + 8 + 4 + 8
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
MAX_NAME_NBYTES = 65535
MAX_KEYS = 1 << 16  # real files have up to 100
MAX_TENSORS = 1 << 15  # real files have up to 2,000
MAX_STRINGS = 1 << 21  # in all arrays of a file together; real files have up to 700,000

TypedMetadata = dict[str, tuple[Any, str]]
"""key -> (value, type), the type as ``GGUFFile.value_types`` names it: "UINT32", "STRING", "ARRAY[FLOAT32]" ..."""

# type id of a metadata value: its name, and its form to struct and numpy
VALUE_TYPES: dict[int, tuple[str, str]] = {
    0: ("UINT8", "<B"),
    1: ("INT8", "<b"),
    2: ("UINT16", "<H"),
    3: ("INT16", "<h"),
    4: ("UINT32", "<I"),
    5: ("INT32", "<i"),
    6: ("FLOAT32", "<f"),
    7: ("BOOL", "<B"),
    8: ("STRING", ""),
    9: ("ARRAY", ""),
    10: ("UINT64", "<Q"),
    11: ("INT64", "<q"),
    12: ("FLOAT64", "<d"),
}
_SCALARS = {i: struct.Struct(form) for i, (_, form) in VALUE_TYPES.items() if form}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_RECORDS = [struct.Struct(f"<{n}QIQ") for n in range(MAX_DIMS + 1)]  # dims, type, offset

# what people save as .gguf by mistake: first bytes (lower case), what it is
NOT_GGUF = (
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML page"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
    (b"pk\x03\x04", "a zip archive (a wheel or a PyTorch checkpoint)"),
    (b"{", "a JSON text"),
    (b"invalid username", "an error message of a server"),
    (b"entry not found", "an error message of a server"),
    (b"lmgg", "a GGML file from before GGUF"),
    (b"fmgg", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"),
    (b"algg", "a GGML adapter from before GGUF"),
)


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as the header declares it, nothing of it proved yet. ``dims`` are innermost first."""

    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int
    position: int  # byte of the record in the file


@dataclass
class Header:
    """The parsed header of one file.

    metadata   scalars as Python values, numeric arrays as read-only numpy arrays, string arrays as list[str]
    types      key -> "UINT32", "STRING", "ARRAY[FLOAT32]" ...
    positions  key -> byte of its record in the file
    """

    file: str
    nbytes: int
    version: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    alignment: int = 32
    data_start: int = 0

    def finding(self, code: str, message: str, key: str, advice: str = REBUILD, severity: str = "error") -> Finding:
        """What is wrong with the value of a key."""
        return Finding(code, message, advice, self.file, self.positions.get(key), key, severity)


def read_header(data: mmap.mmap | bytes, file: str, report: Report = raise_finding) -> Header:
    """Parse the header in ``data``, the bytes of the file called ``file``.

    What makes the rest unreadable is raised; what does not goes to ``report``.
    """
    reader = _Reader(data, file, report)
    header = reader.header
    reader.read_magic_and_version()
    n_tensors = reader.number(_U64)
    n_kv = reader.number(_U64)
    reader.check_count(n_tensors, MAX_TENSORS, MIN_TENSOR_NBYTES, "tensors", position=8)
    reader.check_count(n_kv, MAX_KEYS, MIN_KV_NBYTES, "metadata keys", position=16)
    for _ in range(n_kv):
        reader.read_key_value()
    reader.read_alignment()
    for _ in range(n_tensors):
        reader.read_tensor_record()
    header.data_start = -(-reader.position // header.alignment) * header.alignment
    return header


class _Reader:
    """A cursor over the bytes of a header."""

    def __init__(self, data: mmap.mmap | bytes, file: str, report: Report) -> None:
        self.data = data
        self.nbytes = len(data)
        self.position = 0
        self.n_strings = 0
        self.report = report
        self.header = Header(file, self.nbytes)

    # -- errors ------------------------------------------------------------------------------------------------------

    def finding(
        self, code: str, message: str, position: int, name: str | None = None, advice: str = REBUILD
    ) -> Finding:
        return Finding(code, message, advice, file=self.header.file, offset=position, name=name)

    def fail(self, code: str, message: str, position: int, name: str | None = None, advice: str = REBUILD) -> NoReturn:
        raise self.finding(code, message, position, name, advice).error()

    def need(self, n: int, code: str, what: str, name: str | None = None) -> None:
        """Prove that n more bytes exist, before they are read or memory for them is taken."""
        remaining = self.nbytes - self.position
        if n <= remaining:
            return
        if n > self.nbytes:
            message = f"{what} needs {n:,} bytes, and the whole file has {self.nbytes:,}"
            self.fail(code, message, self.position, name, PULL_AGAIN)
        message = f"the file ends inside {what}: at least {n - remaining:,} bytes are missing"
        self.fail("MODEL_TRUNCATED", message, self.position, name, PULL_AGAIN)

    # -- parts of the header -----------------------------------------------------------------------------------------

    def read_magic_and_version(self) -> None:
        start = bytes(self.data[:64])
        if start[:4] != b"GGUF":
            text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
            kind = next((f", it looks like {what}" for prefix, what in NOT_GGUF if text.startswith(prefix)), "")
            if text[:4] == b"fugg":
                kind = ", it looks like a GGUF file with its bytes swapped"
            advice = "Download the .gguf file itself."
            if not kind and start[8:10] == b'{"':
                kind = ", it looks like a safetensors file"
                advice = "Give the folder of the checkpoint that it belongs to, to `edgellm convert`."
            message = f"is not a GGUF file{kind}: the first bytes are {start[:4]!r}, expected b'GGUF'"
            self.fail("GGUF_NOT_A_GGUF", message, 0, advice=advice)
        if self.nbytes < 24:
            self.fail("GGUF_NOT_A_GGUF", f"is {self.nbytes} bytes long, a header has 24", 0, advice=PULL_AGAIN)
        self.position = 4
        version = self.number(_U32)
        if version not in (2, 3):
            message = f"is GGUF version {version}; versions 2 and 3 can be read"
            advice = REBUILD
            if version & 0xFFFF == 0 and version:
                message = "is a big-endian GGUF file; little-endian ones can be read"
                advice = "Take the little-endian file of this model, or convert it with gguf-convert-endian."
            self.fail("GGUF_VERSION", message, 4, advice=advice)
        self.header.version = version

    def check_count(self, count: int, most: int, record_nbytes: int, what: str, position: int) -> None:
        """A count that the file can hold, and that reads in less than a second."""
        remaining = self.nbytes - self.position
        if count * record_nbytes > remaining:
            message = f"declares {count:,} {what}, and the {remaining:,} bytes that follow cannot hold them"
            self.fail("GGUF_COUNT", message, position, advice=PULL_AGAIN)
        if count > most:
            self.fail("GGUF_COUNT", f"declares {count:,} {what}, expected up to {most:,}", position)

    def read_key_value(self) -> None:
        header, position = self.header, self.position
        key = self.name("GGUF_KEY", "a metadata key", header.metadata)
        type_id = self.number(_U32, key)
        value, kind = self.value(type_id, key)
        if key not in header.metadata:
            header.metadata[key] = value
            header.types[key] = kind
            header.positions[key] = position

    def read_alignment(self) -> None:
        """``general.alignment``: a UINT32, a power of two."""
        key, header = "general.alignment", self.header
        if key not in header.metadata:
            return
        value, kind = header.metadata[key], header.types[key]
        if kind != "UINT32" or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            message = f"is {short(value)} ({kind}), expected a UINT32 power of two up to {MAX_ALIGNMENT:,}"
            self.fail("GGUF_ALIGNMENT", message, header.positions[key], key)
        header.alignment = value

    def read_tensor_record(self) -> None:
        position = self.position
        name = self.name("GGUF_TENSOR_NAME", "a tensor name", self.header.tensors)
        n_dims = self.number(_U32, name)
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail("GGUF_DIMS", f"has {n_dims:,} dimensions, expected 1 to {MAX_DIMS}", position, name)
        form = _RECORDS[n_dims]
        self.need(form.size, "MODEL_TRUNCATED", "the header", name)
        *dims, type_id, offset = form.unpack_from(self.data, self.position)
        self.position += form.size
        self.header.tensors.setdefault(name, TensorRecord(name, tuple(dims), type_id, offset, position))

    # -- values ------------------------------------------------------------------------------------------------------

    def number(self, form: struct.Struct, name: str | None = None, what: str = "the header") -> Any:
        self.need(form.size, "MODEL_TRUNCATED", what, name)
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value

    def string(self, what: str, name: str | None = None) -> bytes:
        length = self.number(_U64, name)
        self.need(length, "GGUF_STRING_LENGTH", what, name)
        start = self.position
        self.position = start + length
        return self.data[start : self.position]

    def name(self, code: str, what: str, known: dict[str, Any]) -> str:
        """A key or a tensor name: not empty, UTF-8, not seen before, of a sane length."""
        position = self.position
        raw = self.string(what)
        name = raw.decode("utf-8", "surrogateescape")
        wrong = None
        if not raw:
            wrong = f"{what} is empty"
        elif len(raw) > MAX_NAME_NBYTES:
            wrong = f"{what} is {len(raw):,} bytes long, expected up to {MAX_NAME_NBYTES:,}"
        elif name in known:
            wrong = f"{what} that was there before"
        elif not name.isascii() and any("\udc80" <= c <= "\udcff" for c in name):
            wrong = f"{what} is not UTF-8"
        if wrong:
            self.report(self.finding(code, wrong, position, short(name)))
        return name

    def value(self, type_id: int, key: str) -> tuple[Any, str]:
        """A metadata value and the name of its type."""
        if type_id == _STRING:
            return self.string("a string", key).decode("utf-8", "surrogateescape"), "STRING"
        if type_id == _ARRAY:
            return self.array(key)
        scalar = _SCALARS.get(type_id)
        if scalar is None:
            message = f"has the value type {type_id}, expected 0 to {max(VALUE_TYPES)}"
            self.fail("GGUF_KEY", message, self.position - 4, short(key))
        value = self.number(scalar, key, "the metadata")
        return (value != 0 if type_id == _BOOL else value), VALUE_TYPES[type_id][0]

    def array(self, key: str) -> tuple[Any, str]:
        position = self.position
        type_id = self.number(_U32, key)
        count = self.number(_U64, key)
        if type_id == _ARRAY:
            self.fail("GGUF_NESTED_ARRAY", "is an array of arrays, which GGUF readers refuse", position, short(key))
        if type_id not in VALUE_TYPES:
            message = f"is an array of value type {type_id}, expected 0 to {max(VALUE_TYPES)}"
            self.fail("GGUF_KEY", message, position, short(key))
        kind, form = VALUE_TYPES[type_id]
        what = f"an array of {count:,} {kind}"
        if type_id == _STRING:
            self.need(8 * count, "GGUF_ARRAY_LENGTH", what, key)
            self.n_strings += count
            if self.n_strings > MAX_STRINGS:
                message = f"brings the strings in arrays to {self.n_strings:,}, expected up to {MAX_STRINGS:,}"
                self.fail("GGUF_ARRAY_LENGTH", message, position, key)
            return self.strings(count, key), "ARRAY[STRING]"
        dtype = np.dtype(form)
        self.need(count * dtype.itemsize, "GGUF_ARRAY_LENGTH", what, key)
        start = self.position
        self.position = start + count * dtype.itemsize
        values = np.frombuffer(self.data[start : self.position], dtype)
        if type_id == _BOOL:
            values = values != 0
        return values, f"ARRAY[{kind}]"

    def strings(self, count: int, key: str) -> list[str]:
        """An array of strings. The one hot loop of opening a file: a vocabulary has up to 300,000 of them."""
        data, end, unpack = self.data, self.nbytes, _U64.unpack_from
        position = self.position
        raw: list[bytes] = []
        append = raw.append
        for _ in range(count):
            start = position + 8
            if start > end:
                break
            position = start + unpack(data, position)[0]
            if position > end:
                break
            append(data[start:position])
        if len(raw) < count:  # read the string that does not fit once more, for its error
            self.position = start - 8
            self.string(f"string {len(raw):,} of an array", key)
        self.position = position
        try:
            return list(map(bytes.decode, raw))
        except UnicodeDecodeError:
            return [text.decode("utf-8", "surrogateescape") for text in raw]
