"""Rules for products: rows of one matrix or of two, what is done to their input before and to their output behind."""

from __future__ import annotations

from typing import Any, NamedTuple

from edgellm.kernels.gpu import experts, latent, recurrent, sources
from edgellm.kernels.gpu.device import MOST_NUMBERS
from edgellm.kernels.gpu.emitter import Lowering, blocks, clash, folded, is_added
from edgellm.kernels.gpu.layout import PIECE, Place
from edgellm.kernels.gpu.sources import LANES, MOST_COLUMNS
from edgellm.kernels.gpu.weights import Matrix
from edgellm.kernels.ops import Activate, Add, GatedUnit, LayerNorm, Matmul, RMSNorm

MOST_MATRICES = 4  # of one dispatch
GATED_COLUMNS = (1, 2, 4)  # of products of a gate and what it lets through in one


class _Run(NamedTuple):
    """Products of one input that are rows [begin, end) of a matrix, and columns beside each other of a buffer."""

    ops: list[Matmul]
    matrix: Matrix
    begin: int
    end: int


def _run_of(low: Lowering, op: Matmul, at: int = 0) -> _Run:
    """The products from ``op`` on that are one; it is the next but ``at`` - 1."""
    run, out, (matrix, begin) = [op], low.made(op.out), low.there.matrices[op.weight]
    end, width = begin + low.there.program.tensors[op.weight].shape[0], out.width
    while isinstance(other := low.next(at + len(run)), Matmul) and other.x == op.x:
        if _is_gate(low, at + len(run)):
            break  # they are one product with their unit
        place, (of, first) = low.made(other.out), low.there.matrices[other.weight]
        beside = place.buffer is out.buffer and place.at == out.at + width and (other.bias is None) == (op.bias is None)
        if of is not matrix or first != end or not beside:
            break
        run.append(other)
        end, width = end + low.there.program.tensors[other.weight].shape[0], width + place.width
    return _Run(run, matrix, begin, end)


def _is_gate(low: Lowering, at: int) -> bool:
    """Whether the next ops but ``at`` - 1 are a gate, what it lets through, and their unit."""
    gate, up, unit = (low.next(at + i) for i in range(3))
    if not (isinstance(gate, Matmul) and isinstance(up, Matmul) and isinstance(unit, GatedUnit)):
        return False
    return gate.x == up.x and (unit.gate, unit.up) == (gate.out, up.out)


def matmul(low: Lowering, op: Matmul) -> None:
    """A product, with those of the same input beside it, and what comes behind it."""
    found, out = _run_of(low, op), low.made(op.out)
    run, matrix, begin, end = found
    low.n_taken, epilogue = len(run), "bias" if op.bias else "set"
    after = low.next(len(run))
    if isinstance(after, GatedUnit) and _gated_product(low, run, matrix, begin, after):
        return
    if isinstance(after, Matmul) and _several_products(low, found):
        return
    amount = 1.0
    if len(run) == 1 and isinstance(after, Add) and _is_residual(low, op, after):
        low.n_taken, epilogue, out, amount = 2, f"{epilogue} add", low.place(after.out), after.scale
    curve = _curve_behind(low, op) if len(run) == 1 else None
    if curve is not None:
        low.n_taken, out = 2, low.place(curve.out)
    through = _unit_behind(low, op) if len(run) == 1 else None
    if through is not None:
        low.n_taken, out = 2, low.place(through.out)
    bias = [low.vector(*[one.bias for one in run if one.bias])] if op.bias else []
    made = [out._replace(width=end - begin)] if len(matrix.parts) == 1 and through is None else []
    conv = recurrent.behind(low, len(run), made) if made else None
    if conv is not None and _columns(low.counts.tokens) > 0:
        whole = [matrix.parts[0].buffer, low.place(op.x).buffer, out.buffer, *bias, *conv.buffers]
        conv = conv if _fits(low, whole, "rrw" + "r" * len(bias) + conv.kinds, 11 + len(conv.immediates)) else None
    else:
        conv = None
    low.n_taken += conv is not None
    _product(
        low, op.x, matrix, begin, end, out, epilogue, amount, bias, curve.activation if curve else "", conv, through
    )
    if not low.fuse and op.out in low.there.made:  # a hook sees it as the model has it
        latent.join(low, op.out, low.there.cuts[op.out])


