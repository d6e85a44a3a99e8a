"""Which keys of a prompt its last tokens look at, and these alone, gathered into blocks of their own (SnapKV).

Li et al., 2024: what the last 32 tokens of a prompt give weight to is what an answer will mostly look at. Their weights
are summed over them and over the query heads that share a head of the cache; each position then counts as the largest
of its seven neighbours, itself included, so that what stands together stays together. Each head keeps its own
positions, so a block that is made here holds, at one place, another token for each head.
"""

from __future__ import annotations

import numpy as np

from edgellm.kernels.cache_types import QUANTIZED
from edgellm.kernels.kv import BLOCK_TOKENS, CachePool, KVLayer
from edgellm.kernels.ops.attention import Attention, read_blocks
from edgellm.kernels.program import Program

WINDOW = BLOCK_TOKENS  # tokens that vote
REACH = 3  # neighbours on either side


def votes(program: Program, pool: CachePool, op: Attention, q: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """How much the window's queries (WINDOW, n_heads * head_dim) look at each position before it.

    ``blocks`` are those of the whole text, the window's last. (n_kv_heads, n_positions) float32
    """
    layer = program.kv_layer(op.layer)
    keys, _ = read_blocks(pool, op.layer, layer, blocks)
    n, group = keys.shape[2], op.n_heads // layer.n_kv_heads
    hidden = np.arange(n) > np.arange(n - WINDOW, n)[:, None]
    found = np.zeros((layer.n_kv_heads, n - WINDOW), np.float32)
    q = q.reshape(WINDOW, op.n_heads, layer.head_dim_k)
    for head in range(op.n_heads):
        scores = (q[:, head] @ keys[head // group]) * np.float32(op.scale)
        if op.softcap:
            scores = np.tanh(scores / np.float32(op.softcap)) * np.float32(op.softcap)
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        found[head // group] += (weights / weights.sum(axis=1, keepdims=True))[:, : n - WINDOW].sum(axis=0)
    return found


def likeliest(found: np.ndarray, n: int) -> np.ndarray:
    """The n positions of each head (n_heads, n) with the most votes around them, rising; of equal ones the first."""
    padded = np.pad(found, ((0, 0), (REACH, REACH)))
    pooled = np.lib.stride_tricks.sliding_window_view(padded, 2 * REACH + 1, axis=1).max(axis=-1)
    return np.sort(np.argsort(-pooled, axis=1, kind="stable")[:, :n], axis=1)


def gathered(layer: KVLayer, arrays: list[np.ndarray], blocks: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
    """New blocks of a layer's keys and values, made of the positions (n_kv_heads, n) of a text in ``blocks``."""
    made: list[np.ndarray] = []
    for values, (array, name) in enumerate(zip(arrays, (layer.type_k, layer.type_v), strict=True)):
        if name in QUANTIZED:
            kind, dim = QUANTIZED[name], layer.head_dim_v if values else layer.head_dim_k
            parts = kind.read(array[blocks], dim, values=bool(values))  # (n_blocks, heads, 32, ...)
            chosen = [_at(np.moveaxis(part, 1, 0), positions) for part in parts]
            made.append(kind.write((chosen[0], chosen[1], chosen[2]), values=bool(values)))
        elif values:
            made.append(_at(np.moveaxis(array[blocks], 1, 0), positions))
        else:
            keys = np.moveaxis(array[blocks], 1, 0).swapaxes(-1, -2)
            made.append(np.ascontiguousarray(_at(keys, positions).swapaxes(-1, -2)))
    return made


def _at(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Of (heads, n_blocks, 32, ...) the positions (heads, n), as blocks (n / 32, heads, 32, ...)."""
    rows = x.reshape(x.shape[0], -1, *x.shape[3:])
    chosen = np.stack([of_head[where] for of_head, where in zip(rows, positions, strict=True)])
    blocks = chosen.reshape(x.shape[0], -1, BLOCK_TOKENS, *x.shape[3:])
    return np.ascontiguousarray(np.moveaxis(blocks, 0, 1))
