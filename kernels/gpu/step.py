"""What a batch tells the shaders, in one buffer of words that is written once a step (``shaders/step.wgsl``).

0 tokens | 1 outputs | 2 positions at | 3 sequences at | 4 starts at | 5 output rows at
    6 the last positions that tokens see at | 7 types at
8 + 2 g   block table of group g at, and its width
30 the scales of adapters at | 31 how many a token has
32 + r    cos and sin of rope r at
64 ...    the tokens, then all that the header points to
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.sources import source
from edgellm.kernels.gpu.top_k import CHAIN
from edgellm.kernels.gpu.walk import Dispatch
from edgellm.kernels.ops.step import segments
from edgellm.kernels.program import Batch, Program

HEADER = 64
_TABLES, _ADAPTERS, _ROPES = 8, 30, 32


class StepBuffer:
    """The buffer and how it is filled. ``buffer`` is replaced by a larger one when a batch does not fit."""

    def __init__(self, device: Device, program: Program, max_tokens: int) -> None:
        if len(program.groups) > (_ADAPTERS - _TABLES) // 2 or len(program.ropes) > HEADER - _ROPES:
            raise UnsupportedError(
                f"{program.architecture}: {len(program.groups)} kinds of cache and {len(program.ropes)} rotations; the "
                f"gpu device takes {(_ADAPTERS - _TABLES) // 2} and {HEADER - _ROPES}.",
                code="MODEL_SHAPE",
            )
        self._device, self._ropes = device, tuple(program.ropes.values())
        self._states = [i for i, group in enumerate(program.groups) if group.kind == "state"]
        self.buffer: Any = device.buffer(self.held_nbytes(program, max_tokens))

    @staticmethod
    def held_nbytes(program: Program, max_tokens: int) -> int:
        """Bytes on the device, of block tables that are not long."""
        per_token = 8 + program.n_adapters + sum(rope.n_dims for rope in program.ropes.values())
        return 4 * (HEADER + per_token * max_tokens + 4096)

    def begin(self, batch: Batch, output_rows: Sequence[int], n_steps: int = 1) -> bool:
        """Send a batch; whether the buffer is another one than before.

        n_steps   that the device takes by itself (shaders/advance.wgsl); the angles of each lie one after the other
        """
        parts: list[np.ndarray] = [np.zeros(HEADER, np.uint32)]
        header, at = parts[0], HEADER

        def place(values: np.ndarray) -> int:
            nonlocal at
            parts.append(np.ascontiguousarray(values).reshape(-1).view(np.uint32))
            at += len(parts[-1])
            return at - len(parts[-1])

        header[:2] = len(batch), len(output_rows)
        place(batch.tokens.astype(np.int32))
        header[2] = place(batch.positions.astype(np.int32))
        header[3] = place(batch.sequences.astype(np.int32))
        starts = np.array([[s.start] for s in segments(batch) for _ in range(s.start, s.stop)], np.uint32)
        ends = np.array([[s.stop] for s in segments(batch) for _ in range(s.start, s.stop)], np.uint32)
        header[4], _, header[5] = place(starts), place(ends), place(np.array(output_rows, np.uint32))
        header[7] = place(np.zeros(len(batch), np.int32) if batch.types is None else batch.types.astype(np.int32))
        header[6] = header[2] if batch.sees is None else place(batch.sees.astype(np.int32))
        for i, table in enumerate(batch.tables):
            header[_TABLES + 2 * i : _TABLES + 2 * i + 2] = place(table.astype(np.int32)), table.shape[1]
        if batch.adapters is not None:
            scales = batch.adapters.astype(np.float32)
            header[_ADAPTERS : _ADAPTERS + 2] = place(scales), scales.shape[1]
        turning = batch.positions if batch.rope_positions is None else batch.rope_positions
        for i, rope in enumerate(self._ropes):
            angles = [np.concatenate(rope.table(turning + np.int32(step)), axis=1) for step in range(n_steps)]
            header[_ROPES + i] = place(np.concatenate(angles))
        return self._send(np.concatenate(parts))

    def advance(self, n: int, n_vocab: int, found: Any, at: int, row: int, chains: Any) -> Dispatch:
        """What makes the batch of n sequences that of the next step, drawn of rows of ``found`` by their ``chains``."""
        angles = "\n    ".join(f"b[{_ROPES + i}u] += p.n * {rope.n_dims}u;" for i, rope in enumerate(self._ropes))
        states = "\n    ".join(
            f"let slots{i} = b[{_TABLES + 2 * i}u] + b[b[3] + t] * 2u;\n    b[slots{i}] = b[slots{i} + 1u];"
            for i in self._states
        )
        return self._device.dispatch(
            source("advance", ANGLES=angles, STATES=states, **CHAIN), [self.buffer, found, chains], "www", (1, 1, 1),
            n, n_vocab, at, row,
        )  # fmt: skip

    def outputs(self, output_rows: Sequence[int]) -> None:
        """Other rows of the same batch, as many as before or fewer."""
        words = np.array([len(output_rows)], np.uint32)
        self._device.write(self.buffer, 4, words)
        self._device.write(self.buffer, 4 * self._rows_at, np.array(output_rows, np.uint32))

    def _send(self, words: np.ndarray) -> bool:
        self._rows_at, grown = int(words[5]), words.nbytes > self.buffer.size
        if grown:
            self._device.free(self.buffer)
            self.buffer = self._device.buffer(1 << math.ceil(math.log2(words.nbytes)))
        self._device.write(self.buffer, 0, words)
        return grown
