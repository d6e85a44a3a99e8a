"""From the rows of all tokens to those that want logits."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.kernels.ops.sketch import N_VOCAB, Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op, Program


@dataclass(frozen=True)
class SelectOutputs(Op):
    """out = the rows of x whose token wants logits; out is a buffer of kind ``outputs``."""

    name, reads, writes = "select_outputs", ("x",), ("out",)

    x: str
    out: str

    def reference(self, step: Step) -> None:
        step[self.out] = step[self.x][step.batch.outputs]

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        s.emit(f"width={N_VOCAB}", SelectOutputs(s.input(N_VOCAB), Program.output))
