"""What a caller asks of the engine, checked before it is put in line: each error says what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm import arguments
from edgellm.formats.errors import ContextFullError, ParameterError, UnsupportedError
from edgellm.kernels.program import Program


def check_tokens(tokens: Sequence[int], n_ctx: int, n_vocab: int) -> None:
    """There are some, of this vocabulary, and the context has room for them."""
    if not len(tokens):
        raise ParameterError("The prompt has 0 tokens. Give at least one.")
    if len(tokens) > n_ctx:
        raise ContextFullError(
            f"The prompt has {len(tokens)} tokens, the context has room for {n_ctx}. "
            "Shorten the prompt or load the model with a larger context.",
            n_tokens=len(tokens),
            n_ctx=n_ctx,
        )
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= n_vocab:
        raise ParameterError(
            f"Token id {low if low < 0 else high} is not in the vocabulary, which has ids 0 to {n_vocab - 1}. "
            "Use ids of this model's own tokenizer."
        )


def check_max_tokens(max_tokens: int | None) -> None:
    """It is None, a number of tokens, or -1 for no limit."""
    whole = isinstance(max_tokens, int | np.integer) and not isinstance(max_tokens, bool)
    if max_tokens is not None and not (whole and max_tokens >= -1):
        raise arguments.wrong("max_tokens", max_tokens, "a whole number from 0 on, or -1 for no limit")


def check_callables(cancel: Any, progress: Any, hook: Any) -> None:
    """A flag that can be asked, and functions, or None."""
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise arguments.wrong("cancel", cancel, "an object with is_set(), such as threading.Event")
    for name, given in (("progress", progress), ("hook", hook)):
        if given is not None:
            arguments.function(name, given)


def check_logits(program: Program) -> None:
    """The model gives a next token."""
    if program.is_encoder:
        raise UnsupportedError(
            f"A {program.architecture} model gives vectors of texts and no next token. Use embed, or take a model for "
            "chats.",
            code="EMBEDDINGS",
        )
