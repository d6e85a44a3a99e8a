"""What an executor takes on trust of a batch, proved before it runs, and that what comes of it are numbers."""

from __future__ import annotations

import itertools

import numpy as np

from edgellm.formats.errors import NumericError, ParameterError
from edgellm.kernels.kv import BLOCK_TOKENS, CachePool
from edgellm.kernels.ops.embed import embedding_of
from edgellm.kernels.ops.encoder import AddRows
from edgellm.kernels.program import Batch, Program


def check_batch(batch: Batch, program: Program, pool: CachePool, max_tokens: int, n_steps: int = 1) -> list[int]:
    """The first token of each sequence of a batch, and one past the last. ParameterError names what cannot be.

    n_steps   so many steps are made from it, each a position further: the blocks must be there for all
    """
    n = len(batch)
    if not 0 < n <= max_tokens:
        raise ParameterError(f"a batch of {n} tokens; this executor takes 1 to {max_tokens}")
    if len({n, len(batch.positions), len(batch.sequences), len(batch.outputs)}) != 1:
        raise ParameterError("tokens, positions, sequences and outputs of a batch must have one length")
    tokens, positions = batch.tokens.tolist(), batch.positions.tolist()
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= program.n_vocab:
        raise ParameterError(f"token id {low if low < 0 else high} is not in [0, {program.n_vocab})")
    if batch.logged and n > program.log_rows:
        raise ParameterError(f"{n} tokens to be logged; this program's log has {program.log_rows} rows")
    if len(batch.tables) != len(pool.groups):
        raise ParameterError(f"{len(batch.tables)} block tables; the model has {len(pool.groups)} groups")
    if batch.embeddings is not None:
        _check_embeddings(*batch.embeddings, n, program)
    if batch.rope_positions is not None:
        _check_rope_positions(batch.rope_positions, n, program)
    if batch.adapters is not None:
        _check_adapters(batch, program)
    if batch.types is not None and batch.types.shape != (n,):
        raise ParameterError(f"types of shape {batch.types.shape}; ({n},) is expected")
    _check_rows(batch, program, n_steps)
    starts = _starts(batch.sequences)
    if 1 < n == len(starts) - 1 and batch.sees is None and _are_blocks_there(batch, pool, n_steps):
        return starts  # many answers decode: each by itself would take 4 us
    for start, stop in itertools.pairwise(starts):
        first, last = positions[start], positions[stop - 1]
        if first < 0 or (stop - start > 1 and positions[start:stop] != list(range(first, first + stop - start))):
            raise ParameterError("positions of a sequence must rise by one, from 0 on")
        if batch.sees is not None:
            _check_sight(batch.sees[start:stop], batch.positions[start:stop])
        _check_blocks(batch, pool, int(batch.sequences[start]), first, last + n_steps - 1)
    return starts


def _are_blocks_there(batch: Batch, pool: CachePool, n_steps: int) -> bool:
    """Whether all is well with the blocks of a batch of one token of each sequence; False where there are states."""
    first, sequences = batch.positions, batch.sequences
    if first.min() < 0 or sequences.min() < 0 or any(group.kind == "state" for group in pool.groups):
        return False
    end = (first + n_steps - 1) // BLOCK_TOKENS + 1
    for group, n_blocks, table in zip(pool.groups, pool.n_blocks, batch.tables, strict=True):
        begin = group.first_read(first)
        if table.ndim != 2 or sequences.max() >= len(table) or end.max() > table.shape[1]:
            return False
        columns = np.arange(begin.min(), end.max())
        blocks = table[sequences, columns[0] : columns[-1] + 1]
        wanted = (columns >= begin[:, None]) & (columns < end[:, None])
        if (wanted & ((blocks < 0) | (blocks >= n_blocks))).any():
            return False
        beginnings = table[sequences, 0]
        if group.kind == "newest" and ((beginnings < 0) | (beginnings >= n_blocks)).any():
            return False
    return True


def check_logits(logits: np.ndarray) -> None:
    """NumericError where one of them, (n_outputs, n_vocab), is no finite number."""
    if logits.size and not (np.isfinite(logits.max()) and np.isfinite(logits.min())):
        raise NumericError(
            "the model computed NaN or infinity instead of logits. Its file may be damaged: try "
            "`edgellm verify FILE`, then pull it again."
        )


def checked(rows: np.ndarray) -> np.ndarray:
    """The rows, where all of them are finite numbers; else NumericError."""
    check_logits(rows)
    return rows


