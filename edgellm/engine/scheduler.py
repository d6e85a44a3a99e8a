"""Which tokens share the next step: all answers that wait for one token, and as much of the prompts as there is room.

The weights are read once for all of them, so sixteen answers together cost little more than one. A prompt that comes
in while others answer is taken in small pieces, for each piece delays all of them. Tokens get the same bits whoever
they share a step with, so nobody's answer depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from edgellm.engine import cache
from edgellm.engine.requests import Request
from edgellm.kernels.kv import BLOCK_TOKENS
from edgellm.kernels.program import Batch

RUN_S = 0.025  # of decoding without Python: so long a newcomer waits, or a caller who gives up
PROMPT_TOKENS_BESIDE = 128  # of a prompt in a step, while others wait for their next token


class Share(NamedTuple):
    """The part of a step that is one request's: its next tokens, and for how many of the last ones it wants logits."""

    request: Request
    sequence: cache.Sequence
    tokens: Sequence[int]
    n_outputs: int


def rooms(requests: Iterable[Request], max_tokens: int) -> Iterator[tuple[Request, int]]:
    """The requests that take part in a step of at most ``max_tokens``, and how many tokens each may bring.

    Those that miss one token come first. A prompt that goes on exactly as another one in this step waits: in the next
    one it finds the other's blocks.
    """
    requests = list(requests)
    answering = [r for r in requests if r.n_missing == 1][:max_tokens]
    for request in answering:
        yield request, 1
    room = max_tokens - len(answering)
    if answering:
        room = min(room, PROMPT_TOKENS_BESIDE)
    taken: set[tuple[int, ...]] = set()
    for request in requests:
        if request.n_missing > 1 and room > 0:
            known = len(request.tokens) - request.n_missing
            goes_on = tuple(request.tokens[: known + BLOCK_TOKENS])
            if request.shared and len(goes_on) == known + BLOCK_TOKENS and goes_on in taken:
                continue
            taken.add(goes_on)
            yield request, room
            room -= min(room, request.n_missing)


def n_ahead(share: Share, step_s: float, room: int) -> int:
    """Steps that a lone answer may take without Python between them, 0 where it must take each by itself.

    step_s   what its last step took
    room     steps that its caller may fall behind
    """
    if len(share.tokens) > 1 or not share.n_outputs:
        return 0
    return min(int(RUN_S / step_s), room, share.request.n_wanted)


def make_batch(shares: Sequence[Share]) -> Batch:
    """All shares as one batch, each a sequence of its own."""
    if len(shares) == 1:  # every core waits for the next token: few calls into numpy
        return _batch_of_one(shares[0])
    counts = [len(share.tokens) for share in shares]
    outputs = np.zeros(sum(counts), bool)
    for end, share in zip(np.cumsum(counts), shares, strict=True):
        outputs[end - share.n_outputs : end] = True
    starts = [share.sequence.length for share in shares]
    return Batch(
        tokens=np.concatenate([np.array(share.tokens, np.int32) for share in shares]),
        positions=np.concatenate([np.arange(p, p + n, dtype=np.int32) for p, n in zip(starts, counts, strict=True)]),
        sequences=np.repeat(np.arange(len(shares), dtype=np.int32), counts),
        outputs=outputs,
        tables=tuple(np.stack(tables) for tables in zip(*(share.sequence.tables for share in shares), strict=True)),
    )


def _batch_of_one(share: Share) -> Batch:
    n, start = len(share.tokens), share.sequence.length
    outputs = np.zeros(n, bool)
    outputs[n - share.n_outputs :] = True
    positions = np.arange(start, start + n, dtype=np.int32)
    tables = tuple(table[None] for table in share.sequence.tables)
    return Batch(np.array(share.tokens, np.int32), positions, np.zeros(n, np.int32), outputs, tables)
