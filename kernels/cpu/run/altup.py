"""Rules for the ops of AltUp's streams, and for activations of which few are not 0.

``low`` is the lowering of a program, see lowering.py.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.lib.layout import ALONE_WIDTH
from edgellm.kernels.ops import AddToStreams, GaussianTopK, MatchMagnitude, MixStreams, ScaleColumns


def _mix_streams(low: Any, op: MixStreams) -> None:
    whole = low.width(op.x)
    streams = next(n for n in range(1, whole + 1) if n * n == low.width(op.coefs))
    arguments = layout.MIX_STREAMS(
        **low.where(x=op.x, coefs=op.coefs, out=op.out), width=whole // streams, streams=streams,
        row_kind=low.row_kind(op.out),
    )  # fmt: skip
    low.emit(op, "mix_streams", arguments, alone=whole <= ALONE_WIDTH)


def _add_to_streams(low: Any, op: AddToStreams) -> None:
    whole, width = low.width(op.x), low.width(op.y)
    coefs = {"coefs": 0, "coefs_row": 0} if op.coefs is None else low.where(coefs=op.coefs)
    arguments = layout.ADD_TO_STREAMS(
        **low.where(x=op.x, y=op.y, out=op.out), **coefs, width=width, streams=whole // width, first=op.first,
        row_kind=low.row_kind(op.out),
    )  # fmt: skip
    low.emit(op, "add_to_streams", arguments, alone=whole <= ALONE_WIDTH)


def _match_magnitude(low: Any, op: MatchMagnitude) -> None:
    whole, width = low.width(op.x), low.width(op.of)
    arguments = layout.MATCH_MAGNITUDE(
        **low.where(x=op.x, of=op.of, out=op.out), width=width, streams=whole // width, row_kind=low.row_kind(op.out)
    )
    low.emit(op, "match_magnitude", arguments, alone=whole <= ALONE_WIDTH)


def _scale_columns(low: Any, op: ScaleColumns) -> None:
    width = low.width(op.x)
    arguments = layout.SCALE_COLUMNS(
        **low.where(x=op.x, out=op.out), w=low.vector(op.weight), width=width, row_kind=low.row_kind(op.out)
    )
    low.emit(op, "scale_columns", arguments, alone=width <= ALONE_WIDTH)


def _gaussian_top_k(low: Any, op: GaussianTopK) -> None:
    width = low.width(op.x)
    arguments = layout.GAUSSIAN_TOP_K(
        **low.where(x=op.x, out=op.out), width=width, factor=op.factor, row_kind=low.row_kind(op.out)
    )
    low.emit(op, "gaussian_top_k", arguments, alone=width <= 2 * ALONE_WIDTH)


RULES: dict[type, Any] = {
    MixStreams: _mix_streams,
    AddToStreams: _add_to_streams,
    MatchMagnitude: _match_magnitude,
    ScaleColumns: _scale_columns,
    GaussianTopK: _gaussian_top_k,
}
