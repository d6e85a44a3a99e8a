"""Two GGUF files side by side: metadata, tensors, types, and the error of each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.formats.gguf import GGUFFile, QuantizedTensor
from edgellm.formats.gguf_writer import rows_in_chunks

SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class TensorDifference:
    """Of one tensor: its types in A and B, bytes, and how far B's values stand from A's.

    nmse   sum of (b - a)^2 / sum of a^2, 0 for equal tensors;  worst   the largest |b - a|
    """

    name: str
    quants: tuple[str, str]
    nbytes: tuple[int, int]
    n: int
    nmse: float
    worst: float


def metadata_changes(a: GGUFFile, b: GGUFFile) -> list[tuple[str, str, str]]:
    """(key, value in A, value in B) where they differ; "-" where a file has no such key."""
    rows = []
    for key in dict.fromkeys([*a.metadata, *b.metadata]):
        if not _equal(a.metadata.get(key), b.metadata.get(key)):
            rows.append((key, _shown(a.metadata.get(key)), _shown(b.metadata.get(key))))
    return rows


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)


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


def tensor_errors(a: GGUFFile, b: GGUFFile) -> Iterator[TensorDifference]:
    """One for each tensor that both have in the same shape, some rows decoded at a time."""
    for name, tensor in a.tensors.items():
        other = b.tensors.get(name)
        if other is not None and other.shape == tensor.shape:
            yield tensor_error(tensor, other)


def tensor_error(a: QuantizedTensor, b: QuantizedTensor) -> TensorDifference:
    """How far b's values stand from a's."""
    noise = signal = worst = 0.0
    if a.quant is not b.quant or not np.array_equal(a.data, b.data):
        for start, stop in rows_in_chunks(len(a.data), 4 * a.shape[-1]):
            ours, theirs = a.dequantize(slice(start, stop)), b.dequantize(slice(start, stop))
            difference = theirs - ours
            noise += float(np.square(difference, dtype=np.float64).sum())
            signal += float(np.square(ours, dtype=np.float64).sum())
            worst = max(worst, float(np.abs(difference).max(initial=0)))
    nmse = noise / signal if signal else (math.inf if noise else 0.0)
    return TensorDifference(a.name, (a.quant.name, b.quant.name), (a.nbytes, b.nbytes), math.prod(a.shape), nmse, worst)