def _fits(low: Lowering, buffers: list[Any], kinds: str, n_numbers: int) -> bool:
    """Whether a shader can have so many buffers and numbers, each buffer that it writes once."""
    fits = len(buffers) <= low.there.device.most_buffers and n_numbers <= MOST_NUMBERS
    return fits and not clash(buffers, kinds)


def normed(low: Lowering, norm: RMSNorm) -> bool:
    """Emit a norm of whole rows in the products that read it, where these have few rows: each 16 of them norm it again.
    Whether so."""
    op = low.next()
    if not isinstance(op, Matmul) or op.x != norm.out:
        return False
    low.at += 1
    x, h, runs = low.place(norm.x), low.place(op.x), [_run_of(low, op)]
    columns, n_in = _columns(low.n(x)), runs[0].matrix.n_in
    is_whole = low.there.program.tensors[norm.weight].shape[-1] == x.width == n_in and x.width % PIECE == 0
    fits = columns > 0 and is_whole and x.at % 4 == h.at % 4 == 0 and len(runs[0].matrix.parts) == 1
    while fits and len(runs) < MOST_MATRICES and _stands_beside(low, runs, alike=True):
        runs.append(_next_run(low, runs))
    while fits and runs:
        if 2 * sum(run.end - run.begin for run in runs) <= n_in and _emit_runs(low, runs, columns, norm):
            return True
        runs.pop()
    low.at -= 1
    return False


def _columns(m: int) -> int:
    """Columns of the product with few that m are computed by; 0 where they go in tiles."""
    return next((n for n in (1, 2, 4, MOST_COLUMNS) if n >= m), 0)


def _curve_behind(low: Lowering, op: Matmul) -> Activate | None:
    """The activation that comes next, where nobody else wants what it is of."""
    after = low.next()
    if not isinstance(after, Activate) or after.x != op.out or op.out in low.there.made:
        return None
    place, x = low.place(after.out), low.place(op.x)
    is_alone = after.out == op.out or low.is_dead(op.out, 1)
    return after if is_alone and place.rows == low.place(op.out).rows and place.buffer is not x.buffer else None


def _unit_behind(low: Lowering, op: Matmul) -> GatedUnit | None:
    """The unit that comes next, where a product is its gate, which nobody else wants, and what that lets through is
    there."""
    after = low.next()
    if not isinstance(after, GatedUnit) or after.gate != op.out or after.up == op.out or op.out in low.there.made:
        return None
    out, up, x = low.place(after.out), low.place(after.up), low.place(op.x)
    is_alone = after.out == op.out or low.is_dead(op.out, 1)
    is_apart = out.buffer is not x.buffer and up.buffer not in (x.buffer, out.buffer) and out.rows == x.rows == up.rows
    return after if is_alone and is_apart else None


def _is_residual(low: Lowering, op: Matmul, add: Add) -> bool:
    """Whether a sum only adds what the product makes to a buffer, and nobody else wants the product."""
    if not is_added(low, op.out, add):
        return False
    place = low.place(add.out)
    return place.rows == low.place(op.out).rows and place.buffer is not low.place(op.x).buffer


def _several_products(low: Lowering, first: _Run) -> bool:
    """Emit products by several matrices, of types that may differ, as one, where there are few columns; whether there
    are such. They have one input, or inputs of their own."""
    x = low.place(first.ops[0].x)
    columns, runs = _columns(low.n(x)), [first]
    while columns and len(runs) < MOST_MATRICES and _stands_beside(low, runs):
        runs.append(_next_run(low, runs))
    while len(runs) > 1:
        if _emit_runs(low, runs, columns):
            return True
        runs.pop()
    return False


