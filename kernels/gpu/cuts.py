"""Products whose heads are cut in two behind them: their rows stand in the order of the cut, so nothing is to be cut.

Each half has its columns where the product leaves them. What stood there before the cut is made for hooks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgellm.kernels.ops import HeadMatmul, Matmul, Op, SplitHeads
from edgellm.kernels.program import Buffer


class Cut(NamedTuple):
    """A buffer's two halves, by heads of which the first has ``dim`` columns.

    order   its columns in the order in which these have them; None: they lie as they are
    """

    first: str
    second: str
    dim: int
    order: np.ndarray | None


def find_cuts(ops: Sequence[Op], buffers: Mapping[str, Buffer]) -> dict[str, Cut]:
    """The buffers that nothing but products write, and nothing but one kind of cut reads, or cuts of their halves.

    Halves that products read four numbers at a time are left where they are, and so are those of latent heads.
    """
    found: dict[str, Cut] = {}
    writers: dict[str, list[Op]] = {}
    readers: dict[str, list[Op]] = {}
    for op in ops:
        for names, known in ((op.written_buffers(), writers), (op.read_buffers(), readers)):
            for name in names:
                known.setdefault(name, []).append(op)
    parents = {buffer.of for buffer in buffers.values()} - {""}
    for op in ops:
        if not isinstance(op, SplitHeads) or op.x in found:
            continue
        halves = op.first, op.second
        kinds = {(type(one), getattr(one, "first", ""), getattr(one, "second", ""), getattr(one, "head_dim", 0))
                 for one in readers[op.x]}  # fmt: skip
        is_half = any(op.x in (cut.first, cut.second) and cut.order is None for cut in found.values())
        is_made = is_half or all(isinstance(one, Matmul) for one in writers.get(op.x, [op]))
        is_own = all(_is_cut_alone(name, op, writers[name], readers.get(name, [])) for name in halves)
        n_heads = buffers[op.first].width // op.head_dim
        stands = not any(name in parents or buffers[name].of for name in (op.x, *halves))
        if len(kinds) == 1 and is_made and is_own and stands and not (is_half and n_heads > 1):
            found[op.x] = Cut(
                *halves, op.head_dim, _order(n_heads, op.head_dim, buffers[op.x].width) if n_heads > 1 else None
            )
    return found


def _is_cut_alone(name: str, cut: SplitHeads, writers: Sequence[Op], readers: Sequence[Op]) -> bool:
    """Whether a half comes of this cut wherever it comes from, but for what changes it in place."""
    own = all((isinstance(op, SplitHeads) and op.x == cut.x) or name in op.read_buffers() for op in writers)
    return own and not any(isinstance(op, Matmul | HeadMatmul) for op in readers)


def _order(n_heads: int, dim: int, width: int) -> np.ndarray:
    heads = np.arange(width).reshape(n_heads, width // n_heads)
    return np.concatenate([heads[:, :dim].reshape(-1), heads[:, dim:].reshape(-1)])
