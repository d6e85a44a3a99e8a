"""How attention over the cache is lowered: what stores keys and values, and what reads them."""

from __future__ import annotations

from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run import attention_work
from edgellm.kernels.ops import Attention, StoreKV


def _cache(low: Any, layer: int) -> dict[str, int]:
    """Addresses of a layer's keys and values."""
    arrays = [0] if low.pool is None else [array.ctypes.data for array in low.pool.arrays[layer]]
    return {"k_pool": arrays[0], "v_pool": arrays[-1]}


def _store_kv(low: Any, op: StoreKV) -> None:
    layer = low.program.kv_layer(op.layer)
    dim_k, dim_v = layer.head_dim_k, layer.head_dim_v
    if op.v is None:  # keys with their values in them lie as values do
        dim_k, dim_v = 0, dim_k
    arguments = layout.STORE_KV(
        **low.where(k=op.k, v=op.v or op.k), **_cache(low, op.layer), heads=layer.n_kv_heads, dim_k=dim_k, dim_v=dim_v,
        table=low.program.table_of(op.layer),
    )  # fmt: skip
    low.emit(op, "store_kv", arguments, alone=True)


def _attention(low: Any, op: Attention) -> None:
    layer = low.program.kv_layer(op.layer)
    if layer.latent and (layer.head_dim_k % layout.ROW_ALIGN or layer.head_dim_v % layout.ROW_ALIGN):
        raise UnsupportedError(
            f"keys of {layer.head_dim_k} with values of {layer.head_dim_v} in them; the CPU kernel takes multiples of "
            f"{layout.ROW_ALIGN}.",
            code="MODEL_SHAPE",
        )
    arguments = layout.ATTENTION(
        **low.where(q=op.q, out=op.out), **_cache(low, op.layer), n_heads=op.n_heads, n_kv_heads=layer.n_kv_heads,
        dim_k=layer.head_dim_k, dim_v=layer.head_dim_v, window=layer.window,
        shape=low.shapes.index(attention_work.attention_shape(op, layer)), scale=op.scale,
        softcap=op.softcap, sinks=low.vector(op.sinks) if op.sinks else 0,
    )  # fmt: skip
    kernel = "attention_latent" if layer.latent else "attention"
    low.emit(op, kernel, arguments, alone=False, also_writes=["partials"])


RULES: dict[type, Any] = {StoreKV: _store_kv, Attention: _attention}
