"""What a caller asks of the engine, checked before it is put in line: each error says what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
    if max_tokens is not None and not (isinstance(max_tokens, int | np.integer) and max_tokens >= -1):
        raise ParameterError(f"max_tokens is {max_tokens!r}. It must be a whole number from 0 on, or -1 for no limit.")


def check_callables(cancel: Any, progress: Any, hook: Any) -> None:
    """A flag that can be asked, and functions, or None."""
    for name, given in (("cancel", getattr(cancel, "is_set", None)), ("progress", progress), ("hook", hook)):
        if not callable(given) and (given is not None or (name == "cancel" and cancel is not None)):
            raise ParameterError(f"{name} is of the wrong type. See LLM.stream for what it must be.")


def check_logits(program: Program) -> None:
    """The model gives a next token."""
    if program.is_encoder:
        raise UnsupportedError(
            f"A {program.architecture} model gives vectors of texts and no next token. Use embed, or take a model for "
            "chats.",
            code="EMBEDDINGS",
        )
