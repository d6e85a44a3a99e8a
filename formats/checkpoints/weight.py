"""A weight of a checkpoint as rows of float32, however it is packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.safetensors import StoredTensor

Rows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    shape     outermost dimension first
    decode    (start, stop) -> float32 (stop - start, n_in); a vector is one row
    stored    the tensor itself where it lies in the file as plain floats, None where it is packed
    """

    shape: tuple[int, ...]
    decode: Rows
    stored: StoredTensor | None = None


def plain(tensor: StoredTensor) -> Weight:
    """A tensor that holds its numbers one by one."""
    if len(tensor.shape) > 1:
        rows = replace(tensor, shape=(-1, tensor.shape[-1]))
        return Weight(tensor.shape, lambda start, stop: rows.float32(slice(start, stop)), tensor)
    shape = tensor.shape or (1,)
    return Weight(shape, lambda start, stop: tensor.float32().reshape(1, -1)[start:stop], tensor)


def pair(value: object) -> tuple[int, int] | None:
    """Two whole numbers from 1, None for anything else."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n >= 1 for n in value):
        return None
    return value[0], value[1]


class Parts:
    """The tensors that one packed weight is made of: ``base`` + "." + suffix. Remembers which were used."""

    def __init__(self, tensors: dict[str, StoredTensor], scheme: str) -> None:
        self.tensors = tensors
        self.scheme = scheme
        self.used: set[str] = set()

    def bases(self, suffix: str) -> list[str]:
        """What stands before ``suffix`` in the names that end so."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def find(self, name: str, *kinds: str) -> StoredTensor | None:
        """A tensor that may be there, of one of these types."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if kinds and tensor.kind.name not in kinds:
            self.fail(name, f"is {tensor.kind.name}, expected {' or '.join(kinds)}")
        self.used.add(name)
        return tensor

    def need(self, name: str, *kinds: str) -> StoredTensor:
        """A tensor that must be there."""
        tensor = self.find(name, *kinds)
        if tensor is None:
            self.fail(name, "is missing", "CHECKPOINT_TENSOR")
        return tensor

    def matrix(self, name: str, *kinds: str, rows: int | None = None, columns: int | None = None) -> np.ndarray:
        """The numbers of a tensor of two dimensions, of this many rows and columns where they are known."""
        tensor = self.need(name, *kinds)
        wanted = (rows, columns)
        if len(tensor.shape) != 2 or any(w not in (None, n) for w, n in zip(wanted, tensor.shape, strict=True)):
            shown = " x ".join("any" if w is None else str(w) for w in wanted)
            self.fail(name, f"has the shape {tensor.shape}, expected {shown}", "MODEL_SHAPE")
        return tensor.values

    def flat(self, name: str, n: int, *kinds: str) -> np.ndarray:
        """The n numbers of a tensor of any shape, float32 (n,)."""
        numbers = self.need(name, *kinds).float32().reshape(-1)
        if len(numbers) != n:
            self.fail(name, f"has {len(numbers)} numbers, expected {n}", "MODEL_SHAPE")
        return numbers

    def groups(self, indices: StoredTensor | None, scales: str, size: object, n_in: int, n_groups: int) -> np.ndarray:
        """(n_in,) the group of every input: as ``indices`` say, else ``size`` inputs one after another."""
        if indices is None:
            if type(size) is not int or size < 1 or -(-n_in // size) != n_groups:
                message = f"has {n_groups} groups for {n_in} inputs, group_size is {size}"
                self.fail(scales, message, "MODEL_SHAPE")
            return np.arange(n_in) // size
        found = indices.values.reshape(-1).astype(np.int64)
        if len(found) != n_in or found.min() < 0 or found.max() >= n_groups:
            self.fail(indices.name, f"names groups outside 0 to {n_groups - 1}")
        return found

    def fail(self, name: str, message: str, code: str = "CHECKPOINT_SCHEME") -> NoReturn:
        """FormatError that names the tensor and the scheme."""
        raise FormatError(f"{short(name)} ({self.scheme}): {message}. {PULL_AGAIN}", code=code)

    def refuse(self, name: str, message: str) -> NoReturn:
        """UnsupportedError for what is sound, and not decoded."""
        raise UnsupportedError(
            f"{short(name)} ({self.scheme}): {message}. Take the checkpoint that is not quantized, or another one.",
            code="CHECKPOINT_SCHEME",
        )
