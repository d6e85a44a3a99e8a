"""Rules for mixtures of experts, and for heads with a matrix each: a head is an expert that every token is sent to.

A few tokens take a workgroup for each row of theirs. Many are put in the order of their experts first, and go through
tiles as other products do; both have the order of additions of ``shaders/matmul.wgsl``.
"""

from __future__ import annotations

import math
from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.emitter import Lowering, blocks, folded
from edgellm.kernels.gpu.sources import LANES, bindings, source, vector
from edgellm.kernels.gpu.weights import Matrix
from edgellm.kernels.ops import ExpertMatmul, ExpertSum, HeadMatmul, Route

TILE = 32  # tokens of one expert that a workgroup takes
LEAST_TOKENS = 9  # that go in tiles
LEAST_FILLED = 8  # of the 32 columns of a tile, so many at least are tokens, on average


def route(low: Lowering, op: Route) -> None:
    """The experts of a token and what they count."""
    x, ids, y = low.place(op.logits), low.place(op.ids), low.place(op.probs)
    names = [(name, what) for name, what in ((op.scales, "scales"), (op.bias, "bias")) if name is not None]
    declared = "".join(vector(3 + i, what) for i, (_, what) in enumerate(names))
    times = " * scales[ids[p.ids_at + g.x * p.ids_row + k]]" if op.scales is not None else ""
    buffers = [x.buffer, ids.buffer, y.buffer, *(low.vector(name) for name, _ in names)]
    kinds, grid, places = "rww" + "r" * len(names), (low.n(x), 1, 1), (x.at, x.row, ids.at, ids.row, y.at, y.row)
    if op.by_logits and op.factor == 1.0:
        text = source("route", KEYS=sources.text("keys"), SCALES=declared, TIMES=times)
        low.emit(text, buffers, kinds, grid, x.width, ids.width, int(op.over == "all"), *places)
        return
    softmax = {"SCORE": "exp(x[begin + i] - largest) / whole", "WEIGHT": "exp(x[begin + i] - largest)",
               "WHOLE": "whole", "LEAST": "0.0"}  # fmt: skip
    sigmoid = {"SCORE": "logistic(x[begin + i])", "WEIGHT": "logistic(x[begin + i])", "WHOLE": "1.0", "LEAST": "1e-20"}
    text = source(
        "route_scores", KEYS=sources.text("keys"), VECTORS=declared, TIMES=times, N=x.width,
        BIASED=" + bias[i]" if op.bias is not None else "", **(sigmoid if op.scores == "sigmoid" else softmax),
    )  # fmt: skip
    low.emit(
        text, buffers, kinds, grid, ids.width, *op.groups, op.best, int(op.over == "all"), *places, float(op.factor)
    )


def expert_matmul(low: Lowering, op: ExpertMatmul) -> None:
    """Every token by the matrices of its experts."""
    ids, y = low.place(op.ids), low.place(op.out)
    (matrix, _), (n_expert, n_out, n_in) = low.there.matrices[op.weight], low.there.program.tensors[op.weight].shape
    slot = _slot(low, op.x, op.weight, n_in, 0 if low.place(op.x).width == n_in else n_in)
    more = [low.vector(op.bias)] if op.bias else []
    n = low.n(y)
    if n >= LEAST_TOKENS and n * op.n_used >= LEAST_FILLED * n_expert:
        text = sources.expert_tiles(matrix.quant, has_bias=bool(more), of_heads=False)
        groups, n_tiles = _grouped(low, op, n_expert)
        _in_tiles(low, text, op.x, op.out, matrix, [groups, *more], n_tiles, (n_out, 0, n_out), op.n_used, slot)
        return
    text = sources.expert_matmul(matrix.quant, has_bias=bool(more), of_heads=False)
    _one_by_one(
        low, text, op.x, op.out, matrix, [ids.buffer, *more], (n_out, 0, n_out), op.n_used, slot, (ids.at, ids.row)
    )


def head_matmul(low: Lowering, op: HeadMatmul) -> None:
    """Every head by a matrix of its own."""
    x, (matrix, _) = low.place(op.x), low.there.matrices[op.weight]
    of_one = math.prod(low.there.program.tensors[op.weight].shape[:-1]) // op.n_heads
    begin, n_rows = (0, of_one) if op.rows is None else op.rows
    if op.turned:
        _turned(low, op, matrix, (of_one, begin, n_rows))
        return
    slot = _slot(low, op.x, op.weight, matrix.n_in, 0 if op.n_heads == 1 else matrix.n_in)
    rows, n = (of_one, begin, n_rows), low.n(x)
    if n >= LEAST_TOKENS:
        text = sources.expert_tiles(matrix.quant, has_bias=False, of_heads=True)
        _in_tiles(low, text, op.x, op.out, matrix, [], op.n_heads * blocks(n, TILE), rows, op.n_heads, slot)
        return
    text = sources.expert_matmul(matrix.quant, has_bias=False, of_heads=True)
    _one_by_one(low, text, op.x, op.out, matrix, [], rows, op.n_heads, slot, (0, 0))


