"""Ops that take rows value by value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), by e^-|x|, which does not overflow; what is near 0 keeps all its digits."""
    y = np.exp(-np.abs(x))
    return np.where(x < 0, y, np.float32(1.0)) / (np.float32(1.0) + y)


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU, x / 2 (1 + tanh(u)), written as x sigmoid(2u)."""
    c = np.float32(2.0 * math.sqrt(2.0 / math.pi))
    return x * sigmoid(c * (x + np.float32(0.044715) * x * x * x))


def gelu_erf(x: np.ndarray) -> np.ndarray:
    """GELU itself: x times the share of a normal distribution below x."""
    share = np.vectorize(math.erf, otypes=[np.float64])(x * np.sqrt(0.5))
    return (x * (0.5 + 0.5 * share)).astype(np.float32)


def clamped_swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The unit of gpt-oss: a steeper silu of a gate cut off above, times what was cut on both sides, plus 1."""
    gate, up = np.minimum(gate, np.float32(7.0)), np.clip(up, np.float32(-7.0), np.float32(7.0))
    return gate * sigmoid(np.float32(1.702) * gate) * (up + np.float32(1.0))


WIDTHS = (1, 17, 100, 256)  # of trials

Activation = Literal["silu", "gelu", "gelu_erf", "clamped_swiglu"]
UNITS: dict[Activation, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "gelu_erf": lambda gate, up: gelu_erf(gate) * up,
    "clamped_swiglu": clamped_swiglu,
}


@dataclass(frozen=True)
class GatedUnit(Op):
    """out = activation(gate) * up; ``gelu`` is the tanh form, as gemma uses it, ``gelu_erf`` the exact one.

    With ``clamped_swiglu`` out = g sigmoid(1.702 g) * (u + 1) of g = min(gate, 7) and u = up between -7 and 7.
    """

    name, reads, writes, by_row = "gated", ("gate", "up"), ("out",), True

    gate: str
    up: str
    out: str
    activation: Activation

    def reference(self, step: Step) -> None:
        step[self.out] = UNITS[self.activation](step[self.gate], step[self.up])

    @staticmethod
    def trial(s: Sketch, variant: str = "silu") -> None:
        for width in WIDTHS:
            op = GatedUnit(s.input(width), s.input(width), s.buffer(width), cast(Activation, variant))
            s.emit(f"width={width}", op)


def relu_squared(x: np.ndarray) -> np.ndarray:
    """x^2 above 0, else 0."""
    return np.square(np.maximum(x, np.float32(0.0)))


Curve = Literal["gelu", "gelu_erf", "relu_squared"]
CURVES: dict[Curve, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": gelu,
    "gelu_erf": gelu_erf,
    "relu_squared": relu_squared,
}


@dataclass(frozen=True)
class Activate(Op):
    """out = activation(x)"""

    name, reads, writes, by_row = "activate", ("x",), ("out",), True

    x: str
    out: str
    activation: Curve

    def reference(self, step: Step) -> None:
        step[self.out] = CURVES[self.activation](step[self.x])

    @staticmethod
    def trial(s: Sketch, variant: str = "gelu_erf") -> None:
        for width in WIDTHS:
            s.emit(f"width={width}", Activate(s.input(width), s.buffer(width), cast(Curve, variant)))


@dataclass(frozen=True)
class Add(Op):
    """out = x + scale * y"""

    name, reads, writes, by_row = "add", ("x", "y"), ("out",), True

    x: str
    y: str
    out: str
    scale: float = 1.0

    def reference(self, step: Step) -> None:
        y = step[self.y] if self.scale == 1.0 else step[self.y] * np.float32(self.scale)
        step[self.out] = step[self.x] + y

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width in WIDTHS:
            scale = 0.22 if variant == "scaled" else 1.0
            s.emit(f"width={width}", Add(s.input(width), s.input(width), s.buffer(width), scale))


