"""AltUp: the residual stream as several of one width, side by side in a row (https://arxiv.org/abs/2301.13310).

A layer computes on one of them. The others follow: before it each is predicted from all, behind it each is corrected by
what the layer made of its own prediction, both by a few numbers that every token has of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op

LEAST = 1e-5
"""Of a mean square that something is divided by."""
SHAPES = ((4, 64), (1, 7), (3, 33), (2, 160), (5, 16))
"""Streams and their width, in trials."""


@dataclass(frozen=True)
class MixStreams(Op):
    """out_i = x_i + sum over j of coefs[i n + j] x_j, for the n streams of x."""

    name, reads, writes, by_row = "mix_streams", ("x", "coefs"), ("out",), True

    x: str
    coefs: str
    out: str

    def reference(self, step: Step) -> None:
        x, coefs = step[self.x], step[self.coefs]
        n = math.isqrt(coefs.shape[1])
        streams = x.reshape(len(x), n, x.shape[1] // n)
        step[self.out] = (streams + coefs.reshape(-1, n, n) @ streams).reshape(x.shape)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for n, width in SHAPES:
            s.emit(f"streams={n} width={width}", MixStreams(s.input(n * width), s.input(n * n), s.buffer(n * width)))


@dataclass(frozen=True)
class AddToStreams(Op):
    """out_i = x_i + (1 + coefs_i) y for the streams of x from ``first`` on, out_i = x_i for those before it.

    coefs   a number for each stream; None: they are 0
    """

    name, reads, writes, by_row = "add_to_streams", ("x", "y", "coefs"), ("out",), True

    x: str
    y: str
    out: str
    coefs: str | None = None
    first: int = 0

    def reference(self, step: Step) -> None:
        x, y = step[self.x], step[self.y]
        streams = x.reshape(len(x), x.shape[1] // y.shape[1], y.shape[1]).copy()
        factors = np.ones((1, streams.shape[1]), np.float32)
        if self.coefs is not None:
            factors = factors + step[self.coefs]
        streams[:, self.first :] += factors[:, self.first :, None] * y[:, None]
        step[self.out] = streams.reshape(x.shape)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for i, (n, width) in enumerate(SHAPES):
            coefs = None if i % 2 else s.input(n)
            op = AddToStreams(s.input(n * width), s.input(width), s.buffer(n * width), coefs, min(i, 1) * (n > 1))
            s.emit(f"streams={n} width={width} coefs={coefs is not None}", op)


@dataclass(frozen=True)
class MatchMagnitude(Op):
    """out_i = x_i sqrt(mean(of^2) / max(mean(x_i^2), 1e-5)): each stream of x, as wide as ``of``, as long as it."""

    name, reads, writes, by_row = "match_magnitude", ("x", "of"), ("out",), True

    x: str
    of: str
    out: str

    def reference(self, step: Step) -> None:
        x, of = step[self.x], step[self.of]
        streams = x.reshape(len(x), x.shape[1] // of.shape[1], of.shape[1])
        wanted = np.mean(np.square(of, dtype=np.float64), axis=1)[:, None, None]
        found = np.mean(np.square(streams, dtype=np.float64), axis=2, keepdims=True)
        step[self.out] = (streams * np.sqrt(wanted / np.maximum(found, LEAST)).astype(np.float32)).reshape(x.shape)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for n, width in SHAPES:
            op = MatchMagnitude(s.input(n * width), s.input(width), s.buffer(n * width))
            s.emit(f"streams={n} width={width}", op)


@dataclass(frozen=True)
class ScaleColumns(Op):
    """out = x * weight, a number for each column."""

    name, reads, writes, weights, by_row = "scale_columns", ("x",), ("out",), ("weight",), True

    x: str
    weight: str
    out: str

    def reference(self, step: Step) -> None:
        step[self.out] = step[self.x] * step.weight(self.weight)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width in (1, 17, 100, 256):
            s.emit(f"width={width}", ScaleColumns(s.input(width), s.tensor("F32", (width,)), s.buffer(width)))