def _slot(low: Lowering, x_name: str, weight: str, n_in: int, slot: int) -> int:
    """Groups of four numbers from the input of one expert to that of the next."""
    if slot % 4 or low.place(x_name).at % 4:
        raise UnsupportedError(
            f"{weight}: each expert, or head, has an input of {n_in} numbers; the gpu device takes multiples of 4.",
            code="MODEL_SHAPE",
        )
    return slot // 4


def _one_by_one(
    low: Lowering, text: str, x_name: str, out_name: str, matrix: Matrix, more: list[Any], rows: tuple[int, int, int],
    n_used: int, slot: int, ids: tuple[int, int],
) -> None:  # fmt: skip
    """``rows``: of an expert, of which are taken from, so many."""
    x, y = low.place(x_name), low.place(out_name)
    for part in matrix.parts:
        low.emit(
            text, [part.buffer, x.buffer, y.buffer, *more], "rrw" + "r" * len(more),
            (blocks(rows[2], LANES), n_used, low.n(y)), matrix.words, matrix.pieces, part.first, part.n, *rows, *ids,
            x.at // 4, x.row // 4, slot, y.at, y.row, flops=2 * low.n(y) * n_used * rows[2] * matrix.n_in,
        )  # fmt: skip


def _in_tiles(
    low: Lowering, text: str, x_name: str, out_name: str, matrix: Matrix, more: list[Any], n_tiles: int,
    rows: tuple[int, int, int], n_used: int, slot: int,
) -> None:  # fmt: skip
    x, y = low.place(x_name), low.place(out_name)
    for part in matrix.parts:
        low.emit(
            text, [part.buffer, x.buffer, y.buffer, *more], "rrw" + "r" * len(more),
            (blocks(rows[2], 64), 1, n_tiles), matrix.words, matrix.pieces, part.first, part.n, *rows, n_used, low.n(y),
            x.at // 4, x.row // 4, slot, y.at, y.row, flops=2 * low.n(y) * n_used * rows[2] * matrix.n_in,
        )  # fmt: skip


def _grouped(low: Lowering, op: ExpertMatmul, n_expert: int) -> tuple[Any, int]:
    """The pairs of this step by expert, put in order where they are not yet, and how many tiles they have at most."""
    ids, n = low.place(op.ids), low.n(low.place(op.ids))
    n_pairs = n * op.n_used
    n_tiles = min(n_pairs, n_expert + n_pairs // TILE)
    groups = low.there.scratch(f"groups {op.ids}", 4 * (1 + 4 * low.there.rows[ids.rows] * op.n_used))
    if op.ids not in low.grouped:
        low.grouped.add(op.ids)
        low.emit(
            source("expert_groups", N=n_expert), [ids.buffer, groups], "rw", (1, 1, 1), n_pairs, op.n_used, ids.at,
            ids.row, 1 + 3 * n_tiles,
        )  # fmt: skip
    return groups, n_tiles


def _turned(low: Lowering, op: HeadMatmul, matrix: Matrix, rows: tuple[int, int, int]) -> None:
    x, y = low.place(op.x), low.place(op.out)
    for part in matrix.parts:
        low.emit(
            source("head_matmul_turned", WEIGHTS=sources.weights(matrix.quant)), [part.buffer, x.buffer, y.buffer],
            "rrw", (blocks(matrix.pieces * 8), op.n_heads, low.n(y)), matrix.words, matrix.pieces, part.first, part.n,
            *rows, matrix.n_in, x.at, x.row, y.at, y.row, flops=2 * low.n(y) * op.n_heads * rows[2] * matrix.n_in,
        )  # fmt: skip


def expert_sum(low: Lowering, op: ExpertSum) -> None:
    """What a token's experts made, each by what it counts."""
    x, probs, y = low.place(op.x), low.place(op.probs), low.place(op.out)
    bound = bindings(0, [("x", x.buffer, "r"), ("probs", probs.buffer, "r"), ("y", y.buffer, "w")])
    n = low.n(y) * y.width
    low.emit(
        source("expert_sum", BINDINGS=bound.text, **bound.names), bound.buffers, bound.kinds, folded(blocks(n)),
        y.width, n, probs.width, x.at, x.row, probs.at, probs.row, y.at, y.row,
    )  # fmt: skip
