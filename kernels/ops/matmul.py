"""Products with a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


@dataclass(frozen=True)
class Matmul(Op):
    """out = x @ weight.T (+ bias), weight (n_out, n_in)."""

    name, reads, writes, weights, by_row = "matmul", ("x",), ("out",), ("weight", "bias"), True

    x: str
    weight: str
    out: str
    bias: str | None = None

    def reference(self, step: Step) -> None:
        out = step[self.x] @ step.weight(self.weight).T
        step[self.out] = out if self.bias is None else out + step.weight(self.bias)
