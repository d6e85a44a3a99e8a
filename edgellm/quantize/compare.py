"""Two GGUF files side by side: metadata, tensors, types, and the error of each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgellm.formats.gguf import GGUFFile, QuantizedTensor
from edgellm.formats.gguf_writer import rows_in_chunks
from edgellm.formats.split_files import same_value
from edgellm.quantize.deviation import Deviation

SHOWN = 60  # characters of a value


def metadata_changes(a: GGUFFile, b: GGUFFile) -> list[tuple[str, str, str]]:
    """(key, value in A, value in B) where they differ; "-" where a file has no such key."""
    rows = []
    for key in dict.fromkeys([*a.metadata, *b.metadata]):
        if not same_value(a.metadata.get(key), b.metadata.get(key)):
            rows.append((key, _shown(a.metadata.get(key)), _shown(b.metadata.get(key))))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | np.ndarray):
        return f"{len(value)} values"
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def tensor_differences(a: GGUFFile, b: GGUFFile) -> list[tuple[str, str]]:
    """(name, what is wrong) of tensors that only one file has, or in another shape."""
    found = []
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        if name not in b.tensors or name not in a.tensors:
            found.append((name, f"only in {'A' if name in a.tensors else 'B'}"))
        elif a.tensors[name].shape != b.tensors[name].shape:
            found.append((name, f"{a.tensors[name].shape} in A, {b.tensors[name].shape} in B"))
    return found


def tensor_errors(a: GGUFFile, b: GGUFFile) -> Iterator[tuple[QuantizedTensor, QuantizedTensor, Deviation]]:
    """How far B's values stand from A's, for each tensor that both have in the same shape."""
    for name, tensor in a.tensors.items():
        other = b.tensors.get(name)
        if other is not None and other.shape == tensor.shape:
            yield tensor, other, tensor_error(tensor, other)


def tensor_error(a: QuantizedTensor, b: QuantizedTensor) -> Deviation:
    """How far b's values stand from a's, some rows decoded at a time; nothing for equal bytes."""
    found = Deviation()
    if a.quant is not b.quant or not np.array_equal(a.data, b.data):
        for start, stop in rows_in_chunks(len(a.data), 4 * a.shape[-1]):
            found.add(a.dequantize(slice(start, stop)), b.dequantize(slice(start, stop)))
    return found
