"""Rules for the ops of recurrent layers, whose state lies in the cache on the device."""

from __future__ import annotations

import math

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.emitter import Lowering, blocks, folded
from edgellm.kernels.gpu.sources import bindings, source, vector
from edgellm.kernels.ops import CausalConv, DeltaGates, DeltaRule, GatedNorm, ShortConv, SplitHeads, SSMGates, SSMScan

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
    low.emit(
        source("short_conv", TAPS=taps, FUNCTIONS=sources.text("activations"), BIAS=declared, **words),
        [low.step, low.taps(op.weight), states.buffer, x.buffer, y.buffer, *own], "rrrrw" + "r" * len(own), grid,
        y.width, group, x.at, x.row, y.at, y.row,
    )  # fmt: skip
    if taps > 1:
        low.emit(
            source("short_conv_state", TAPS=taps, VALUE=words["VALUE"]), [low.step, states.buffer, x.buffer], "rwr",
            grid, y.width, group, x.at, x.row,
        )  # fmt: skip


def delta_gates(low: Lowering, op: DeltaGates) -> None:
    """How much of a state stays, and how far it moves."""
    alpha, beta, decay, rate = (low.place(name) for name in (op.alpha, op.beta, op.decay, op.rate))
    bound = bindings(1, [("alpha", alpha.buffer, "r"), ("beta", beta.buffer, "r"), ("decay", decay.buffer, "w"),
                         ("rate", rate.buffer, "w")])  # fmt: skip
    n = low.n(decay) * decay.width
    low.emit(
        source("delta_gates", BINDINGS=bound.text, FUNCTIONS=sources.text("activations"), **bound.names),
        [low.vector(op.a, op.dt_bias), *bound.buffers], "r" + bound.kinds, folded(blocks(n)), decay.width, n,
        alpha.at, alpha.row, beta.at, beta.row, decay.at, decay.row, rate.at, rate.row,
    )  # fmt: skip


def delta_rule(low: Lowering, op: DeltaRule) -> None:
    """The rule for every 16 columns of a head's state."""
    qkv, decay, rate, out = (low.place(name) for name in (op.qkv, op.decay, op.rate, op.out))
    dim, (states,) = out.width // op.n_v_heads, low.there.pool.arrays[op.layer]
    if dim % COLUMNS:
        raise UnsupportedError(
            f"{op.name}: heads of {dim} numbers; the gpu device takes multiples of {COLUMNS}. Take --device cpu.",
            code="MODEL_SHAPE",
        )
    bound = bindings(2, [("qkv", qkv.buffer, "r"), ("decay", decay.buffer, "r"), ("rate", rate.buffer, "r"),
                         ("out", out.buffer, "w")])  # fmt: skip
    low.emit(
        source("delta_rule", BINDINGS=bound.text, ROWS=dim // 4, **bound.names),
        [low.step, states.buffer, *bound.buffers], "rw" + bound.kinds, (dim // COLUMNS, op.n_v_heads, low.n(out)),
        low.there.program.table_of(op.layer), op.n_k_heads, op.n_v_heads, int(op.tiled), qkv.at, qkv.row, decay.at,
        decay.row, rate.at, rate.row, out.at, out.row, float(op.eps), 1 / math.sqrt(dim),
        flops=low.n(out) * op.n_v_heads * dim * dim * 7,
    )  # fmt: skip


def ssm_gates(low: Lowering, op: SSMGates) -> None:
    """How much of a state stays, and how much of a token it takes in."""
    dt, decay, rate = (low.place(name) for name in (op.dt, op.decay, op.rate))
    bound = bindings(1, [("dt", dt.buffer, "r"), ("decay", decay.buffer, "w"), ("rate", rate.buffer, "w")])
    n = low.n(decay) * decay.width
    low.emit(
        source("ssm_gates", BINDINGS=bound.text, FUNCTIONS=sources.text("activations"), **bound.names),
        [low.vector(op.a, op.dt_bias), *bound.buffers], "r" + bound.kinds, folded(blocks(n)), decay.width, n,
        dt.at, dt.row, decay.at, decay.row, rate.at, rate.row,
    )  # fmt: skip


def ssm_scan(low: Lowering, op: SSMScan) -> None:
    """The state space for every 16 columns of a head's state."""
    xbc, decay, rate, out = (low.place(name) for name in (op.xbc, op.decay, op.rate, op.out))
    dim, size = out.width // op.n_heads, (xbc.width - out.width) // 2 // op.n_groups
    (states,) = low.there.pool.arrays[op.layer]
    bound = bindings(3, [("xbc", xbc.buffer, "r"), ("decay", decay.buffer, "r"), ("rate", rate.buffer, "r"),
                         ("out", out.buffer, "w")])  # fmt: skip
    low.emit(
        source("ssm_scan", BINDINGS=bound.text, ROWS=blocks(size, 4), SIZE=size, DIM=dim, **bound.names),
        [low.step, states.buffer, low.vector(op.d), *bound.buffers], "rwr" + bound.kinds,
        (blocks(dim, COLUMNS), op.n_heads, low.n(out)), low.there.program.table_of(op.layer), op.n_heads, op.n_groups,
        out.width, xbc.at, xbc.row, decay.at, decay.row, rate.at, rate.row, out.at, out.row,
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


def split_heads(low: Lowering, op: SplitHeads) -> None:
    """Heads of one buffer to those of two."""
    x, y, z = low.place(op.x), low.place(op.first), low.place(op.second)
    bound = bindings(0, [("x", x.buffer, "r"), ("first", y.buffer, "w"), ("second", z.buffer, "w")])
    n = low.n(x) * x.width
    low.emit(
        source("split_heads", BINDINGS=bound.text, **bound.names), bound.buffers, bound.kinds, folded(blocks(n)),
        x.width, n, op.head_dim, x.width // (y.width // op.head_dim), x.at, x.row, y.at, y.row, z.at, z.row,
    )  # fmt: skip
