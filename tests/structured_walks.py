"""Texts and grammars: whether a grammar takes a text, and random texts that it allows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from edgellm.structured import Grammar
from edgellm.tokenizer import Tokenizer


def takes(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether an answer may be ``text``, in the tokens that masks allow, and end there."""
    constraint, left = grammar.constraint(), text.encode()
    while left:
        if constraint.complete:
            return False
        allowed = constraint.allowed()
        flags = allowed.flags if allowed is not None else np.ones(tokenizer.n_vocab, bool)
        pieces = [(len(piece), token) for token in np.flatnonzero(flags) if (piece := tokenizer.token_bytes(token))]
        fitting = [(n, token) for n, token in pieces if left.startswith(tokenizer.token_bytes(token)) and n]
        fitting = [(n, token) for n, token in fitting if token not in tokenizer.mark_ids]
        if not fitting:
            return False
        n, token = max(fitting)
        constraint.accept(int(token))
        left = left[n:]
    return may_end(constraint, tokenizer)


def may_end(constraint: Any, tokenizer: Tokenizer) -> bool:
    """Whether the answer may be over."""
    if constraint.complete:
        return True
    allowed = constraint.allowed()
    ends = [allowed is None or bool(allowed.flags[token]) for token in tokenizer.eog_ids]
    assert len(set(ends)) == 1, "all tokens that end an answer are alike"
    return ends[0]


def walk(grammar: Grammar, tokenizer: Tokenizer, rng: random.Random, n: int = 300) -> list[int] | None:
    """Random tokens of an answer, drawn to its end; None where it did not end within n."""
    constraint, tokens = grammar.constraint(), []
    closing = [tokenizer.token_id(text) for text in ('"', "}", "]", '"}', '"]')]
    while not constraint.complete:
        allowed = constraint.allowed()
        assert allowed is not None
        ids = np.flatnonzero(allowed.flags)
        if allowed.flags[list(tokenizer.eog_ids)].all() and rng.random() < 0.5:
            break
        ends = [token for token in closing if token is not None and allowed.flags[token]]
        late = len(tokens) > 60 or rng.random() < 0.5
        token = rng.choice(ends) if ends and late else int(ids[rng.randrange(len(ids))])
        if token in tokenizer.eog_ids:
            break
        constraint.accept(token)
        tokens.append(token)
        if len(tokens) == n:
            return None
    return tokens
