"""Products with a weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        if variant.startswith("texts_"):
            Matmul._trial_texts(s, variant.removeprefix("texts_").upper())
            return
        quant = variant.upper()
        block = QUANT_TYPES[quant].block_size
        columns = {1: (40, 33, 512, 7, 100), 32: (32, 96, 544, 64, 1056), 256: (256, 512, 768, 256, 1024)}[block]
        for i, (n_out, n_in) in enumerate(zip((1, 7, 17, 33, 100), columns, strict=True)):
            bias = s.tensor("F32", (n_out,)) if i % 2 else None
            op = Matmul(s.input(n_in), s.tensor(quant, (n_out, n_in)), s.buffer(n_out), bias)
            s.emit(f"n_out={n_out} n_in={n_in}", op)

    @staticmethod
    def _trial_texts(s: Sketch, quant: str) -> None:
        """As encoders have them."""
        s.is_encoder = True
        for i, (n_out, n_in) in enumerate(((64, 528), (7, 33), (130, 1040), (96, 16))):
            bias = s.tensor("F32", (n_out,)) if i % 2 == 0 else None
            op = Matmul(s.input(n_in), s.tensor(quant, (n_out, n_in)), s.buffer(n_out), bias)
            s.emit(f"n_out={n_out} n_in={n_in}", op)


@dataclass(frozen=True)
class HeadMatmul(Op):
    """out[head] = x[head] @ W[head].T: every head by a matrix of its own. W is the weight (n_heads, n_out, n_in), or

    rows     (first, n): such rows of each head's in a weight (n_heads * rows of a head, n_in)
    turned   of them the transposed: (n_out, n_in) of a head are n_in rows there
    """

    name, reads, writes, weights, by_row = "head_matmul", ("x",), ("out",), ("weight",), True
    kernel = "expert_matmul"  # a head is an expert that every token is sent to

    x: str
    weight: str
    out: str
    n_heads: int
    rows: tuple[int, int] | None = None
    turned: bool = False

    def matrices(self, weight: np.ndarray) -> np.ndarray:
        """W, (n_heads, n_out, n_in), of the whole weight in its own shape; a view."""
        if self.rows is None:
            return weight
        first, n = self.rows
        found = weight.reshape(self.n_heads, len(weight) // self.n_heads, weight.shape[1])[:, first : first + n]
        return found.swapaxes(1, 2) if self.turned else found

    def reference(self, step: Step) -> None:
        weight = self.matrices(step.weight(self.weight))
        n, n_in = len(step[self.x]), weight.shape[2]
        heads = step[self.x].reshape(n, self.n_heads, n_in).swapaxes(0, 1) @ weight.swapaxes(1, 2)
        step[self.out] = heads.swapaxes(0, 1).reshape(n, self.n_heads * weight.shape[1])

    @staticmethod
    def trial(s: Sketch, variant: str = "f32") -> None:
        quant = "F32" if variant == "turned" else variant.upper()
        block = QUANT_TYPES[quant].block_size
        n_ins = {1: (37, 40, 16), 32: (96, 544, 64), 256: (768, 256, 512)}[block]
        for (n_heads, n_out), n_in in zip(((1, 8), (5, 33), (20, 100)), n_ins, strict=True):
            both = s.tensor(quant, (n_heads * (n_out + 9), n_in))
            if variant != "turned":
                weight = s.tensor(quant, (n_heads, n_out, n_in))
                op = HeadMatmul(s.input(n_heads * n_in), weight, s.buffer(n_heads * n_out), n_heads)
                s.emit(f"heads={n_heads} n_out={n_out} n_in={n_in}", op)
                op = HeadMatmul(s.input(n_heads * n_in), both, s.buffer(n_heads * n_out), n_heads, (9, n_out))
                s.emit(f"rows of heads={n_heads} n_out={n_out} n_in={n_in}", op)
            op = HeadMatmul(s.input(n_heads * 9), both, s.buffer(n_heads * n_in), n_heads, (0, 9), turned=True)
            s.emit(f"turned rows of heads={n_heads} n_out={n_in} n_in=9", op)
