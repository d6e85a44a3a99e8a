"""How attention over the cache is lowered: what stores keys and values, and what reads them, by their types."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.lib.layout import ALONE_WIDTH
from edgellm.kernels.cpu.run import attention_work
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import Attention, Hadamard, StoreKV


def _cache(low: Any, layer: int) -> dict[str, int]:
    """Addresses of a layer's keys and values."""
    arrays = [0] if low.pool is None else [array.ctypes.data for array in low.pool.arrays[layer]]
    return {"k_pool": arrays[0], "v_pool": arrays[-1]}


def _store_kv(low: Any, op: StoreKV) -> None:
    layer, pools = low.program.kv_layer(op.layer), _cache(low, op.layer)
    if op.v is None or not layer.is_typed:
        dim_k, dim_v = layer.head_dim_k, layer.head_dim_v
        if op.v is None:  # keys with their values in them lie as values do
            dim_k, dim_v = 0, dim_k
        arguments = layout.STORE_KV(
            **low.where(k=op.k, v=op.v or op.k), **pools, heads=layer.n_kv_heads, dim_k=dim_k, dim_v=dim_v,
            table=low.program.table_of(op.layer),
        )  # fmt: skip
        low.emit(op, "store_kv", arguments, alone=True)
        return
    kinds = (("k", op.k, layer.type_k, layer.head_dim_k), ("v", op.v, layer.type_v, layer.head_dim_v))
    for (of, x, name, dim), nbytes in zip(kinds, _head_nbytes(layer), strict=True):
        typed = layout.STORE_TYPED(
            **low.where(x=x), pool=pools[f"{of}_pool"], head_nbytes=nbytes, heads=layer.n_kv_heads, dim=dim,
            table=low.program.table_of(op.layer), values=int(of == "v"),
        )  # fmt: skip
        low.emit(op, f"store_{name}", typed, alone=True)


def _head_nbytes(layer: KVLayer) -> list[int]:
    """Bytes of one head in a block, of keys and of values."""
    arrays = layer.arrays(np.dtype(np.float16))
    return [math.prod(shape) * kept.itemsize // layer.n_kv_heads for shape, kept in arrays]


def _attention(low: Any, op: Attention) -> None:
    layer = low.program.kv_layer(op.layer)
    if layer.latent and (layer.head_dim_k % layout.ROW_ALIGN or layer.head_dim_v % layout.ROW_ALIGN):
        raise UnsupportedError(
            f"keys of {layer.head_dim_k} with values of {layer.head_dim_v} in them; the CPU kernel takes multiples of "
            f"{layout.ROW_ALIGN}.",
            code="MODEL_SHAPE",
        )
    heads = _head_nbytes(layer)
    k_head, v_head = heads[0], heads[-1]
    arguments = layout.ATTENTION(
        **low.where(q=op.q, out=op.out), **_cache(low, op.layer), k_head=k_head, v_head=v_head,
        n_heads=op.n_heads, n_kv_heads=layer.n_kv_heads, dim_k=layer.head_dim_k, dim_v=layer.head_dim_v,
        window=layer.window, shape=low.shapes.index(attention_work.attention_shape(op, layer)), scale=op.scale,
        softcap=op.softcap, sinks=low.vector(op.sinks) if op.sinks else 0, score=0, weigh=0,
    )  # fmt: skip
    if layer.is_typed:
        low.calls += [
            (len(low.rows), "score", f"score_{layer.type_k}"),
            (len(low.rows), "weigh", f"weigh_{layer.type_v}"),
        ]
    kernel = "attention_latent" if layer.latent else "attention_typed" if layer.is_typed else "attention"
    low.emit(op, kernel, arguments, alone=False, also_writes=["partials"])


def _hadamard(low: Any, op: Hadamard) -> None:
    width = low.width(op.x)
    arguments = layout.HADAMARD(
        **low.where(x=op.x), groups=width // op.size, size=op.size, scale=op.size**-0.5, row_kind=low.row_kind(op.x)
    )
    low.emit(op, "hadamard", arguments, alone=width <= ALONE_WIDTH)


RULES: dict[type, Any] = {StoreKV: _store_kv, Attention: _attention, Hadamard: _hadamard}
