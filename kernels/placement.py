"""Which op of a program stands on which device: the last layers on the GPU, experts on the CPU, as far as memory goes.

Layers are told by the names that weights have in a GGUF file, ``blk.3.attn_q.weight``; what has no weights stands with
what comes before it. What a device has no kernel for goes to the CPU, and whatever shares a layer of the cache with it
goes along: keys and values stand beside the ops that use them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from edgellm.kernels.ops import ExpertMatmul, ExpertSum
from edgellm.kernels.program import Op, Program
from edgellm.kernels.split import Cut, cut

CPU, GPU = 0, 1
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class DeviceNeed:
    """Bytes that a device holds of a program: weights, keys and values, and the buffers of a step."""

    weights: int
    kv: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.work


@dataclass(frozen=True)
class Placement:
    """Where the ops of a program stand.

    layers     of the last ones on the GPU; one more than the model has, where its embedding is there, too
    n_layers   that the model has
    sides      of each op: CPU or GPU
    """

    layers: int
    n_layers: int
    sides: tuple[int, ...]

    @property
    def is_split(self) -> bool:
        """Whether both have ops."""
        return len(set(self.sides)) > 1

    @property
    def on_gpu(self) -> bool:
        """Whether the GPU has any."""
        return GPU in self.sides

    def cut(self, program: Program) -> Cut:
        """The program in a part for the CPU and one for the GPU."""
        return cut(program, self.sides, 2)


def layers_of(program: Program) -> tuple[list[int], int]:
    """The layer of each op, and how many there are; -1 before the first, that number where the logits begin."""
    own = [
        max((int(m[1]) for name in op.weight_names() if (m := _BLOCK.match(name))), default=-1) for op in program.ops
    ]
    last, n = max((i for i, layer in enumerate(own) if layer >= 0), default=-1), max(own, default=-1) + 1
    layers, current = list[int](), -1
    for i, (op, layer) in enumerate(zip(program.ops, own, strict=True)):
        is_head = i > last and any(program.buffers[name].rows == "outputs" for name in op.written_buffers())
        current = n if is_head else max(current, layer)
        layers.append(current)
    return layers, n


def place(program: Program, n_gpu_layers: int | None, *, cpu_moe: bool, has_kernel: Callable[[Op], bool]) -> Placement:
    """The last ``n_gpu_layers`` layers on the GPU and what follows them; None is all, and the embedding.

    cpu_moe      leaves experts on the CPU
    has_kernel   whether the GPU can run an op
    """
    layers, n = layers_of(program)
    wanted = n + 1 if n_gpu_layers is None else min(n_gpu_layers, n + 1)
    sides = [GPU if wanted > n or (wanted and layer >= n - wanted) else CPU for layer in layers]
    for i, op in enumerate(program.ops):
        if not has_kernel(op):
            sides[i] = CPU
    if cpu_moe:
        _leave_experts(program, sides)
    touched = [{*op.read_layers(), *op.written_layers()} for op in program.ops]
    kept = {layer for of, side in zip(touched, sides, strict=True) if side == CPU for layer in of}
    sides = [CPU if of & kept else side for of, side in zip(touched, sides, strict=True)]
    return Placement(wanted if GPU in sides else 0, n, tuple(sides))


def _leave_experts(program: Program, sides: list[int]) -> None:
    """Put experts on the CPU, and what has no weights and works on nothing but what they gave."""
    of_experts: set[str] = set()
    for i, op in enumerate(program.ops):
        reads = set(op.read_buffers())
        between = not op.weight_names() and not op.cache and reads and reads <= of_experts
        if isinstance(op, ExpertMatmul | ExpertSum) or between:
            sides[i] = CPU
        of_experts -= set(op.written_buffers())
        if isinstance(op, ExpertMatmul) or (between and not isinstance(op, ExpertSum)):
            of_experts |= set(op.written_buffers())


def most_layers(n_layers: int, fits: Callable[[int], bool]) -> int:
    """The most layers on the GPU that fit its memory: the embedding and all, ``n_layers + 1``, down to 0."""
    low, high = 0, n_layers + 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
