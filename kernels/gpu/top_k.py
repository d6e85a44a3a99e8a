"""The largest logits of a vocabulary, found on the device: a few numbers come back in place of all.

Where more logits than there is room for share the upper bits of the k-th, as in a flat distribution, the answer says so
and whoever asks reads all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.sources import source, text
from edgellm.kernels.gpu.walk import Recording

MAX_K = 128
ROOM, SLICE, N_COUNTS = 1024, 2048, 4096  # candidates; logits of a workgroup; values of the upper 12 bits


class Found(NamedTuple):
    """Of one row of logits: positions and values by falling value, ties by rising position.

    sum   of exp(logit - the largest) over all
    """

    positions: np.ndarray
    values: np.ndarray
    sum: float


class TopK:
    """The shaders that find the largest of the first row of ``logits``, and where they leave them."""

    def __init__(self, device: Device, logits: Place, n_vocab: int) -> None:
        self._device, self._logits, self._n = device, logits, n_vocab
        self._slices = -(-n_vocab // SLICE)
        self._state = device.buffer(4 * (4 + self._slices + N_COUNTS))
        self._candidates = device.buffer(8 * ROOM)
        self.found = device.buffer(16 + 8 * MAX_K)
        self._recordings: dict[int, Recording] = {}

    def recording(self, k: int) -> Recording:
        """What finds the k largest."""
        if k not in self._recordings:
            numbers: dict[str, str | int] = {"KEYS": text("keys"), "SLICE": SLICE, "ROOM": ROOM}
            x, over_all = self._logits.buffer, (self._slices, 1, 1)
            count = source("top_k_count", **numbers), [x, self._state], "rw", over_all, self._n, self._slices
            threshold = source("top_k_threshold"), [self._state], "w", (1, 1, 1), k, self._slices
            gather = source("top_k_gather", **numbers), [x, self._state, self._candidates], "rww", over_all, self._n
            sort = source("top_k_sort", **numbers), [self._state, self._candidates, self.found], "wrw", (1, 1, 1), k
            rows = [
                self._device.dispatch(*count, self._logits.at),
                self._device.dispatch(*threshold),
                self._device.dispatch(*gather, self._slices, self._logits.at),
                self._device.dispatch(*sort, self._slices),
            ]
            self._recordings[k] = self._device.recording(rows)
        return self._recordings[k]

    @staticmethod
    def nbytes(k: int) -> int:
        """Bytes to read of ``found``."""
        return 16 + 8 * k

    @staticmethod
    def read(data: np.ndarray) -> Found | bool | None:
        """What stands in these bytes; False where a logit is not finite, None where there was no room."""
        words = data.view(np.uint32)
        if words[0]:
            return False
        if words[1] > ROOM:
            return None
        values = words.view(np.float32)
        return Found(words[4::2].astype(np.int64), values[5::2].copy(), float(values[2]))
