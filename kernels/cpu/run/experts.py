"""Rules for the ops of experts, and of heads. ``low`` is the lowering of a program, see lowering.py."""

from __future__ import annotations

from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.weights import QUANTIZED
from edgellm.kernels.ops import ExpertMatmul, ExpertSum, HeadMatmul, Route
from edgellm.kernels.program import Program


def _route(low: Any, op: Route) -> None:
    """The experts of a token."""
    n_expert, n_groups = low.width(op.logits), op.groups[0]
    if not op.by_logits and (n_expert + n_groups) * 4 > layout.EDGE:
        raise UnsupportedError(
            f"{n_expert:,} experts that are chosen by their scores; the CPU kernels take up to {layout.EDGE // 4:,}.",
            code="MODEL_SHAPE",
        )
    arguments = layout.ROUTE(
        **low.where(logits=op.logits, ids=op.ids, probs=op.probs), n_expert=n_expert,
        n_used=low.width(op.ids), row_kind=low.row_kind(op.logits), over_all=int(op.over == "all"),
        scales=low.vector(op.scales) if op.scales else 0, by_logits=int(op.by_logits),
        sigmoid=int(op.scores == "sigmoid"), bias=low.vector(op.bias) if op.bias else 0, factor=float(op.factor),
        n_groups=n_groups, groups_used=op.groups[1], best=op.best,
    )  # fmt: skip
    low.emit(op, "route", arguments, alone=True)


def _expert_matmul(low: Any, op: ExpertMatmul) -> None:
    """A product of pairs, in the order of their experts."""
    n_expert, n_out, n_in = low.program.tensors[op.weight].shape
    if n_out < 8:
        raise UnsupportedError(
            f"{op.weight}: its experts have {n_out} rows; the CPU kernels take 8 at once, and more.",
            code="MODEL_SHAPE",
        )
    quant, experts, w_row = low.experts(op.weight)
    groups = low.grouped(op.ids, n_expert)
    forms: dict[str, Any] = {op.ids: groups}
    x = low.slots(op.x, n_in)
    if quant in QUANTIZED:
        form = forms[op.x] = low.quantized_pairs(op.x, op.ids, n_in, op.n_used, groups)
        x = {"x": form.address, "x_row": form.row_nbytes, "x_slot": 0}
    arguments = layout.EXPERT_MATMUL(
        **x, experts=experts, w_row=w_row, n_out=n_out, n_in=n_in, **low.where(out=op.out), groups=groups.groups,
        pairs=groups.pairs, n_used=op.n_used, bias=low.vector(op.bias, layout.PANEL_ROWS) if op.bias else 0,
    )  # fmt: skip
    low.of_experts[len(low.rows)] = op.weight
    low.emit(op, f"expert_matmul_{quant.lower()}", arguments, alone=False, forms=forms)


def _expert_sum(low: Any, op: ExpertSum) -> None:
    """The sum of a token's experts, by their shares."""
    n_used, width = low.width(op.probs), low.width(op.out)
    arguments = layout.EXPERT_SUM(
        **low.where(x=op.x, probs=op.probs, out=op.out), width=width, n_used=n_used, row_kind=low.row_kind(op.out)
    )
    low.emit(op, "expert_sum", arguments, alone=width * n_used <= layout.ALONE_WIDTH)


def _head_matmul(low: Any, op: HeadMatmul) -> None:
    """A product of heads: each is an expert that every token is sent to, or is turned while it is read."""
    if op.turned:
        _turned_heads(low, op)
        return
    tensor = low.program.tensors[op.weight]
    n_out, n_in = low.width(op.out) // op.n_heads, low.width(op.x) // op.n_heads
    if n_out < 8:
        raise UnsupportedError(
            f"{op.weight}: its heads have {n_out} rows; the CPU kernels take 8 at once, and more.", code="MODEL_SHAPE"
        )
    quant, address, w_row = low.matrix(op.weight)
    each, first = (n_out, 0) if op.rows is None else (tensor.shape[0] // op.n_heads, op.rows[0])
    table = low.memory.zeros(1, op.n_heads, "int64")
    if low.memory.real:
        table[:] = [address + (i * each + first - i * n_out) * w_row for i in range(op.n_heads)]
    groups = low.by_heads(op.x, op.n_heads)
    forms: dict[str, Any] = {}
    x = low.slots(op.x, n_in)
    if quant in QUANTIZED:
        form = forms[op.x] = low.quantized_pairs(op.x, op.x, n_in, op.n_heads, groups)
        x = {"x": form.address, "x_row": form.row_nbytes, "x_slot": 0}
    arguments = layout.EXPERT_MATMUL(
        **x, experts=table.ctypes.data, w_row=w_row, n_out=n_out, n_in=n_in, **low.where(out=op.out),
        groups=groups.groups, pairs=groups.pairs, n_used=op.n_heads, bias=0,
    )  # fmt: skip
    low.emit(op, f"expert_matmul_{quant.lower()}", arguments, alone=False, forms=forms, also_reads=[groups.name])


def _turned_heads(low: Any, op: HeadMatmul) -> None:
    quant, w, w_row = low.matrix(op.weight)
    first, n_in = _turned_rows(low.program, op)
    arguments = layout.TURNED_HEADS(
        **low.where(x=op.x), w=w, w_row=w_row, first=first, each=low.program.tensors[op.weight].shape[0] // op.n_heads,
        n_heads=op.n_heads, n_in=n_in, n_out=low.width(op.out) // op.n_heads, **low.where(out=op.out),
        row_kind=low.row_kind(op.x), unpack=0,
    )  # fmt: skip
    low.calls.append((len(low.rows), "unpack", f"embed_{quant.lower()}"))
    low.emit(op, "head_matmul_turned", arguments, alone=False)


def scratch_nbytes(program: Program, max_tokens: int, form: str) -> int:
    """Scratch of one thread for products with experts, and with heads; 0 without any."""
    has_groups = any(isinstance(op, ExpertMatmul | HeadMatmul) for op in program.ops)
    return max(_turned_scratch_nbytes(program), layout.expert_scratch_nbytes(max_tokens, form) if has_groups else 0)


def _turned_scratch_nbytes(program: Program) -> int:
    return max((
        layout.EDGE + layout.turned_record_nbytes(_turned_rows(program, op)[1])
        + _turned_rows(program, op)[1] * layout.padded(program.tensors[op.weight].shape[1]) * 4
        for op in program.ops if isinstance(op, HeadMatmul) and op.turned
    ), default=0)  # fmt: skip


def _turned_rows(program: Program, op: HeadMatmul) -> tuple[int, int]:
    """Of a head's rows the first one that counts, and how many do."""
    return op.rows or (0, program.tensors[op.weight].shape[0] // op.n_heads)


RULES: dict[type, Any] = {
    Route: _route,
    ExpertMatmul: _expert_matmul,
    ExpertSum: _expert_sum,
    HeadMatmul: _head_matmul,
}
