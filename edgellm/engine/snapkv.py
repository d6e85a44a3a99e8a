"""Fewer keys for an answer: at the end of its prompt a sequence keeps what the prompt's last tokens look at.

The choice is made at one place that the prompt's length alone decides: at the last multiple of 32 before its last
token, by the 32 tokens before that. They are one step of their own, however the rest is cut and whoever else is there;
all tokens up to that place are computed with every key, all behind it without those that were dropped. So a token has
the same bits in any batch and any chunking, and again after its blocks were taken.

What was computed up to the place enters the prefix tree and can be shared. The sequence itself leaves the tree then:
its new blocks are nobody else's, and what comes of them is found by nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgellm.engine.cache import KVCache, Sequence
from edgellm.formats.errors import UnsupportedError
from edgellm.kernels import snapkv
from edgellm.kernels.cache_types import PACKED
from edgellm.kernels.kv import BLOCK_TOKENS, KVLayer
from edgellm.kernels.ops import AddRows, Attention
from edgellm.kernels.program import Executor, Hook, Op, Program

WINDOW = snapkv.WINDOW


class SnapKV:
    """Keeps ``n_tokens`` positions of each head, the window's among them. UnsupportedError where that cannot be."""

    def __init__(self, program: Program, n_tokens: int, max_tokens: int) -> None:
        self.n_far = n_tokens - WINDOW
        attends = [op for op in program.ops if isinstance(op, Attention)]
        layers = [layer for layer in program.cache_layers if isinstance(layer, KVLayer)]
        window = max(layer.window for layer in layers) if layers else 0
        why = ""
        if all(program.kv_layer(op.layer).window for op in attends):
            why = "has no layer that reads a whole context"
        elif any(layer.latent for layer in layers):
            why = "has keys that are values, too"
        elif any(layer.type_k in PACKED for layer in layers):
            why = "has keys that are packed block by block"
        elif any(isinstance(op, AddRows) and op.of == "positions" for op in program.ops):
            why = "adds a row for every position"
        elif window > n_tokens:
            why = f"has layers with a window of {window} tokens, of which snapkv:{n_tokens} would keep fewer"
        elif max_tokens < WINDOW:
            why = f"is run in steps of {max_tokens} tokens, and the choice is made by {WINDOW} in one"
        if why:
            raise UnsupportedError(f"{program.architecture} {why}: leave kv_keep=snapkv out.", code="KV_KEEP")

    def end(self, n_prompt: int) -> int:
        """Where the choice is made in a prompt of so many tokens; 0 where it keeps all there is."""
        end = (n_prompt - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        return end if end > self.n_far + WINDOW else 0

    def keep(self, cache: KVCache, sequence: Sequence, watch: Watch, make_room: Callable[[], bool]) -> None:
        """Make the choice, once the window is committed."""
        n_blocks, gathered = sequence.length // BLOCK_TOKENS, dict[int, list[np.ndarray]]()
        for index, found in watch.votes.items():
            layer, group = cache.pool.layers[index], cache.pool.groups.index(cache.pool.layers[index].group)
            assert isinstance(layer, KVLayer), "it has keys"
            blocks, positions = sequence.tables[group][:n_blocks], snapkv.likeliest(found, self.n_far)
            gathered[index] = snapkv.gathered(layer, cache.pool.arrays[index], blocks, positions)
        targets = cache.shrink(sequence, self.n_far, make_room)
        for index, arrays in gathered.items():
            for kept, new in zip(cache.pool.arrays[index], arrays, strict=True):
                kept[targets] = new


class Watch:
    """A hook that sees the queries of the window in a step, layer by layer: its votes. It calls ``hook`` as well."""

    def __init__(self, executor: Executor, sequence: Sequence, hook: Hook | None) -> None:
        self.votes: dict[int, np.ndarray] = {}
        self._executor, self._sequence, self._hook = executor, sequence, hook

    def __call__(self, index: int, op: Op, read: Callable[[str], np.ndarray]) -> Any:
        if isinstance(op, Attention) and not (program := self._executor.program).kv_layer(op.layer).window:
            pool, end = self._executor.pool, self._sequence.length + WINDOW
            blocks = self._sequence.tables[program.table_of(op.layer)][: end // BLOCK_TOKENS]
            found = snapkv.votes(program, pool, op, read(op.q), blocks)
            self.votes[op.layer] = self.votes[op.layer] + found if op.layer in self.votes else found
        if self._hook is not None:
            self._hook(index, op, read)
