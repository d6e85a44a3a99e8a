"""One matrix with the rows of q, k and v, as some checkpoints have it: which of its rows are whose."""

from __future__ import annotations

import numpy as np

from edgellm.models.parts.checkpoint_config import CheckpointConfig


def rows_of_qkv(
    config: CheckpointConfig, *, by_group: bool = False, n_kv: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of q, k and v, of a matrix with all of q, then k, then v.

    by_group   heads of q stand with those of k and v that they share: [q ... q k v] for each
    n_kv       heads of k and of v, where the settings' own number does not count
    """
    n_head, dim = config.integer("num_attention_heads"), config.head_dim
    n_kv = n_kv or config.integer("num_key_value_heads", n_head)
    if n_head % n_kv:
        raise config.wrong("num_key_value_heads", n_kv, f"a divisor of num_attention_heads, which is {n_head}")
    rows = np.arange((n_head + 2 * n_kv) * dim)
    if not by_group:
        q, k, v = np.split(rows, [n_head * dim, (n_head + n_kv) * dim])
        return q, k, v
    groups = rows.reshape(n_kv, n_head // n_kv + 2, dim)
    return groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)


def paired(config: CheckpointConfig, rows: np.ndarray) -> np.ndarray:
    """The rows of q or k in an order in which rotated pairs, half a head apart in the checkpoint, are neighbours."""
    return rows.reshape(-1, 2, config.head_dim // 2).swapaxes(1, 2).reshape(-1)