def _n_ops(runs: list[_Run]) -> int:
    return sum(len(run.ops) for run in runs)


def _next_run(low: Lowering, runs: list[_Run]) -> _Run:
    op = low.next(_n_ops(runs))
    assert isinstance(op, Matmul), "looked at before"
    return _run_of(low, op, _n_ops(runs))


def _stands_beside(low: Lowering, runs: list[_Run], *, alike: bool = False) -> bool:
    """Whether what comes next are products that can go with these; ``alike``: of the same input alone."""
    op, first = low.next(_n_ops(runs)), runs[0].ops[0]
    if not isinstance(op, Matmul) or (alike and op.x != first.x):
        return False
    other = _next_run(low, runs)
    behind = low.next(_n_ops([*runs, other]))
    if isinstance(behind, GatedUnit) and (
        op.x != first.x or [one.out for one in other.ops] == [behind.gate, behind.up]
    ):
        return False  # which are a product of their own
    if op.x != first.x and not isinstance(behind, RMSNorm | LayerNorm | Add):
        return False
    inputs = {id(low.place(run.ops[0].x).buffer) for run in (*runs, other)}
    outputs = {id(low.made(run.ops[0].out).buffer) for run in (*runs, other)}
    is_alike = low.made(op.out).rows == low.made(first.out).rows == low.place(op.x).rows
    is_alike = is_alike and (op.bias is None) == (first.bias is None)
    return is_alike and not inputs & outputs and all(len(run.matrix.parts) == 1 for run in (*runs, other))


