"""From ops to dispatches: one rule for each kind of op, and the few places where several ops become one dispatch.

Products of one input whose outputs lie side by side are one product; a sum with what a product has just made is its
epilogue, and so is the gate of a feed-forward; keys are rotated, with the queries, on their way to the cache. With
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
from edgellm.kernels.gpu import recurrent, sources
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.emitter import PART, Counts, Lowering, Resident, blocks, folded
from edgellm.kernels.gpu.layout import Place, place_buffers, row_counts, runs_of_products
from edgellm.kernels.gpu.pool import GPUPool
from edgellm.kernels.gpu.sources import LANES, MOST_COLUMNS, Bound, bindings, source
from edgellm.kernels.gpu.step import StepBuffer
from edgellm.kernels.gpu.walk import Dispatch
from edgellm.kernels.gpu.weights import Matrix, device_type, put_matrix
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import (
    Add,
    ApplyRope,
    Attention,
    CausalConv,
    DeltaGates,
    DeltaRule,
    Embed,
    ExpertMatmul,
    ExpertSum,
    GatedUnit,
    Matmul,
    RMSNorm,
    Route,
    Scale,
    SelectOutputs,
    ShortConv,
    SigmoidGate,
    Softcap,
    SoftplusGate,
    SplitHeads,
    StoreKV,
)
from edgellm.kernels.program import Op, Program

GATED_COLUMNS = (1, 2, 4)  # of products of a gate and what it lets through in one
PARTIALS_NBYTES = 32 << 20  # of attention's partial results; more tokens go in turns


def put_program(device: Device, program: Program, pool: GPUPool, max_tokens: int) -> Resident:
    """Send all of a program to the device. UnsupportedError names what has no shader."""
    check(program)
    rows = row_counts(program, max_tokens, device.max_binding)
    there = Resident(device, program, pool, StepBuffer(device, program, max_tokens), rows)
    there.places = place_buffers(device, program, program.ops, rows)
    for op in program.ops:
        if isinstance(op, Attention):
            there.heads_at_once(op)
    wanted = [names for run in runs_of_products(program.ops) for names in _alike(program, run)]
    wanted += [(op.weight,) for op in program.ops if isinstance(op, Embed | ExpertMatmul)]
    for names in dict.fromkeys(wanted):
        if all(name in there.matrices for name in names):
            continue
        matrix, first = put_matrix(device, [program.tensors[name] for name in names]), 0
        for name in names:
            there.matrices[name] = matrix, first
            first += math.prod(program.tensors[name].shape[:-1])
    return there


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
    if isinstance(op, Route) and op.over not in ("chosen", "all"):
        return f"{op.name} over {op.over}"
    layer = getattr(op, "layer", None)
    if layer is not None and getattr(program.cache_layers[layer], "latent", False):
        return f"{op.name} over keys that are values, too"
    if layer is not None and getattr(program.cache_layers[layer], "is_typed", False):
        return f"{op.name} of keys and values in other types than f16"
    return None


def record(
    there: Resident, ops: Sequence[Op], following: Sequence[Op], counts: Counts, *, fuse: bool
) -> list[Dispatch]:
    """The dispatches of some ops. ``following`` are those that come after them in the same step."""
    low = Lowering(there, counts, fuse, [*ops, *following])
    at = 0
    while at < len(ops):
        low.at, low.end = at, len(ops)
        if ops[at].computes:
            RULES[type(ops[at])].lower(low, ops[at])
        at += max(1, low.n_taken)
        low.n_taken = 1
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
    if _heads_to_cache(low) or _norm_add(low, op):
        return
    x, y, width = low.place(op.x), low.place(op.out), low.there.program.tensors[op.weight].shape[-1]
    bound = bindings(1, [("x", x.buffer, "r"), ("y", y.buffer, "w")])
    groups = x.width // width
    low.emit(
        source("rms_norm", BINDINGS=bound.text, **bound.names), [low.vector(op.weight), *bound.buffers],
        "r" + bound.kinds, (groups, low.n(x), 1), width, groups, low.n(x), x.at, x.row, y.at, y.row, float(op.eps),
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


def _matmul(low: Lowering, op: Matmul) -> None:
    run, out, (matrix, begin) = [op], low.place(op.out), low.there.matrices[op.weight]
    end, width = begin + low.there.program.tensors[op.weight].shape[0], out.width
    while isinstance(other := low.next(len(run)), Matmul) and other.x == op.x:
        place, (of, first) = low.place(other.out), low.there.matrices[other.weight]
        beside = place.buffer is out.buffer and place.at == out.at + width and (other.bias is None) == (op.bias is None)
        if of is not matrix or first != end or not beside:
            break
        run.append(other)
        end, width = end + low.there.program.tensors[other.weight].shape[0], width + place.width
    low.n_taken, epilogue = len(run), "bias" if op.bias else "set"
    after = low.next(len(run))
    if isinstance(after, GatedUnit) and _gated_product(low, run, matrix, begin, after):
        return
    if len(run) == 1 and op.bias is None and isinstance(after, Add) and _is_residual(low, op, after):
        low.n_taken, epilogue, out = 2, "add", low.place(after.out)
    bias = [low.vector(*[one.bias for one in run if one.bias])] if op.bias else []
    _product(low, op.x, matrix, begin, end, out, epilogue, bias)


def _is_residual(low: Lowering, op: Matmul, add: Add) -> bool:
    """Whether a sum only adds what the product makes to a buffer, and nobody else wants the product."""
    if {add.x, add.y} != {op.out, add.out} or add.out == op.out or add.scale != 1.0 or not low.is_dead(op.out, 1):
        return False
    place = low.place(add.out)
    return place.rows == low.place(op.out).rows and place.buffer is not low.place(op.x).buffer


def _gated_product(low: Lowering, run: list[Matmul], matrix: Matrix, begin: int, unit: GatedUnit) -> bool:
    """Emit a gate and what it lets through as one product, where there are few columns; whether it could be."""
    x, out, m = low.place(run[0].x), low.place(unit.out), low.n(low.place(run[0].x))
    columns = next((n for n in GATED_COLUMNS if n >= m), 0)
    fits = [op.out for op in run] == [unit.gate, unit.up] and run[0].bias is None and len(matrix.parts) == 1
    alone = all(low.is_dead(name, 2) for name in (unit.gate, unit.up) if name != unit.out)
    if not (columns and fits and alone) or out.buffer is x.buffer or out.rows != x.rows:
        return False
    n, part = out.width, matrix.parts[0]
    low.n_taken = 3
    low.emit(
        sources.matmul_gated(matrix.quant, columns, unit.activation), [part.buffer, x.buffer, out.buffer], "rrw",
        folded(blocks(n, LANES)), matrix.words, matrix.pieces, begin, begin + n, n, m, x.at // 4, x.row // 4,
        out.at - begin, out.row, flops=4 * m * n * matrix.n_in,
    )  # fmt: skip
    return True


def _product(
    low: Lowering, x_name: str, matrix: Matrix, begin: int, end: int, out: Place, epilogue: str, bias: list[Any]
) -> None:
    """Rows [begin, end) of a matrix times x, into the columns of ``out``."""
    x = low.place(x_name)
    m = low.n(x)
    columns = next((n for n in (1, 2, 4, MOST_COLUMNS) if n >= m), 0)
    text = sources.matmul(matrix.quant, columns, epilogue) if columns else sources.matmul_tiles(matrix.quant, epilogue)
    for part in matrix.parts:
        first, last = max(begin, part.first) - part.first, min(end, part.first + part.n) - part.first
        if first >= last:
            continue
        grid = folded(blocks(last - first, LANES if columns else 64))
        low.emit(
            text, [part.buffer, x.buffer, out.buffer, *bias], "rrw" + "r" * len(bias),
            grid if columns else (*grid[:2], blocks(m, 32)),
            matrix.words, matrix.pieces, first, last, m, x.at // 4, x.row // 4, out.at + part.first - begin, out.row,
            part.first - begin, flops=2 * m * (last - first) * matrix.n_in,
        )  # fmt: skip


def _rope(low: Lowering, op: ApplyRope) -> None:
    if _heads_to_cache(low):
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


def _heads_to_cache(low: Lowering) -> bool:
    """Emit the norms of queries and of keys, their rotation, and the store, where nobody else reads the keys; whether
    these are what comes now."""
    ahead = [op for op in map(low.next, range(5)) if op is not None]
    norms = [op for op in ahead[:2] if isinstance(op, RMSNorm)]
    ropes, store = ahead[len(norms) : len(norms) + 2], ahead[len(norms) + 2 : len(norms) + 3]
    first, second = ropes if len(ropes) == 2 else (None, None)
    if len(norms) == 1 or not store or not (isinstance(first, ApplyRope) and isinstance(second, ApplyRope)):
        return False
    if not isinstance(store[0], StoreKV) or not _are_heads_of(low, norms, first, second, store[0]):
        return False
    op, program = store[0], low.there.program
    assert op.v is not None, "checked"
    q, k, v, layer = low.place(first.x), low.place(op.k), low.place(op.v), program.kv_layer(op.layer)
    rope, (keys, values) = program.ropes[first.rope], low.there.pool.arrays[op.layer]
    bound, heads = bindings(3, [("q", q.buffer, "w"), ("v", v.buffer, "r")]), q.width // first.head_dim
    weights, norm = [low.vector(*(one.weight for one in norms))] if norms else [], ""
    if norms:
        norm = sources.text("head_norm")
    low.n_taken = len(norms) + 3
    low.emit(
        source("heads_to_cache", BINDINGS=bound.text + _vector(3 + len(bound.buffers), "w") * bool(norms), NORM=norm,
               HALF_BITS=sources.text("half_bits"), DIM_K=layer.head_dim_k, **bound.names),
        [low.step, keys.buffer, values.buffer, *bound.buffers, *weights], "rww" + bound.kinds + "r" * len(weights),
        (heads + 2 * layer.n_kv_heads, low.n(q), 1),
        heads, layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v, rope.n_dims // 2, int(rope.adjacent),
        list(program.ropes).index(first.rope), program.table_of(op.layer), q.at, k.at, q.row, v.at, v.row,
        float(norms[0].eps if norms else 0.0),
    )  # fmt: skip
    return True


def _are_heads_of(low: Lowering, norms: list[RMSNorm], first: ApplyRope, second: ApplyRope, store: StoreKV) -> bool:
    """Whether norms and rotations are those of the queries, and of the keys on their way to the cache."""
    q, k, layer = low.place(first.x), low.place(store.k), low.there.program.kv_layer(store.layer)
    if second.x != store.k or first.x == store.k or store.v == store.k or k.buffer is not q.buffer:
        return False
    if (first.rope, first.head_dim) != (second.rope, second.head_dim) or first.head_dim != layer.head_dim_k:
        return False
    if k.width != layer.n_kv_heads * layer.head_dim_k or not low.is_dead(store.k, len(norms) + 2):
        return False
    tensors = low.there.program.tensors
    return not norms or (
        [(op.x, op.out) for op in norms] == [(first.x, first.x), (store.k, store.k)]
        and all(tensors[op.weight].shape[-1] == layer.head_dim_k for op in norms)
        and norms[0].eps == norms[1].eps
    )


def _store_kv(low: Lowering, op: StoreKV) -> None:
    assert op.v is not None, "checked"
    k, v, layer = low.place(op.k), low.place(op.v), low.there.program.kv_layer(op.layer)
    keys, values = low.there.pool.arrays[op.layer]
    bound = bindings(3, [("k", k.buffer, "r"), ("v", v.buffer, "r")])
    widest = layer.n_kv_heads * max(layer.head_dim_k, layer.head_dim_v)
    low.emit(
        source("store_kv", BINDINGS=bound.text, HALF_BITS=sources.text("half_bits"), **bound.names),
        [low.step, keys.buffer, values.buffer, *bound.buffers], "rww" + bound.kinds, (blocks(widest), low.n(k), 1),
        layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v, low.there.program.table_of(op.layer),
        k.at, k.row, v.at, v.row,
    )  # fmt: skip


def _attention(low: Lowering, op: Attention) -> None:
    there, layer, parts = low.there, low.there.program.kv_layer(op.layer), low.counts.parts
    q, out, heads = low.place(op.q), low.place(op.out), there.heads_at_once(op)
    keys, values = there.pool.arrays[op.layer]
    size, whole = layer.head_dim_v + 2, parts == 1
    target = out.buffer if whole else _partials(low)
    bound = bindings(3, [("q", q.buffer, "r"), ("o", target, "w")])
    text, sinks = _attention_text(bound, op, heads, layer, whole), [low.vector(op.sinks)] if op.sinks else []
    own = sinks if whole else []
    at_once = low.n(q) if whole else max(1, PARTIALS_NBYTES // (4 * op.n_heads * parts * size))
    common = low.there.program.table_of(op.layer), layer.window, parts, op.n_heads, layer.n_kv_heads
    for first in range(0, low.n(q), at_once):
        n = min(at_once, low.n(q) - first)
        low.emit(
            text, [low.step, keys.buffer, values.buffer, *bound.buffers, *own], "rrr" + bound.kinds + "r" * len(own),
            (parts, op.n_heads // heads, n), *common, op.n_heads // layer.n_kv_heads // heads, first, q.at, q.row,
            out.at, out.row, float(op.scale), float(op.softcap),
            flops=n * op.n_heads * parts * PART * 2 * (layer.head_dim_k + layer.head_dim_v),
        )  # fmt: skip
        if not whole:
            low.emit(
                _attention_sum_text(layer.head_dim_v, bool(sinks)), [low.step, target, out.buffer, *sinks],
                "rrw" + "r" * len(sinks), (op.n_heads, n, 1), layer.window, parts, op.n_heads, first, out.at, out.row,
            )  # fmt: skip


def _attention_text(bound: Bound, op: Attention, heads: int, layer: KVLayer, whole: bool) -> str:
    dim_k, dim_v, has_cap, has_sinks = layer.head_dim_k, layer.head_dim_v, bool(op.softcap), op.sinks is not None
    sinks = _vector(3 + len(bound.buffers), "sinks") if has_sinks and whole else ""
    if whole:
        keep = """sums[h] = reduced[0];
      factors[h] = 1.0;"""
        if has_sinks:  # as attention_sum.wgsl does it for a single part
            keep = """let largest = max(most, sinks[head0 + h]);
      factors[h] = exp(most - largest);
      sums[h] = fma(reduced[0], factors[h], exp(sinks[head0 + h] - largest));"""
        store = """let to = p.y_at + token * p.y_row + (head0 + h) * $DIM_V + d;
      $o[to] = acc[h].x * factors[h] / sums[h];
      if (d + 1u < $DIM_V) { $o[to + 1u] = acc[h].y * factors[h] / sums[h]; }"""
    else:
        size = f"{dim_v + 2}u"
        keep = f"""let to = ((g.z * p.n_heads + head0 + h) * p.parts + g.x) * {size};
      $o[to] = most;
      $o[to + 1u] = reduced[0];"""
        store = f"""let to = ((g.z * p.n_heads + head0 + h) * p.parts + g.x) * {size} + 2u + d;
      $o[to] = acc[h].x;
      if (d + 1u < $DIM_V) {{ $o[to + 1u] = acc[h].y; }}"""
    keep, store = (text.replace("$o", bound.names["o"]).replace("$DIM_V", f"{dim_v}u") for text in (keep, store))
    words = {"CAP": "capped" if has_cap else "", "FUNCTIONS": sources.text("activations")}
    return source(
        "attention", **words, BINDINGS=bound.text + sinks, HEADS=heads, DIM_K=dim_k, DIM_V=dim_v, KEEP_SUM=keep,
        STORE=store, q=bound.names["q"],
    )  # fmt: skip


def _vector(binding: int, name: str) -> str:
    return f"\n@group(0) @binding({binding}) var<storage, read> {name}: array<f32>;"


def _attention_sum_text(dim_v: int, has_sinks: bool) -> str:
    words = {"SINKS": "", "SINK": "-1e30", "SINK_POWER": "0.0"}
    if has_sinks:
        words = {"SINKS": _vector(3, "sinks"), "SINK": "sinks[g.x]", "SINK_POWER": "exp(sinks[g.x] - most)"}
    return source("attention_sum", DIM_V=dim_v, **words)


def _partials(low: Lowering) -> Any:
    there, needed = low.there, 0
    for op in there.program.ops:
        if isinstance(op, Attention):
            size = 4 * op.n_heads * low.counts.parts * (there.program.kv_layer(op.layer).head_dim_v + 2)
            needed = max(needed, size * min(low.counts.tokens, max(1, PARTIALS_NBYTES // size)))
    if there.partials is None or there.partials.size < needed:
        if there.partials is not None:
            there.device.free(there.partials)
        there.partials = there.device.buffer(needed)
    return there.partials


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


def _gated_unit(low: Lowering, op: GatedUnit) -> None:
    _pointwise(low, f"{op.activation}(u, v)", op.gate, op.up, op.out)


def _add(low: Lowering, op: Add) -> None:
    _pointwise(low, "u + v" if op.scale == 1.0 else "fma(p.amount, v, u)", op.x, op.y, op.out, op.scale)


def _scale(low: Lowering, op: Scale) -> None:
    _pointwise(low, "p.amount * u", op.x, op.x, op.out, op.factor)


def _softcap(low: Lowering, op: Softcap) -> None:
    _pointwise(low, "softcap(u, p.amount)", op.x, op.x, op.out, op.cap)


def _sigmoid_gate(low: Lowering, op: SigmoidGate) -> None:
    per = low.place(op.x).width // low.place(op.gate).width
    _pointwise(low, "u * sigmoid(v)", op.x, op.gate, op.out, per=per)


def _softplus_gate(low: Lowering, op: SoftplusGate) -> None:
    per = low.place(op.x).width // low.place(op.gate).width
    _pointwise(low, "u * softplus(v)", op.x, op.gate, op.out, per=per)


def _select_outputs(low: Lowering, op: SelectOutputs) -> None:
    x, y = low.place(op.x), low.place(op.out)
    low.emit(
        source("select_outputs"), [low.step, x.buffer, y.buffer], "rrw", (1, low.n(y), 1),
        x.width, x.at, x.row, y.at, y.row,
    )  # fmt: skip


def _route(low: Lowering, op: Route) -> None:
    x, ids, y = low.place(op.logits), low.place(op.ids), low.place(op.probs)
    words, scales = {"SCALES": "", "TIMES": ""}, []
    if op.scales is not None:
        words = {"SCALES": _vector(3, "scales"), "TIMES": " * scales[ids[p.ids_at + g.x * p.ids_row + k]]"}
        scales = [low.vector(op.scales)]
    low.emit(
        source("route", KEYS=sources.text("keys"), **words), [x.buffer, ids.buffer, y.buffer, *scales],
        "rww" + "r" * len(scales), (low.n(x), 1, 1),
        x.width, ids.width, int(op.over == "all"), x.at, x.row, ids.at, ids.row, y.at, y.row,
    )  # fmt: skip


def _expert_matmul(low: Lowering, op: ExpertMatmul) -> None:
    x, ids, y = low.place(op.x), low.place(op.ids), low.place(op.out)
    (matrix, _), (_, n_out, n_in) = low.there.matrices[op.weight], low.there.program.tensors[op.weight].shape
    slot = 0 if x.width == n_in else n_in
    if slot % 4 or x.at % 4:
        raise UnsupportedError(
            f"{op.weight}: each expert has an input of {n_in} numbers; the gpu device takes multiples of 4.",
            code="MODEL_SHAPE",
        )
    bias = [low.vector(op.bias)] if op.bias else []
    for part in matrix.parts:
        low.emit(
            sources.expert_matmul(matrix.quant, bool(bias)),
            [part.buffer, ids.buffer, x.buffer, y.buffer, *bias], "rrrw" + "r" * len(bias),
            (blocks(n_out, LANES), op.n_used, low.n(y)), matrix.words, matrix.pieces, part.first, part.n, n_out,
            op.n_used, ids.at, ids.row, x.at // 4, x.row // 4, slot // 4, y.at, y.row,
            flops=2 * low.n(y) * op.n_used * n_out * n_in,
        )  # fmt: skip


def _expert_sum(low: Lowering, op: ExpertSum) -> None:
    x, probs, y = low.place(op.x), low.place(op.probs), low.place(op.out)
    bound = bindings(0, [("x", x.buffer, "r"), ("probs", probs.buffer, "r"), ("y", y.buffer, "w")])
    n = low.n(y) * y.width
    low.emit(
        source("expert_sum", BINDINGS=bound.text, **bound.names), bound.buffers, bound.kinds, folded(blocks(n)),
        y.width, n, probs.width, x.at, x.row, probs.at, probs.row, y.at, y.row,
    )  # fmt: skip


class Rule(NamedTuple):
    """What lowers a kind of op, and the fields of it that it knows: another one that says something is refused."""

    lower: Callable[[Lowering, Any], None]
    fields: str


RULES: dict[type[Op], Rule] = {
    Embed: Rule(_embed, "weight out scale embeds"),
    RMSNorm: Rule(_rms_norm, "x weight out eps"),
    Matmul: Rule(_matmul, "x weight out bias"),
    ApplyRope: Rule(_rope, "x head_dim rope"),
    StoreKV: Rule(_store_kv, "k v layer"),
    Attention: Rule(_attention, "q out layer n_heads scale softcap sinks"),
    GatedUnit: Rule(_gated_unit, "gate up out activation"),
    Add: Rule(_add, "x y out scale"),
    Scale: Rule(_scale, "x out factor"),
    SigmoidGate: Rule(_sigmoid_gate, "x gate out"),
    SoftplusGate: Rule(_softplus_gate, "x gate out"),
    Softcap: Rule(_softcap, "x out cap"),
    SelectOutputs: Rule(_select_outputs, "x out"),
    ShortConv: Rule(recurrent.short_conv, "bcx weight out layer"),
    CausalConv: Rule(recurrent.causal_conv, "x weight out layer"),
    DeltaGates: Rule(recurrent.delta_gates, "alpha beta a dt_bias decay rate"),
    DeltaRule: Rule(recurrent.delta_rule, "qkv decay rate out layer n_k_heads n_v_heads tiled eps"),
    SplitHeads: Rule(recurrent.split_heads, "x first second head_dim"),
    Route: Rule(_route, "logits ids probs over scales"),
    ExpertMatmul: Rule(_expert_matmul, "x ids weight out n_used bias"),
    ExpertSum: Rule(_expert_sum, "x probs out"),
}
UNITS = ("silu", "gelu", "clamped_swiglu")