def _starts(sequences: np.ndarray) -> list[int]:
    if len(sequences) == 1:  # decode: numpy would take 10 us
        return [0, 1]
    return [0, *(np.flatnonzero(np.diff(sequences)) + 1).tolist(), len(sequences)]


def _check_sight(sees: np.ndarray, positions: np.ndarray) -> None:
    """The tokens of a sequence see up to themselves or further, not past its last, and none less far than before."""
    if len(sees) != len(positions) or (sees < positions).any() or (np.diff(sees) < 0).any() or sees[-1] > positions[-1]:
        raise ParameterError("sees must not fall, from a token's own position to the last of its sequence in the batch")


def _check_embeddings(rows: np.ndarray, values: np.ndarray, n: int, program: Program) -> None:
    if embedding_of(program) is None:
        raise ParameterError("embeddings in place of tokens, for a program that looks no token up")
    if values.shape != (len(rows), program.n_embd):
        raise ParameterError(f"embeddings of shape {values.shape}; ({len(rows)}, {program.n_embd}) is expected")
    if len(rows) and not 0 <= min(rows) <= max(rows) < n:
        raise ParameterError(f"embeddings for the rows {min(rows)} to {max(rows)} of a batch of {n} tokens")


def _check_adapters(batch: Batch, program: Program) -> None:
    n_adapters = program.adapted.n_adapters if program.adapted is not None else program.n_adapters
    scales, expected = batch.adapters, (len(batch), n_adapters)
    if scales is None or not n_adapters or scales.shape != expected or not np.isfinite(scales).all():
        shape = None if scales is None else scales.shape
        raise ParameterError(f"scales of adapters of shape {shape}; numbers of the shape {expected} are expected")
    if batch.embeddings is not None:
        raise ParameterError("embeddings in place of tokens, in a batch with adapters")


def _check_rows(batch: Batch, program: Program, n_steps: int) -> None:
    """Tables by position or type have a row for every token, of all steps that are made."""
    for op in program.row_tables:
        if isinstance(op, AddRows) and op.of != "none":
            numbers = batch.positions if op.of == "positions" else batch.types
            low, high = (0, 0) if numbers is None else (int(numbers.min()), int(numbers.max()))
            high += (n_steps - 1) * (op.of == "positions")
            n_rows = program.tensors[op.weight].shape[0]
            if low < 0 or high >= n_rows:
                raise ParameterError(f"{op.of} {low} to {high}; {op.weight} has {n_rows} rows")


def _check_rope_positions(parts: np.ndarray, n: int, program: Program) -> None:
    chosen = [int(rope.part_of.max()) for rope in program.ropes.values() if rope.part_of is not None]
    n_parts = 1 + max(chosen, default=0)
    if parts.shape == (n,):
        return
    if parts.ndim != 2 or parts.shape[0] < n_parts or parts.shape[1] != n:
        raise ParameterError(f"rope_positions of shape {parts.shape}; ({n_parts}, {n}) is expected")


def _check_blocks(batch: Batch, pool: CachePool, sequence: int, first: int, last: int) -> None:
    for group, n_blocks, table in zip(pool.groups, pool.n_blocks, batch.tables, strict=True):
        if table.ndim != 2:
            raise ParameterError(f"a block table of shape {table.shape}; (n_sequences, max_blocks) is expected")
        if group.kind == "state":
            _check_slots(table, n_blocks, sequence, fresh=first == 0)
            continue
        begin = int(group.first_read(first))
        end = last // BLOCK_TOKENS + 1
        if not 0 <= sequence < table.shape[0] or end > table.shape[1]:
            raise ParameterError(f"no block table for position {last} of sequence {sequence}")
        blocks = table[sequence, [0, *range(begin, end)] if group.kind == "newest" else slice(begin, end)]
        if int(blocks.min()) < 0 or int(blocks.max()) >= n_blocks:
            raise ParameterError(f"block table of sequence {sequence} points outside its {n_blocks} blocks")


def _check_slots(table: np.ndarray, n_slots: int, sequence: int, fresh: bool) -> None:
    """A state is read from one slot, at position 0 from none; no other sequence of the table has the one it writes."""
    if not 0 <= sequence < table.shape[0] or table.shape[1] != 2:
        raise ParameterError(f"no slots for the state of sequence {sequence} in a table of shape {table.shape}")
    read, written = table[sequence].tolist()
    shared = np.count_nonzero(table == written) > 1 + (read == written)
    if (read < 0) != fresh or not (-1 <= read < n_slots and 0 <= written < n_slots) or shared:
        raise ParameterError(f"sequence {sequence} reads slot {read} and writes {written} of {n_slots}")
