"""GGUF bytes by hand, so that a test can write what no writer would: wrong counts, lengths, offsets and types."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

Value = int | float | str | bytes | Sequence[int] | Sequence[float] | Sequence[str | bytes]


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string record; ``length`` is what it claims to be."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: int | float | str | bytes) -> bytes:
    """The bytes of one value."""
    if kind == STRING:
        assert isinstance(value, str | bytes)
        return string(value)
    return struct.pack("<" + _FORMS[kind], value)


def kv(key: str | bytes, kind: int, value: int | float | str | bytes) -> bytes:
    """A metadata record of one value."""
    return string(key) + struct.pack("<I", kind) + scalar(kind, value)


def kv_array(key: str | bytes, kind: int, values: Sequence, count: int | None = None) -> bytes:
    """A metadata record of an array; ``count`` is what it claims to hold."""
    body = b"".join(scalar(kind, value) for value in values)
    return string(key) + struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count) + body


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    """A tensor record; dims innermost first."""
    body = b"".join(struct.pack("<Q", n % (1 << 64)) for n in dims)
    start = string(name) + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return start + body + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    kvs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
    alignment: int = 32,
) -> bytes:
    """A whole file."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kv is None else n_kv)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(kvs) + b"".join(tensors)
    return header + bytes(-len(header) % alignment if tensors else 0) + data
