"""A log of rows: a step that tries drafts keeps what its states were made of, and is taken back in part by it.

A state is behind all tokens of a step. Where a step keeps for each of them what the updates of states read, some rows
beside states of megabytes, the states behind its first tokens are made by these updates alone: they go once more from
the slots that the step has read to the slots that it has written. The ops are the same, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import Scale
from edgellm.kernels.program import Batch, Buffer, Op, Program

LOG_ROWS = 32
"""Tokens of a step that are logged at most: one answer tries up to 15, and more of them together are seldom wrong."""


def with_log(program: Program) -> Program:
    """The same for an executor that is to log; the program itself where no layer has a state."""
    if not any(map(is_update, [program] * len(program.ops), program.ops)):
        return program
    adapted = None if program.adapted is None else with_log(program.adapted)
    return replace(program, log_rows=LOG_ROWS, adapted=adapted)


def is_update(program: Program, op: Op) -> bool:
    """Whether an op makes states of states."""
    return op.cache == "update" and all(isinstance(program.cache_layers[i], StateLayer) for i in op.written_layers())


@dataclass(frozen=True)
class RowLog:
    """The log of a program as ops over buffers of its own.

    copies    by an op that makes states: what writes to the log all that it reads
    replay    the ops that make states, with the log in place of what they read
    buffers   the log: a row for each token of a step that is logged
    """

    copies: dict[Op, list[Scale]]
    replay: list[Op]
    buffers: dict[str, Buffer]


def row_log(program: Program) -> RowLog:
    """The log that a program asks for; nothing where it asks for none."""
    log = RowLog({}, [], {})
    for op in program.ops if program.log_rows else ():
        if is_update(program, op):
            (layer,), changed = op.written_layers(), dict[str, str]()
            for field in op.reads:
                name = getattr(op, field)
                changed[field] = kept = f"{name} in the log of {layer}"
                log.buffers[kept] = Buffer(kept, program.buffers[name].width)
            log.copies[op] = [Scale(getattr(op, field), kept, 1.0) for field, kept in changed.items()]
            log.replay.append(replace(op, **changed))
    return log


def taken_back(batch: Batch, counts: Sequence[int]) -> tuple[np.ndarray, Batch]:
    """Of a step the rows of the first ``counts`` tokens of its sequences, 0 for one that is left alone, and the step
    that they would have been, without outputs."""
    starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1))
    rows = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
    kept = replace(
        batch,
        **{name: getattr(batch, name)[rows] for name in ("tokens", "positions", "sequences")},
        outputs=np.zeros(len(rows), bool),
        rope_positions=None if batch.rope_positions is None else batch.rope_positions[..., rows],
        adapters=None if batch.adapters is None else batch.adapters[rows],
        types=None if batch.types is None else batch.types[rows],
        sees=None,
        embeddings=None,  # of what came before any state
        logged=False,
    )
    return rows, kept
