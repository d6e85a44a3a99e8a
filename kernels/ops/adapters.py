"""What adapters add to a program: low-rank branches beside its products, and directions in its residual stream.

The tokens of one batch may each have adapters of their own: ``Batch.adapters`` has the scale of every one for every
token, and a token whose scale is 0 keeps the numbers that it would have without the adapter, to the last bit.

    adapter_down    h = A x                 for all products of the same x
    adapter_up      out += scale (B h)      for one product
    add_direction   x += scale v

What a token's experts make lies side by side in its row, as everywhere: (n_used, width) flattened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op

N_ADAPTERS = 3
"""Of trials."""


class AdapterWeight(NamedTuple):
    """A matrix, or vector, of one adapter.

    adapter   its column in ``Batch.adapters``
    weight    A (rank, n_in), B (n_out, rank), or such matrices of all experts; a direction (width,)
    first     the column of h where what A makes begins, a multiple of 16
    factor    what the adapter's scale is multiplied by, such as alpha / rank
    """

    adapter: int
    weight: str
    first: int = 0
    factor: float = 1.0


class _OfAdapters:
    """Of an op with the weights of several adapters in ``parts``."""

    parts: tuple[AdapterWeight, ...]

    def weight_names(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return tuple(part.weight for part in self.parts)


@dataclass(frozen=True)
class AdapterDown(_OfAdapters, Op):
    """out[slot, first : first + rank] = A x[slot] of each part, 0 for the tokens that have not its adapter.

    x is one row for all of a token's experts or one for each, as in ``ExpertMatmul``.
    """

    name, reads, writes, by_row = "adapter_down", ("x", "ids"), ("out",), True

    x: str
    out: str
    parts: tuple[AdapterWeight, ...]
    ids: str | None = None
    n_used: int = 1

    def reference(self, step: Step) -> None:
        scales, x = step.adapters(self.out), step[self.x]
        step[self.out] = np.zeros_like(step[self.out])
        out = step[self.out].reshape(len(x), self.n_used, step[self.out].shape[1] // self.n_used)
        for part in self.parts:
            a = step.weight(part.weight)
            rank, n_in = a.shape[-2:]
            slots = x.reshape(len(x), x.shape[1] // n_in, n_in)
            for t in np.flatnonzero(scales[:, part.adapter]):
                for slot in range(self.n_used):
                    matrix = a if self.ids is None else a[step[self.ids][t, slot]]
                    out[t, slot, part.first : part.first + rank] = matrix @ slots[t, slot % slots.shape[1]]

    @staticmethod
    def trial(s: Sketch, variant: str = "f32") -> None:
        for rank, n_in in ((1, 37), (7, 64), (16, 33), (40, 256)):
            parts = tuple(
                AdapterWeight(i, s.tensor(variant.upper(), (rank + i, n_in)), i * 48) for i in range(N_ADAPTERS)
            )
            s.emit(f"rank={rank} n_in={n_in}", AdapterDown(s.input(n_in), s.buffer(48 * N_ADAPTERS), parts))
        for n_expert, n_used, n_in, per_slot in ((4, 2, 40, 0), (3, 3, 33, 1)):
            weight = s.tensor(variant.upper(), (n_expert, 9, n_in))
            x, ids = s.input(n_in * n_used if per_slot else n_in), s.choices(n_expert, n_used)
            op = AdapterDown(x, s.buffer(16 * n_used), (AdapterWeight(1, weight),), ids, n_used)
            s.emit(f"{n_used} of {n_expert} n_in={n_in}", op)


@dataclass(frozen=True)
class AdapterUp(_OfAdapters, Op):
    """out[slot] += scale factor (B h[slot, first : first + rank]) of each part in turn."""

    name, reads, writes, by_row = "adapter_up", ("h", "out", "ids"), ("out",), True

    h: str
    out: str
    parts: tuple[AdapterWeight, ...]
    ids: str | None = None
    n_used: int = 1

    def reference(self, step: Step) -> None:
        scales, n = step.adapters(self.out), self.n_used
        out = step[self.out].reshape(len(scales), n, step[self.out].shape[1] // n).copy()
        h = step[self.h].reshape(len(scales), n, step[self.h].shape[1] // n)
        for part in self.parts:
            b, factor = step.weight(part.weight), np.float32(part.factor)
            for t in np.flatnonzero(scales[:, part.adapter]):
                for slot in range(n):
                    matrix = b if self.ids is None else b[step[self.ids][t, slot]]
                    low = h[t, slot, part.first : part.first + b.shape[-1]]
                    out[t, slot] += scales[t, part.adapter] * factor * (matrix @ low)
        step[self.out] = out.reshape(len(out), -1)

    @staticmethod
    def trial(s: Sketch, variant: str = "f32") -> None:
        for rank, n_out in ((1, 1), (7, 64), (16, 100), (33, 200)):
            parts = tuple(
                AdapterWeight(i, s.tensor(variant.upper(), (n_out, rank + i)), i * 48, 0.5 * i + 0.5)
                for i in range(N_ADAPTERS)
            )
            s.emit(f"rank={rank} n_out={n_out}", AdapterUp(s.input(48 * N_ADAPTERS), s.input(n_out), parts))
        for n_expert, n_used, n_out in ((4, 2, 96), (3, 3, 16)):
            weight = s.tensor(variant.upper(), (n_expert, n_out, 9))
            h, out, ids = s.input(16 * n_used), s.input(n_out * n_used), s.choices(n_expert, n_used)
            op = AdapterUp(h, out, (AdapterWeight(1, weight, 0, 2.0),), ids, n_used)
            s.emit(f"{n_used} of {n_expert} n_out={n_out}", op)


@dataclass(frozen=True)
class AddDirection(_OfAdapters, Op):
    """x += scale factor v of each part in turn."""

    name, reads, writes, by_row = "add_direction", ("x",), ("x",), True

    x: str
    parts: tuple[AdapterWeight, ...]

    def reference(self, step: Step) -> None:
        scales = step.adapters(self.x)
        for part in self.parts:
            has = scales[:, part.adapter] != 0
            direction = step.weight(part.weight).reshape(-1)
            step[self.x][has] += scales[has, part.adapter, None] * np.float32(part.factor) * direction

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width in (1, 17, 100, 256):
            parts = tuple(AdapterWeight(i, s.tensor("F32", (width,)), 0, i + 0.5) for i in range(N_ADAPTERS))
            s.emit(f"width={width}", AddDirection(s.input(width), parts))
