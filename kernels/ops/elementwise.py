"""Ops that take rows value by value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), by tanh, which does not overflow."""
    half = x * np.float32(0.5)
    return half + half * np.tanh(half)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU."""
    c = np.float32(np.sqrt(2.0 / np.pi))
    half = x * np.float32(0.5)
    return half + half * np.tanh(c * (x + np.float32(0.044715) * x * x * x))


WIDTHS = (1, 17, 100, 256)  # of trials

Activation = Literal["silu", "gelu"]
ACTIVATIONS: dict[Activation, Callable[[np.ndarray], np.ndarray]] = {"silu": silu, "gelu": gelu}


@dataclass(frozen=True)
class GatedUnit(Op):
    """out = activation(gate) * up; ``gelu`` is the tanh form, as gemma uses it."""

    name, reads, writes, by_row = "gated", ("gate", "up"), ("out",), True

    gate: str
    up: str
    out: str
    activation: Activation

    def reference(self, step: Step) -> None:
        step[self.out] = ACTIVATIONS[self.activation](step[self.gate]) * step[self.up]

    @staticmethod
    def trial(s: Sketch, variant: str = "silu") -> None:
        for width in WIDTHS:
            op = GatedUnit(s.input(width), s.input(width), s.buffer(width), cast(Activation, variant))
            s.emit(f"width={width}", op)


@dataclass(frozen=True)
class Add(Op):
    """out = x + y"""

    name, reads, writes, by_row = "add", ("x", "y"), ("out",), True

    x: str
    y: str
    out: str

    def reference(self, step: Step) -> None:
        step[self.out] = step[self.x] + step[self.y]

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width in WIDTHS:
            s.emit(f"width={width}", Add(s.input(width), s.input(width), s.buffer(width)))