def _emit_runs(low: Lowering, runs: list[_Run], columns: int, norm: RMSNorm | None = None) -> bool:
    """Emit these, whose outputs are apart, as one dispatch, with the norm of their input; whether a shader can have so
    many buffers and numbers."""
    first, h = runs[0], low.place(runs[0].ops[0].x)
    x = low.place(norm.x) if norm else h
    y, ops = low.made(first.ops[0].out), [op for run in runs for op in run.ops]
    bias = [low.vector(*[op.bias for op in ops if op.bias])] if ops[0].bias else []
    others, buffers, kinds, numbers = list[sources.Other](), list[Any](), "rrw", list[float]()
    if norm is not None:
        buffers, kinds = [low.vector(norm.weight), h.buffer], "rrwrw"
        numbers = [h.at // 4, h.row // 4, float(norm.eps)]
    n_groups, n_before = blocks(first.end - first.begin, LANES), first.end - first.begin
    for run in runs[1:]:
        own, z = low.place(run.ops[0].x), low.made(run.ops[0].out)
        has_input, has_output = own != h, z.buffer is not y.buffer
        others.append(
            sources.Other(run.matrix.quant, run.matrix.words, run.matrix.pieces, own.row // 4 if has_input else None,
                          z.row if has_output else None)
        )  # fmt: skip
        buffers += [run.matrix.parts[0].buffer, *[own.buffer] * has_input, *[z.buffer] * has_output]
        kinds += "r" + "r" * has_input + "w" * has_output
        numbers += [n_groups, run.begin, run.end, z.at - run.begin, n_before - run.begin, *[own.at // 4] * has_input]
        n_groups, n_before = n_groups + blocks(run.end - run.begin, LANES), n_before + run.end - run.begin
    whole = [first.matrix.parts[0].buffer, x.buffer, y.buffer, *buffers, *bias]
    kinds += "r" * len(bias)
    made = [low.made(run.ops[0].out)._replace(width=run.end - run.begin) for run in runs]
    conv = recurrent.behind(low, len(ops), made)
    if conv is not None and not (
        _fits(low, [*whole, *conv.buffers], kinds + conv.kinds, 11 + len(numbers) + len(conv.immediates))
    ):
        conv = None
    if not _fits(low, whole, kinds, 11 + len(numbers)):
        return False
    low.n_taken = len(ops) + (conv is not None)
    low.emit(
        sources.matmul(
            first.matrix.quant, columns, "bias" if bias else "set", norms=norm is not None, others=tuple(others),
            conv=conv.of if conv else None, convolved=conv.run if conv else 0,
        ), [*whole, *(conv.buffers if conv else [])], kinds + (conv.kinds if conv else ""), folded(n_groups),
        first.matrix.words, first.matrix.pieces, first.begin, first.end, low.n(x), x.at // 4, x.row // 4,
        y.at - first.begin, y.row, -first.begin, 1.0, *numbers, *(conv.immediates if conv else []),
        flops=2 * low.n(x) * sum((run.end - run.begin) * run.matrix.n_in for run in runs),
    )  # fmt: skip
    return True


def _gated_product(low: Lowering, run: list[Matmul], matrix: Matrix, begin: int, unit: GatedUnit) -> bool:
    """Emit a gate and what it lets through as one product, where there are few columns; whether it could be."""
    x, out, m = low.place(run[0].x), low.place(unit.out), low.n(low.place(run[0].x))
    columns = next((n for n in GATED_COLUMNS if n >= m), 0)
    outs = [half for op in run for half in low.halves(op.out)]
    fits = outs == [unit.gate, unit.up] and run[0].bias is None and len(matrix.parts) == 1
    alone = all(low.is_dead(name, len(run)) for name in (unit.gate, unit.up) if name != unit.out)
    if not (columns and fits and alone) or out.buffer is x.buffer or out.rows != x.rows:
        return False
    n, part = out.width, matrix.parts[0]
    if experts.beside(low, len(run) + 1, experts.Beside(x, out, matrix, begin, n, n, unit.activation)):
        return True
    low.n_taken = len(run) + 1
    low.emit(
        sources.matmul(matrix.quant, columns, activation=unit.activation), [part.buffer, x.buffer, out.buffer], "rrw",
        folded(blocks(n, LANES)), matrix.words, matrix.pieces, begin, begin + n, m, x.at // 4, x.row // 4,
        out.at - begin, out.row, 0, 1.0, n, flops=4 * m * n * matrix.n_in,
    )  # fmt: skip
    return True


def _product(
    low: Lowering, x_name: str, matrix: Matrix, begin: int, end: int, out: Place, epilogue: str, amount: float,
    bias: list[Any], curve: str = "", conv: recurrent.Behind | None = None, unit: GatedUnit | None = None,
) -> None:  # fmt: skip
    """Rows [begin, end) of a matrix times x, into the columns of ``out``; ``amount`` of it, or a ``curve`` of it, or
    what it lets through."""
    x = low.place(x_name)
    m = low.n(x)
    columns = _columns(m)
    up, through = (low.place(unit.up), unit.activation) if unit else (out, "")
    if columns:
        text = sources.matmul(
            matrix.quant, columns, epilogue, curve=curve, conv=conv.of if conv else None, through=through
        )
    else:
        text = sources.matmul_tiles(matrix.quant, epilogue, curve, through)
    more = [*bias, *([up.buffer] if unit else []), *(conv.buffers if conv else [])]
    for part in matrix.parts:
        first, last = max(begin, part.first) - part.first, min(end, part.first + part.n) - part.first
        if first >= last:
            continue
        grid = folded(blocks(last - first, LANES if columns else 64))
        low.emit(
            text, [part.buffer, x.buffer, out.buffer, *more],
            "rrw" + "r" * (len(bias) + bool(unit)) + (conv.kinds if conv else ""),
            grid if columns else (*grid[:2], blocks(m, 32)),
            matrix.words, matrix.pieces, first, last, m, x.at // 4, x.row // 4, out.at + part.first - begin, out.row,
            part.first - begin, float(amount), *([up.at + part.first - begin, up.row] if unit else []),
            *(conv.immediates if conv else []),
            flops=2 * m * (last - first) * matrix.n_in,
        )  # fmt: skip
