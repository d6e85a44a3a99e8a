"""Rules for mixtures of experts, and for heads with a matrix each: a head is an expert that every token is sent to.

A few tokens take a workgroup for each row of theirs. Many are put in the order of their experts first, and go through
tiles as other products do; both have the order of additions of ``shaders/matmul.wgsl``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.emitter import Lowering, blocks, clash, folded, is_added
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.sources import ADDED, LANES, SLICES, bindings, source
from edgellm.kernels.gpu.weights import Matrix, matrix_nbytes
from edgellm.kernels.ops import (
    Activate,
    Add,
    ExpertMatmul,
    ExpertSum,
    GatedUnit,
    HeadMatmul,
    Matmul,
    Route,
    SigmoidGate,
    SplitHeads,
)
from edgellm.kernels.program import Program

TILE = 32  # tokens of one expert that a workgroup takes
LEAST_TOKENS = 9  # that go in tiles
LEAST_FILLED = 8  # of the 32 columns of a tile, so many at least are tokens, on average


class _Routing(NamedTuple):
    """How experts are chosen, for whichever shader does it: what ``sources.routing`` takes, buffers, and immediates."""

    words: tuple[tuple[str, str | int], ...]
    vectors: tuple[str, ...]
    buffers: list[Any]
    kinds: str
    immediates: tuple[float, ...]


def _routing(low: Lowering, op: Route) -> _Routing:
    x, ids, y = low.place(op.logits), low.place(op.ids), low.place(op.probs)
    names = [(name, what) for name, what in ((op.scales, "scales"), (op.bias, "choice_bias")) if name is not None]
    score = {
        "softmax": ("exp(logits[begin + i] - largest) / whole", "exp(logits[begin + i] - largest)", "whole", "0.0"),
        "sigmoid": ("logistic(logits[begin + i])", "logistic(logits[begin + i])", "1.0", "1e-20"),
    }[op.scores]
    words: dict[str, str | int] = dict(zip(("SCORE", "WEIGHT", "WHOLE", "LEAST"), score, strict=True))
    if op.by_logits:
        words["SCORE"] = "logits[begin + i]"
    words["HAS_SCORES"] = "false" if op.by_logits or op.scores == "sigmoid" else "true"
    words["TIMES"] = " * scales[ids[p.ids_at + token * p.ids_row + k]]" if op.scales is not None else ""
    words["BIASED"] = " + choice_bias[i]" if op.bias is not None else ""
    words["N"] = x.width
    numbers = ids.width, *op.groups, op.best, int(op.over == "all"), x.at, x.row, y.at, y.row, float(op.factor)
    vectors = [low.vector(name) for name, _ in names]
    return _Routing(
        tuple(words.items()),
        tuple(what for _, what in names),
        [x.buffer, ids.buffer, y.buffer, *vectors],
        "rww" + "r" * len(names),
        numbers,
    )


def route(low: Lowering, op: Route) -> None:
    """The experts of a token and what they count; in the product that comes next, where that is of few tokens."""
    found, ids, product = _routing(low, op), low.place(op.ids), low.next()
    if isinstance(product, ExpertMatmul) and product.ids == op.ids:
        low.at += 1
        if _of_few(low, product, found):
            return
        low.at -= 1
    low.emit(
        sources.route(found.words, found.vectors), found.buffers, found.kinds, (low.n(ids), 1, 1), ids.at, ids.row,
        *found.immediates,
    )  # fmt: skip


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
    y, (matrix, begin) = low.place(op.out), low.there.matrices[op.weight]
    if not _takes_tiles(low, op):
        if not _summed(low, op):
            _of_few(low, op)
        return
    n_expert, n_out, _ = low.there.program.tensors[op.weight].shape
    text = sources.expert_tiles(matrix.quant, has_bias=op.bias is not None, of_heads=False)
    groups, n_tiles = _grouped(low, op, n_expert)
    more, rows = [groups, *([low.vector(op.bias)] if op.bias else [])], (n_out, begin, n_out)
    _in_tiles(low, text, low.place(op.x), y, n_out, matrix, more, n_tiles, rows, op.n_used, _slot_of(low, op))


def _takes_tiles(low: Lowering, op: ExpertMatmul) -> bool:
    n, n_expert = low.n(low.place(op.out)), low.there.program.tensors[op.weight].shape[0]
    return n >= LEAST_TOKENS and n * op.n_used >= LEAST_FILLED * n_expert


def _slot_of(low: Lowering, op: ExpertMatmul) -> int:
    x, n_in = low.place(op.x), low.there.program.tensors[op.weight].shape[-1]
    return _slot(x, op.weight, n_in, 0 if x.width == n_in else n_in)


class Beside(NamedTuple):
    """The gate of an expert that all tokens share, and what it lets through: rows [begin, begin + n) of a matrix, and
    n ``apart`` from them."""

    x: Place
    y: Place
    matrix: Matrix
    begin: int
    n: int
    apart: int
    activation: str


def beside(low: Lowering, at: int, shared: Beside) -> bool:
    """Emit these with the choice of experts and their first products, where these are the next ops but ``at`` - 1;
    whether so."""
    route, product = low.next(at), low.next(at + 1)
    if not (isinstance(route, Route) and isinstance(product, ExpertMatmul) and product.ids == route.ids):
        return False
    low.at += at + 1
    if _of_few(low, product, _routing(low, route), shared):
        return True
    low.at -= at + 1
    return False


def _of_few(
    low: Lowering, op: ExpertMatmul, routing: _Routing | None = None, shared: Beside | None = None
) -> bool:  # fmt: skip
    """Emit a product, with the gated unit, or the activation, behind it where one comes next; whether it could be, with
    this routing, and with what all tokens share."""
    ids, x, y, up, unit = low.place(op.ids), low.place(op.x), low.place(op.out), low.next(), low.next(2)
    (matrix, begin), (_, n_out, _) = low.there.matrices[op.weight], low.there.program.tensors[op.weight].shape
    if routing is not None and (_takes_tiles(low, op) or len(matrix.parts) > 1):
        return False
    bias: tuple[str, ...] = (op.bias,) if op.bias else ()
    rows, apart, activation = (n_out, begin, n_out), list[int](), ""
    if isinstance(up, ExpertMatmul) and isinstance(unit, GatedUnit) and _is_gated(low, op, up, unit):
        apart = [low.there.matrices[up.weight][1] - begin]
        bias = (op.bias, up.bias) if op.bias and up.bias else ()
    elif isinstance(up, SplitHeads) and isinstance(unit, GatedUnit) and _is_halved(low, op, up, unit):
        rows, apart = (n_out, begin, up.head_dim), [up.head_dim]
    curve = up if isinstance(up, Activate) and up.x == op.out and (up.out == op.out or low.is_dead(op.out, 1)) else None
    if apart and isinstance(unit, GatedUnit):
        y, activation = low.place(unit.out), unit.activation
    elif curve is not None:
        y = low.place(curve.out)
    if shared is not None and (not apart or activation != shared.activation or x != shared.x):
        return False
    more = [low.vector(*bias)] if bias else []
    n_slots, last = op.n_used, [*apart, *(routing.immediates if routing else ())]
    if shared is not None:
        more += [shared.matrix.parts[0].buffer, shared.y.buffer]
        n_slots += blocks(shared.n, rows[2])
        last += [shared.matrix.words, shared.begin, shared.apart, shared.n, shared.y.at, shared.y.row]
    between, kinds = ([ids.buffer], "r") if routing is None else (routing.buffers, routing.kinds)
    kinds = "rrw" + kinds + "r" * bool(bias) + "rw" * (shared is not None)
    buffers = [matrix.parts[0].buffer, x.buffer, y.buffer, *between, *more]
    if routing is not None and (len(buffers) > low.there.device.most_buffers or clash(buffers, kinds)):
        return False
    low.n_taken = 3 if apart else 1 + (curve is not None)
    text = sources.expert_matmul(
        matrix.quant, has_bias=bool(bias), of_heads=False, activation=activation,
        routing=(routing.words, routing.vectors) if routing else None, shared=shared.matrix.quant if shared else "",
        curve=curve.activation if curve is not None and not apart else "",
    )  # fmt: skip
    _one_by_one(low, text, x, y, rows[2], matrix, kinds, [*between, *more], rows, n_slots, _slot_of(low, op),
                (ids.at, ids.row), last)  # fmt: skip
    return True


def _is_halved(low: Lowering, op: ExpertMatmul, halves: SplitHeads, unit: GatedUnit) -> bool:
    """Whether a unit takes the two halves of what each expert makes, which nobody else wants."""
    names = halves.first, halves.second
    n_out = low.there.program.tensors[op.weight].shape[1]
    is_whole = halves.x == op.out and 2 * halves.head_dim == n_out and (unit.gate, unit.up) == names
    alone = low.is_dead(op.out, 1) and all(low.is_dead(name, 2) for name in names if name != unit.out)
    is_one = len(low.there.matrices[op.weight][0].parts) == 1
    return is_whole and alone and is_one and low.place(unit.out).buffer is not low.place(op.x).buffer


def _summed(low: Lowering, op: ExpertMatmul) -> bool:
    """Emit a product with the sum of what experts make, and the sum that this goes into, where these come next and
    nobody else wants what is between; whether so."""
    (matrix, begin), (_, n_out, _) = low.there.matrices[op.weight], low.there.program.tensors[op.weight].shape
    found, fits = low.next(), len(matrix.parts) == 1 and op.n_used <= SLICES
    more = [low.vector(op.bias)] if op.bias else []
    if not (isinstance(found, ExpertSum) and found.x == op.out and fits and low.is_dead(op.out, 1)):
        return False
    x, ids, probs, y, amount = low.place(op.x), low.place(op.ids), low.place(found.probs), low.place(found.out), 1.0
    shared = _shared_behind(low, found) if not more and op.n_used < SLICES else None
    low.n_taken = 2 + (shared.n_ops if shared else 0)
    add = low.next(low.n_taken)
    adds = isinstance(add, Add) and is_added(low, found.out, add, low.n_taken)
    if isinstance(add, Add) and adds:
        y, amount = low.place(add.out), float(add.scale)
        low.n_taken += 1
    more, last = (shared.buffers, shared.immediates) if shared else (more, [])
    buffers = [matrix.parts[0].buffer, x.buffer, y.buffer, ids.buffer, probs.buffer, *more]
    kinds = "rrwrr" + "r" * len(more)
    if y.rows != low.place(found.out).rows or clash(buffers, kinds):
        low.n_taken = 1
        return False
    low.emit(
        sources.expert_down(
            matrix.quant, op.n_used, has_bias=op.bias is not None, adds=adds, shared=shared.quant if shared else "",
            has_gate=bool(shared and shared.has_gate),
        ), buffers, kinds,
        (blocks(n_out, LANES), 1, low.n(y)), matrix.words, matrix.pieces, n_out, begin, n_out, ids.at, ids.row,
        x.at // 4, x.row // 4, _slot_of(low, op), probs.at, probs.row, y.at, y.row, amount, *last,
        flops=2 * low.n(y) * op.n_used * n_out * matrix.n_in,
    )  # fmt: skip
    return True


class _Shared(NamedTuple):
    """What all tokens take besides, behind a sum of experts: of how many ops, by what type, buffers and immediates."""

    n_ops: int
    quant: str
    has_gate: bool
    buffers: list[Any]
    immediates: list[int]


def _shared_behind(low: Lowering, found: ExpertSum) -> _Shared | None:
    """The last product of an expert that all tokens share, its gate, and the sum with what the others made."""
    product, gate = low.next(2), low.next(3)
    if not isinstance(product, Matmul) or product.bias is not None:
        return None
    has_gate = isinstance(gate, SigmoidGate) and gate.x == gate.out == product.out and low.place(gate.gate).width == 1
    add, x = low.next(3 + has_gate), low.place(product.x)
    is_sum = isinstance(add, Add) and add.scale == 1.0 and {add.x, add.y} == {found.out, product.out}
    (matrix, begin) = low.there.matrices[product.weight]
    if not (isinstance(add, Add) and is_sum and add.out == found.out and low.is_dead(product.out, 3 + has_gate)):
        return None
    if len(matrix.parts) > 1 or x.rows != low.place(found.x).rows:
        return None
    buffers, immediates = (
        [matrix.parts[0].buffer, x.buffer],
        [0, matrix.words, matrix.pieces, begin, x.at // 4, x.row // 4],
    )
    if has_gate and isinstance(gate, SigmoidGate):
        place = low.place(gate.gate)
        buffers, immediates = [*buffers, place.buffer], [*immediates, place.at, place.row]
    return _Shared(2 + has_gate, matrix.quant, has_gate, buffers, immediates)


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
    _one_by_one(low, text, x, y, y_slot, matrix, "rrw", [], rows, op.n_heads, slot, (0, 0), [])


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
    low: Lowering, text: str, x: Place, y: Place, y_slot: int, matrix: Matrix, kinds: str, more: list[Any],
    rows: tuple[int, int, int], n_used: int, slot: int, ids: tuple[int, int], last: list[float],
) -> None:  # fmt: skip
    """``rows``: of an expert, of which are taken from, so many; ``last``: how far these are from those that a gate lets
    through, and what else the shader takes."""
    for part in matrix.parts:
        low.emit(
            text, [part.buffer, x.buffer, y.buffer, *more], kinds,
            (blocks(rows[2], LANES), n_used, low.n(y)), matrix.words, matrix.pieces, part.first, part.n, *rows, *ids,
            x.at // 4, x.row // 4, slot, y.at, y.row, y_slot, *last,
            flops=2 * (1 + bool(last)) * low.n(y) * n_used * rows[2] * matrix.n_in, is_fixed=True,
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


def _groups_nbytes(op: ExpertMatmul, n_rows: int) -> int:
    return 4 * (1 + 4 * n_rows * op.n_used)


def groups_nbytes(program: Program, rows: Mapping[str, int]) -> int:
    """Bytes of the orders of pairs that a program's experts have."""
    ops = [op for op in program.ops if isinstance(op, ExpertMatmul)]
    sizes = {op.ids: _groups_nbytes(op, rows[program.buffers[op.ids].rows]) for op in ops}
    return sum(sizes.values())


def _grouped(low: Lowering, op: ExpertMatmul, n_expert: int) -> tuple[Any, int]:
    """The pairs of this step by expert, put in order where they are not yet, and how many tiles they have at most."""
    ids, n = low.place(op.ids), low.n(low.place(op.ids))
    n_pairs = n * op.n_used
    n_tiles = min(n_pairs, n_expert + n_pairs // TILE)
    groups = low.there.scratch(f"groups {op.ids}", _groups_nbytes(op, low.there.rows[ids.rows]))
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
    amount = 1.0
    if isinstance(add, Add) and is_added(low, op.out, add) and low.place(add.out).rows == y.rows:
        y, low.n_taken, value, amount = low.place(add.out), 2, ADDED, float(add.scale)
    bound = bindings(0, [("x", x.buffer, "r"), ("probs", probs.buffer, "r"), ("y", y.buffer, "w")])
    n = low.n(y) * y.width
    low.emit(
        source("expert_sum", BINDINGS=bound.text, SUM=value.format(**bound.names), **bound.names), bound.buffers,
        bound.kinds, folded(blocks(n)), y.width, n, probs.width, x.at, x.row, probs.at, probs.row, y.at, y.row, amount,
    )  # fmt: skip
