"""How likely a text is to the model: log-probabilities token by token, of a continuation, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgellm.formats.errors import ParameterError
from edgellm.generation import TokenLogprob

if TYPE_CHECKING:
    from edgellm.engine import Engine
    from edgellm.tokenizer import Tokenizer


@dataclass(frozen=True)
class ContinuationScore:
    """Sum of the natural log-probabilities of ``n_tokens``, and whether greedy decoding would have written them."""

    logprob: float
    greedy: bool
    n_tokens: int


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, n_vocab) float32 log-probabilities; the sum is taken in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def following_logprobs(engine: Engine, ids: Sequence[int], top: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token but the first: its log-probability (n-1,), and the likeliest there (ids and values, (n-1, top)).

    ``top`` is at least 1 in what comes back.
    """
    top = max(1, min(top, engine.executor.program.n_vocab))

    def reduce(start: int, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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

    parts = list(engine.score(ids, reduce))
    chosen, best, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return chosen, best, values


def token_logprobs(engine: Engine, tokenizer: Tokenizer, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """One row for each token; the first has nothing before it and no log-probability."""
    if not ids:
        return []
    chosen, best, values = following_logprobs(engine, ids, top)
    rows = [TokenLogprob(ids[0], tokenizer.token_bytes(ids[0]), None)]
    for token, logprob, others, of_others in zip(ids[1:], chosen.tolist(), best.tolist(), values.tolist(), strict=True):
        likeliest = zip(others[:top], of_others[:top], strict=True)
        alternatives = tuple(TokenLogprob(t, tokenizer.token_bytes(t), value) for t, value in likeliest)
        rows.append(TokenLogprob(token, tokenizer.token_bytes(token), logprob, alternatives))
    return rows


def score_continuation(engine: Engine, prompt: Sequence[int], whole: Sequence[int]) -> ContinuationScore:
    """The part of ``whole`` after ``prompt``, whose ids are taken to begin it."""
    n = len(whole) - len(prompt)
    if n < 1 or not prompt:
        raise ParameterError(
            f"The prompt has {len(prompt)} tokens, prompt and continuation together {len(whole)}. Both must have some."
        )
    chosen, best, _ = following_logprobs(engine, whole)
    greedy = bool((best[-n:, 0] == np.asarray(whole[-n:])).all())
    return ContinuationScore(float(chosen[-n:].sum(dtype=np.float64)), greedy, n)


def perplexity(engine: Engine, tokenizer: Tokenizer, ids: Sequence[int], n_ctx: int) -> float:
    """llama-perplexity's figure: chunks of ``n_ctx`` tokens, the first replaced by BOS, the second half scored."""
    n_chunks = len(ids) // n_ctx
    if n_chunks < 1 or n_ctx < 4:
        raise ParameterError(f"The text has {len(ids)} tokens. It must have at least n_ctx, which is {n_ctx}.")
    prefix = list(tokenizer.special.prefix[:1])
    total, count = 0.0, 0
    for chunk in range(n_chunks):
        tokens = list(ids[chunk * n_ctx : (chunk + 1) * n_ctx])
        tokens[: len(prefix)] = prefix
        scored = following_logprobs(engine, tokens)[0][n_ctx // 2 :]
        total -= float(scored.sum(dtype=np.float64))
        count += len(scored)
    return math.exp(total / count)
