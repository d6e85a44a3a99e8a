"""The tokens of a checkpoint's vocabulary on their way into GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgellm.formats.errors import FormatError
from edgellm.tokenizer.vocabulary import TokenType

MAX_TOKENIZER_NBYTES = 1 << 28
PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0
SCORED_KINDS = ("llama", "t5")


@dataclass
class Tokens:
    """All ids of a vocabulary. ``scores`` are None where no piece has one, ``merges`` empty where none are kept."""

    kind: str
    texts: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, kind: str, n: int) -> Tokens:
        """n unused ids."""
        scores = [PAD_SCORE] * n if kind in SCORED_KINDS else None
        return cls(kind, [f"[PAD{i}]" for i in range(n)], [int(TokenType.UNUSED)] * n, scores)

    def put(self, token_id: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Say what an id is."""
        self.texts[token_id], self.types[token_id] = text, int(kind)
        if self.scores is not None:
            self.scores[token_id] = score


def below(n_vocab: int) -> str:
    """What ids are expected to be."""
    return f"ids below {n_vocab:,}, the rows of the embedding"


def invalid(found: str, expected: str) -> FormatError:
    """The error of tokenizer files that do not fit."""
    return FormatError(
        f"The tokenizer of the checkpoint is not sound: found {found}; expected {expected}. Download its files again.",
        code="VOCAB_INVALID",
    )


def vocab_of(found: Any, n_vocab: int) -> dict[str, int]:
    """text -> id, every id in range and there once."""
    if not isinstance(found, dict) or not all(type(i) is int for i in found.values()):
        raise invalid("a vocabulary that is no object of ids", "a whole number for each token")
    if found and not 0 <= min(found.values()) <= max(found.values()) < n_vocab:
        raise invalid(f"the token id {max(found.values()):,}", below(n_vocab))
    if len(set(found.values())) != len(found):
        raise invalid("two tokens with one id", "an id for each token")
    return found
