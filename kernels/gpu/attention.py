"""Rules for attention: keys and values on their way to the cache, in whatever they are kept as, and what they are for.

A workgroup takes the query heads that share a key, and of a prompt several of its tokens, too: they read the keys once.
Every sum has one order, whatever shares a workgroup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgellm.kernels.cache_types import QUANTIZED
from edgellm.kernels.gpu import cache_types, sources
from edgellm.kernels.gpu.emitter import PART, Lowering, blocks
from edgellm.kernels.gpu.layout import Place, padded
from edgellm.kernels.gpu.sources import Bound, bindings, source, vector
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import (
    ApplyRope,
    Attention,
    Op,
    PackKV,
    RMSNorm,
    SelfAttention,
    SigmoidGate,
    SoftplusGate,
    StoreKV,
)
from edgellm.kernels.ops.encoder import alibi_slopes
from edgellm.kernels.program import Program

MOST_ROWS = 8  # query heads times tokens of a workgroup that takes several tokens: more leave few workgroups a core
PARTIALS_NBYTES = 32 << 20  # of attention's partial results; more tokens go in turns


def store_kv(low: Lowering, op: StoreKV) -> None:
    """Keys and values of every token."""
    layer = low.there.program.kv_layer(op.layer)
    if layer.is_typed or op.v is None:
        _store(low, op.k, op.layer, layer.type_k, layer.head_dim_k, by_row=layer.latent, values=False)
        if op.v is not None:
            _store(low, op.v, op.layer, layer.type_v, layer.head_dim_v, by_row=True, values=True)
        return
    k, v = low.place(op.k), low.place(op.v)
    keys, values = low.there.pool.arrays[op.layer]
    bound = bindings(3, [("k", k.buffer, "r"), ("v", v.buffer, "r")])
    widest = layer.n_kv_heads * max(layer.head_dim_k, layer.head_dim_v)
    low.emit(
        source("store_kv", BINDINGS=bound.text, PUT=sources.puts("keys", "values"), **bound.names),
        [low.step, keys.buffer, values.buffer, *bound.buffers], "rww" + bound.kinds, (blocks(widest), low.n(k), 1),
        layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v, low.there.program.table_of(op.layer),
        k.at, k.row, v.at, v.row,
    )  # fmt: skip


def _store(low: Lowering, name: str, index: int, kept: str, dim: int, *, by_row: bool, values: bool) -> None:
    """One of the arrays of a layer, in a type of its own."""
    x, layer, array = low.place(name), low.there.program.kv_layer(index), low.there.pool.arrays[index][int(values)]
    n = layer.n_kv_heads * dim
    if kept in QUANTIZED:
        text, n = cache_types.store_codes(kept, dim, values=values), n // 32
    else:
        text = cache_types.store_floats(kept, by_row=by_row)
    low.emit(
        text, [low.step, array.buffer, x.buffer], "rwr", (blocks(n), low.n(x), 1), layer.n_kv_heads, dim,
        low.there.program.table_of(index), x.at, x.row, 0,
    )  # fmt: skip


def pack_kv(low: Lowering, op: PackKV) -> None:
    """The blocks that the batch fills. Tokens that are alone in their sequences read none of those, so of them it is
    done beside their attention."""
    there, layer, behind = low.there, low.there.program.kv_layer(op.layer), low.next()
    is_beside = False
    if low.counts.is_lone and isinstance(behind, Attention) and behind.layer == op.layer:
        is_beside = True
        low.at += 1
        attention(low, behind)
        low.at -= 1
        low.n_taken += 1
    arrays = [array.buffer for index in (op.newest, op.layer) for array in there.pool.arrays[index][:2]]
    low.emit(
        cache_types.pack(max(layer.head_dim_k, layer.head_dim_v)), [low.step, *arrays], "rrrww",
        (layer.n_kv_heads, low.counts.tokens, 1), layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v,
        there.program.table_of(op.layer), there.program.table_of(op.newest),
        joins=is_beside,
    )  # fmt: skip


class _Heads(NamedTuple):
    """What is done to queries, and to keys, before these are stored: a norm, a rotation, or both in this order.

    values   the norm of these, or of keys as they were
    store    None: the queries of a layer that looks at another one's keys
    """

    queries: list[RMSNorm | ApplyRope]
    keys: list[RMSNorm | ApplyRope]
    values: RMSNorm | None
    store: StoreKV | None
    layer: int
    is_row: bool  # rows are normed as a whole

    @property
    def n_ops(self) -> int:
        return len(self.queries) + len(self.keys) + (self.values is not None) + (self.store is not None)


def heads_to_cache(low: Lowering) -> bool:
    """Emit all that is done to queries and to keys, and the store, where nobody else reads the keys; whether these are
    what comes now."""
    found = _heads(low)
    if found is None:
        return False
    program, layer, q = low.there.program, low.there.program.kv_layer(found.layer), low.place(found.queries[0].x)
    k, v = (q, q) if found.store is None else (low.place(found.store.k), low.place(str(found.store.v)))
    v, n_kv = low.place(found.values.x) if found.values else v, layer.n_kv_heads if found.store else 0
    keys, values = low.there.pool.arrays[found.layer]
    norms = [one for one in (*found.queries, *found.keys, found.values) if isinstance(one, RMSNorm)]
    turns = [one.rope for one in (*found.queries, *found.keys) if isinstance(one, ApplyRope)]
    y = low.apart(found.queries[0].x) if found.is_row else q
    roles = [("q", q.buffer, "r"), ("y", y.buffer, "w"), ("k", k.buffer, "r"), ("v", v.buffer, "r")]
    bound = bindings(3, roles)
    weights, norm = [low.vector(*(one.weight for one in norms))] if norms else [], sources.text("head_norm")
    if found.is_row:
        norm = source("row_norm", **bound.names)
    is_before = isinstance(found.queries[0], RMSNorm)
    rope, names = program.ropes[turns[0]] if turns else None, list(program.ropes)
    low.n_taken = found.n_ops
    low.emit(
        source("heads_to_cache", BINDINGS=bound.text + vector(3 + len(bound.buffers), "w") * bool(norms),
               NORM=norm if norms and is_before else "", NORM_BEHIND=norm if norms and not is_before else "",
               NORM_VALUES=source("value_norm", **bound.names) if found.values else "",
               FACTOR=" * factor * w[2u * p.dim_k + d]" if found.values else "",
               PUT=sources.puts("keys", "values"), ROTATE=source("rotate", DIM=layer.head_dim_k), **bound.names),
        [low.step, keys.buffer, values.buffer, *bound.buffers, *weights], "rww" + bound.kinds + "r" * len(weights),
        (q.width // layer.head_dim_k + 2 * n_kv, low.n(q), 1), q.width // layer.head_dim_k,
        n_kv, layer.head_dim_k, layer.head_dim_v, rope.n_dims // 2 if rope else 0,
        int(rope is not None and rope.adjacent), *([names.index(one) for one in (turns * 2)[:2]] or (0, 0)),
        program.table_of(found.layer), q.at, q.row, y.at, y.row, k.at, k.row, v.at, v.row,
        float(norms[0].eps if norms else 0.0), is_fixed=True,
    )  # fmt: skip
    return True


def apart_nbytes(program: Program, rows: Mapping[str, int]) -> int:
    """Bytes of the queries that are normed as whole rows on their way: every head reads them, so they go elsewhere."""
    queries = {op.q for op in program.ops if isinstance(op, Attention)}
    normed = {op.x for op in program.ops if isinstance(op, RMSNorm) and op.x in queries
              and program.tensors[op.weight].shape[-1] == program.buffers[op.x].width}  # fmt: skip
    return sum(4 * padded(program.buffers[name].width) * rows[program.buffers[name].rows] for name in normed)


def _heads(low: Lowering) -> _Heads | None:
    """What comes now, where it is done alike to queries and to keys on their way to the cache."""
    ops = list[RMSNorm | ApplyRope]()
    while len(ops) < 5 and isinstance(op := low.next(len(ops)), RMSNorm | ApplyRope):
        ops.append(op)
    store = low.next(len(ops))
    if isinstance(store, Attention):
        return _queries_alone(low, ops, store)
    if not isinstance(store, StoreKV) or store.v in (None, store.k):
        return None
    values = next((op for op in ops if isinstance(op, RMSNorm) and op.out == store.v), None)
    if values is not None and not _are_values(low, values, ops, store):
        return None
    queries, keys = ([op for op in ops if (op.x == store.k) == is_key and op is not values] for is_key in (False, True))
    layer, k, kinds = low.there.program.kv_layer(store.layer), low.place(store.k), [type(op) for op in keys]
    if layer.is_typed or layer.latent or not keys or [type(op) for op in queries] != kinds:
        return None
    is_one = len(kinds) == len(set(kinds)) and {op.x for op in queries} == {queries[0].x} != {store.v}
    is_whole = k.width == layer.n_kv_heads * layer.head_dim_k and low.is_dead(store.k, len(ops))
    is_by_head = all(_is_by_head(low, op, layer.head_dim_k) for op in (*queries, *keys))
    is_row = not is_by_head and all(_is_by_head(low, op, low.place(op.x).width) for op in ops[:1] + keys[:1])
    if is_row:  # queries that every head reads go elsewhere, and attention is to be the only one that looks for them
        at = len(ops) + 1 + isinstance(low.next(len(ops) + 1), PackKV)
        following = low.next(at)
        is_row = (
            isinstance(following, Attention) and following.q == queries[0].x and low.place(following.q).rows == k.rows
        )
        is_row = is_row and isinstance(queries[0], RMSNorm) and low.is_dead(queries[0].x, at)
        is_row = is_row and all(_is_by_head(low, op, layer.head_dim_k) for op in ops if isinstance(op, ApplyRope))
        is_row = is_row and values is None
    same = all(_same_but_weight(low, one, other) for one, other in zip(queries, keys, strict=True))
    if is_one and is_whole and (is_by_head or is_row) and same:
        return _Heads(queries, keys, values, store, store.layer, is_row)
    return None


def _queries_alone(low: Lowering, ops: list[RMSNorm | ApplyRope], behind: Attention) -> _Heads | None:
    """The norm and the rotation of queries, where no keys are stored."""
    layer = low.there.program.kv_layer(behind.layer)
    is_both = [type(op) for op in ops] in ([RMSNorm, ApplyRope], [ApplyRope, RMSNorm])
    is_by_head = all(op.x == behind.q and _is_by_head(low, op, layer.head_dim_k) for op in ops)
    arrays = len(low.there.pool.arrays[behind.layer])
    return _Heads(ops, [], None, None, behind.layer, False) if is_both and is_by_head and arrays == 2 else None


def _are_values(low: Lowering, norm: RMSNorm, ops: list[RMSNorm | ApplyRope], store: StoreKV) -> bool:
    """Whether a norm makes the values of a cache alone, of themselves or of keys that nothing was done to yet."""
    layer, epsilons = low.there.program.kv_layer(store.layer), {op.eps for op in ops if isinstance(op, RMSNorm)}
    is_first = norm.x == store.v or all(op.x != norm.x for op in ops[: ops.index(norm)])
    is_alone = len(epsilons) == 1 and low.is_dead(norm.out, len(ops)) and norm.x in (store.v, store.k)
    # their weights stand behind those of queries and of keys
    is_third = sum(isinstance(op, RMSNorm) for op in ops) == 3
    dim = layer.head_dim_v
    is_by_head = low.there.program.tensors[norm.weight].shape[-1] == dim
    return is_first and is_alone and is_third and is_by_head and low.place(norm.x).width == layer.n_kv_heads * dim


def _is_by_head(low: Lowering, op: RMSNorm | ApplyRope, dim: int) -> bool:
    if isinstance(op, ApplyRope):
        return op.head_dim == dim
    return op.out == op.x and low.there.program.tensors[op.weight].shape[-1] == dim


def _same_but_weight(low: Lowering, one: Op, other: Op) -> bool:
    """Whether queries and keys are normed by one epsilon, or the same dimensions of them are rotated."""
    if isinstance(one, ApplyRope) and isinstance(other, ApplyRope):
        first, second = (low.there.program.ropes[op.rope] for op in (one, other))
        return (first.n_dims, first.adjacent) == (second.n_dims, second.adjacent)
    return isinstance(one, RMSNorm) and isinstance(other, RMSNorm) and one.eps == other.eps


class _Shape(NamedTuple):
    """Of a workgroup: query tokens, heads of each, whether the cache is one part, and what the values are read by."""

    queries: int
    heads: int
    is_whole: bool


def attention(low: Lowering, op: Attention) -> None:
    """Softmax of scores, over parts of 256 positions, and the sum of values."""
    there, layer, parts = low.there, low.there.program.kv_layer(op.layer), low.counts.parts
    q = low.elsewhere.pop(op.q, low.place(op.q))
    heads, gate = there.heads_at_once(op), _gate_behind(low, op)
    out = low.place(op.out if gate is None else gate.out)
    shape = _Shape(_queries(low, heads, layer) if low.counts.is_prompt else 1, heads, parts == 1)
    kept = [array.buffer for array in (there.pool.arrays[op.layer] * 2)[:2]]  # of a latent layer one and the same
    if op.newest is not None:
        kept += [array.buffer for array in there.pool.arrays[op.newest]]
    size = layer.head_dim_v + 2
    target = out.buffer if shape.is_whole else _partials(low)
    roles, gate_at = [("q", q.buffer, "r"), ("o", target, "w")], list[int]()
    if gate is not None:
        low.n_taken, of_gate = 2, low.place(gate.gate)
        gate_at = [of_gate.at, of_gate.row, out.width // of_gate.width]
        roles += [("gate", of_gate.buffer, "r")] if shape.is_whole else []
    bound = bindings(1 + len(kept), roles)
    text, sinks = _text(low, bound, op, layer, shape, gate), [low.vector(op.sinks)] if op.sinks else []
    own = sinks if shape.is_whole else []
    at_once = low.n(q) if shape.is_whole else max(1, PARTIALS_NBYTES // (4 * op.n_heads * parts * size))
    common = there.program.table_of(op.layer), layer.window, parts, op.n_heads, layer.n_kv_heads
    for first in range(0, low.n(q), at_once):
        n = min(at_once, low.n(q) - first)
        low.emit(
            text, [low.step, *kept, *bound.buffers, *own], "r" * (1 + len(kept)) + bound.kinds + "r" * len(own),
            (parts, op.n_heads // heads, blocks(n, shape.queries)), *common, op.n_heads // layer.n_kv_heads // heads,
            first, first + n, q.at, q.row, out.at, out.row, float(op.scale), float(op.softcap),
            *(gate_at if shape.is_whole else []),
            flops=n * op.n_heads * parts * PART * 2 * (layer.head_dim_k + layer.head_dim_v),
        )  # fmt: skip
        if not shape.is_whole:
            _sum(low, layer, target, out, sinks, gate, (op.n_heads, n, 1), (layer.window, parts, op.n_heads, first))


def _gate_behind(low: Lowering, op: Attention) -> SigmoidGate | SoftplusGate | None:
    """The gate that comes next, where nobody else wants what it lets through."""
    gate = low.next()
    if op.newest is not None and op.sinks:
        return None  # more buffers than every device can bind
    if isinstance(gate, SigmoidGate | SoftplusGate) and gate.x == op.out != gate.gate:
        return gate if gate.out == op.out or low.is_dead(op.out, 1) else None
    return None


def _gated(gate: SigmoidGate | SoftplusGate | None, variable: str) -> dict[str, str]:
    """Words for what goes through a gate at the end, or as it is."""
    value, fields = "v", ""
    if gate is not None:
        curve = "sigmoid" if isinstance(gate, SigmoidGate) else "softplus"
        value = f"v * {curve}({variable}[p.gate_at + token * p.gate_row + column / p.per])"
        fields = ", gate_at: u32, gate_row: u32, per: u32"
    let_through = f"fn let_through(v: f32, token: u32, column: u32) -> f32 {{ return {value}; }}"
    return {"FUNCTIONS": sources.text("activations") + let_through, "GATE_AT": fields}


def _queries(low: Lowering, heads: int, layer: KVLayer) -> int:
    """Tokens of a prompt that a workgroup takes: as many as fit its memory, so that its threads share them evenly."""
    most = max(1, min(MOST_ROWS, low.there.rows_at_once(layer)) // heads)
    even = [n for n in range(1, most + 1) if n * heads % (64 // _lanes(layer)) == 0]
    return max(even, default=most)


def _lanes(layer: KVLayer) -> int:
    """Threads that have all dimensions of a value, two each."""
    return min(64, 1 << (-(-layer.head_dim_v // 2) - 1).bit_length())


_TREES = {
    f"{name}_{half}": sources.joined("reduced[at + {}u]", step, how)
    for name, how in (("LARGEST", "max({}, {})"), ("SUM", "({} + {})"))
    for half, step in (("UPPER", 8), ("LOWER", 1))
}


def _text(
    low: Lowering, bound: Bound, op: Attention, layer: KVLayer, shape: _Shape, gate: SigmoidGate | SoftplusGate | None
) -> str:
    newest, first = (0, 3) if op.newest is None else (low.there.program.table_of(op.newest), 5)
    has_sinks, size = op.sinks is not None and shape.is_whole, f"{layer.head_dim_v + 2}u"
    if shape.is_whole:
        to = "p.y_at + (token + r / $HEADS) * p.y_row + (head0 + r % $HEADS) * $DIM_V + d"
        keep = """sums[t] = sum;
      factors[t] = 1.0;"""
        if has_sinks:  # as attention_sum.wgsl does it for a single part
            keep = """let largest = max(tops[t], sinks[head0 + t % $HEADS]);
      factors[t] = exp(tops[t] - largest);
      sums[t] = fma(sum, factors[t], exp(sinks[head0 + t % $HEADS] - largest));"""
        store = f"""let to = {to};
          let column = (head0 + r % $HEADS) * $DIM_V + d;
          $o[to] = let_through(acc[k].x * factors[r] / sums[r], token + r / $HEADS, column);
          if (d + 1u < $DIM_V) {{
            $o[to + 1u] = let_through(acc[k].y * factors[r] / sums[r], token + r / $HEADS, column + 1u);
          }}"""
    else:
        to = "((token + {r} / $HEADS - p.first) * p.n_heads + head0 + {r} % $HEADS) * p.parts + g.x) * " + size
        keep = f"""let to = ({to.format(r="t")};
      $o[to] = tops[t];
      $o[to + 1u] = sum;"""
        store = f"""let to = ({to.format(r="r")} + 2u + d;
          $o[to] = acc[k].x;
          if (d + 1u < $DIM_V) {{ $o[to + 1u] = acc[k].y; }}"""
    rows, lanes = shape.queries * shape.heads, _lanes(layer)
    shares = next(n for n in (64 // lanes, 8, 4, 2, 1) if n * lanes <= 64 and rows % n == 0)
    words = {"HEADS": f"{shape.heads}u", "DIM_V": f"{layer.head_dim_v}u", "o": bound.names["o"]}
    keep, store = (_filled(text, words) for text in (keep, store))
    return source(
        "attention", CAP="capped" if op.softcap else "",
        **_gated(gate if shape.is_whole else None, bound.names.get("gate", "")),
        BINDINGS=bound.text + (vector(first + len(bound.buffers), "sinks") if has_sinks else ""), HEADS=shape.heads,
        QUERIES=shape.queries, ROWS=rows, SHARES=shares, OWN=rows // shares, LANES=64 // shares, DIM_K=layer.head_dim_k,
        DIM_V=layer.head_dim_v, KEEP_SUM=keep, STORE=store, q=bound.names["q"], **_TREES,
        **cache_types.readers(layer, rows, newest),
    )  # fmt: skip


def _filled(text: str, words: dict[str, str]) -> str:
    for name, word in words.items():
        text = text.replace(f"${name}", word)
    return text


def _sum(
    low: Lowering, layer: KVLayer, target: Any, out: Place, sinks: list[Any],
    gate: SigmoidGate | SoftplusGate | None, grid: tuple[int, int, int], immediates: tuple[int, ...],
) -> None:  # fmt: skip
    """The sum of parts."""
    words = {"SINKS": "", "SINK": "-1e30", "SINK_POWER": "0.0"}
    if sinks:
        words = {"SINK": "sinks[g.x]", "SINK_POWER": "exp(sinks[g.x] - most)"}
    roles, gate_at = [("y", out.buffer, "w")], list[int]()
    if gate is not None:
        place = low.place(gate.gate)
        roles, gate_at = [*roles, ("gate", place.buffer, "r")], [place.at, place.row, out.width // place.width]
    bound = bindings(2, roles)
    if sinks:
        words["SINKS"] = vector(2 + len(bound.buffers), "sinks")
    text = source("attention_sum", DIM_V=layer.head_dim_v, BINDINGS=bound.text, y=bound.names["y"], **words,
                  **_gated(gate, bound.names.get("gate", "")))  # fmt: skip
    low.emit(
        text, [low.step, target, *bound.buffers, *sinks], "rr" + bound.kinds + "r" * len(sinks), grid, *immediates,
        out.at, out.row, *gate_at,
    )  # fmt: skip


def _partials(low: Lowering) -> Any:
    there, needed = low.there, 0
    for op in there.program.ops:
        if isinstance(op, Attention):
            size = 4 * op.n_heads * low.counts.parts * (there.program.kv_layer(op.layer).head_dim_v + 2)
            needed = max(needed, size * min(low.counts.tokens, max(1, PARTIALS_NBYTES // size)))
    return there.scratch("partials", needed)


def self_attention(low: Lowering, op: SelfAttention) -> None:
    """Attention over the other tokens of a text, both ways, of which nothing is kept."""
    q, k, v, out = (low.place(name) for name in (op.q, op.k, op.v, op.out))
    dim_k, dim_v = q.width // op.n_heads, out.width // op.n_heads
    bound = bindings(1, [("q", q.buffer, "r"), ("k", k.buffer, "r"), ("v", v.buffer, "r"), ("o", out.buffer, "w")])
    slopes = [low.numbers(f"slopes {op.n_heads}", alibi_slopes(op.n_heads))] if op.fades else []
    own = vector(1 + len(bound.buffers), "slopes") if slopes else ""
    low.emit(
        source(
            "self_attention", BINDINGS=bound.text + own, DIM_K=dim_k, DIM_V=dim_v,
            FADE="- slopes[g.x] * f32(max(i, at) - min(i, at))" if slopes else "", **bound.names,
        ),
        [low.step, *bound.buffers, *slopes], "r" + bound.kinds + "r" * len(slopes), (op.n_heads, low.n(q), 1),
        op.n_heads // op.n_kv_heads, op.reach, q.at, q.row, k.at, k.row, v.at, v.row, out.at, out.row, float(op.scale),
        flops=low.n(q) * low.n(q) * op.n_heads * 2 * (dim_k + dim_v),
    )  # fmt: skip
