"""Rules for what adapters add: one dispatch for each adapter of an op, which tokens without it leave at once."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.emitter import Lowering, blocks
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.sources import LANES, SLICES, source
from edgellm.kernels.ops import AdapterDown, AdapterUp, AddDirection


def down(low: Lowering, op: AdapterDown) -> None:
    """A x of every adapter."""
    x, h = low.place(op.x), low.place(op.out)
    ends = [*(part.first for part in op.parts[1:]), h.width // op.n_used]
    for part, end in zip(op.parts, ends, strict=True):
        matrix, _ = low.there.matrices[part.weight]
        rank, n_in = low.there.program.tensors[part.weight].shape[-2:]
        more, words, ids = _numbers(low, op.ids, h)
        text = source("adapter_down", WEIGHTS=sources.weights(matrix.quant), LANES=LANES, SLICES=SLICES, **words)
        for piece in matrix.parts:
            low.emit(
                text, [piece.buffer, x.buffer, h.buffer, low.step, *more], "rrwr" + "r" * len(more),
                (blocks(end - part.first, LANES), op.n_used, low.n(h)), matrix.words, matrix.pieces, piece.first,
                piece.n, rank, end - part.first, part.adapter, *ids, x.at, x.row, 0 if x.width == n_in else n_in,
                h.at + part.first, h.row, h.width // op.n_used,
            )  # fmt: skip


def up(low: Lowering, op: AdapterUp) -> None:
    """B h of every adapter, in turn."""
    h, y = low.place(op.h), low.place(op.out)
    for part in op.parts:
        matrix, _ = low.there.matrices[part.weight]
        n_out = low.there.program.tensors[part.weight].shape[-2]
        more, words, ids = _numbers(low, op.ids, y)
        text = source("adapter_up", WEIGHTS=sources.weights(matrix.quant), **words)
        for piece in matrix.parts:
            low.emit(
                text, [piece.buffer, h.buffer, y.buffer, low.step, *more], "rrwr" + "r" * len(more),
                (blocks(n_out), op.n_used, low.n(y)), matrix.words, matrix.pieces, piece.first, piece.n, n_out,
                part.adapter, *ids, h.at + part.first, h.row, h.width // op.n_used, y.at, y.row, float(part.factor),
            )  # fmt: skip


def direction(low: Lowering, op: AddDirection) -> None:
    """The direction of every adapter, in turn."""
    x = low.place(op.x)
    for part in op.parts:
        low.emit(
            source("add_direction", TOKEN=_token(x, "token")), [low.step, low.vector(part.weight), x.buffer], "rrw",
            (blocks(x.width), low.n(x), 1), x.width, part.adapter, x.at, x.row, float(part.factor),
        )  # fmt: skip


def _token(place: Place, row: str) -> str:
    """The token of a row."""
    return row if place.rows == "tokens" else f"b[b[5] + {row}]"


def _numbers(low: Lowering, name: str | None, of: Place) -> tuple[list[Any], dict[str, str], tuple[int, int]]:
    """The experts of a token, where an op has them: the buffer, what the shader calls it, and where it begins."""
    if name is None:
        return [], {"MORE": "", "EXPERT": "0u", "TOKEN": _token(of, "token")}, (0, 0)
    ids = low.place(name)
    words = {"MORE": "@group(0) @binding(4) var<storage, read> ids: array<u32>;",
             "EXPERT": "ids[p.ids_at + token * p.ids_row + slot]", "TOKEN": _token(of, "token")}  # fmt: skip
    return [ids.buffer], words, (ids.at, ids.row)
