"""From ops to dispatches: one rule for each kind of op, and the few places where several ops become one dispatch.

Products that stand together are one (products.py), with what a norm does before and what sums, gates, activations and
convolutions do behind; so is what is done by row (rows.py); queries and keys are normed and rotated on their way to
the cache (attention.py); experts are chosen in their first product and added up in their last (experts.py). So a layer
decodes in eight dispatches or fewer in most architectures; benchmarks/LOG.md has those that take more, and why. With
``fuse=False`` every op stands for itself, for hooks.

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
from edgellm.kernels.gpu import (
    attention,
    cache_types,
    experts,
    latent,
    low_rank,
    products,
    recurrent,
    rows,
    sources,
)
from edgellm.kernels.gpu.cuts import find_cuts
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.emitter import Counts, Lowering, Resident, blocks
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
    n_rows = row_counts(program, max_tokens, device.max_binding)
    cuts = find_cuts(program.ops, program.buffers)
    placed = place_buffers(device, program, n_rows, cuts)
    step = StepBuffer(device, program, max_tokens)
    there = Resident(device, program, pool, step, n_rows, placed.of, placed.made, cuts)
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
    return low.dispatches()


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
    if attention.heads_to_cache(low) or rows.taken_together(low) or products.normed(low, op):
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
    elif width == x.width:
        rows.by_row(low, op)
        return
    bound = bindings(1, [*roles, ("y", y.buffer, "w")])
    words["VALUE"] = words["VALUE"].format(**bound.names)
    low.emit(
        source("rms_norm", BINDINGS=bound.text, **words, **bound.names), [low.vector(op.weight), *bound.buffers],
        "r" + bound.kinds, (x.width // width, low.n(x), 1), width, x.at, x.row, y.at, y.row, float(op.eps), *at,
    )  # fmt: skip


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
    GatedUnit: Rule(rows.by_value, "gate up out activation"),
    Add: Rule(rows.by_value, "x y out scale"),
    Scale: Rule(rows.by_value, "x out factor"),
    SigmoidGate: Rule(rows.by_value, "x gate out"),
    SoftplusGate: Rule(rows.by_value, "x gate out"),
    Softcap: Rule(rows.by_value, "x out cap"),
    Clamp: Rule(rows.by_value, "x out limit"),
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
    LayerNorm: Rule(rows.by_row, "x weight out eps bias"),
    Activate: Rule(rows.by_value, "x out activation"),
    AddRows: Rule(_add_rows, "x weight out of"),
    MixStreams: Rule(rows.by_row, "x coefs out"),
    AddToStreams: Rule(rows.by_row, "x y out coefs first"),
    MatchMagnitude: Rule(rows.by_row, "x of out"),
    ScaleColumns: Rule(rows.by_row, "x weight out"),
    GaussianTopK: Rule(rows.by_row, "x out factor"),
    AdapterDown: Rule(low_rank.down, "x out parts ids n_used"),
    AdapterUp: Rule(low_rank.up, "h out parts ids n_used"),
    AddDirection: Rule(low_rank.direction, "x parts"),
    SelfAttention: Rule(attention.self_attention, "q k v out n_heads n_kv_heads scale reach fades"),
}
