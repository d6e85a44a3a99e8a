"""An executor that computes nothing but remembers everything: a judge of paging.

It writes each token id and position into the pool through the block tables, and makes the next logits from all that a
query may look at, read back through the tables. One wrong block, one stale or missing position, and the answer is
another one. ``expected_logits`` gives the same numbers straight from the tokens.

What a sequence holds from the first position of a step on is void, be it the token of a draft that was rejected: it is
blotted out before the step, and whoever looks at it later fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from edgellm.formats.errors import NumericError
from edgellm.kernels.kv import BLOCK_TOKENS, CacheLayer, CachePool, KVLayer, StateLayer
from edgellm.kernels.program import Batch, Hook, Program

N_VOCAB = 97
STATE = -1  # in a list of windows: recurrent layers
PACKED = -2  # and that blocks are packed once they are full, with layers for the first one and the newest run beside
VOID = -1  # in place of a key


def fake_program(windows: tuple[int, ...] = (0,), context_length: int = 4096) -> Program:
    """A program without ops: two layers for each window. It has as many groups as there are ``windows``."""
    return Program("fake", (), {}, {}, fake_layers(windows), {}, N_VOCAB, context_length, 8)


def fake_layers(windows: Sequence[int]) -> tuple[CacheLayer, ...]:
    """Two layers for each window, or with a state."""
    twice = [window for window in windows if window != PACKED for _ in range(2)]
    layers = [StateLayer(2) if window == STATE else KVLayer(1, 2, 2, window) for window in twice]
    near = [KVLayer(1, 2, 2, newest=True) for layer in layers if isinstance(layer, KVLayer) and PACKED in windows]
    return (*layers, *near)


def fake_pool(program: Program, n_blocks: tuple[int, ...]) -> CachePool:
    """float32, so that positions are exact."""
    return CachePool(program.cache_layers, n_blocks, "float32")


def expected_logits(tokens: list[int], windows: tuple[int, ...] = (0,)) -> np.ndarray:
    """(n_vocab,) float32 for the last of ``tokens``."""
    seen = []
    for window in sorted(set(windows) - {STATE, PACKED}):
        start = max(0, len(tokens) - window) if window else 0
        seen.append([(p, tokens[p]) for p in range(start, len(tokens))])
    if STATE in windows:
        state = (0, 0)
        for token in tokens:
            state = _next_state(state, token)
        seen.append([state])
    return _logits(seen)


def _next_state(state: tuple[int, int], token: int) -> tuple[int, int]:
    """How many tokens there were, and a number made of them all that float32 holds exactly."""
    return state[0] + 1, (state[1] * 31 + token * 7 + 1) % 1_000_003


def expected_tokens(prompt: list[int], n: int, windows: tuple[int, ...] = (0,)) -> list[int]:
    """The greedy continuation."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(expected_logits(tokens, windows).argmax()))
    return tokens[len(prompt) :]


def _logits(seen: list[list[tuple[int, int]]]) -> np.ndarray:
    state = 0
    for group in seen:
        for position, token in group:
            state = (state * 1_000_003 + position * 8191 + token + 1) & 0xFFFFFFFF
    return np.random.RandomState(state).rand(N_VOCAB).astype(np.float32)


