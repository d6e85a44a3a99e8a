"""Rules for mixtures of experts, and for heads with a matrix each: a head is an expert that every token is sent to.

A few tokens take a workgroup for each row of theirs. Many are put in the order of their experts first, and go through
tiles as other products do; both have the order of additions of ``shaders/matmul.wgsl``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.emitter import Lowering, blocks, folded, is_added
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.sources import LANES, bindings, source, vector
from edgellm.kernels.gpu.weights import Matrix, matrix_nbytes
from edgellm.kernels.ops import Add, ExpertMatmul, ExpertSum, GatedUnit, HeadMatmul, Route
from edgellm.kernels.program import Program

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
    softmax = {"SCORE": "exp(x[begin + i] - largest) / whole", "WEIGHT": "exp(x[begin + i] - largest)",
               "WHOLE": "whole", "LEAST": "0.0"}  # fmt: skip
    sigmoid = {"SCORE": "logistic(x[begin + i])", "WEIGHT": "logistic(x[begin + i])", "WHOLE": "1.0", "LEAST": "1e-20"}
    if op.by_logits:
        softmax["SCORE"] = "x[begin + i]"
    text = source(
        "route", KEYS=sources.text("keys"), VECTORS=declared, TIMES=times, N=x.width,
        BIASED=" + bias[i]" if op.bias is not None else "", **(sigmoid if op.scores == "sigmoid" else softmax),
    )  # fmt: skip
    low.emit(
        text, buffers, kinds, grid, ids.width, *op.groups, op.best, int(op.over == "all"), *places, float(op.factor)
    )


def gates(program: Program, max_binding: int) -> list[tuple[str, ...]]:
    """Weights of experts, of a gate and of what it lets through, that are to stand in one matrix, in one binding."""
    return [
        (gate.weight, up.weight)
        for gate, up in itertools.pairwise(program.ops)
        if isinstance(gate, ExpertMatmul) and isinstance(up, ExpertMatmul) and _are_alike(program, gate, up)
        and sum(matrix_nbytes(program.tensors[op.weight]) for op in (gate, up)) <= max_binding
    ]  # fmt: skip


def _are_alike(program: Program, gate: ExpertMatmul, up: ExpertMatmul) -> bool:
    first, second = (program.tensors[op.weight] for op in (gate, up))
    same = (gate.x, gate.ids, gate.n_used, gate.bias is None) == (up.x, up.ids, up.n_used, up.bias is None)
    return same and (first.quant, first.shape) == (second.quant, second.shape) and gate.weight != up.weight


def expert_matmul(low: Lowering, op: ExpertMatmul) -> None:
    """Every token by the matrices of its experts."""
    ids, y = low.place(op.ids), low.place(op.out)
    (matrix, begin), (n_expert, n_out, n_in) = low.there.matrices[op.weight], low.there.program.tensors[op.weight].shape
    slot = _slot(low.place(op.x), op.weight, n_in, 0 if low.place(op.x).width == n_in else n_in)
    more, rows = [low.vector(op.bias)] if op.bias else [], (n_out, begin, n_out)
    n = low.n(y)
    if n >= LEAST_TOKENS and n * op.n_used >= LEAST_FILLED * n_expert:
        text = sources.expert_tiles(matrix.quant, has_bias=bool(more), of_heads=False)
        groups, n_tiles = _grouped(low, op, n_expert)
        _in_tiles(low, text, low.place(op.x), y, n_out, matrix, [groups, *more], n_tiles, rows, op.n_used, slot)
        return
    activation, apart = "", list[int]()
    up, unit = low.next(), low.next(2)
    if isinstance(up, ExpertMatmul) and isinstance(unit, GatedUnit) and _is_gated(low, op, up, unit):
        y, activation, low.n_taken = low.place(unit.out), unit.activation, 3
        apart = [low.there.matrices[up.weight][1] - begin]
        more = [low.vector(op.bias, up.bias)] if op.bias and up.bias else []
    text = sources.expert_matmul(matrix.quant, has_bias=bool(more), of_heads=False, activation=activation)
    where = (ids.at, ids.row), apart
    _one_by_one(low, text, low.place(op.x), y, n_out, matrix, [ids.buffer, *more], rows, op.n_used, slot, *where)


def _is_gated(low: Lowering, gate: ExpertMatmul, up: ExpertMatmul, unit: GatedUnit) -> bool:
    """Whether a unit takes these two products, which nobody else wants, of one matrix that one binding holds."""
    (matrix, _), (other, _) = (low.there.matrices[op.weight] for op in (gate, up))
    fits = other is matrix and len(matrix.parts) == 1 and _are_alike(low.there.program, gate, up)
    alone = all(low.is_dead(name, 2) for name in (gate.out, up.out) if name != unit.out)
    out = low.place(unit.out)
    return fits and alone and (unit.gate, unit.up) == (gate.out, up.out) and out.buffer is not low.place(gate.x).buffer


def head_matmul(low: Lowering, op: HeadMatmul) -> None:
    """Every head by a matrix of its own."""
    n_in = low.there.matrices[op.weight][0].n_in
    if op.turned:
        _turned(low, op, low.there.matrices[op.weight][0], _rows_of(low, op))
        return
    of_heads(low, op, low.place(op.x), 0 if op.n_heads == 1 else n_in, low.place(op.out), _rows_of(low, op)[2])


def of_heads(low: Lowering, op: HeadMatmul, x: Place, x_slot: int, y: Place, y_slot: int) -> None:
    """The same from columns of x, ``x_slot`` from head to head, into columns of y, ``y_slot`` from head to head."""
    (matrix, _), rows, n = low.there.matrices[op.weight], _rows_of(low, op), low.n(x)
    slot = _slot(x, op.weight, matrix.n_in, x_slot)
    if n >= LEAST_TOKENS:
        text = sources.expert_tiles(matrix.quant, has_bias=False, of_heads=True)
        _in_tiles(low, text, x, y, y_slot, matrix, [], op.n_heads * blocks(n, TILE), rows, op.n_heads, slot)
        return
    text = sources.expert_matmul(matrix.quant, has_bias=False, of_heads=True)
    _one_by_one(low, text, x, y, y_slot, matrix, [], rows, op.n_heads, slot, (0, 0), [])


def _rows_of(low: Lowering, op: HeadMatmul) -> tuple[int, int, int]:
    """Rows of a head's matrix, the first of them that is taken, and how many are."""
    of_one = math.prod(low.there.program.tensors[op.weight].shape[:-1]) // op.n_heads
    return (of_one, 0, of_one) if op.rows is None else (of_one, *op.rows)