@dataclass(frozen=True)
class Scale(Op):
    """out = factor * x"""

    name, reads, writes, by_row = "scale", ("x",), ("out",), True

    x: str
    out: str
    factor: float

    def reference(self, step: Step) -> None:
        step[self.out] = step[self.x] * np.float32(self.factor)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width in WIDTHS:
            s.emit(f"width={width}", Scale(s.input(width), s.buffer(width), 0.37))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e^x)"""
    return np.logaddexp(x, np.float32(0.0))


GATE_SHAPES = ((1, 1), (17, 17), (100, 1), (256, 256), (96, 2), (60, 3))
"""Widths of x and of the gate, in trials."""


def _gated(x: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """One value of the gate times as many neighbours of x as there are for it."""
    return (x.reshape(*gate.shape, x.shape[1] // gate.shape[1]) * gate[:, :, None]).reshape(x.shape)


@dataclass(frozen=True)
class SigmoidGate(Op):
    """out = x * sigmoid(gate), where one value of ``gate`` is for width(x) / width(gate) neighbours of x: for a single
    one, for a head, or for the whole row."""

    name, reads, writes, by_row = "sigmoid_gate", ("x", "gate"), ("out",), True

    x: str
    gate: str
    out: str

    def reference(self, step: Step) -> None:
        step[self.out] = _gated(step[self.x], sigmoid(step[self.gate]))

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, n_gates in GATE_SHAPES:
            s.emit(f"width={width} gates={n_gates}", SigmoidGate(s.input(width), s.input(n_gates), s.buffer(width)))


@dataclass(frozen=True)
class SoftplusGate(Op):
    """out = x * softplus(gate), a value of ``gate`` for neighbours of x as in ``SigmoidGate``."""

    name, reads, writes, by_row = "softplus_gate", ("x", "gate"), ("out",), True

    x: str
    gate: str
    out: str

    def reference(self, step: Step) -> None:
        step[self.out] = _gated(step[self.x], softplus(step[self.gate]))

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, n_gates in GATE_SHAPES:
            s.emit(f"width={width} gates={n_gates}", SoftplusGate(s.input(width), s.input(n_gates), s.buffer(width)))


@dataclass(frozen=True)
class SplitHeads(Op):
    """Heads of x, each [first | second], to heads of two buffers."""

    name, reads, writes, by_row = "split_heads", ("x",), ("first", "second"), True

    x: str
    first: str
    second: str
    head_dim: int  # of first

    def reference(self, step: Step) -> None:
        n, dim = len(step[self.x]), self.head_dim
        n_heads = step[self.first].shape[1] // dim
        heads = step[self.x].reshape(n, n_heads, step[self.x].shape[1] // n_heads)
        first, second = heads[:, :, :dim], heads[:, :, dim:]
        step[self.first], step[self.second] = (part.reshape(n, n_heads * part.shape[2]) for part in (first, second))

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for heads, dim, rest in ((1, 1, 1), (3, 2, 2), (2, 17, 40), (4, 64, 64), (3, 48, 5)):
            op = SplitHeads(s.input(heads * (dim + rest)), s.buffer(heads * dim), s.buffer(heads * rest), dim)
            s.emit(f"heads={heads} head_dim={dim}+{rest}", op)


@dataclass(frozen=True)
class JoinHeads(Op):
    """Heads of two buffers to heads of one, each [first | second]."""

    name, reads, writes, by_row = "join_heads", ("first", "second"), ("out",), True

    first: str
    second: str
    out: str
    head_dim: int  # of first

    def reference(self, step: Step) -> None:
        n, n_heads = len(step[self.out]), step[self.first].shape[1] // self.head_dim
        parts = (step[name].reshape(n, n_heads, step[name].shape[1] // n_heads) for name in (self.first, self.second))
        step[self.out] = np.concatenate(list(parts), axis=2).reshape(n, step[self.out].shape[1])

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for heads, dim, rest in ((1, 1, 1), (3, 2, 2), (2, 17, 40), (4, 64, 64), (3, 48, 5)):
            op = JoinHeads(s.input(heads * dim), s.input(heads * rest), s.buffer(heads * (dim + rest)), dim)
            s.emit(f"heads={heads} head_dim={dim}+{rest}", op)


@dataclass(frozen=True)
class Softcap(Op):
    """out = cap * tanh(x / cap): values of any size are brought between -cap and cap."""

    name, reads, writes, by_row = "softcap", ("x",), ("out",), True

    x: str
    out: str
    cap: float

    def reference(self, step: Step) -> None:
        cap = np.float32(self.cap)
        step[self.out] = np.tanh(step[self.x] / cap) * cap

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, cap in zip(WIDTHS, (30.0, 1.0, 50.0, 7.5), strict=True):
            s.emit(f"width={width} cap={cap}", Softcap(s.input(width), s.buffer(width), cap))


@dataclass(frozen=True)
class Clamp(Op):
    """out = x, what is beyond ``limit`` on either side cut off there."""

    name, reads, writes, by_row = "clamp", ("x",), ("out",), True

    x: str
    out: str
    limit: float

    def reference(self, step: Step) -> None:
        limit = np.float32(self.limit)
        step[self.out] = np.clip(step[self.x], -limit, limit)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, limit in zip(WIDTHS, (0.5, 0.25, 1.0, 8.0), strict=True):
            s.emit(f"width={width} limit={limit}", Clamp(s.input(width), s.buffer(width), limit))
