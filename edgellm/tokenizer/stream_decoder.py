"""Text from token ids as they come, one at a time, never half a character."""

import codecs
from collections.abc import Collection
from typing import Protocol


class TokenBytes(Protocol):
    """What the decoder needs of a tokenizer."""

    strip_first_space: bool

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for."""

    def is_control(self, token_id: int) -> bool:
        """Whether a token is a mark that is not text."""


class StreamDecoder:
    """Holds the bytes of an unfinished character and whether the first space is still to drop.

    For any ids: ``"".join(map(add, ids)) + flush()`` equals ``Tokenizer.decode(ids)``. Bytes that are not UTF-8 become
    U+FFFD, once for each broken sequence, as soon as it is certain that they are.
    """

    def __init__(self, tokenizer: TokenBytes, *, special: bool = False, shown: Collection[int] = ()) -> None:
        """special: whether control tokens are shown as their text; ``shown`` are some that are in any case."""
        self._tokenizer = tokenizer
        self._special = special
        self._shown = shown
        self._start()

    def _start(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = self._tokenizer.strip_first_space

    def add(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished.

        Raises ParameterError for an id outside the vocabulary.
        """
        piece = self._tokenizer.token_bytes(token_id)
        if not self._special and self._tokenizer.is_control(token_id) and token_id not in self._shown:
            return ""
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What was held back, U+FFFD for an unfinished character; the decoder starts anew."""
        text = self._utf8.decode(b"", final=True)
        self._start()
        return text
