"""The inputs of every matmul over a calibration text, group by group, while the weights before it are replaced.

A program is walked once: all chunks go up to the next matmuls that read one buffer (q, k and v; gate and up), what
they read is summed, whoever asked replaces their weights, and all chunks go on from there. So a weight is fitted to
what its quantized predecessors really give it, at the cost of one pass over the text in all. Between two groups only
the buffers that are still needed are kept, for every chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.kernels.kv import BLOCK_TOKENS, CachePool
from edgellm.kernels.ops import Matmul
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Batch, Program
from edgellm.measure.perplexity import Chunk

WeightOf = Callable[[str], np.ndarray]
"""A tensor of the program by name, float32 in its own shape."""
RowsOf = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Group:
    """Matmuls that read the same buffer, and the ops [start, stop) that hold them."""

    start: int
    stop: int
    weights: tuple[str, ...]
    x: str


def groups(program: Program) -> list[Group]:
    """In order; the output matrix, which reads only some rows, is left out."""
    found: list[Group] = []
    for index, op in enumerate(program.ops):
        if not isinstance(op, Matmul) or op.out == program.output:
            continue
        last = found[-1] if found else None
        written = map(program.root, program.ops[index - 1].written_buffers())
        if last and last.stop == index and last.x == op.x and program.root(op.x) not in written:
            found[-1] = Group(last.start, index + 1, (*last.weights, op.weight), op.x)
        else:
            found.append(Group(index, index + 1, (op.weight,), op.x))
    return found


def needed(program: Program, start: int) -> tuple[set[str], set[int]]:
    """The buffers, and the layers of the cache, that the ops from ``start`` on read before they write them."""
    buffers: set[str] = set()
    layers: set[int] = set()
    for op in reversed(program.ops[start:]):
        buffers = buffers.difference(op.written_buffers()) | set(map(program.root, op.read_buffers()))
        layers = layers.difference(op.written_layers()) | set(op.read_layers())
    return buffers, layers


class Walk:
    """All chunks on their way through a program, in float32.

    weight_of   a tensor by name, asked again after each ``advance``
    rows_of     the rows of a table by its name and token ids (n,), float32 (n, width): it is never decoded whole
    """

    def __init__(self, program: Program, chunks: Sequence[Chunk], weight_of: WeightOf, rows_of: RowsOf) -> None:
        self.program = program
        self.batches = [Batch.single(program, chunk.ids, outputs="last") for chunk in chunks]
        n_blocks = [-(-max(len(batch) for batch in self.batches) // BLOCK_TOKENS)] * len(program.groups)
        self.pool = CachePool(program.cache_layers, n_blocks, "float32")
        self.weight = functools.cache(weight_of)
        self.rows = rows_of
        self.at = 0
        self.kept: list[dict[str, np.ndarray]] = [{} for _ in chunks]
        self.caches: list[dict[int, list[np.ndarray]]] = [{} for _ in chunks]  # of layers that are read later

    def advance(self, stop: int) -> None:
        """Run the ops up to ``stop`` for every chunk; keep what the rest needs."""
        ops = self.program.ops[self.at : stop]
        buffers, layers = needed(self.program, stop)
        for index, batch in enumerate(self.batches):
            step = Step(self.program, self.pool, self.weight, self.rows, batch)
            for name, array in self.kept[index].items():
                step[name] = array
            for layer, arrays in self.caches[index].items():
                self.pool.arrays[layer] = arrays
            for op in ops:
                op.reference(step)
            self.kept[index] = {name: step.buffers[name] for name in buffers}
            self.caches[index] = {layer: [a.copy() for a in self.pool.arrays[layer]] for layer in layers}
        self.weight.cache_clear()
        self.at = stop

    def inputs(self, name: str) -> Iterator[np.ndarray]:
        """A kept buffer of each chunk, (n_tokens, width)."""
        buffer = self.program.buffers[name]
        for kept in self.kept:
            yield kept[self.program.root(name)][:, buffer.first : buffer.first + buffer.width]


def gram(inputs: Iterable[np.ndarray], n_in: int) -> np.ndarray:
    """The sum of x^T x over float32 (n, n_in), float32 (n_in, n_in)."""
    total = np.zeros((n_in, n_in), np.float32)
    for x in inputs:
        total += x.T @ x
    return total
