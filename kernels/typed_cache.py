"""A program whose keys and values are kept in fewer bits (cache_types.py).

Keys and queries are rotated alike, which leaves their products what they are and spreads what is far out in a few
dimensions, where it would take the bits of the others in its group. Values are rotated, too, and what attention makes
of them is turned back. A packed type needs no rotation: its keys share a scale by dimension.
"""

from __future__ import annotations

from dataclasses import replace

from edgellm import arguments
from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cache_types import DEFAULT, GROUP, PACKED, QUANTIZED
from edgellm.kernels.kv import CacheLayer, KVLayer
from edgellm.kernels.ops.attention import Attention, StoreKV
from edgellm.kernels.ops.full_blocks import PackKV
from edgellm.kernels.ops.hadamard import Hadamard
from edgellm.kernels.program import Op, Program


def with_cache_types(program: Program, type_k: str, type_v: str, *, rotates: bool = True) -> Program:
    """The program with keys and values of these types, rows of cache_types.py; states stay as they are.

    UnsupportedError where heads do not divide into groups of 32, or keys are values, too.
    """
    arguments.cache_type("cache_type_k", type_k)
    arguments.cache_type("cache_type_v", type_v)
    if (type_k, type_v) == (DEFAULT, DEFAULT):
        return program
    if (type_k in PACKED or type_v in PACKED) and type_k != type_v:
        packed, other = (type_k, type_v) if type_k in PACKED else (type_v, type_k)
        raise UnsupportedError(
            f"{packed} is a form of keys and values together, and {other} was asked for the others. Give both "
            "cache_type_k and cache_type_v the same.",
            code="CACHE_TYPE",
        )
    layers = tuple(_typed(i, layer, type_k, type_v) for i, layer in enumerate(program.cache_layers))
    if type_k in PACKED:
        return _packed(program, layers)
    adapted = program.adapted and with_cache_types(program.adapted, type_k, type_v, rotates=rotates)
    typed = replace(program, cache_layers=layers, adapted=adapted)
    return replace(typed, ops=tuple(_rotated(typed))) if rotates else typed


def _typed(index: int, layer: CacheLayer, type_k: str, type_v: str) -> CacheLayer:
    if not isinstance(layer, KVLayer):
        return layer
    if layer.latent:
        raise UnsupportedError(
            f"The cache of layer {index} has keys that are values, too; it is kept as f16. Leave cache_type_k and "
            "cache_type_v out.",
            code="CACHE_TYPE",
        )
    for what, name, dim in (("keys", type_k, layer.head_dim_k), ("values", type_v, layer.head_dim_v)):
        if (name in QUANTIZED or name in PACKED) and dim % GROUP:
            raise UnsupportedError(
                f"The {what} of layer {index} have heads of {dim} dimensions; {name} takes multiples of {GROUP}. "
                "Take f16, bf16 or f32 for them.",
                code="CACHE_TYPE",
            )
    return replace(layer, type_k=type_k, type_v=type_v)


def _packed(program: Program, layers: tuple[CacheLayer, ...]) -> Program:
    """The program whose layers are packed block by block, and others behind them that have the first and the newest."""
    kept = [i for i, layer in enumerate(layers) if isinstance(layer, KVLayer)]
    newest = {index: len(layers) + i for i, index in enumerate(kept)}
    near = tuple(
        KVLayer(layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v, newest=True)
        for layer in layers
        if isinstance(layer, KVLayer)
    )
    ops = list[Op]()
    for op in program.ops:
        if isinstance(op, StoreKV):
            ops += [replace(op, layer=newest[op.layer]), PackKV(op.layer, newest[op.layer])]
        elif isinstance(op, Attention):
            ops.append(replace(op, newest=newest[op.layer]))
        else:
            ops.append(op)
    adapted = program.adapted and _packed(program.adapted, layers)
    return replace(program, ops=tuple(ops), cache_layers=(*layers, *near), adapted=adapted)


def _size(dim: int) -> int:
    """The largest power of two that divides a head."""
    return dim & -dim


def _rotated(program: Program) -> list[Op]:
    ops: list[Op] = []
    for op in program.ops:
        if isinstance(op, StoreKV) and op.v is not None:
            layer = program.kv_layer(op.layer)
            turned = [(op.k, layer.type_k, layer.head_dim_k), (op.v, layer.type_v, layer.head_dim_v)]
            ops += [Hadamard(x, _size(dim)) for x, name, dim in turned if name in QUANTIZED]
        if isinstance(op, Attention) and program.kv_layer(op.layer).type_k in QUANTIZED:
            ops.append(Hadamard(op.q, _size(program.kv_layer(op.layer).head_dim_k)))
        ops.append(op)
        if isinstance(op, Attention) and program.kv_layer(op.layer).type_v in QUANTIZED:
            ops.append(Hadamard(op.out, _size(program.kv_layer(op.layer).head_dim_v)))
    return ops
