"""Rules for a residual stream of several, and for what it is made of (Gemma 3n)."""

from __future__ import annotations

import math

from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.emitter import Lowering, blocks, folded
from edgellm.kernels.gpu.sources import bindings, source
from edgellm.kernels.ops import AddToStreams, GaussianTopK, MatchMagnitude, MixStreams, ScaleColumns
from edgellm.kernels.ops.altup import LEAST


def mix(low: Lowering, op: MixStreams) -> None:
    """Each stream from all of them."""
    x, y, z = low.place(op.x), low.place(op.coefs), low.place(op.out)
    bound = bindings(0, [("x", x.buffer, "r"), ("y", y.buffer, "r"), ("z", z.buffer, "w")])
    streams = math.isqrt(y.width)
    width, n = x.width // streams, low.n(z) * x.width // streams
    low.emit(
        source("mix_streams", BINDINGS=bound.text, N=streams, **bound.names), bound.buffers, bound.kinds,
        folded(blocks(n)), width, n, x.at, x.row, y.at, y.row, z.at, z.row,
    )  # fmt: skip


def add_to(low: Lowering, op: AddToStreams) -> None:
    """One row to several streams."""
    x, y, z = low.place(op.x), low.place(op.y), low.place(op.out)
    coefs = y if op.coefs is None else low.place(op.coefs)
    roles = [("x", x.buffer, "r"), ("y", y.buffer, "r"), ("c", coefs.buffer, "r"), ("z", z.buffer, "w")]
    bound = bindings(0, roles)
    factor = "1.0" if op.coefs is None else f"1.0 + {bound.names['c']}[p.c_at + row * p.c_row + i]"
    n = low.n(z) * z.width
    low.emit(
        source("add_to_streams", BINDINGS=bound.text, FACTOR=factor, **bound.names), bound.buffers, bound.kinds,
        folded(blocks(n)), z.width, y.width, op.first, n, x.at, x.row, y.at, y.row, coefs.at, coefs.row, z.at, z.row,
    )  # fmt: skip


def match_magnitude(low: Lowering, op: MatchMagnitude) -> None:
    """Each stream as long as another row."""
    x, y, z = low.place(op.x), low.place(op.of), low.place(op.out)
    bound = bindings(0, [("x", x.buffer, "r"), ("y", y.buffer, "r"), ("z", z.buffer, "w")])
    low.emit(
        source("match_magnitude", BINDINGS=bound.text, **bound.names), bound.buffers, bound.kinds,
        (x.width // y.width, low.n(x), 1), y.width, x.at, x.row, y.at, y.row, z.at, z.row, LEAST,
    )  # fmt: skip


def scale_columns(low: Lowering, op: ScaleColumns) -> None:
    """Each column by its number."""
    x, z, weight = low.place(op.x), low.place(op.out), low.vector(op.weight)
    bound = bindings(0, [("x", x.buffer, "r"), ("y", weight, "r"), ("z", z.buffer, "w")])
    words, n = {"FUNCTION": "u * v", "FUNCTIONS": sources.text("activations")}, low.n(z) * z.width
    low.emit(
        source("pointwise", BINDINGS=bound.text, **words, **bound.names), bound.buffers, bound.kinds, folded(blocks(n)),
        z.width, n, 1, x.at, x.row, 0, 0, z.at, z.row, 1.0,
    )  # fmt: skip


def gaussian_top_k(low: Lowering, op: GaussianTopK) -> None:
    """What of a row is far above its mean."""
    x, y = low.place(op.x), low.place(op.out)
    bound = bindings(0, [("x", x.buffer, "r"), ("y", y.buffer, "w")])
    low.emit(
        source("gaussian_top_k", BINDINGS=bound.text, **bound.names), bound.buffers,
        bound.kinds, (1, low.n(x), 1), x.width, x.at, x.row, y.at, y.row, float(op.factor),
    )  # fmt: skip
