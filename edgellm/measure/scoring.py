"""How likely a text is to the model, token by token, and how likely a continuation is after a context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgellm.formats.errors import ParameterError
from edgellm.generation import TokenLogprob
from edgellm.measure.perplexity import ROWS, exp, log_softmax

if TYPE_CHECKING:
    from edgellm.adapters.scales import AdapterScales
    from edgellm.engine.engine import Engine
    from edgellm.engine.requests import CancelFlag
    from edgellm.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextScore:
    """Tokens as the model sees them coming, each after those before it.

    tokens     (n,) int32 ids
    logprobs   (n,) float32 natural log-probabilities; NaN for a first token with nothing before it
    best       (n,) int32, the likeliest id in that place; -1 for a first token with nothing before it
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    best: np.ndarray

    @property
    def logprob(self) -> float:
        """The sum: ln p of the whole."""
        return float(np.nansum(self.logprobs, dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written it."""
        foretold = self.best >= 0
        return bool((self.best[foretold] == self.tokens[foretold]).all())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of the tokens that have one; NaN when none has."""
        known = self.logprobs[~np.isnan(self.logprobs)]
        return exp(-float(known.mean(dtype=np.float64))) if len(known) else math.nan


def following_logprobs(
    engine: Engine,
    ids: Sequence[int],
    top: int = 0,
    cancel: CancelFlag | None = None,
    last: Callable[[np.ndarray], None] | None = None,
    adapters: AdapterScales | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token but the first: its log-probability (n-1,), and the likeliest there (ids and values, (n-1, top)).

    ``top`` is at least 1 in what comes back. ``last`` is called on the engine's thread with the logits (n_vocab,) of
    what would follow the text; they are valid only inside it.
    """
    top = max(1, min(top, engine.executor.program.n_vocab))

    def reduce_rows(start: int, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        targets = np.asarray(ids[start + 1 : start + 1 + len(logits)], np.int64)
        table = log_softmax(logits[: len(targets)])
        best = np.argpartition(table, -top, axis=-1)[:, -top:] if top > 1 else table.argmax(axis=-1)[:, None]
        values = np.take_along_axis(table, best, -1)
        order = np.lexsort((best, -values))
        return (
            np.take_along_axis(table, targets[:, None], -1)[:, 0],
            np.take_along_axis(best, order, -1),
            np.take_along_axis(values, order, -1),
        )

    def reduce(start: int, logits: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = [reduce_rows(start + i, logits[i : i + ROWS]) for i in range(0, len(logits), ROWS)]
        if last is not None and start + len(logits) == len(ids):
            last(logits[-1])
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    scored = engine.score(ids, reduce, cancel, adapters)
    chosen, best, values = (np.concatenate(column) for column in zip(*scored, strict=True))
    return chosen, best, values


def token_logprobs(
    engine: Engine,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    top: int,
    cancel: CancelFlag | None = None,
    last: Callable[[np.ndarray], None] | None = None,
    adapters: AdapterScales | None = None,
) -> list[TokenLogprob]:
    """One row for each token; the first has nothing before it and no log-probability. ``last`` as above."""
    if not ids:
        return []
    chosen, best, values = following_logprobs(engine, ids, top, cancel, last, adapters)
    rows = [TokenLogprob(ids[0], tokenizer.token_bytes(ids[0]), None)]
    for token, logprob, others, of_others in zip(ids[1:], chosen.tolist(), best.tolist(), values.tolist(), strict=True):
        likeliest = zip(others[:top], of_others[:top], strict=True)
        alternatives = tuple(TokenLogprob(t, tokenizer.token_bytes(t), value) for t, value in likeliest)
        rows.append(TokenLogprob(token, tokenizer.token_bytes(token), logprob, alternatives))
    return rows


def score_ids(engine: Engine, ids: Sequence[int]) -> TextScore:
    """Every token of a text; the first has nothing before it."""
    if len(ids) == 0:
        return TextScore(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    chosen, best, _ = following_logprobs(engine, ids)
    return TextScore(
        np.asarray(ids, np.int32),
        np.concatenate([[np.nan], chosen]).astype(np.float32),
        np.concatenate([[-1], best[:, 0]]).astype(np.int32),
    )


def score_continuation(engine: Engine, context: Sequence[int], whole: Sequence[int]) -> TextScore:
    """The part of ``whole`` after ``context``, whose ids are taken to begin it."""
    n = len(whole) - len(context)
    if n < 1 or not context:
        raise ParameterError(
            f"The context has {len(context)} tokens, context and continuation together {len(whole)}. Both must have "
            "some."
        )
    score = score_ids(engine, whole)
    return TextScore(score.tokens[-n:], score.logprobs[-n:], score.best[-n:])
