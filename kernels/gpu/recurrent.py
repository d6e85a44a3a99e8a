"""Rules for the ops of recurrent layers, whose state lies in the cache on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.emitter import Lowering, blocks, folded
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.sources import bindings, source, vector
from edgellm.kernels.ops import CausalConv, DeltaGates, DeltaRule, GatedNorm, GatedUnit, ShortConv, SSMGates, SSMScan

COLUMNS = 16  # of a head's state, that one workgroup of the delta rule owns


def short_conv(low: Lowering, op: ShortConv) -> None:
    """The gated convolution of LFM2."""
    out = "x[p.x_at + token * p.x_row + p.width + channel] * sum"
    _convolution(low, op.bcx, op, VALUE="x[row] * x[row + 2u * p.width]", OUT=out)


def causal_conv(low: Lowering, op: CausalConv) -> None:
    """The plain one before a delta rule, or a state space."""
    out = "silu(sum + bias[channel], 1.0)" if op.bias is not None else "silu(sum, 1.0)"
    _convolution(low, op.x, op, op.bias, VALUE="x[row]", OUT=out)


def _convolution(low: Lowering, x_name: str, op: ShortConv | CausalConv, bias: str | None = None, **words: str) -> None:
    x, y, (states,) = low.place(x_name), low.place(op.out), low.there.pool.arrays[op.layer]
    weight, group = low.there.program.tensors[op.weight], low.there.program.table_of(op.layer)
    taps, grid = weight.shape[1], (blocks(y.width), low.n(y), 1)
    own, declared = ([low.vector(bias)], vector(5, "bias")) if bias is not None else ([], "")
    keeps, state = taps > 1, source("conv_state", TAPS=taps, VALUE=words["VALUE"])
    at_once = keeps and not low.counts.writes_over
    kept = {"KEEP": "keep_state(token, channel);", "KEEP_STATE": state, "ACCESS": "read_write"} if at_once else {
        "KEEP": "", "KEEP_STATE": "", "ACCESS": "read"}  # fmt: skip
    low.emit(
        source("short_conv", TAPS=taps, FUNCTIONS=sources.text("activations"), BIAS=declared, **words, **kept),
        [low.step, low.taps(op.weight), states.buffer, x.buffer, y.buffer, *own],
        ("rrwrw" if at_once else "rrrrw") + "r" * len(own), grid, y.width, group, x.at, x.row, y.at, y.row,
    )  # fmt: skip
    if keeps and not at_once:
        low.emit(
            source("conv_state_alone", KEEP_STATE=state), [low.step, states.buffer, x.buffer], "rwr", grid, y.width,
            group, x.at, x.row,
        )  # fmt: skip


class Behind(NamedTuple):
    """A convolution as a part of the product that makes its input, for ``sources.matmul``; what is bound besides.

    run   which of the places that products leave has its input
    """

    of: tuple[int, bool]
    run: int
    buffers: list[Any]
    kinds: str
    immediates: list[int]


def behind(low: Lowering, at: int, made: Sequence[Place]) -> Behind | None:
    """The next op but ``at`` - 1, where it is a convolution of columns that a product leaves at ``made``.

    Of tokens that are alone in their sequences: a thread has a channel of theirs, with its state.
    """
    op = low.next(at)
    if not isinstance(op, CausalConv) or not low.counts.is_lone:
        return None
    x, y, (states,) = low.place(op.x), low.place(op.out), low.there.pool.arrays[op.layer]
    taps = low.there.program.tensors[op.weight].shape[1]
    inside = [x.buffer is one.buffer and one.at <= x.at and x.at + x.width <= one.at + one.width for one in made]
    if not any(inside) or taps < 2 or x.rows != made[0].rows:
        return None
    bias = [low.vector(op.bias)] if op.bias is not None else []
    buffers = [low.step, low.taps(op.weight), states.buffer, y.buffer, *bias]
    numbers = [x.at, x.width, low.there.program.table_of(op.layer), y.at, y.row]
    return Behind((taps, bool(bias)), inside.index(True), buffers, "rrww" + "r" * len(bias), numbers)


class _Gates(NamedTuple):
    """What decay and rate are made of: two buffers, the expressions over a number of each, and a vector in them."""

    first: str
    second: str
    decay: str = "first"
    rate: str = "second"
    weights: tuple[str, ...] = ()


def _gates_of(op: DeltaGates | SSMGates, heads: int) -> _Gates:
    shifted, weights = f"softplus(first + w[{heads}u + head])", (op.a, op.dt_bias)
    if isinstance(op, SSMGates):
        return _Gates(op.dt, op.dt, "exp(w[head] * rate)", shifted, weights)
    return _Gates(op.alpha, op.beta, f"exp(w[head] * {shifted})", "sigmoid(second)", weights)


def gates(low: Lowering, op: DeltaGates | SSMGates) -> None:
    """How much of a state stays, and how far it moves; in the rule itself, where that comes next."""
    decay, rate, rule = low.place(op.decay), low.place(op.rate), low.next()
    made = _gates_of(op, decay.width)
    is_alone = low.is_dead(op.decay, 1) and low.is_dead(op.rate, 1)
    if isinstance(rule, DeltaRule | SSMScan) and is_alone and (rule.decay, rule.rate) == (op.decay, op.rate):
        low.n_taken = 2
        if isinstance(rule, DeltaRule):
            _delta_rule(low, rule, made)
        else:
            _ssm_scan(low, rule, made)
        return
    first, second = low.place(made.first), low.place(made.second)
    bound = bindings(1, [("first", first.buffer, "r"), ("second", second.buffer, "r"), ("decay", decay.buffer, "w"),
                         ("rate", rate.buffer, "w")])  # fmt: skip
    n = low.n(decay) * decay.width
    low.emit(
        source("state_gates", BINDINGS=bound.text, FUNCTIONS=sources.text("activations"), DECAY=made.decay,
               RATE=made.rate, **bound.names),
        [low.vector(*made.weights), *bound.buffers], "r" + bound.kinds, folded(blocks(n)), decay.width, n,
        first.at, first.row, second.at, second.row, decay.at, decay.row, rate.at, rate.row,
    )  # fmt: skip


def _gated(low: Lowering, made: _Gates, at: int) -> tuple[dict[str, str], list[Any]]:
    """Words of a rule with gates of its own, and the buffer of what they are made of, bound at ``at``."""
    own = [low.vector(*made.weights)] if made.weights else []
    return {"DECAY": made.decay, "RATE": made.rate, "GATES": vector(at, "w") if own else "",
            "FUNCTIONS": sources.text("activations") if own else ""}, own  # fmt: skip


def delta_rule(low: Lowering, op: DeltaRule) -> None:
    """The rule for every 16 columns of a head's state."""
    _delta_rule(low, op, _Gates(op.decay, op.rate))