def _slot(x: Place, weight: str, n_in: int, slot: int) -> int:
    """Groups of four numbers from the input of one expert to that of the next."""
    if slot % 4 or x.at % 4:
        raise UnsupportedError(
            f"{weight}: each expert, or head, has an input of {n_in} numbers; the gpu device takes multiples of 4.",
            code="MODEL_SHAPE",
        )
    return slot // 4


def _one_by_one(
    low: Lowering, text: str, x: Place, y: Place, y_slot: int, matrix: Matrix, more: list[Any],
    rows: tuple[int, int, int], n_used: int, slot: int, ids: tuple[int, int], apart: list[int],
) -> None:  # fmt: skip
    """``rows``: of an expert, of which are taken from, so many; ``apart`` from those that a gate lets through."""
    for part in matrix.parts:
        low.emit(
            text, [part.buffer, x.buffer, y.buffer, *more], "rrw" + "r" * len(more),
            (blocks(rows[2], LANES), n_used, low.n(y)), matrix.words, matrix.pieces, part.first, part.n, *rows, *ids,
            x.at // 4, x.row // 4, slot, y.at, y.row, y_slot, *apart,
            flops=2 * (1 + len(apart)) * low.n(y) * n_used * rows[2] * matrix.n_in,
        )  # fmt: skip


def _in_tiles(
    low: Lowering, text: str, x: Place, y: Place, y_slot: int, matrix: Matrix, more: list[Any], n_tiles: int,
    rows: tuple[int, int, int], n_used: int, slot: int,
) -> None:  # fmt: skip
    for part in matrix.parts:
        low.emit(
            text, [part.buffer, x.buffer, y.buffer, *more], "rrw" + "r" * len(more),
            (blocks(rows[2], 64), 1, n_tiles), matrix.words, matrix.pieces, part.first, part.n, *rows, n_used, low.n(y),
            x.at // 4, x.row // 4, slot, y.at, y.row, y_slot, flops=2 * low.n(y) * n_used * rows[2] * matrix.n_in,
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
    x, probs, y, add, value = low.place(op.x), low.place(op.probs), low.place(op.out), low.next(), "sum"
    if isinstance(add, Add) and is_added(low, op.out, add) and low.place(add.out).rows == y.rows:
        y, low.n_taken, value = low.place(add.out), 2, f"fma({float(add.scale)}, sum, {{y}}[to])"
    bound = bindings(0, [("x", x.buffer, "r"), ("probs", probs.buffer, "r"), ("y", y.buffer, "w")])
    n = low.n(y) * y.width
    low.emit(
        source("expert_sum", BINDINGS=bound.text, SUM=value.format(**bound.names), **bound.names), bound.buffers,
        bound.kinds, folded(blocks(n)), y.width, n, probs.width, x.at, x.row, probs.at, probs.row, y.at, y.row,
    )  # fmt: skip