class FakeExecutor:
    """See the module. ``fail`` raises in the next step, ``poison`` finds NaN in each, ``poisonous`` is a token after
    which there is NaN, ``pause_s`` makes a step last."""

    draw = None

    def __init__(self, program: Program, pool: CachePool, max_tokens: int = 512) -> None:
        self.program = program
        self.pool = pool
        self.max_tokens = max_tokens
        self.batches: list[int] = []
        self.fail: BaseException | None = None
        self.poison = False
        self.poisonous: int | None = None  # a token that makes NaN of its sequence's logits
        self.pause_s = 0.0
        self.closed = 0
        self._inside = threading.Lock()
        kinds = [group.kind for group in pool.groups]
        self._newest = kinds.index("newest") if "newest" in kinds else None
        self._packed = [i for i, kind in enumerate(kinds) if self._newest is not None and kind in ("all", "window")]

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits of the tokens that want them."""
        assert self._inside.acquire(blocking=False), "two threads in one executor"
        try:
            assert not self.closed and 0 < len(batch) <= self.max_tokens
            time.sleep(self.pause_s)
            if self.fail is not None:
                error, self.fail = self.fail, None
                raise error
            self.batches.append(len(batch))
            self._store(batch)
            rows = [self._logits(self._read(batch, i)) for i in np.flatnonzero(batch.outputs)]
            logits = np.array(rows, np.float32).reshape(-1, self.program.n_vocab)
            if (self.poison and len(logits)) or self.poisonous in batch.tokens[batch.outputs]:
                raise NumericError("a logit is NaN")
            return logits
        finally:
            self._inside.release()

    def close(self) -> None:
        """Counts."""
        self.closed += 1

    def _block(self, batch: Batch, i: int, group: int, position: int) -> int:
        block = int(batch.tables[group][batch.sequences[i], position // BLOCK_TOKENS])
        assert block >= 0, f"position {position} of group {group} is in no block"
        return block

    def _store(self, batch: Batch) -> None:
        self._states = np.zeros((len(batch), 2), int)  # behind each token
        for group, kind in enumerate(self.pool.groups):
            if kind.kind == "state":
                self._go_on(batch, group)
                continue
            self._blot_out(batch, group)
            if group in self._packed:
                continue
            for i, (token, position) in enumerate(zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True)):
                block = self._block(batch, i, group, position)
                for keys, values in self._arrays(group):
                    keys[block, 0, :, position % BLOCK_TOKENS] = token + 1
                    values[block, 0, position % BLOCK_TOKENS] = position
        for group in self._packed:
            self._pack(batch, group)

    def _pack(self, batch: Batch, group: int) -> None:
        """The blocks that the step fills, as they are among the newest ones."""
        assert self._newest is not None
        source = self._arrays(self._newest)[-1]
        for i, position in enumerate(batch.positions.tolist()):
            if position % BLOCK_TOKENS == BLOCK_TOKENS - 1:
                filled, block = self._block(batch, i, self._newest, position), self._block(batch, i, group, position)
                for arrays in self._arrays(group):
                    for target, array in zip(arrays, source, strict=True):
                        target[block] = array[filled]

    def _go_on(self, batch: Batch, group: int) -> None:
        """Each sequence's state, from the slot that it reads to the one that it writes."""
        table = batch.tables[group]
        for sequence in dict.fromkeys(batch.sequences.tolist()):
            mine = np.flatnonzero(batch.sequences == sequence)
            read, written = table[sequence].tolist()
            assert written >= 0 and np.count_nonzero(table == written) == 1, "a slot that is written is read, too"
            state = (0, 0)
            for (slots,) in self._arrays(group) if read >= 0 else ():
                state = tuple(int(number) for number in slots[read])  # type: ignore[assignment]
            assert state[0] == batch.positions[mine[0]], "a state of another position"
            for i in mine:
                state = _next_state(state, int(batch.tokens[i]))
                self._states[i] = state
            for (slots,) in self._arrays(group):
                slots[written] = state

    def _arrays(self, group: int) -> list[list[np.ndarray]]:
        owners = zip(self.pool.layers, self.pool.arrays, strict=True)
        return [arrays for layer, arrays in owners if layer.group == self.pool.groups[group]]

    def _blot_out(self, batch: Batch, group: int) -> None:
        """Make void what the blocks of each sequence hold from its first position on, or the block that has it."""
        for sequence, i in zip(*np.unique(batch.sequences, return_index=True), strict=True):
            first = int(batch.positions[i])
            first -= first % BLOCK_TOKENS if group in self._packed else 0
            for b, block in enumerate(batch.tables[group][sequence].tolist()):
                if block >= 0 and (b + 1) * BLOCK_TOKENS > first:
                    for keys, _ in self._arrays(group):
                        keys[block, ..., max(0, first - b * BLOCK_TOKENS) :] = VOID

    def _logits(self, seen: list[list[tuple[int, int]]]) -> np.ndarray:
        return _logits(seen)

    def _place(self, group: int, position: int, query: int) -> int:
        """The group that has a position for the query: that of the newest, or its own, where it may be packed."""
        if self._newest is None or group not in self._packed:
            return group
        run = self.pool.groups[self._newest].window
        return self._newest if position < BLOCK_TOKENS or position // run == query // run else group

    def _read(self, batch: Batch, i: int) -> list[list[tuple[int, int]]]:
        """For each group the positions that the query sees, and their tokens."""
        end = int(batch.positions[i]) + 1
        seen = []
        for group, kind in enumerate(self.pool.groups):
            if kind.kind == "state":
                seen.append([tuple(self._states[i].tolist())])
                continue
            if kind.kind == "newest":
                continue
            start = max(0, end - kind.window) if kind.window else 0
            found = []
            for p in range(start, end):
                place = self._place(group, p, end - 1)
                (keys, values), block = self._arrays(place)[-1], self._block(batch, i, place, p)
                key = int(keys[block, 0, 1, p % BLOCK_TOKENS])
                assert key != VOID, f"position {p} of group {group} is that of a rejected token, or of none"
                found.append((int(values[block, 0, p % BLOCK_TOKENS, 0]), key - 1))
            seen.append(found)
        return seen