def _delta_rule(low: Lowering, op: DeltaRule, made: _Gates) -> None:
    qkv, first, second, out = (low.place(name) for name in (op.qkv, made.first, made.second, op.out))
    dim, (states,) = out.width // op.n_v_heads, low.there.pool.arrays[op.layer]
    if dim % COLUMNS:
        raise UnsupportedError(
            f"{op.name}: heads of {dim} numbers; the gpu device takes multiples of {COLUMNS}. Take --device cpu.",
            code="MODEL_SHAPE",
        )
    bound = bindings(2, [("qkv", qkv.buffer, "r"), ("first", first.buffer, "r"), ("second", second.buffer, "r"),
                         ("out", out.buffer, "w")])  # fmt: skip
    words, own = _gated(low, made, 2 + len(bound.buffers))
    low.emit(
        source("delta_rule", BINDINGS=bound.text, ROWS=dim // 4, **words, **bound.names),
        [low.step, states.buffer, *bound.buffers, *own], "rw" + bound.kinds + "r" * len(own),
        (dim // COLUMNS, op.n_v_heads, low.n(out)),
        low.there.program.table_of(op.layer), op.n_k_heads, op.n_v_heads, int(op.tiled), qkv.at, qkv.row, first.at,
        first.row, second.at, second.row, out.at, out.row, float(op.eps), 1 / math.sqrt(dim),
        flops=low.n(out) * op.n_v_heads * dim * dim * 7,
    )  # fmt: skip


def ssm_scan(low: Lowering, op: SSMScan) -> None:
    """The state space for every 16 columns of a head's state."""
    _ssm_scan(low, op, _Gates(op.decay, op.rate))


def _ssm_scan(low: Lowering, op: SSMScan, made: _Gates) -> None:
    xbc, first, second, out = (low.place(name) for name in (op.xbc, made.first, made.second, op.out))
    dim, size = out.width // op.n_heads, (xbc.width - out.width) // 2 // op.n_groups
    (states,), unit, value, through = low.there.pool.arrays[op.layer], low.next(low.n_taken), "made", list[int]()
    roles = [("xbc", xbc.buffer, "r"), ("first", first.buffer, "r"), ("second", second.buffer, "r")]
    is_gated = isinstance(unit, GatedUnit) and unit.up == op.out and low.place(unit.out).buffer is not xbc.buffer
    if isinstance(unit, GatedUnit) and is_gated and (unit.out == op.out or low.is_dead(op.out, low.n_taken)):
        gate, out, low.n_taken = low.place(unit.gate), low.place(unit.out), low.n_taken + 1
        roles.append(("gate", gate.buffer, "r"))
        value, through = (
            f"{unit.activation}({{gate}}[p.gate_at + token * p.gate_row + at_column], made)",
            [gate.at, gate.row],
        )
    bound = bindings(3, [*roles, ("out", out.buffer, "w")])
    words, own = _gated(low, made, 3 + len(bound.buffers))
    words["FUNCTIONS"] = sources.text("activations") if own or through else ""
    words |= {"VALUE": value.format(**bound.names), "FIELDS": ", gate_at: u32, gate_row: u32" if through else ""}
    low.emit(
        source("ssm_scan", BINDINGS=bound.text, ROWS=blocks(size, 4), SIZE=size, DIM=dim, **words, **bound.names),
        [low.step, states.buffer, low.vector(op.d), *bound.buffers, *own], "rwr" + bound.kinds + "r" * len(own),
        (blocks(dim, COLUMNS), op.n_heads, low.n(out)), low.there.program.table_of(op.layer), op.n_heads, op.n_groups,
        op.n_heads * dim, xbc.at, xbc.row, first.at, first.row, second.at, second.row, out.at, out.row, *through,
        flops=low.n(out) * op.n_heads * dim * size * 5,
    )  # fmt: skip


def gated_norm(low: Lowering, op: GatedNorm) -> None:
    """The norm behind a state space, of what its gate lets through."""
    x, gate, y = (low.place(name) for name in (op.x, op.gate, op.out))
    groups, width = low.there.program.tensors[op.weight].shape
    bound = bindings(1, [("x", x.buffer, "r"), ("gate", gate.buffer, "r"), ("y", y.buffer, "w")])
    low.emit(
        source("gated_norm", BINDINGS=bound.text, FUNCTIONS=sources.text("activations"), **bound.names),
        [low.vector(op.weight), *bound.buffers], "r" + bound.kinds, (groups, low.n(x), 1),
        width, x.at, x.row, gate.at, gate.row, y.at, y.row, float(op.eps),
    )  # fmt: skip
