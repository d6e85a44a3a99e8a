"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


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
        cos, sin = (t[:, None, :] for t in rope.table(step.batch.positions))  # (n, 1, half)
        if rope.adjacent:
            first, second = heads[:, :, 0 : rope.n_dims : 2], heads[:, :, 1 : rope.n_dims : 2]
        else:
            first, second = heads[:, :, :half], heads[:, :, half : rope.n_dims]
        rotated = first * cos - second * sin, second * cos + first * sin
        first[...], second[...] = rotated
