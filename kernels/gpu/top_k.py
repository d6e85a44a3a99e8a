"""The largest logits of a vocabulary, found on the device: a few numbers come back in place of all.

Where more logits than there is room for share the upper bits of the k-th, as in a flat distribution, the answer says so
and whoever asks reads all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgellm.kernels.cpu.lib import draw_layout
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.sources import source, text
from edgellm.kernels.gpu.walk import Recording

MAX_K = 128
AHEAD = 4  # steps whose answers are read together
MAX_LINKS = 8  # of a chain that the device draws by, of these
CHAIN_WORDS = 3 + AHEAD + 3 * MAX_LINKS
CHAIN = {"MAX_K": MAX_K, "AHEAD": AHEAD, "WORDS": CHAIN_WORDS, "TOP_K": draw_layout.TOP_K, "TOP_P": draw_layout.TOP_P,
         "MIN_P": draw_layout.MIN_P}  # fmt: skip
"""What the shader calls the layout of a chain, and the kinds of its links."""
ROOM, SLICE, N_COUNTS = 1024, 2048, 4096  # candidates; logits of a workgroup; values of the upper 12 bits


class Found(NamedTuple):
    """Of one row of logits: positions and values by falling value, ties by rising position.

    sum     of exp(logit - the largest) over all
    taken   the token that the device went on with, where it did
    """

    positions: np.ndarray
    values: np.ndarray
    sum: float
    taken: int


class TopK:
    """The shaders that find the largest of the first rows of ``logits``, and where they leave them.

    rows   of logits, at most: as many as are asked for, or as small bindings take; answers for as many are kept of
           ``AHEAD`` steps
    """

    def __init__(self, device: Device, logits: Place, n_vocab: int, rows: int = 1) -> None:
        self._device, self._logits, self._n = device, logits, n_vocab
        self._slices, state_nbytes = -(-n_vocab // SLICE), _state_nbytes(n_vocab)
        self.rows = rows = max(1, min(rows, device.max_binding // state_nbytes))
        self._state = device.buffer(rows * state_nbytes)
        self._candidates = device.buffer(8 * rows * ROOM)
        self.found = device.buffer(AHEAD * rows * TopK.nbytes(MAX_K))
        self._recordings: dict[tuple[int, int, int], Recording] = {}

    def recording(self, k: int, n_rows: int = 1, step: int = 0) -> Recording:
        """What finds the k largest of so many rows, as the answers of a step."""
        key = k, n_rows, step
        if key not in self._recordings:
            numbers: dict[str, str | int] = {"KEYS": text("keys"), "SLICE": SLICE, "ROOM": ROOM}
            x, place, over_all, slices = self._logits.buffer, self._logits, (self._slices, n_rows, 1), self._slices
            count = source("top_k_count", **numbers), [x, self._state], "rw", over_all, self._n, slices
            threshold = source("top_k_threshold"), [self._state], "w", (1, n_rows, 1), k, slices
            gather = source("top_k_gather", **numbers), [x, self._state, self._candidates], "rww", over_all, self._n
            sort = source("top_k_sort", **numbers), [self._state, self._candidates, self.found], "wrw", (1, n_rows, 1)
            rows = [
                self._device.dispatch(*count, place.at, place.row),
                self._device.dispatch(*threshold),
                self._device.dispatch(*gather, slices, place.at, place.row),
                self._device.dispatch(*sort, k, slices, step * n_rows * TopK.nbytes(k) // 4),
            ]
            self._recordings[key] = self._device.recording(rows)
        return self._recordings[key]

    @staticmethod
    def held_nbytes(n_vocab: int, rows: int) -> int:
        """Bytes on the device."""
        return rows * (_state_nbytes(n_vocab) + 8 * ROOM + AHEAD * TopK.nbytes(MAX_K))

    @staticmethod
    def nbytes(k: int) -> int:
        """Bytes of the answer for one row."""
        return 16 + 8 * k

    def read(
        self, k: int, n_rows: int, n_steps: int, recordings: Sequence[Recording]
    ) -> list[list[Found | bool | None]]:
        """Play recordings, then the answers for each step and row; see ``parse``."""
        data = self._device.play(recordings, (self.found, 0, n_steps * n_rows * TopK.nbytes(k)))
        return [[TopK.parse(row) for row in step] for step in data.reshape(n_steps, n_rows, -1)]

    @staticmethod
    def parse(data: np.ndarray) -> Found | bool | None:
        """What stands in these bytes; False where a logit is not finite, None where there was no room."""
        words = data.view(np.uint32)
        if words[0]:
            return False
        if words[1] > ROOM:
            return None
        values = words.view(np.float32)
        return Found(words[4::2].astype(np.int64), values[5::2].copy(), float(values[2]), int(words[3]))


def _state_nbytes(n_vocab: int) -> int:
    """Of what the shaders tell each other about a row."""
    return 4 * (4 + -(-n_vocab // SLICE) + N_COUNTS)
