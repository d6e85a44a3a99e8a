"""Rules for the ops of recurrent layers: convolutions along the tokens, delta rules, state spaces.

``low`` is the lowering of a program, see lowering.py.
"""

from __future__ import annotations

from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.lib.layout import ALONE_WIDTH
from edgellm.kernels.ops import CausalConv, DeltaGates, DeltaRule, GatedNorm, ShortConv, SSMGates, SSMScan


def _conv(low: Any, op: ShortConv | CausalConv, kernel: str, x: str, bias: int) -> None:
    width, n_taps = low.program.tensors[op.weight].shape
    weight = low.memory.zeros(n_taps, layout.padded(width), "float32")  # (n_taps, width): neighbours are channels
    if low.memory.real:
        weight[:, :width] = low.program.tensors[op.weight].dequantize().reshape(width, n_taps).T
    arguments = layout.SHORT_CONV(
        **low.where(x=x, out=op.out), w=weight.ctypes.data, w_row=weight.strides[0], bias=bias, width=width,
        n_taps=n_taps, states=low.states(op.layer), table=low.program.table_of(op.layer),
    )  # fmt: skip
    low.emit(op, kernel, arguments, alone=width <= ALONE_WIDTH)


def _short_conv(low: Any, op: ShortConv) -> None:
    _conv(low, op, "short_conv", op.bcx, 0)


def _causal_conv(low: Any, op: CausalConv) -> None:
    width = low.width(op.x)
    bias = low.vector(op.bias) if op.bias else low.array(f"no bias {width}", 1, layout.padded(width), "float32")
    _conv(low, op, "causal_conv", op.x, bias)


def _delta_gates(low: Any, op: DeltaGates) -> None:
    arguments = layout.DELTA_GATES(
        **low.where(alpha=op.alpha, beta=op.beta, decay=op.decay, rate=op.rate), a=low.vector(op.a),
        dt_bias=low.vector(op.dt_bias), heads=low.width(op.alpha), row_kind=low.row_kind(op.alpha),
    )  # fmt: skip
    low.emit(op, "delta_gates", arguments, alone=True)


def _head_dim(low: Any, op: DeltaRule | SSMScan, n_heads: int, most: int, what: str) -> int:
    head_dim = low.width(op.out) // n_heads
    if head_dim % layout.ROW_ALIGN or head_dim > most:
        raise UnsupportedError(
            f"a {what} with heads of {head_dim}; the CPU kernels take multiples of {layout.ROW_ALIGN} up to {most}.",
            code="MODEL_SHAPE",
        )
    return head_dim


def _delta_rule(low: Any, op: DeltaRule) -> None:
    arguments = layout.DELTA_RULE(
        **low.where(qkv=op.qkv, decay=op.decay, rate=op.rate, out=op.out), n_k_heads=op.n_k_heads,
        n_v_heads=op.n_v_heads, head_dim=_head_dim(low, op, op.n_v_heads, layout.DELTA_HEAD_DIM, "delta rule"),
        tiled=int(op.tiled), eps=op.eps, states=low.states(op.layer), table=low.program.table_of(op.layer),
    )  # fmt: skip
    low.emit(op, "delta_rule", arguments, alone=False)


def _ssm_gates(low: Any, op: SSMGates) -> None:
    arguments = layout.SSM_GATES(
        **low.where(dt=op.dt, decay=op.decay, rate=op.rate), a=low.vector(op.a), dt_bias=low.vector(op.dt_bias),
        heads=low.width(op.dt), row_kind=low.row_kind(op.dt),
    )  # fmt: skip
    low.emit(op, "ssm_gates", arguments, alone=True)


def _ssm_scan(low: Any, op: SSMScan) -> None:
    head_dim = _head_dim(low, op, op.n_heads, 1 << 16, "state space")
    n_state = (low.width(op.xbc) - low.width(op.out)) // (2 * op.n_groups)
    if n_state > layout.SSM_STATE:
        raise UnsupportedError(
            f"a state space with a state of {n_state}; the CPU kernels take up to {layout.SSM_STATE}.",
            code="MODEL_SHAPE",
        )
    arguments = layout.SSM_SCAN(
        **low.where(xbc=op.xbc, decay=op.decay, rate=op.rate, out=op.out), d=low.vector(op.d), n_heads=op.n_heads,
        n_groups=op.n_groups, head_dim=head_dim, n_state=n_state, states=low.states(op.layer),
        table=low.program.table_of(op.layer),
    )  # fmt: skip
    low.emit(op, "ssm_scan", arguments, alone=False)


def _gated_norm(low: Any, op: GatedNorm) -> None:
    groups, width = low.program.tensors[op.weight].shape
    arguments = layout.GATED_NORM(
        **low.where(x=op.x, gate=op.gate, out=op.out), w=low.vector(op.weight), width=width, groups=groups, eps=op.eps,
        row_kind=low.row_kind(op.x),
    )  # fmt: skip
    low.emit(op, "gated_norm", arguments, alone=groups * width <= ALONE_WIDTH)


RULES: dict[type, Any] = {
    ShortConv: _short_conv,
    CausalConv: _causal_conv,
    DeltaGates: _delta_gates,
    DeltaRule: _delta_rule,
    SSMGates: _ssm_gates,
    SSMScan: _ssm_scan,
    GatedNorm: _gated_norm,
}
