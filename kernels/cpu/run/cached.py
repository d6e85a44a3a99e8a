"""How attention over the cache is lowered: what stores keys and values, and what reads them, by their types."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.lib.layout import ALONE_WIDTH
from edgellm.kernels.cpu.run import attention_work
from edgellm.kernels.kv import NEWEST_BLOCKS, KVLayer
from edgellm.kernels.ops import Attention, BoundKeys, ChooseBlocks, Hadamard, PackKV, StoreKV


def _cache(low: Any, layer: int) -> dict[str, int]:
    """Addresses of a layer's keys and values."""
    arrays = [0] if low.pool is None else [array.ctypes.data for array in low.pool.arrays[layer]]
    return {"k_pool": arrays[0], "v_pool": arrays[min(1, len(arrays) - 1)]}


def _bounds(low: Any, layer: int) -> int:
    """Address of the bounds of a layer's keys."""
    return 0 if low.pool is None else low.pool.arrays[layer][-1].ctypes.data


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
    for (of, x, name, dim), nbytes in zip(kinds, _head_nbytes(layer)[:2], strict=True):
        typed = layout.STORE_TYPED(
            **low.where(x=x), pool=pools[f"{of}_pool"], head_nbytes=nbytes, heads=layer.n_kv_heads, dim=dim,
            table=low.program.table_of(op.layer), values=int(of == "v"),
        )  # fmt: skip
        low.emit(op, f"store_{name}", typed, alone=True)


def _head_nbytes(layer: KVLayer) -> list[int]:
    """Bytes of one head in a block, of keys and of values."""
    arrays = layer.arrays(np.dtype(np.float16))
    return [math.prod(shape) * kept.itemsize // layer.n_kv_heads for shape, kept in arrays]


def _newest(low: Any, layer: int) -> dict[str, int]:
    """Where the blocks are that are not packed yet."""
    at = _cache(low, layer)
    return {"newest_k": at["k_pool"], "newest_v": at["v_pool"], "newest_table": low.program.table_of(layer)}


def _pack_kv(low: Any, op: PackKV) -> None:
    layer = low.program.kv_layer(op.layer)
    arguments = layout.PACK_KV(
        **_newest(low, op.newest), **_cache(low, op.layer), table=low.program.table_of(op.layer),
        heads=layer.n_kv_heads, dim_k=layer.head_dim_k, dim_v=layer.head_dim_v,
    )  # fmt: skip
    low.emit(op, "pack_kv", arguments, alone=True)


def _bound_keys(low: Any, op: BoundKeys) -> None:
    source = op.read_layers()[0]
    layer = low.program.kv_layer(source)
    arguments = layout.BOUND_KEYS(
        keys=_cache(low, source)["k_pool"], keys_head=_head_nbytes(layer)[0], keys_table=low.program.table_of(source),
        bounds=_bounds(low, op.layer), table=low.program.table_of(op.layer), heads=layer.n_kv_heads,
        dim=layer.head_dim_k,
    )  # fmt: skip
    low.emit(op, f"bound_keys_{layer.type_k}", arguments, alone=True)


def _choose_blocks(low: Any, op: ChooseBlocks) -> None:
    layer = low.program.kv_layer(op.layer)
    arguments = layout.CHOOSE_BLOCKS(
        **low.where(q=op.q, out=op.out), bounds=_bounds(low, op.layer), table=low.program.table_of(op.layer),
        heads=layer.n_kv_heads, n_heads=op.n_heads, dim=layer.head_dim_k, n_chosen=layer.n_chosen,
    )  # fmt: skip
    low.emit(op, "choose_blocks", arguments, alone=False)


def _attention(low: Any, op: Attention) -> None:
    layer = low.program.kv_layer(op.layer)
    if layer.latent and (layer.head_dim_k % layout.ROW_ALIGN or layer.head_dim_v % layout.ROW_ALIGN):
        raise UnsupportedError(
            f"keys of {layer.head_dim_k} with values of {layer.head_dim_v} in them; the CPU kernel takes multiples of "
            f"{layout.ROW_ALIGN}.",
            code="MODEL_SHAPE",
        )
    heads = _head_nbytes(layer)
    k_head, v_head = heads[0], heads[min(1, len(heads) - 1)]
    newest = {"newest_k": 0, "newest_v": 0, "newest_table": 0, "run_blocks": 0}
    if op.newest is not None:
        newest = {**_newest(low, op.newest), "run_blocks": NEWEST_BLOCKS}
    arguments = layout.ATTENTION(
        **low.where(q=op.q, out=op.out), **_cache(low, op.layer), k_head=k_head, v_head=v_head,
        n_heads=op.n_heads, n_kv_heads=layer.n_kv_heads, dim_k=layer.head_dim_k, dim_v=layer.head_dim_v,
        window=layer.window, shape=low.shapes.index(attention_work.attention_shape(op, layer)), scale=op.scale,
        softcap=op.softcap, sinks=low.vector(op.sinks) if op.sinks else 0, score=0, weigh=0,
        **(low.where(chosen=op.chosen) if op.chosen else {"chosen": 0, "chosen_row": 0}), n_chosen=layer.n_chosen,
        **newest,
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


RULES: dict[type, Any] = {
    StoreKV: _store_kv,
    PackKV: _pack_kv,
    BoundKeys: _bound_keys,
    ChooseBlocks: _choose_blocks,
    Attention: _attention,
    Hadamard: _hadamard,
}
