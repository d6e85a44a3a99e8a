"""Products with a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.ops.sketch import Sketch
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

    @staticmethod
    def trial(s: Sketch, variant: str = "f32") -> None:
        quant = variant.upper()
        block = QUANT_TYPES[quant].block_size
        columns = {1: (40, 33, 512, 7, 100), 32: (32, 96, 544, 64, 1056), 256: (256, 512, 768, 256, 1024)}[block]
        for i, (n_out, n_in) in enumerate(zip((1, 7, 17, 33, 100), columns, strict=True)):
            bias = s.tensor("F32", (n_out,)) if i % 2 else None
            op = Matmul(s.input(n_in), s.tensor(quant, (n_out, n_in)), s.buffer(n_out), bias)
            s.emit(f"n_out={n_out} n_in={n_in}", op)
