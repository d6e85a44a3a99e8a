"""From ops to dispatches: one rule for each kind of op, and the few places where several ops become one dispatch.

Products of one input are one (products.py), with what a norm does before and what sums, gates, activations and
convolutions do behind; queries and keys are normed and rotated on their way to the cache (attention.py); experts are
chosen in their first product and added up in their last (experts.py). So a layer decodes in eight dispatches or fewer
in most architectures; benchmarks/LOG.md has those that take more, and why. With ``fuse=False`` every op stands for
itself, for hooks.

What the shaders take on trust is proved here: shapes come from the program, and the buffers are made of the same
numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cache_types import PACKED
from edgellm.kernels.gpu import attention, cache_types, experts, latent, low_rank, products, recurrent, sources, streams
from edgellm.kernels.gpu.cuts import find_cuts
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.emitter import Counts, Lowering, Resident, blocks, folded
from edgellm.kernels.gpu.layout import place_buffers, row_counts, runs_of_products
from edgellm.kernels.gpu.order import in_order
from edgellm.kernels.gpu.pool import GPUPool
from edgellm.kernels.gpu.sources import CURVES, UNITS, bindings, source
from edgellm.kernels.gpu.step import StepBuffer
from edgellm.kernels.gpu.walk import Dispatch
from edgellm.kernels.gpu.weights import device_type, put_matrix
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import (
    Activate,
    AdapterDown,
    AdapterUp,
    Add,
    AddDirection,
    AddRows,
    AddToStreams,
    ApplyRope,
    Attention,
    CausalConv,
    Clamp,
    DeltaGates,
    DeltaRule,
    Embed,
    ExpertMatmul,
    ExpertSum,
    GatedNorm,
    GatedUnit,
    GaussianTopK,
    Hadamard,
    HeadMatmul,
    JoinHeads,
    LayerNorm,
    MatchMagnitude,
    Matmul,
    MixStreams,
    PackKV,
    RMSNorm,
    Route,
    Scale,
    ScaleColumns,
    SelectOutputs,
    SelfAttention,
    ShortConv,
    SigmoidGate,
    Softcap,
    SoftplusGate,
    SplitHeads,
    SSMGates,
    SSMScan,
    StoreKV,
)
from edgellm.kernels.program import Op, Program

LOOKED_UP = (Embed, ExpertMatmul, HeadMatmul, AddRows)  # ops whose weight is a matrix of its own


def put_program(device: Device, program: Program, pool: GPUPool, max_tokens: int) -> Resident:
    """Send all of a program to the device. UnsupportedError names what has no shader."""
    check(program)
    rows = row_counts(program, max_tokens, device.max_binding)
    cuts = find_cuts(program.ops, program.buffers)
    placed = place_buffers(device, program, rows, cuts)
    step = StepBuffer(device, program, max_tokens)
    there = Resident(device, program, pool, step, rows, placed.of, placed.made, cuts)
    for op in program.ops:
        if isinstance(op, Attention):
            there.heads_at_once(op)
        if isinstance(op, Matmul) and op.out in cuts and (order := cuts[op.out].order) is not None:
            there.orders |= dict.fromkeys(op.weight_names(), order)
    ops = in_order(program.ops, cuts, program)
    wanted = [names for run in runs_of_products(ops) for names in _alike(program, run)]
    wanted += experts.gates(program, device.max_binding)
    wanted += [(op.weight,) for op in program.ops if isinstance(op, LOOKED_UP)]
    wanted += [(name,) for op in program.ops if isinstance(op, AdapterDown | AdapterUp) for name in op.weight_names()]
    for names in dict.fromkeys(wanted):
        if all(name in there.matrices for name in names):
            continue
        matrix, first = put_matrix(device, [there.tensor(name) for name in names]), 0
        for name in names:
            there.matrices[name] = matrix, first
            first += math.prod(program.tensors[name].shape[:-1])
    return there


def matrices_of(program: Program) -> set[str]:
    """The weights that are kept as matrices; of others every number is a float32."""
    found = {op.weight for op in program.ops if isinstance(op, Matmul | Embed | ExpertMatmul | HeadMatmul | AddRows)}
    adapters = [op.weight_names() for op in program.ops if isinstance(op, AdapterDown | AdapterUp)]
    return found.union(*adapters)


def _alike(program: Program, run: Sequence[Matmul]) -> list[tuple[str, ...]]:
    """Neighbours in a run whose weights are of one type."""
    groups: list[list[Matmul]] = []
    for op in run:
        last = groups[-1][-1] if groups else None
        if last is not None and _kind(program, last) == _kind(program, op):
            groups[-1].append(op)
        else:
            groups.append([op])
    return [tuple(op.weight for op in group) for group in groups]


def _kind(program: Program, op: Matmul) -> tuple[str, str, bool]:
    quant = program.tensors[op.weight].quant.name
    return device_type(quant), quant, op.bias is None


def check(program: Program) -> None:
    """UnsupportedError for what no shader here does, by name."""
    for op in program.ops:
        if wrong := unknown(program, op):
            raise UnsupportedError(
                f"{program.architecture}: the gpu device has no shader for the op {wrong}. Take --device cpu.",
                code="GPU_OP",
            )


def unknown(program: Program, op: Op) -> str | None:
    """What of an op no rule knows."""
    if not op.computes:
        return None
    if type(op) not in RULES:
        return op.name
    for one in dataclasses.fields(op):
        value = getattr(op, one.name)
        if one.name not in RULES[type(op)].fields.split() and value != one.default:
            return f"{op.name} with {one.name}={value}"
    if isinstance(op, GatedUnit) and op.activation not in UNITS:
        return f"{op.name} with {op.activation}"
    if isinstance(op, Activate) and op.activation not in CURVES:
        return f"{op.name} with {op.activation}"
    layer = program.cache_layers[op.layer] if isinstance(op, StoreKV | Attention) else None
    if isinstance(layer, KVLayer):
        if layer.latent and layer.head_dim_k % 2:
            return f"{op.name} over an odd number of dimensions"
        for name in (layer.type_k, layer.type_v):
            if name not in cache_types.TYPES and (name not in PACKED or isinstance(op, StoreKV)):
                return f"{op.name} of keys or values as {name}"
    return None


def record(
    there: Resident, ops: Sequence[Op], following: Sequence[Op], counts: Counts, *, fuse: bool
) -> list[Dispatch]:
    """The dispatches of some ops. ``following`` are those that come after them in the same step."""
    if fuse:
        ops, following = (in_order(some, there.cuts, there.program) for some in (ops, following))
    low = Lowering(there, counts, fuse, [*ops, *following])
    low.end = len(ops)
    while low.at < low.end:
        op, low.n_taken = ops[low.at], 1
        low.grouped.difference_update(op.written_buffers())
        if op.computes:
            RULES[type(op)].lower(low, op)
        low.at += low.n_taken
    return low.rows


# ---- one rule for each kind of op ------------------------------------------------------------------------------------


def _embed(low: Lowering, op: Embed) -> None:
    out, (matrix, _) = low.place(op.out), low.there.matrices[op.weight]
    text = source("embed", WEIGHTS=sources.weights(matrix.quant))
    for part in matrix.parts:
        low.emit(
            text, [part.buffer, low.step, out.buffer], "rrw", (low.counts.tokens, 1, 1),
            matrix.words, matrix.pieces, part.first, part.n, matrix.n_in, out.at, out.row, float(op.scale),
        )  # fmt: skip


def _rms_norm(low: Lowering, op: RMSNorm) -> None:
    if attention.heads_to_cache(low) or _norm_add(low, op) or products.normed(low, op):
        return
    x, y, width = low.place(op.x), low.place(op.out), low.there.program.tensors[op.weight].shape[-1]
    roles, words, at = [("x", x.buffer, "r")], {"VALUE": "v", "GATE_AT": "", "FUNCTIONS": ""}, list[int]()
    unit = low.next()
    is_alone = isinstance(unit, GatedUnit) and (unit.out == op.out or low.is_dead(op.out, 1))
    if isinstance(unit, GatedUnit) and is_alone and unit.up == op.out != unit.gate:
        gate, y, low.n_taken = low.place(unit.gate), low.place(unit.out), 2
        roles, at = [*roles, ("gate", gate.buffer, "r")], [gate.at, gate.row]
        words = {"GATE_AT": ", gate_at: u32, gate_row: u32", "FUNCTIONS": sources.text("activations")}
        words["VALUE"] = f"{unit.activation}({{gate}}[p.gate_at + g.y * p.gate_row + g.x * p.width + i], v)"
    bound = bindings(1, [*roles, ("y", y.buffer, "w")])
    words["VALUE"] = words["VALUE"].format(**bound.names)
    low.emit(
        source("rms_norm", BINDINGS=bound.text, **words, **bound.names), [low.vector(op.weight), *bound.buffers],
        "r" + bound.kinds, (x.width // width, low.n(x), 1), width, x.at, x.row, y.at, y.row, float(op.eps), *at,
    )  # fmt: skip


def _norm_add(low: Lowering, op: RMSNorm) -> bool:
    """Emit a norm of whole rows, its sum with others, and the norm of that, where these come next; whether so."""
    add, after, tensors = low.next(), low.next(2), low.there.program.tensors
    x, width = low.place(op.x), tensors[op.weight].shape[-1]
    if not isinstance(add, Add) or {add.x, add.y} != {op.out, add.out} or add.out == op.out or add.scale != 1.0:
        return False
    r = low.place(add.out)
    if x.width != width or r.width != width or r.rows != x.rows or r.buffer is x.buffer or not low.is_dead(op.out, 1):
        return False
    low.n_taken, names, roles, next_eps = 2, [op.weight], [("x", x.buffer, "r"), ("r", r.buffer, "w")], 0.0
    y, follows = r, isinstance(after, RMSNorm) and after.x == add.out and tensors[after.weight].shape[-1] == width
    if follows and isinstance(after, RMSNorm) and low.place(after.out).buffer not in (x.buffer, r.buffer):
        y, next_eps = low.place(after.out), after.eps
        low.n_taken = 3
        names.append(after.weight)
        roles.append(("y", y.buffer, "w"))
    bound = bindings(1, roles)
    following = """let next = factor_of(sum, p.next_eps, t);
  let y = p.y_at + g.y * p.y_row;
  for (var i = t; i < p.width; i += 64u) { $y[y + i] = $r[r + i] * next * w[p.width + i]; }"""
    for name, variable in bound.names.items():
        following = following.replace(f"${name}", variable)
    low.emit(
        source("norm_add", BINDINGS=bound.text, NEXT=following if len(names) > 1 else "", **bound.names),
        [low.vector(*names), *bound.buffers], "r" + bound.kinds, (1, low.n(x), 1),
        width, 0, x.at, x.row, r.at, r.row, y.at, y.row, float(op.eps), float(next_eps),
    )  # fmt: skip
    return True


def _rope(low: Lowering, op: ApplyRope) -> None:
    if attention.heads_to_cache(low):
        return
    x, rope = low.place(op.x), low.there.program.ropes[op.rope]
    width, other = x.width, low.next()
    while isinstance(other, ApplyRope) and (other.rope, other.head_dim) == (op.rope, op.head_dim):
        place = low.place(other.x)
        if place.buffer is not x.buffer or place.at != x.at + width:
            break
        width, low.n_taken = width + place.width, low.n_taken + 1
        other = low.next(low.n_taken)
    heads, half = width // op.head_dim, rope.n_dims // 2
    low.emit(
        source("rope"), [low.step, x.buffer], "rw", (blocks(heads * half), low.n(x), 1),
        heads, op.head_dim, half, int(rope.adjacent), list(low.there.program.ropes).index(op.rope), x.at, x.row,
    )  # fmt: skip


def _pointwise(
    low: Lowering, function: str, x_name: str, y_name: str, out_name: str, amount: float = 1.0, per: int = 1
) -> None:
    x, y, z = low.place(x_name), low.place(y_name), low.place(out_name)
    bound = bindings(0, [("x", x.buffer, "r"), ("y", y.buffer, "r"), ("z", z.buffer, "w")])
    n = low.n(z) * z.width
    words = bound.names | {"BINDINGS": bound.text, "FUNCTION": function, "FUNCTIONS": sources.text("activations")}
    low.emit(
        source("pointwise", **words), bound.buffers, bound.kinds, folded(blocks(n)), z.width, n, per,
        x.at, x.row, y.at, y.row, z.at, z.row, float(amount),
    )  # fmt: skip


def _activate(low: Lowering, op: Activate) -> None:
    _pointwise(low, sources.curved(op.activation, "u"), op.x, op.x, op.out)


def _gated_unit(low: Lowering, op: GatedUnit) -> None:
    _pointwise(low, f"{op.activation}(u, v)", op.gate, op.up, op.out)


def _add(low: Lowering, op: Add) -> None:
    _pointwise(low, "u + v" if op.scale == 1.0 else "fma(p.amount, v, u)", op.x, op.y, op.out, op.scale)


def _scale(low: Lowering, op: Scale) -> None:
    _pointwise(low, "p.amount * u", op.x, op.x, op.out, op.factor)


def _softcap(low: Lowering, op: Softcap) -> None:
    _pointwise(low, "softcap(u, p.amount)", op.x, op.x, op.out, op.cap)


def _clamp(low: Lowering, op: Clamp) -> None:
    _pointwise(low, "clamp(u, -p.amount, p.amount)", op.x, op.x, op.out, op.limit)


def _sigmoid_gate(low: Lowering, op: SigmoidGate) -> None:
    per = low.place(op.x).width // low.place(op.gate).width
    _pointwise(low, "u * sigmoid(v)", op.x, op.gate, op.out, per=per)


def _softplus_gate(low: Lowering, op: SoftplusGate) -> None:
    per = low.place(op.x).width // low.place(op.gate).width
    _pointwise(low, "u * softplus(v)", op.x, op.gate, op.out, per=per)


def _layer_norm(low: Lowering, op: LayerNorm) -> None:
    x, y, names = low.place(op.x), low.place(op.out), [op.weight, *([op.bias] if op.bias else [])]
    bound = bindings(1, [("x", x.buffer, "r"), ("y", y.buffer, "w")])
    low.emit(
        source("layer_norm", BINDINGS=bound.text,
               BIAS="w[p.width + i]" if op.bias else "0.0", **bound.names),
        [low.vector(*names), *bound.buffers], "r" + bound.kinds, (1, low.n(x), 1),
        x.width, x.at, x.row, y.at, y.row, float(op.eps),
    )  # fmt: skip


def _add_rows(low: Lowering, op: AddRows) -> None:
    x, out, (matrix, _) = low.place(op.x), low.place(op.out), low.there.matrices[op.weight]
    bound = bindings(2, [("x", x.buffer, "r"), ("y", out.buffer, "w")])
    number = {"positions": "position_of(g.x)", "types": "type_of(g.x)", "none": "0u"}[op.of]
    text = source("add_rows", WEIGHTS=sources.weights(matrix.quant), NUMBER=number, BINDINGS=bound.text, **bound.names)
    for part in matrix.parts:
        low.emit(
            text, [part.buffer, low.step, *bound.buffers], "rr" + bound.kinds, (low.n(x), 1, 1),
            matrix.words, matrix.pieces, part.first, part.n, matrix.n_in, x.at, x.row, out.at, out.row,
        )  # fmt: skip


def _hadamard(low: Lowering, op: Hadamard) -> None:
    x = low.place(op.x)
    low.emit(
        source("hadamard", SIZE=op.size), [x.buffer], "w", (x.width // op.size, low.n(x), 1),
        x.at, x.row, float(op.size**-0.5),
    )  # fmt: skip


def _select_outputs(low: Lowering, op: SelectOutputs) -> None:
    x, y = low.place(op.x), low.place(op.out)
    low.emit(
        source("select_outputs"), [low.step, x.buffer, y.buffer], "rrw", (1, low.n(y), 1),
        x.width, x.at, x.row, y.at, y.row,
    )  # fmt: skip


class Rule(NamedTuple):
    """What lowers a kind of op, and the fields of it that it knows: another one that says something is refused."""

    lower: Callable[[Lowering, Any], None]
    fields: str


RULES: dict[type[Op], Rule] = {
    Embed: Rule(_embed, "weight out scale embeds"),
    RMSNorm: Rule(_rms_norm, "x weight out eps"),
    Matmul: Rule(products.matmul, "x weight out bias"),
    ApplyRope: Rule(_rope, "x head_dim rope"),
    StoreKV: Rule(attention.store_kv, "k v layer"),
    PackKV: Rule(attention.pack_kv, "layer newest"),
    Attention: Rule(attention.attention, "q out layer n_heads scale softcap sinks newest"),
    GatedUnit: Rule(_gated_unit, "gate up out activation"),
    Add: Rule(_add, "x y out scale"),
    Scale: Rule(_scale, "x out factor"),
    SigmoidGate: Rule(_sigmoid_gate, "x gate out"),
    SoftplusGate: Rule(_softplus_gate, "x gate out"),
    Softcap: Rule(_softcap, "x out cap"),
    Clamp: Rule(_clamp, "x out limit"),
    SelectOutputs: Rule(_select_outputs, "x out"),
    ShortConv: Rule(recurrent.short_conv, "bcx weight out layer"),
    CausalConv: Rule(recurrent.causal_conv, "x weight out layer bias"),
    DeltaGates: Rule(recurrent.gates, "alpha beta a dt_bias decay rate"),
    DeltaRule: Rule(recurrent.delta_rule, "qkv decay rate out layer n_k_heads n_v_heads tiled eps"),
    SplitHeads: Rule(latent.split_heads, "x first second head_dim"),
    Route: Rule(experts.route, "logits ids probs over scales scores bias factor groups best"),
    ExpertMatmul: Rule(experts.expert_matmul, "x ids weight out n_used bias"),
    ExpertSum: Rule(experts.expert_sum, "x probs out"),
    HeadMatmul: Rule(experts.head_matmul, "x weight out n_heads rows turned"),
    JoinHeads: Rule(latent.join_heads, "first second out head_dim"),
    SSMGates: Rule(recurrent.gates, "dt a dt_bias decay rate"),
    SSMScan: Rule(recurrent.ssm_scan, "xbc decay rate d out layer n_heads n_groups"),
    GatedNorm: Rule(recurrent.gated_norm, "x gate weight out eps"),
    Hadamard: Rule(_hadamard, "x size"),
    LayerNorm: Rule(_layer_norm, "x weight out eps bias"),
    Activate: Rule(_activate, "x out activation"),
    AddRows: Rule(_add_rows, "x weight out of"),
    MixStreams: Rule(streams.mix, "x coefs out"),
    AddToStreams: Rule(streams.add_to, "x y out coefs first"),
    MatchMagnitude: Rule(streams.match_magnitude, "x of out"),
    ScaleColumns: Rule(streams.scale_columns, "x weight out"),
    GaussianTopK: Rule(streams.gaussian_top_k, "x out factor"),
    AdapterDown: Rule(low_rank.down, "x out parts ids n_used"),
    AdapterUp: Rule(low_rank.up, "h out parts ids n_used"),
    AddDirection: Rule(low_rank.direction, "x parts"),
    SelfAttention: Rule(attention.self_attention, "q k v out n_heads n_kv_heads scale reach fades"),
}
