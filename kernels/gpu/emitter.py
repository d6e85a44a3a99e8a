"""What lowering writes with: the things on the device, the ops that come next, and the dispatches made so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu.beside import Emitted, are_apart, both
from edgellm.kernels.gpu.cuts import Cut
from edgellm.kernels.gpu.device import MAX_GROUPS, Device
from edgellm.kernels.gpu.layout import Place, padded
from edgellm.kernels.gpu.pool import GPUPool
from edgellm.kernels.gpu.sources import MOST_COLUMNS
from edgellm.kernels.gpu.step import StepBuffer
from edgellm.kernels.gpu.walk import Dispatch
from edgellm.kernels.gpu.weights import Matrix
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import Add, Attention
from edgellm.kernels.program import Op, Program

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor

PART = 256  # positions that one workgroup of attention sums up
MOST_HEADS = 16  # of a key, that it takes


@dataclass
class Counts:
    """How large a step is: tokens, outputs, and parts of 256 positions that a token may see."""

    tokens: int
    outputs: int
    parts: int
    is_prompt: bool = False  # most tokens stand beside others of their sequence
    is_lone: bool = False  # every token is the only one of its sequence
    writes_over: bool = False  # a state goes where other tokens of its sequence read the one before

    def rows(self, kind: str) -> int:
        """Rows of a buffer of the kind."""
        return self.outputs if kind == "outputs" else self.tokens


@dataclass
class Resident:
    """What stays on the device: the weights, the cache, the buffers, the batch."""

    device: Device
    program: Program  # with the ops and buffers of its output tail
    pool: GPUPool
    step: StepBuffer
    rows: dict[str, int]
    places: dict[str, Place] = field(default_factory=dict)
    made: dict[str, Place] = field(default_factory=dict)  # where products leave what is cut behind them
    cuts: dict[str, Cut] = field(default_factory=dict)
    orders: dict[str, np.ndarray] = field(default_factory=dict)  # of the rows of a product's weight and bias
    matrices: dict[str, tuple[Matrix, int]] = field(default_factory=dict)  # of a tensor: its matrix and first row there
    vectors: dict[tuple[str, ...], Any] = field(default_factory=dict)
    scratches: dict[str, Any] = field(default_factory=dict)
    n_scratches: int = 0  # made so far: what was recorded with one that has grown is over a buffer that is gone

    def scratch(self, name: str, nbytes: int) -> Any:
        """A buffer for what one dispatch leaves to the next; it grows."""
        found = self.scratches.get(name)
        if found is None or found.size < nbytes:
            if found is not None:
                self.device.free(found)
            found = self.scratches[name] = self.device.buffer(nbytes)
            self.n_scratches += 1
        return found

    def tensor(self, name: str) -> QuantizedTensor:
        """A matrix, its rows in the order of the cut behind it."""
        found, order = self.program.tensors[name], self.orders.get(name)
        return found if order is None else replace(found, data=found.data[order])

    def vector_of(self, name: str) -> np.ndarray:
        """The numbers of a norm or a bias, float32, in the order of the cut behind it."""
        found, order = self.program.tensors[name].dequantize().astype(np.float32).reshape(-1), self.orders.get(name)
        return found if order is None else found[order]

    def heads_at_once(self, op: Attention) -> int:
        """Query heads of one key head that a workgroup takes: as many as fit its memory."""
        layer = self.program.kv_layer(op.layer)
        group, room = op.n_heads // layer.n_kv_heads, self.rows_at_once(layer)
        fitting = [n for n in range(1, min(group, MOST_HEADS) + 1) if group % n == 0 and n <= room]
        if not fitting:
            raise UnsupportedError(
                f"layer {op.layer}: heads of {layer.head_dim_k} numbers do not fit the {self.device.workgroup_nbytes} "
                f"bytes that a workgroup of {self.device.adapter} has. Take --device cpu.",
                code="MODEL_SHAPE",
            )
        return max(fitting)

    def rows_at_once(self, layer: KVLayer) -> int:
        """Query heads of any tokens that a workgroup of attention has memory for."""
        return (self.device.workgroup_nbytes // 4 - 64) // (layer.head_dim_k + PART + 64 + 4)


@dataclass
class Lowering:
    """Ops on their way to dispatches, the ones that are being lowered and those behind them."""

    there: Resident
    counts: Counts
    fuse: bool
    ops: list[Op]
    rows: list[Emitted] = field(default_factory=list)
    at: int = 0  # of the op that is being lowered
    end: int = 0  # of the ops that may be
    n_taken: int = 1  # ops that became the dispatches just emitted
    elsewhere: dict[str, Place] = field(default_factory=dict)  # what the next op that reads it finds at another place
    grouped: set[str] = field(default_factory=set)  # buffers of experts' numbers whose pairs are in order

    def next(self, n: int = 1) -> Op | None:
        """The op after the next n - 1, where it may be taken together with this one."""
        at = self.at + n
        return self.ops[at] if self.fuse and at < self.end else None

    def is_dead(self, name: str, n: int) -> bool:
        """Whether nobody reads a buffer behind the next n ops, before it is written anew."""
        program = self.there.program
        for op in self.ops[self.at + n + 1 :]:
            if program.root(name) in map(program.root, op.read_buffers()):
                return False
            if name in (half for one in op.written_buffers() for half in (one, *self.halves(one))):
                return True
        return name not in (program.output, program.hidden, program.tapped)

    def emit(
        self,
        text: str,
        buffers: Sequence[Any],
        kinds: str,
        grid: tuple[int, int, int],
        *immediates: float,
        flops: int = 0,
        joins: bool = False,
        is_fixed: bool = False,
    ) -> None:
        """Add a dispatch; see ``Device.dispatch``. In a step of few tokens it is one with that before it where these
        are apart by their buffers, or ``joins`` that by a rule; ``is_fixed``: see ``both``."""
        last, made = self.rows[-1] if self.rows else None, Emitted(text, list(buffers), kinds, grid, immediates, flops)
        is_few = self.fuse and self.counts.tokens <= MOST_COLUMNS
        if is_few and last is not None and (joins or are_apart(last, made)):
            whole = both(last, made, self.there.device, is_fixed=is_fixed)
            if whole is not None:
                self.rows[-1] = whole
                return
        self.rows.append(made)

    def dispatches(self) -> list[Dispatch]:
        """What was emitted, with its pipelines."""
        device = self.there.device
        return [
            device.dispatch(one.text, one.buffers, one.kinds, one.grid, *one.immediates, flops=one.flops)
            for one in self.rows
        ]

    def place(self, name: str) -> Place:
        return self.there.places[name]

    def made(self, name: str) -> Place:
        """Where a product leaves a buffer."""
        return self.there.made.get(name, self.there.places[name])

    def apart(self, name: str) -> Place:
        """Another place for a buffer, where the op that reads it next finds it."""
        place, n_rows = self.place(name), self.there.rows[self.place(name).rows]
        row = padded(place.width)
        found = self.there.scratch(f"{name} elsewhere", 4 * row * n_rows)
        self.elsewhere[name] = Place(found, 0, row, place.width, place.rows)
        return self.elsewhere[name]

    def halves(self, name: str) -> list[str]:
        """What a buffer is cut into behind a product, else itself."""
        cut = self.there.cuts.get(name)
        return [name] if cut is None else [*self.halves(cut.first), *self.halves(cut.second)]

    def n(self, place: Place) -> int:
        """Rows of a buffer in this step."""
        return self.counts.rows(place.rows)

    def vector(self, *names: str) -> Any:
        """Tensors of float32 numbers, one after the other."""
        if names not in self.there.vectors:
            self.there.vectors[names] = self.there.device.upload(
                np.concatenate([self.there.vector_of(name) for name in names])
            )
        return self.there.vectors[names]

    def numbers(self, name: str, values: np.ndarray) -> Any:
        """Numbers that are made of the program's, sent once."""
        if (name,) not in self.there.vectors:
            self.there.vectors[name,] = self.there.device.upload(values)
        return self.there.vectors[name,]

    def taps(self, name: str) -> Any:
        """The weights of a convolution, (taps, width) of float32."""
        tensor = self.there.program.tensors[name]
        return self.numbers(f"taps of {name}", tensor.dequantize().reshape(tensor.shape).T)

    @property
    def step(self) -> Any:
        return self.there.step.buffer


def is_added(low: Lowering, name: str, add: Add, n: int = 1) -> bool:
    """Whether a sum, the n-th op from here, only adds what one before it makes, or a multiple of it, to a buffer, and
    nobody else wants it."""
    is_sum = add.out != name and (add.x, add.y) in ((add.out, name), (name, add.out))
    return is_sum and (add.scale == 1.0 or add.y == name) and low.is_dead(name, n)


def clash(buffers: Sequence[Any], kinds: str) -> bool:
    """Whether a buffer would be bound more than once, and written: no device takes that."""
    numbers = [id(buffer) for buffer in buffers]
    return any(kind == "w" and numbers.count(one) > 1 for one, kind in zip(numbers, kinds, strict=True))


def blocks(n: int, size: int = 64) -> int:
    """Workgroups of this size for n threads."""
    return -(-n // size)


def folded(n: int) -> tuple[int, int, int]:
    """A grid of n workgroups or a few more, within the limit of a dimension."""
    return min(n, MAX_GROUPS), blocks(n, MAX_GROUPS), 1
