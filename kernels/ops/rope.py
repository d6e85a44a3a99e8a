"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op
from edgellm.kernels.rope import Rope, frequencies


@dataclass(frozen=True)
class ApplyRope(Op):
    """Rotary position embedding of every head of x, in place; ``rope`` names a row of ``Program.ropes``."""

    name, reads, writes = "rope", ("x",), ("x",)

    x: str
    head_dim: int
    rope: str

    def reference(self, step: Step) -> None:
        rope = step.program.ropes[self.rope]
        x = step[self.x]
        heads = x.reshape(len(x), x.shape[1] // self.head_dim, self.head_dim)  # a view: writes reach the buffer
        half = rope.n_dims // 2
        cos, sin = (t[:, None, :] for t in rope.table(step.rope_positions))  # (n, 1, half)
        if rope.adjacent:
            first, second = heads[:, :, 0 : rope.n_dims : 2], heads[:, :, 1 : rope.n_dims : 2]
        else:
            first, second = heads[:, :, :half], heads[:, :, half : rope.n_dims]
        rotated = first * cos - second * sin, second * cos + first * sin
        first[...], second[...] = rotated

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for heads, head_dim, n_dims in ((3, 64, 64), (1, 40, 40), (2, 36, 20)):
            for adjacent in (False, True):
                rope = s.rope(Rope(adjacent, frequencies(n_dims, 10000.0), 1.0 + 0.1 * adjacent))
                shape = f"heads={heads} head_dim={head_dim} n_dims={n_dims} adjacent={adjacent}"
                s.emit(shape, ApplyRope(s.input(heads * head_dim), head_dim, rope))
