"""The memory of the cache on the device: the same blocks, in the same layout, as the host's (``kernels/kv.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.kernels.gpu.device import Device
from edgellm.kernels.kv import CacheLayer, CachePool, groups_of


class DeviceArray:
    """An array on the device, as far as a cache needs it: its shape, and its blocks in and out.

    A block has a whole number of words: 32 positions, or numbers of four bytes.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.block_nbytes = self.nbytes // max(1, shape[0])
        self.buffer: Any = device.buffer(self.nbytes + 4)  # a value at an odd place is read with the next
        self._device = device

    def read(self, block: int) -> np.ndarray:
        """Bytes of one block."""
        return self._device.read(self.buffer, self.block_nbytes, block * self.block_nbytes)

    def write(self, block: int, data: np.ndarray) -> None:
        """Put bytes into a block."""
        self._device.write(self.buffer, block * self.block_nbytes, data)

    def all(self) -> np.ndarray:
        """The whole of it on the host."""
        return self._device.read(self.buffer, self.nbytes).view(self.dtype).reshape(self.shape)

    def fill(self, values: np.ndarray) -> None:
        """The whole of it from the host."""
        self._device.write(self.buffer, 0, np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8))


class GPUPool(CachePool):
    """A ``CachePool`` whose arrays are on a device. Blocks move between it and the host's pools byte for byte."""

    arrays: list[list[DeviceArray]]  # type: ignore[assignment]

    def __init__(self, device: Device, layers: Sequence[CacheLayer], n_blocks: Sequence[int] | int) -> None:
        self.layers = tuple(layers)
        self.groups = groups_of(layers)
        self.n_blocks = (n_blocks,) * len(self.groups) if isinstance(n_blocks, int) else tuple(n_blocks)
        self.dtype = np.dtype(np.float16)
        self._device = device
        self.arrays = []
        for layer in layers:
            n = self.n_blocks[self.groups.index(layer.group)]
            self.arrays.append([DeviceArray(device, (n, *shape), kept) for shape, kept in layer.arrays(self.dtype)])

    def _of(self, group: int) -> list[DeviceArray]:
        owners = zip(self.layers, self.arrays, strict=True)
        return [array for layer, arrays in owners if layer.group == self.groups[group] for array in arrays]

    def block_nbytes(self, group: int) -> int:
        """Bytes of one block, or slot, of all layers of a group."""
        return sum(array.block_nbytes for array in self._of(group))

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy one block of every layer of a group (copy on write)."""
        sizes = [(array.buffer, array.block_nbytes) for array in self._of(group)]
        self._device.copy([(buffer, source * n, target * n, n) for buffer, n in sizes])

    def read_block(self, group: int, block: int) -> bytes:
        """One block of every layer of a group, layer after layer."""
        return b"".join(array.read(block).tobytes() for array in self._of(group))

    def write_block(self, group: int, block: int, data: bytes | memoryview) -> None:
        """What ``read_block`` gave, into another block."""
        start = 0
        for array in self._of(group):
            array.write(block, np.frombuffer(data[start : start + array.block_nbytes], np.uint8))
            start += array.block_nbytes
