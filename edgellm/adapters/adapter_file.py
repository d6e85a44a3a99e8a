"""Open the file of an adapter: a GGUF file whose every key and tensor is known, with finite numbers only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.findings import short
from edgellm.formats.gguf import GGUFFile, QuantizedTensor

CHUNK_NBYTES = 16 << 20
WRITTEN_BY_ALL = ("general.", "split.")
"""Keys that say something of any file, and nothing of what it computes."""


def wrong(path: Path, found: str, expected: str, advice: str = "Take the adapter's file.") -> FormatError:
    """The error of a file that is no sound adapter."""
    return FormatError(f"{path.name}: {found}, expected {expected}. {advice}", code="ADAPTER_FILE")


def refused(path: Path, what: str, advice: str) -> UnsupportedError:
    """The error of an adapter that asks for what edgellm does not have."""
    return UnsupportedError(f"{path.name}: {what}. {advice}", code="ADAPTER_UNSUPPORTED")


def checked_keys(gguf: GGUFFile, known: Collection[str]) -> None:
    """UnsupportedError for a key whose meaning is not known: the answers may depend on it."""
    for key in gguf.metadata:
        if key not in known and not key.startswith(WRITTEN_BY_ALL):
            advice = "Convert the adapter again, with `edgellm convert`."
            raise refused(gguf.path, f"has the key {short(key)}, which edgellm does not know in such a file", advice)


def value_of(gguf: GGUFFile, key: str, kind: type, default: Any, is_sound: Callable[[Any], bool], expected: str) -> Any:
    """The value of a key, of its kind and in its range."""
    value = gguf.get(key, kind, default)
    if not is_sound(value):
        raise wrong(gguf.path, f"{key} is {short(value)}", expected)
    return value


def finite(tensor: QuantizedTensor, path: Path) -> QuantizedTensor:
    """The tensor, all of whose numbers are finite."""
    data = tensor.data.reshape(-1)
    step = max(1, CHUNK_NBYTES // tensor.quant.block_nbytes) * tensor.quant.block_nbytes
    for start in range(0, len(data), step):
        if not np.asarray(tensor.quant.finite(data[start : start + step])).all():
            raise FormatError(
                f"{path.name}: {short(tensor.name)} holds NaN or infinity, expected numbers. Take the adapter anew.",
                code="TENSOR_NAN",
            )
    return tensor


def digest_of(gguf: GGUFFile, *more: Any) -> str:
    """A hash of all tensors of a file, and of what else counts."""
    total = hashlib.sha256(repr(more).encode())
    for name, tensor in gguf.tensors.items():
        total.update(f"{name} {tensor.quant.name} {tensor.shape}\n".encode())
        data = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)
        for start in range(0, len(data), CHUNK_NBYTES):
            total.update(data[start : start + CHUNK_NBYTES].data)
    return total.hexdigest()[:32]
