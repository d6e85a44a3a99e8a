"""Rows of the embedding, looked up by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.ops.sketch import N_VOCAB, Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor
    from edgellm.kernels.program import Program


@dataclass(frozen=True)
class Embed(Op):
    """out[t] = scale * weight[token[t]]

    embeds   whether it is what ``Batch.embeddings`` stands in place of
    """

    name, writes, weights = "embed", ("out",), ("weight",)

    weight: str
    out: str
    scale: float = 1.0
    embeds: bool = True

    def reference(self, step: Step) -> None:
        step[self.out] = step.rows(self.weight, step.batch.tokens) * np.float32(self.scale)
        if self.embeds and step.batch.embeddings is not None:
            rows, values = step.batch.embeddings
            step[self.out][rows] = values

    def nbytes_per_token(self, tensors: Mapping[str, QuantizedTensor]) -> int:
        """One row."""
        return int(tensors[self.weight].data.shape[1])

    @staticmethod
    def trial(s: Sketch, variant: str = "f32") -> None:
        quant = variant.upper()
        block = QUANT_TYPES[quant].block_size
        for width, scale in ((block, 1.0), (block * 3, 25.3), (block * 2 + (5 if block == 1 else 0), 1.0)):
            s.emit(f"width={width}", Embed(s.tensor(quant, (N_VOCAB, width)), s.buffer(width), scale))


def looked_up(program: Program) -> set[str]:
    """Tables that are read by the row in the file, and by no other op: nothing holds the whole of them."""
    rows = {op.weight for op in program.ops if isinstance(op, Embed) and not op.embeds}
    return rows - {name for op in program.ops if not isinstance(op, Embed) or op.embeds for name in op.weight_names()}


def embedding_of(program: Program) -> int | None:
    """The index of the op that ``Batch.embeddings`` stands in place of."""
    return next((i for i, op in enumerate(program.ops) if isinstance(op, Embed) and op.embeds), None)
